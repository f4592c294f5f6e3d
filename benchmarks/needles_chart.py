"""Answers and recalled attention against the share of pairs kept, of every method on key blocks, from evidence.

python benchmarks/needles_chart.py [--out docs/needles.png]
"""

import argparse
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from salience.claims.harness import load_evidence

CLAIMS = Path(__file__).parent / "results" / "claims"
PLACES = ("4K, 1/16", "4K, 1/8", "4K, 1/4")
LENGTHS = {
    "2K, 1/8": "2K\n(1/8)",
    "4K, 1/16": "4K\n(1/16)",
    "8K, 1/16": "8K\n(1/16)",
    "16K, 1/16": "16K\n(1/16)",
}
# evidence, arm, name on the chart, colour, dashes
LINES = (
    ("sale", "SALE", "SALE, 4 bits", "#0072b2", "-"),
    ("sale", "SALE, exact scores", "SALE's rule with exact scores", "#0072b2", ":"),
    ("hip", "HiP", "HiP", "#d55e00", "-"),
    ("hip", "HiP, first", "HiP, first representative", "#d55e00", ":"),
    ("dhsa", "DHSA", "DHSA, learnt borders, no tail", "#009e73", "-"),
    ("dhsa", "DHSA, uniform chunks", "DHSA, uniform chunks, no tail", "#009e73", ":"),
    ("dhsa", "DHSA, tail of 64", "DHSA, tail of 64 dense rows", "#009e73", "--"),
    ("hip", "block means", "block means", "#997700", "-"),
    ("hip", "StreamingLLM", "StreamingLLM", "#5c6673", "-"),
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "needles.png")
    args = parser.parse_args()
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for slug, arm, name, colour, dashes in LINES:
        rows = load_evidence(CLAIMS / f"{slug}.json").values[arm]

        def mean(what, place, rows=rows):
            return fmean(row[f"{what} at {place}"] for row in rows)

        places = [place for place in PLACES if f"kept at {place}" in rows[0]]
        kept = [100 * mean("kept", place) for place in places]
        style = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 4}
        for axes, what in zip(panels, ("accuracy", "recall")):
            axes.plot(kept, [mean(what, place) for place in places], label=name, **style)
        lengths = [place for place in LENGTHS if f"kept at {place}" in rows[0]]
        order = list(LENGTHS)
        panels[2].plot(
            [order.index(place) for place in lengths], [mean("accuracy", place) for place in lengths], **style
        )
    for axes, title in zip(
        panels, ("answers, 4,096 tokens", "attention recalled, 4,096 tokens", "answers by length")
    ):
        axes.set_ylim(0, 1.04)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", linewidth=0.5, color="#dde2e8")
    for axes in panels[:2]:
        axes.set_xlim(left=0)
        axes.set_xlabel("pairs kept, %")
    panels[2].set_xticks(range(len(LENGTHS)), LENGTHS.values())
    panels[2].set_xlabel("tokens (share that a query may see)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=130)


if __name__ == "__main__":
    main()
