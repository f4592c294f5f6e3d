"""Quality against the share that is kept, each way of making a model smaller beside its rivals at equal size.

    python benchmarks/shrink_curves.py [--method loraprune|experts|darex|maestro|all] [--seeds 1] [--chart-only]

The arms are those of the claims (`src/salience/claims/`), at more shares; learning rates are those that the claims
found. All arms of a panel see the same data in the same order, and for LoRAPrune the same steps of recovery. One seed
shows a shape and no difference of a hundredth: for those there are the claims, with intervals over seeds.
Results of methods that are not asked for stay in the file, and the chart is drawn from the file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from salience.claims import darex, easy_ep, loraprune, maestro
from salience.claims.harness import load_evidence
from salience.core import drawing
from salience.core.evidence import about

ROOT = Path(__file__).parent.parent
CLAIMS = ROOT / "benchmarks" / "results" / "claims"
EXPERTS, RANKS = 16, (4, 8, 16, 32)
HIDDEN = ((64, 128), (128, 128))  # the layers that Maestro's claim cuts
# (share that is really kept, quality)
Point = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """A method and its rivals.

    Attributes:
        title (str): above the panel.
        share (str): what the axis of shares counts.
        quality (str): what is measured; "perplexity" is drawn on a logarithmic scale.
        whole (str): what the line of the whole model says.
        arms (tuple[str, ...]): the claim's, the method first and what chooses blindly last.
        names (dict[str, str]): arm -> name on the chart where it is another one.
        run (Callable): (arm or "" for the whole model, seed) -> points.
    """

    title: str
    share: str
    quality: str
    whole: str
    arms: tuple[str, ...]
    names: dict[str, str]
    run: Callable[[str, int], list[Point]]


def _loraprune(arm: str, seed: int) -> list[Point]:
    rate = loraprune.EXPERIMENT.rates[0]
    if not arm:
        return [(1.0, loraprune.pruned("not pruned", seed, rate, "cpu")["perplexity"])]
    whole = sum(
        parameter.numel() for parameter in loraprune.text_world(size="tiny", seed=seed).model().parameters()
    )
    # one of the two key/value heads of a layer is the least that can stay
    found = [loraprune.pruned(arm, seed, rate, "cpu", keep) for keep in (0.5, 0.625, 0.75, 0.875)]
    return [(one["parameters"] / whole, one["perplexity"]) for one in found]


def _experts(arm: str, seed: int) -> list[Point]:
    if not arm:
        return [(1.0, math.exp(easy_ep.kept("full", EXPERTS, seed, "cpu")["loss"]))]
    return [(n / EXPERTS, math.exp(easy_ep.kept(arm, n, seed, "cpu")["loss"])) for n in (2, 3, 4, 6, 8, 12)]


def _darex(arm: str, seed: int) -> list[Point]:
    shares = (1.0,) if not arm else (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    return [(share, darex.measure(arm or "fine-tuned", "large", share, seed, "cpu")[0]) for share in shares]


def _maestro(arm: str, seed: int) -> list[Point]:
    rates = load_evidence(CLAIMS / "maestro.json").rates
    values = maestro.EXPERIMENT.run(arm or "dense", seed, rates[arm or "dense"], "cpu")
    if not arm:
        return [(1.0, values["full"])]
    dense, factors = (sum(f(*shape) for shape in HIDDEN) for f in (lambda m, n: m * n, lambda m, n: m + n))
    return [(rank * factors / dense, values[f"rank {rank}"]) for rank in RANKS]


PANELS = {
    "loraprune": Panel(
        "LoRAPrune: heads and channels, 100 steps each",
        "parameters kept, %",
        "perplexity",
        "as many steps, nothing removed",
        ("lora", "grad", "one shot", "wanda", "magnitude", "random"),
        {
            "lora": "LoRAPrune",
            "grad": "true gradient",
            "one shot": "true gradient, all at once (LLM-Pruner)",
            "wanda": "weight times input (Wanda)",
        },
        _loraprune,
    ),
    "experts": Panel(
        "EASY-EP: experts for one domain, no recovery",
        "experts kept, %",
        "perplexity",
        "all experts",
        ("easy-ep", "reap", "router score", "frequency", "random"),
        {"easy-ep": "EASY-EP", "reap": "REAP"},
        _experts,
    ),
    "darex": Panel(
        "DAREx: a large fine-tuning delta",
        "entries of the delta kept, %",
        "accuracy",
        "fine-tuned, whole delta",
        ("DAREx, q by outputs", "DARE", "magnitude, not rescaled", "random, not rescaled"),
        {"DAREx, q by outputs": "DAREx-q, chosen without labels", "DARE": "DARE (random, rescaled)"},
        _darex,
    ),
    "maestro": Panel(
        "Maestro: ranks of both hidden layers, no recovery",
        "weights of the layers kept, %",
        "accuracy",
        "dense",
        ("ordered", "ordered, lasso", "dense", "plain factors"),
        {
            "ordered": "Maestro",
            "ordered, lasso": "Maestro with the group lasso",
            "dense": "SVD of the dense network",
            "plain factors": "factors in no order",
        },
        _maestro,
    ),
}  # fmt: skip


def measure(panel: Panel, seeds: int) -> dict[str, Any]:
    """Points of every arm, by seed; the arm "" is the whole model."""
    started, found = time.process_time(), {}
    for arm in ("", *panel.arms):
        found[arm] = [panel.run(arm, seed) for seed in range(seeds)]
        print(f"  {arm or panel.whole}: {[(round(x, 3), round(y, 3)) for x, y in found[arm][0]]}", flush=True)
    return {
        "quality": panel.quality,
        "share": panel.share,
        "seeds": seeds,
        "points": found,
        "processor seconds": round(time.process_time() - started),
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """A panel for each method that was measured."""
    shown = [(panel, results[name]) for name, panel in PANELS.items() if name in results]
    with drawing.style():
        figure = drawing.new_figure(1080, 440 * -(-len(shown) // 2))
        places = figure.subplots(-(-len(shown) // 2), min(len(shown), 2), squeeze=False).ravel()
        for axes in places[len(shown) :]:
            axes.set_axis_off()
        for axes, (panel, found) in zip(places, shown):
            _draw_panel(axes, panel, found["points"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Any, panel: Panel, points: dict[str, Any]) -> None:
    ((_, whole),) = _mean(points[""])
    axes.axhline(whole, color=drawing.INK, linewidth=0.9)
    axes.annotate(panel.whole, (0.005, whole), (0, 3), xycoords=axes.get_yaxis_transform(),
                  textcoords="offset points", fontsize=8.5, color=drawing.MUTED)  # fmt: skip
    for place, arm in reversed(list(enumerate(panel.arms))):
        shares, values = zip(*_mean(points[arm]))
        blind = place == len(panel.arms) - 1
        axes.plot(
            [100 * share for share in shares],
            values,
            color=drawing.BASELINE if blind else drawing.ARMS[place],
            linestyle=(0, (4, 1.6)) if blind else "-",
            linewidth=2.2 if place == 0 else 1.3,
            marker="o",
            markersize=5 if place == 0 else 3.5,
            label=panel.names.get(arm, arm),
        )
    axes.set_xscale("log")
    ticks = [100 * share for share, _ in _mean(points[panel.arms[0]])]
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if panel.quality == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.share)
    axes.set_ylabel(f"{panel.quality}, held out")
    axes.grid(axis="y")
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2, fontsize=8.5
    )


def _mean(by_seed: Sequence[Sequence[Sequence[float]]]) -> list[Point]:
    return [
        (fmean(share for share, _ in points), fmean(value for _, value in points)) for points in zip(*by_seed)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=(*PANELS, "all"), default="all")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "shrink-curves.json")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "shrink-curves.png")
    parser.add_argument("--chart-only", action="store_true", help="draw what the file holds")
    args = parser.parse_args()
    results = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {}
    for name in () if args.chart_only else PANELS if args.method == "all" else (args.method,):
        print(PANELS[name].title, flush=True)
        command = f"python benchmarks/shrink_curves.py --method {name} --seeds {args.seeds}"
        results[name] = {"command": command, "about": about("cpu"), **measure(PANELS[name], args.seeds)}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(results, args.chart)


if __name__ == "__main__":
    main()
