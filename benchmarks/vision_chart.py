"""Accuracy against the share of image tokens that is kept, every method on one chart, from the stored evidence.

python benchmarks/vision_chart.py [--out docs/image-tokens.png]
"""

import argparse
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from salience.claims.harness import load_evidence

CLAIMS = Path(__file__).parent / "results" / "claims"
SHARES = {"1/16": 1 / 16, "1/10": 1 / 10, "1/8": 1 / 8, "1/4": 1 / 4}
# evidence, arm, name on the chart, colour, dashes
LINES = (
    ("pyramiddrop", "PyramidDrop", "PyramidDrop", "#0072b2", "-"),
    ("transprune", "both", "TransPrune", "#009e73", "-"),
    ("transprune", "transition alone", "TransPrune, transition alone", "#009e73", ":"),
    ("visiondrop", "VisionDrop", "VisionDrop", "#d55e00", "-"),
    ("visiondrop", "decoder, not merged", "VisionDrop, decoder, not merged", "#d55e00", "--"),
    ("visiondrop", "decoder, causal, not merged", "the same with the official causal mask", "#d55e00", ":"),
    ("pyramiddrop", "FastV a layer later", "FastV a layer later (a quarter more)", "#997700", "-"),
    ("pyramiddrop", "FastV", "FastV before the first reading layer", "#997700", ":"),
    ("vflowopt", "searched", "VFlowOpt, searched (share of all layers)", "#56b4e9", "-"),
    ("vflowopt", "plain settings", "VFlowOpt, plain settings (of all layers)", "#56b4e9", ":"),
    ("tome", "ToMe", "ToMe", "#cc79a7", "-"),
    ("pyramiddrop", "random in stages", "random, in stages", "#5c6673", "--"),
    ("pyramiddrop", "random", "random", "#5c6673", ":"),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "docs" / "image-tokens.png"
    )
    args = parser.parse_args()
    figure = Figure(figsize=(8.2, 4.6), layout="constrained")
    axes = figure.subplots()
    for slug, arm, name, colour, dashes in LINES:
        evidence = load_evidence(CLAIMS / f"{slug}.json")
        rows = evidence.values[arm]
        measured = [share for share in SHARES if f"accuracy at {share}" in rows[0]]
        found = {share: [row[f"accuracy at {share}"] for row in rows] for share in measured}
        places, means = [SHARES[share] for share in measured], [fmean(found[share]) for share in measured]
        axes.plot(places, means, dashes, color=colour, label=name, marker="o", markersize=4)
        axes.vlines(
            places, [min(v) for v in found.values()], [max(v) for v in found.values()], colour, alpha=0.35
        )
    whole = fmean(
        row["accuracy at 1/4"] for row in load_evidence(CLAIMS / "pyramiddrop.json").values["unpruned"]
    )
    axes.axhline(whole, color="#1f2733", linewidth=0.8)
    axes.annotate(
        "all image tokens", (1 / 16, whole), xytext=(0, -11), textcoords="offset points", fontsize=8.5
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(SHARES.values()), list(SHARES))
    axes.set_ylim(0, 1.04)
    axes.set_xlabel("mean share of image tokens in the layers that read the image")
    axes.set_ylabel("questions answered right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8.5, frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
