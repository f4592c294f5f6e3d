"""Speed and memory of a mixture at half and a quarter of its experts against the whole one.

    python benchmarks/experts.py [--device cuda] [--out benchmarks/results/experts.json]

Throughput is reported at equal batch and, as memory is what experts cost, at equal memory: the bytes that the removed
experts took go to a larger batch, with keys and values of a whole context counted for each row.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import salience as sal
from salience.core.evidence import about
from salience.core.part import parameter_bytes

SIZES = {
    "cpu": {
        "width": 256,
        "inner": 256,
        "layers": 4,
        "experts": 32,
        "top_k": 4,
        "batch": 8,
        "prompt": 128,
        "new": 16,
    },
    "cuda": {
        "width": 1024,
        "inner": 768,
        "layers": 12,
        "experts": 64,
        "top_k": 8,
        "batch": 16,
        "prompt": 512,
        "new": 64,
    },
}
REPEATS = 3


def model_of(size: dict[str, int], device: str) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=size["width"],
        intermediate_size=size["inner"],
        moe_intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["width"] // 64,
        num_key_value_heads=max(size["width"] // 256, 1),
        head_dim=64,
        num_experts=size["experts"],
        num_experts_per_tok=size["top_k"],
        norm_topk_prob=True,
        max_position_embeddings=2048,
        pad_token_id=0,
    )
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Qwen3MoeForCausalLM(config).to(device, dtype).eval()


def timed(model: Qwen3MoeForCausalLM, size: dict[str, int], batch: int, device: str) -> dict[str, float]:
    ids = torch.randint(1, 4096, (batch, size["prompt"]), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    mask = torch.ones_like(ids)
    found: dict[str, list[float]] = {"prefill": [], "whole": []}
    for repeat in range(REPEATS + 1):
        for name, new in (("prefill", 1), ("whole", size["new"])):
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            model.generate(ids, attention_mask=mask, **settings)
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first is to warm up
                found[name].append(time.perf_counter() - started)
    prefill, whole = median(found["prefill"]), median(found["whole"])
    return {
        "batch": batch,
        "prefill tokens/s": batch * size["prompt"] / prefill,
        "decode tokens/s": batch * (size["new"] - 1) / max(whole - prefill, 1e-9),
        "tokens/s": batch * (size["prompt"] + size["new"]) / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=SIZES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/experts.json"))
    options = parser.parse_args()
    device, size = options.device, SIZES[options.device]
    demonstrations = torch.randint(1, 4096, (4, size["prompt"]), generator=torch.Generator().manual_seed(2))
    rows: dict[str, dict[str, object]] = {}
    whole_bytes = 0
    for share in (1.0, 0.5, 0.25):
        model = model_of(size, device)
        started = time.perf_counter()
        handle = sal.focus(model, sal.EasyEP(keep=share), data={"input_ids": demonstrations}).finish()
        seconds = time.perf_counter() - started
        taken = parameter_bytes(model)
        whole_bytes = whole_bytes or taken
        config = model.config
        row = 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers * taken_size(model)
        row *= config.max_position_embeddings
        more = size["batch"] + (whole_bytes - taken) // row
        equal = timed(model, size, size["batch"], device)
        memory = timed(model, size, more, device) if more > size["batch"] else equal
        rows[f"{handle.spent['easy-ep']['experts']} of {size['experts']}"] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": taken,
            "seconds to score and cut": seconds,
            "at equal batch": equal,
            "at equal memory": memory,
        }
        print(json.dumps(rows, indent=1))
    command = f"python benchmarks/experts.py --device {device}"
    found = {"command": command, "about": about(device), "size": size, "rows": rows}
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**known, device: found}, indent=1) + "\n", encoding="utf-8")


def taken_size(model: Qwen3MoeForCausalLM) -> int:
    """Bytes of a number."""
    return next(model.parameters()).element_size()


if __name__ == "__main__":
    main()
