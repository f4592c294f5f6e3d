"""Choosing key blocks and attending to them, against torch's dense attention, at the share where recall is kept.

Queries and keys are made: stretches of text on drifting topics, keys that move slowly within a stretch, queries that
look for their topic, for the first token and for the newest ones, heads from sharp to blunt. For each method and
length the cheapest setting that catches `--recall` of the attention is found first (on sampled rows, averaged over
heads); then dense attention, choosing and attending take turns, and ratios are medians over rounds. `--growth`
measures HiP alone, time and peak memory in a process of its own for each length.

    python benchmarks/key_blocks.py [--tokens 4096 8192 16384 32768] [--recall 0.98] [--rounds 5] [--heads 4]
        [--key-heads 4] [--width 64] [--device cpu] [--dtype float32] [--backend auto] [--threads N]
        [--methods hip ...] [--growth] [--out FILE]
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import salience as sal
from salience import kernels
from salience.core.evidence import about
from salience.hosts.prefill import Prompt

SAMPLED = 64


def states_of(tokens, heads, key_heads, width, device, dtype, seed=0):
    """Query [1, H, T, D], key and value [1, Hkv, T, D] whose attention is topical, local and has a sink."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=draw)

    def unit(x):
        return x / x.norm(dim=-1, keepdim=True)

    topics, group = 64, heads // key_heads
    stretch = torch.randint(40, 200, (tokens // 40 + 1,), generator=draw)
    which = torch.randint(0, topics, (len(stretch),), generator=draw).repeat_interleave(stretch)[:tokens]
    keys, queries = [], []
    for head in range(key_heads):
        about_what = unit(normal(topics, width))[which]
        # within a stretch keys drift: an autoregressive walk, as neighbouring tokens resemble each other
        noise, walk = normal(tokens, width) / math.sqrt(width), torch.zeros(tokens, width)
        for start in range(0, tokens, 4096):
            part = noise[start : start + 4096]
            decay = 0.9 ** torch.arange(64.0).flip(0)
            padded = torch.cat((torch.zeros(63, width), part))
            walk[start : start + 4096] = (padded.unfold(0, 64, 1) * decay).sum(-1) * math.sqrt(1 - 0.81)
        place = torch.arange(tokens).float()
        turn = torch.stack((torch.cos(place / 512), torch.sin(place / 512)), -1)
        key = torch.cat((about_what + 0.5 * walk, 0.4 * turn), -1)
        sink = torch.zeros(width + 2)
        sink[:width] = unit(normal(1, width))[0]
        key[0] = 1.6 * sink
        project = unit(normal(width + 2, width)).mul(math.sqrt((width + 2) / width))
        keys.append(key @ project)
        for member in range(group):
            # from sharp heads to blunt ones
            sharp = 16.0 - 6.0 * ((head * group + member) / max(1, heads - 1))
            query = torch.cat((about_what + 0.3 * walk, 0.6 * turn), -1) + 0.6 * sink
            queries.append(query @ torch.linalg.pinv(project).T * sharp * math.sqrt(width) / 1.0)
    values = normal(1, key_heads, tokens, width)
    made = torch.stack(queries)[None], torch.stack(keys)[None], values
    return [one.to(device, dtype).contiguous() for one in made]


def families_of(name, tokens):
    """Settings of a method, in families that each go from few keys to many."""
    sizes = [
        size for size in (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096) if size < tokens
    ]
    shares = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.0)
    taus = (0.256, 0.128, 0.064, 0.032, 0.016, 0.008, 0.004, 0.002, 0.001, 0.0005)
    return {
        # the official choice, then fewer rows that ask and larger blocks
        "hip": lambda: [
            [
                sal.HiP(mask_k=size, window=64, dense_layers=0, q_block=rows, q_stride=stride, k_block=block)
                for size in sizes
            ]
            for rows, stride, block in ((64, 2, 2), (64, 8, 4), (64, 16, 8), (128, 16, 8))
        ],
        "sale": lambda: [[sal.SALE(tau=tau) for tau in taus]],
        "dhsa": lambda: [
            [
                sal.DHSA(budget=size + 192, q_block=rows, chunks="uniform", local=128, global_tokens=64,
                         instruction_tokens=0, per_head=each)
                for size in sizes
            ]
            for rows, each in ((128, False), (64, True))
        ],
        "block-top-k": lambda: [
            [sal.BlockTopK(keep=share, q_block=rows, k_block=block) for share in shares]
            for rows, block in ((64, 32), (64, 64), (32, 16))
        ],
        "streaming-llm": lambda: [[sal.StreamingLLM(window=2 * size) for size in sizes]],
    }[name]()  # fmt: skip


def found_for(name, states, args):
    """The method, its lists and its recall: of each family the first setting that recalls enough, and the fastest."""
    best = None
    for family in families_of(name, states[0].shape[2]):
        for method in family:
            blocks = method.choose(prompt_of(states))
            if blocks is None:
                continue
            recall = recall_of(prompt_of(states), blocks)
            if recall >= args.recall:
                choosing, _ = timed(lambda m=method: m.choose(prompt_of(states)), args.device)
                attending, _ = timed(lambda b=blocks: attend(states, b, args), args.device)
                if best is None or choosing + attending < best[0]:
                    best = choosing + attending, method, blocks, recall
                break
    return None if best is None else best[1:]


def attend(states, blocks, args):
    return kernels.attend(*states, blocks, scaling=args.width**-0.5, backend=args.backend)


def prompt_of(states):
    query, key, value = states
    return Prompt(query, key, value, query.shape[-1] ** -0.5, None, 99, 100, {}, {})


@torch.no_grad()
def recall_of(prompt, blocks):
    """Share of the true attention of sampled rows that falls on seen keys, averaged over rows and heads."""
    query, key = prompt.query, prompt.key
    heads, tokens, keys = query.shape[1], query.shape[2], key.shape[2]
    rows = torch.linspace(0, tokens - 1, SAMPLED, device=query.device).round().long()
    caught = []
    for some in rows.split(8):
        repeated = key.repeat_interleave(heads // key.shape[1], 1).float()
        logits = query[:, :, some].float() @ repeated.transpose(-1, -2) * prompt.scaling
        past = torch.arange(keys, device=query.device) <= some.unsqueeze(-1)
        share = logits.masked_fill(~past, -torch.inf).softmax(-1)
        caught.append((share * blocks.visible(some)).sum(-1))
    return float(torch.cat(caught, -1).mean())


def sync(device):
    if device != "cpu":
        torch.cuda.synchronize()


def timed(function, device):
    sync(device)
    started = time.perf_counter()
    result = function()
    sync(device)
    return time.perf_counter() - started, result


@torch.no_grad()
def compare(args, tokens):
    states = states_of(
        tokens, args.heads, args.key_heads, args.width, args.device, getattr(torch, args.dtype)
    )
    query, key, value = states
    arms = {}
    for name in args.methods:
        found = found_for(name, states, args)
        if found is None:
            print(f"{tokens:>7} {name}: no setting reaches recall {args.recall}", flush=True)
            continue
        method, blocks, recall = found
        arms[name] = {
            "method": repr(method),
            "share": float(blocks.share().mean()),
            "recall": recall,
            "kernel": kernels.which(query, key, value, blocks, args.backend)[0],
            "choosing": [],
            "attending": [],
            "way": method,
        }

    def dense():
        return sdpa(query, key, value, is_causal=True, enable_gqa=args.heads != args.key_heads)

    seconds = []
    for turn in range(args.rounds + 1):
        took, _ = timed(dense, args.device)
        if turn:  # the first turn warms up
            seconds.append(took)
        for arm in arms.values():
            choosing, blocks = timed(lambda a=arm: a["way"].choose(prompt_of(states)), args.device)
            attending, _ = timed(lambda b=blocks: attend(states, b, args), args.device)
            if turn:
                arm["choosing"].append(choosing)
                arm["attending"].append(attending)
    for name, arm in arms.items():
        arm.pop("way")
        for part in ("choosing", "attending"):
            arm[f"{part} / dense"] = statistics.median(a / d for a, d in zip(arm[part], seconds))
        whole = [(c + a) / d for c, a, d in zip(arm["choosing"], arm["attending"], seconds)]
        arm["whole / dense"] = statistics.median(whole)
        arm["times faster"] = 1 / arm["whole / dense"]
        print(
            f"{tokens:>7} {name:<14} kept {100 * arm['share']:5.1f} % recall {arm['recall']:.3f} choosing "
            f"{arm['choosing / dense']:.3f} attending {arm['attending / dense']:.3f} of dense: "
            f"{arm['times faster']:.2f}x ({arm['kernel']})  {arm['method']}",
            flush=True,
        )
    return {"tokens": tokens, "dense seconds": seconds, "arms": arms}


def grow(args):
    """One length for each call, so that peak memory is its own."""
    rows = []
    for tokens in args.tokens:
        command = [sys.executable, __file__, "--one-length", str(tokens), "--heads", str(args.heads)]
        command += [
            "--key-heads",
            str(args.key_heads),
            "--width",
            str(args.width),
            "--rounds",
            str(args.rounds),
        ]
        command += ["--q-stride", str(args.q_stride), "--k-block", str(args.k_block)]
        command += ["--device", args.device, "--dtype", args.dtype, "--backend", args.backend]
        command += ["--threads", str(args.threads)] if args.threads else []
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    fits = {name: slope(rows, name) for name in ("choosing", "attending", "whole", "peak bytes")}
    print("exponents of the length:", {name: round(value, 3) for name, value in fits.items()})
    return {"rows": rows, "exponents": fits}


def slope(rows, name):
    x = [math.log(row["tokens"]) for row in rows]
    y = [math.log(row[name]) for row in rows]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


@torch.no_grad()
def one_length(args):
    tokens = args.one_length
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, args.width) for heads in (args.heads, args.key_heads, args.key_heads)]
    states = [torch.randn(s, generator=draw).to(args.device, getattr(torch, args.dtype)) for s in shapes]
    method = sal.HiP(mask_k=512, window=256, dense_layers=0, q_stride=args.q_stride, k_block=args.k_block)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    choosing, attending = [], []
    for turn in range(args.rounds + 1):
        took, blocks = timed(lambda: method.choose(prompt_of(states)), args.device)
        spent, _ = timed(
            lambda b=blocks: kernels.attend(*states, b, scaling=args.width**-0.5, backend=args.backend),
            args.device,
        )
        if turn or args.rounds == 0:
            choosing.append(took)
            attending.append(spent)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if args.device != "cpu":
        after = torch.cuda.max_memory_allocated()
    row = {
        "tokens": tokens,
        "choosing": statistics.median(choosing),
        "attending": statistics.median(attending),
    }
    row |= {"whole": row["choosing"] + row["attending"], "peak bytes": after - before}
    print(json.dumps(row))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--recall", type=float, default=0.98)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--backend", default="auto", choices=kernels.BACKENDS)
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--methods", nargs="+", default=["hip", "sale", "dhsa", "block-top-k", "streaming-llm"]
    )
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--q-stride", type=int, default=2, help="of HiP in --growth")
    parser.add_argument("--k-block", type=int, default=2, help="of HiP in --growth")
    parser.add_argument("--one-length", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.one_length:
        one_length(args)
        return
    result = {
        "command": " ".join(["python", "benchmarks/key_blocks.py", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
        "about": about(args.device),
    }
    if args.growth:
        result["growth"] = grow(args)
    else:
        result["lengths"] = [compare(args, tokens) for tokens in args.tokens]
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
