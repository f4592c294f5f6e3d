"""Prefill time and exact KV bytes of methods on image tokens, against the unpruned model and against FastV.

A LLaVA whose decoder has random weights (12 layers of width 512 by default), one prompt with 576 or 2,880 image
tokens. The arms take turns, so that a drift of the machine meets all alike; ratios are medians of paired runs.
All arms at one keep share have the same mean number of image tokens over the layers; the cost of scoring is what a
method takes beyond the same schedule with random choices. `--train` measures training steps instead.

    python benchmarks/vision.py [--tokens 576 2880] [--keep 0.5 0.25 0.1] [--rounds 5] [--train] [--device cpu]
        [--dtype float32] [--size small|7b] [--out FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import salience as sal
from salience.core.evidence import about

SIZES = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
    },
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
TOWERS = {
    "small": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    },
    "7b": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}
PER_IMAGE, TEXT, IMAGE_ID = 576, 48, 999


def model_of(size, device, dtype):
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=1000, max_position_embeddings=8192, **SIZES[size])
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=512, **TOWERS[size])
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_ID)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.to(dtype).eval()


def prompt_of(tokens, device, dtype):
    images = tokens // PER_IMAGE
    ids = torch.randint(3, 900, (1, TEXT + tokens))
    ids[0, 8 : 8 + tokens] = IMAGE_ID
    pixels = torch.randn(images, 3, 336, 336).to(device, dtype)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels,
    }


def staged(keep, depth):
    """Layers and ratios of three stages that fall by one factor, with a mean of `keep` over all layers."""
    layers = tuple(max(i + 1, depth // part) for i, part in enumerate((12, 6, 3)))
    spans = [layers[0], layers[1] - layers[0], layers[2] - layers[1], depth - layers[2]]
    low, high = 0.0, 1.0
    for _ in range(60):
        factor = (low + high) / 2
        mean = sum(span * factor**i for i, span in enumerate(spans)) / depth
        low, high = (factor, high) if mean < keep else (low, factor)
    return layers, tuple(factor ** (i + 1) for i in range(3))


def arms_of(keep, depth, tokens):
    """Arms with the same mean number of image tokens over all layers."""
    layer = 2 if keep * depth > 2 else 1
    single = (keep * depth - layer) / (depth - layer)
    layers, ratios = staged(keep, depth)
    images = tokens // PER_IMAGE
    return {
        "unpruned": None,
        "FastV": sal.FastV(keep=single, layer=layer),
        "random, once": sal.RandomTokens(ratios=(single,), layers=(layer,)),
        "PyramidDrop": sal.PyramidDrop(ratios=ratios, layers=layers),
        "TransPrune": sal.TransPrune(prune=layers, ratios=ratios),
        "random, in stages": sal.RandomTokens(ratios=ratios, layers=layers),
        "VisionDrop": sal.VisionDrop(tokens=int(keep * PER_IMAGE) * images),
        "VFlowOpt": sal.VFlowOpt(ratios=(keep, 1.0, 1.0), layers=(depth // 3, 2 * depth // 3), t=1.0),
    }


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def prefill(model, batch, device):
    sync(device)
    started = time.perf_counter()
    output = model(**batch, use_cache=True, logits_to_keep=1)
    sync(device)
    seconds = time.perf_counter() - started
    kv = sum(layer.keys.nbytes + layer.values.nbytes for layer in output.cache.layers)
    return seconds, kv


def train_step(model, batch, device):
    labels = batch["input_ids"].clone()
    labels[:, : -TEXT // 2] = -100
    sync(device)
    started = time.perf_counter()
    model(**batch, labels=labels).loss.backward()
    model.zero_grad(set_to_none=True)
    sync(device)
    return time.perf_counter() - started, 0


def measure(model, batch, arms, rounds, device, step):
    times = {name: [] for name in arms}
    kv, layers = {}, {}
    for turn in range(rounds + 1):
        for name, method in arms.items():
            if method is None:
                seconds, kv[name] = step(model, batch, device)
            else:
                with sal.focus(model, method) as handle:
                    seconds, kv[name] = step(model, batch, device)
                    layers[name] = next(iter(handle.spent.values()))["share of image token-layers"]
            if turn:  # the first warms up
                times[name].append(seconds)
    rows = {}
    for name in arms:
        ratios = [a / b for a, b in zip(times[name], times["unpruned"], strict=True)]
        rows[name] = {
            "share of image token-layers": layers.get(name, 1.0),
            "seconds": statistics.median(times[name]),
            "time ratio": statistics.median(ratios),
            "KV bytes": kv[name],
            "KV ratio": kv[name] / kv["unpruned"] if kv["unpruned"] else None,
        }
    # against FastV at the same share
    for row in rows.values():
        if "FastV" in rows:
            row["time against FastV"] = row["seconds"] / rows["FastV"]["seconds"]
    for name, schedule in (
        ("FastV", "random, once"),
        ("PyramidDrop", "random, in stages"),
        ("TransPrune", "random, in stages"),
    ):
        if name in rows and schedule in rows:
            extra = [
                (a - b) / c for a, b, c in zip(times[name], times[schedule], times["unpruned"], strict=True)
            ]
            rows[name]["scoring, share of unpruned prefill"] = statistics.median(extra)
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = model_of(args.size, args.device, dtype)
    depth = SIZES[args.size]["num_hidden_layers"]
    found = {}
    for tokens in args.tokens:
        batch = prompt_of(tokens, args.device, dtype)
        if args.train:
            model.train()
            arms = {"unpruned": None, "PyramidDrop": sal.PyramidDrop()}
            found[f"{tokens} image tokens, training step"] = measure(
                model, batch, arms, args.rounds, args.device, train_step
            )
            continue
        for keep in args.keep:
            arms = arms_of(keep, depth, tokens)
            found[f"{tokens} image tokens, keep {keep:g}"] = measure(
                model, batch, arms, args.rounds, args.device, prefill
            )
    for title, rows in found.items():
        print(title)
        for name, row in rows.items():
            shown = ", ".join(
                f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
            print(f"  {name}: {shown}")
    if args.out:
        result = {"about": about(args.device), "size": args.size, "dtype": args.dtype, "results": found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
