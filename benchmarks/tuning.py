"""Step time and exact memory of the ways to tune one model, measured side by side in one run.

A Llama of 8 layers, width 256 and a vocabulary of 16,000, so that embedding and head are most of the parameters, as
they are not at 7B but are at small sizes and large vocabularies. The arms take turns, step by step, so that a drift
of the machine's speed meets all of them alike; ratios are medians of paired steps.

    python benchmarks/tuning.py [--steps 60] [--device cpu] [--out FILE]
"""

import argparse
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import salience as sal
from salience.core.evidence import about, saved_for_backward
from salience.core.method import Method
from salience.core.part import Part, gradient_bytes, optimizer_bytes, parameter_bytes


@dataclass(frozen=True, kw_only=True)
class Nothing(Method):
    """A method that does nothing: what is left is the cost of being attached."""

    unit: ClassVar[str] = "step"

    def attach_trainer(self, site, record):
        return Part()


@dataclass(frozen=True, kw_only=True)
class Ones(Method):
    """Weights every token by one, so that the weighted loss is computed instead of the model's own."""

    unit: ClassVar[str] = "token"

    def attach_trainer(self, site, record):
        part = Part()
        part.weights_tokens = True
        return part


ARMS = {
    "LoRA": (True, None),
    "LoRA + no-op": (True, Nothing()),
    "LoRA + weights of one": (True, Ones()),
    "IST (2 of 8)": (True, sal.IST(active_layers=2)),
    "SsToken": (True, sal.SsToken(keep=0.6)),
    "DEFT": (True, sal.DEFT()),
    "LISA (2 of 8)": (False, sal.LISA(active_layers=2, interval=5)),
    "LISA, embeddings sampled": (False, sal.LISA(active_layers=2, interval=5, sample_embeddings=True)),
    "LISA, state kept": (False, sal.LISA(active_layers=2, interval=5, state="keep")),
    "full": (False, None),
}


class Arm:
    def __init__(self, lora, method, device):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16_000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=8,
            num_attention_heads=4,
        )
        model = LlamaForCausalLM(config).to(device)
        if lora:
            model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.model = model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)
        random = torch.Generator().manual_seed(1)
        ids = torch.randint(3, 16_000, (8, 4, 128), generator=random)
        self.batches = [self._batch(one, device) for one in ids]
        self.loop = None
        if method is not None:
            self.loop = sal.loop(model, method, optimizer=self.optimizer, data=self.batches)
            self.loop.begin()
        self.times, self.gradients, self.held, self.saved = [], 0, 0, []

    @staticmethod
    def _batch(ids, device):
        labels = ids.clone()
        labels[:, :32] = -100
        return {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones_like(ids).to(device),
            "labels": labels.to(device),
        }

    def step(self, index):
        batch = self.batches[index % len(self.batches)]
        started = time.perf_counter()
        if self.loop is not None:
            self.loop.start_step([batch])
        loss = self.loop.loss(batch) if self.loop is not None else self.model(**batch).loss
        loss.backward()
        if self.loop is not None:
            self.loop.finish_step()
        self.gradients = max(self.gradients, gradient_bytes(self.model))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - started)
        self.held = max(self.held, optimizer_bytes(self.optimizer))

    def count_saved(self, index):
        batch = self.batches[index % len(self.batches)]
        if self.loop is not None:
            self.loop.start_step([batch])
        with saved_for_backward() as kept:
            loss = self.loop.loss(batch) if self.loop is not None else self.model(**batch).loss
        loss.backward()
        if self.loop is not None:
            self.loop.finish_step()
        self.optimizer.zero_grad()
        self.saved.append(kept["bytes"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    arms = {name: Arm(lora, method, args.device) for name, (lora, method) in ARMS.items()}
    for index in range(args.steps + 3):
        for arm in arms.values():
            arm.step(index)
    for index in range(10):
        for arm in arms.values():
            arm.count_saved(index)
    rows = {}
    for name, arm in arms.items():
        base = arms["LoRA"]
        ratios = [mine / theirs for mine, theirs in zip(arm.times[3:], base.times[3:])]
        rows[name] = {
            "step ms (median)": 1e3 * statistics.median(arm.times[3:]),
            "step / LoRA's": statistics.median(ratios),
            "trainable parameters": sum(p.numel() for g in arm.optimizer.param_groups for p in g["params"]),
            "parameter bytes": parameter_bytes(arm.model),
            "gradient bytes": arm.gradients,
            "optimizer bytes": arm.held,
            "saved for backward": int(statistics.fmean(arm.saved)),
        }
        shown = "  ".join(f"{key} {value:,.3f}".rstrip("0").rstrip(".") for key, value in rows[name].items())
        print(f"{name}: {shown}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        command = f"python benchmarks/tuning.py --steps {args.steps} --device {args.device}"
        args.out.write_text(
            json.dumps({"command": command, "about": about(args.device), "arms": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
