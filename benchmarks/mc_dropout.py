"""S samples of temporal dropout: one batch of S x B series against a Python loop over S, on the same masks.

    python benchmarks/mc_dropout.py [--device cuda] [--out benchmarks/results/mc-dropout.json]

Both give the same numbers (compared here); the ratio is of their medians, taken in turn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

import torch

import salience as sal
from salience.core.evidence import about
from salience.sandbox.series import SeriesNet, series

SAMPLES, REPEATS = 32, 15
BATCHES = (1, 4, 16)


def seconds(call, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/mc-dropout.json"))
    options = parser.parse_args()
    device = options.device
    rows = {}
    for learn in (False, True):
        net = SeriesNet(gaps=sal.TemporalDropout(0.3, learn=learn)).to(device)
        for batch in BATCHES:
            data = series(train=2, test=batch, missing=0.3)
            x, seen = data.test.to(device), data.test_observed.to(device)

            def batched(x=x, seen=seen, net=net):
                return sal.mc_predict(net, x, seen, samples=SAMPLES, seed=0)

            def looped(x=x, seen=seen, net=net):
                return sal.mc_predict(net, x, seen, samples=SAMPLES, seed=0, at_once=1)

            one, other = batched(), looped()
            torch.testing.assert_close(one.total, other.total, rtol=1e-4, atol=1e-5)
            times = [(seconds(batched, device), seconds(looped, device)) for _ in range(REPEATS)]
            fast, slow = (median(column) for column in zip(*times))
            name = f"{'learnt' if learn else 'fixed'} rate, batch {batch}"
            rows[name] = {"one batch, ms": 1e3 * fast, "loop, ms": 1e3 * slow, "ratio": slow / fast}
            print(name, json.dumps({key: round(value, 2) for key, value in rows[name].items()}))
    found = {
        "about": about(device),
        "samples": SAMPLES,
        "steps": 24,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**known, device: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
