"""What LoRAPrune's score costs in training memory beside that with the true gradient of the weights.

A few optimizer steps of the same pruning run on the same model, for `metric="lora"` and `metric="grad"`, each in a
process of its own: bytes of gradients before the optimizer's step, bytes that torch held at the most (on a GPU its
allocator's peak; on a CPU the tensors that are alive, counted at every operation).

    python benchmarks/pruning_memory.py                       # a 12-layer Llama of width 512
    python benchmarks/pruning_memory.py --width 2048 --layers 16 --inner 5632 --device cuda
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from salience.core.evidence import about

RESULT = Path(__file__).parent / "results" / "pruning-memory.json"
STEPS = 3


class Alive(TorchDispatchMode):
    """Counts the bytes of storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return result


def model_of(settings: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(settings.device, getattr(torch, settings.dtype))
    if settings.checkpointing:
        model.gradient_checkpointing_enable()
    return model


def train(loop: Any, batch: dict[str, torch.Tensor]) -> None:
    loop.begin()
    for _ in range(STEPS):
        loop.start_step([batch])
        loop.loss(batch).backward()
        loop.finish_step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    loop.end()


def measure(settings: argparse.Namespace) -> dict[str, float]:
    """One arm, in this process."""
    from peft import LoraConfig, get_peft_model

    import salience as sal

    model = get_peft_model(model_of(settings), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    ids = torch.randint(settings.vocabulary, (settings.rows, settings.length), device=settings.device)
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    method = sal.LoRAPrune(metric=settings.metric, steps=STEPS, prune_every=2, units="both")
    loop = sal.loop(model, method, optimizer=optimizer)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        train(loop, batch)
        most = torch.cuda.max_memory_allocated()
    else:
        with Alive() as alive:
            for parameter in model.parameters():
                alive.add(parameter.data)
            train(loop, batch)
        most = alive.most
    return {
        "gradient bytes": loop.parts[0].spent()["gradient bytes"],
        "weight bytes": weights,
        "most bytes": most,
        "most bytes beyond the weights": most - weights,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("layers", 12), ("width", 512), ("inner", 1408), ("vocabulary", 4096), ("rows", 1), ("length", 64),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--checkpointing", action="store_true", help="gradient checkpointing, as large models need"
    )
    parser.add_argument("--metric", help="measure one arm here and print it")
    parser.add_argument("--out", type=Path, default=RESULT)
    settings = parser.parse_args()
    if settings.metric:
        print(json.dumps(measure(settings)))
        return
    arms = {}
    for metric in ("lora", "grad"):
        command = [sys.executable, __file__, *sys.argv[1:], "--metric", metric]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        arms[metric] = json.loads(done.stdout.splitlines()[-1])
        print(metric, arms[metric])
    keys = ("gradient bytes", "most bytes", "most bytes beyond the weights")
    ratios = {key: round(arms["lora"][key] / arms["grad"][key], 4) for key in keys}
    print("lora / grad", ratios)
    setting = {name: value for name, value in vars(settings).items() if name not in ("metric", "out")}
    result = {"setting": setting, "arms": arms, "lora / grad": ratios, "about": about(settings.device)}
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    settings.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
