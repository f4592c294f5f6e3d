"""What choosing documents costs: against a plain forward pass, in memory, and with more workers of Ray.

python benchmarks/selecting.py [--documents 60] [--ray] [--out benchmarks/results/selecting.json]

A model of six layers that was not trained scores made documents; what is measured is time, which does not depend on
what a model has learnt. Passes are timed in turns, and the median of the rounds is told.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAYERS, WIDTH, HEADS, VOCABULARY = 6, 256, 8, 768
# how far down the lowest head lies decides how much the two passes share
LOWEST = {"last layer": LAYERS - 1, "middle layer": LAYERS // 2, "first layer": 0}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true", help="also time one and two workers of Ray")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selecting.json"))
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory_child(args.memory)
    from salience.core.evidence import about
    from salience.core.files import write_json_atomic

    result: dict[str, Any] = {"about": about("cpu"), "model": f"{LAYERS} layers of width {WIDTH}"}
    result["cost"] = cost(args.documents, args.rounds)
    result["memory"] = memory((2_000, 20_000, 200_000))
    if args.ray:
        result["ray"] = workers(600)
    write_json_atomic(args.out, result)
    print(json.dumps(result, indent=1))
    return 0


def reader() -> tuple[Any, Any]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from salience.sandbox import corpus

    torch.manual_seed(0)
    tokenizer = corpus.new_tokenizer(VOCABULARY)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS // 2, max_position_embeddings=384,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval(), tokenizer


def cost(count: int, rounds: int) -> dict[str, Any]:
    """Seconds of scoring against those of a plain forward pass with its loss, on the same batches."""
    import torch

    from salience.core.documents import Documents
    from salience.core.token_scores import nll
    from salience.hosts.language import TokenMeter
    from salience.hosts.scoring import packed
    from salience.methods.samples.attention_influence import AttentionInfluence
    from salience.methods.samples.perplexity import Perplexity
    from salience.sandbox import corpus

    model, tokenizer = reader()
    tokens = [
        one[:384]
        for one in tokenizer([text.text for text in corpus.documents(count, 1)], verbose=False)["input_ids"]
    ]
    import numpy as np

    batches = []
    for places in packed(np.array([len(one) for one in tokens]), 8192):
        long = max(len(tokens[place]) for place in places)
        ids = torch.zeros(len(places), long, dtype=torch.int64)
        labels = torch.full((len(places), long), -100)
        for row, place in enumerate(places):
            ids[row, : len(tokens[place])] = labels[row, : len(tokens[place])] = torch.tensor(tokens[place])
        lengths = torch.tensor([len(tokens[place]) for place in places])
        batches.append(Documents(ids, labels, lengths, lengths, torch.tensor(places)))
    meter = TokenMeter(model)
    ways: dict[str, Any] = {
        "forward pass and loss": lambda batch: meter(batch.ids, batch.labels, {"loss": nll}),
        "perplexity": Perplexity(model=(model, tokenizer)).scorer(model, tokenizer),
    }
    for name, layer in LOWEST.items():
        ways[f"attention-influence, {name}"] = AttentionInfluence(heads=((layer, 0),)).scorer(
            model, tokenizer
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            for batch in batches:
                way(batch)
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    plain = statistics.median(seconds["forward pass and loss"])
    total = sum(map(len, tokens))
    return {
        name: {
            "seconds": round(statistics.median(each), 3),
            "ratio": round(statistics.median(each) / plain, 3),
            "documents per second": round(count / statistics.median(each), 1),
            "tokens per second": round(total / statistics.median(each)),
        }
        for name, each in seconds.items()
    }


def memory(counts: tuple[int, ...]) -> dict[str, float]:
    """Peak resident memory in MB of a process that selects from so many documents."""
    found = {}
    for count in counts:
        done = subprocess.run(
            [sys.executable, __file__, "--memory", str(count)], check=True, capture_output=True, text=True
        )
        found[f"{count:,} documents"] = float(done.stdout.strip().splitlines()[-1])
    return found


def memory_child(count: int) -> int:
    """Select from documents in a file by their length, which costs no model's time but everything else."""
    from salience.core.documents import Reading
    from salience.hosts.corpus_files import open_source
    from salience.hosts.selecting import select
    from salience.methods.samples.length import Length

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "documents.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for place in range(count):
                file.write(json.dumps({"id": place, "text": "word " * (50 + place % 500)}) + "\n")
        reading = Reading(folder=str(Path(name) / "run"))
        picked = select(open_source(path, reading), Length(keep=0.2), reading)  # type: ignore[arg-type]
        out = Path(name) / "out"
        out.mkdir()
        picked.save(out)
    # not ru_maxrss, which a child takes over from the process that started it
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024)
    return 0


def workers(count: int) -> dict[str, float]:
    """Seconds from the first to the last shard with one and with two workers of one thread, starting left out."""
    from salience.sandbox import corpus

    found = {}
    model, tokenizer = reader()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name) / "reader"
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        corpus.write_documents(Path(name) / "data", count, 1)
        for number in (1, 2):
            out = Path(name) / f"out{number}"
            subprocess.run(
                [
                    sys.executable, "-m", "salience", "select", "--data", str(Path(name) / "data"), "--model",
                    str(place), "--method", "attention-influence:heads=((3,0),),min_tokens=2", "--engine", "ray",
                    "--workers", str(number), "--shard-documents", "10", "--device", "cpu", "--out", str(out),
                ],
                check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            times = sorted(path.stat().st_mtime for path in (out / "parts").iterdir())
            found[f"{number} workers"] = round(times[-1] - times[number - 1], 2)
    found["speedup"] = round(found["1 workers"] / found["2 workers"], 2)
    return found


if __name__ == "__main__":
    sys.exit(main())
