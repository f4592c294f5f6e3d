"""Pictures of what was picked of a dataset: scores, sources and both ends, or clusters and their shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.core import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BINS, _MOST_SOURCES = 60, 12
KEPT, DROPPED = "#0072b2", "#b9c2cc"


def draw_picked(
    values: np.ndarray,
    kept: np.ndarray,
    sources: Mapping[str, Sequence[int]],
    examples: Sequence[Mapping[str, Any]] = (),
    *,
    width: int = drawing.WIDE,
) -> Figure:
    """Draw the scores of kept and dropped documents, the sources, and the first words of documents at both ends.

    Args:
        values (np.ndarray): [N] scores, NaN where there is none.
        kept (np.ndarray): [N] nonzero where kept.
        sources (Mapping): name -> documents and documents kept.
        examples (Sequence[Mapping]): id, score and text, the highest first; empty draws none.
        width (int): pixels at 96 an inch.
    """
    shown = list(sources.items())[:_MOST_SOURCES]
    heights = [200, 46 + 22 * len(shown)] + ([40 + 17 * len(examples)] if examples else [])
    with drawing.style():
        figure = drawing.new_figure(width, sum(heights) + 30)
        axes = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights}, squeeze=False)[:, 0]
        _histogram(axes[0], values, kept)
        _sources(axes[1], shown, width)
        if examples:
            _examples(axes[2], examples, width)
        return figure


def draw_clusters(clusters: Sequence[Mapping[str, Any]], *, width: int = drawing.WIDE) -> Figure:
    """Draw a bar for each cluster, the largest on top: its samples, and in front of them those that were chosen.

    Args:
        clusters (Sequence[Mapping]): with samples, chosen and expert, None where chance chose.
        width (int): pixels at 96 an inch.
    """
    ranked = sorted(enumerate(clusters), key=lambda pair: pair[1]["samples"])
    places = range(len(ranked))
    with drawing.style():
        figure = drawing.new_figure(width, 110 + 26 * len(ranked))
        axes = figure.subplots()
        axes.barh(places, [one["samples"] for _, one in ranked], color=DROPPED, label="pool and arrivals")
        axes.barh(places, [one["chosen"] for _, one in ranked], color=KEPT, label="to train on")
        axes.set_yticks(places, [f"{number}: by {one['expert'] or 'chance'}" for number, one in ranked])
        axes.set_xlabel("samples")
        figure.legend(loc="outside lower center", ncols=2)
        axes.set_title("pseudo-skills, and the expert that was asked in each")
        return figure


def counts(
    values: np.ndarray, kept: np.ndarray, bins: int = _BINS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges [bins + 1] and how many documents are kept and dropped in each bin [bins]; the outermost bins hold what
    lies beyond the 0.5th and 99.5th percentile."""
    step = max(1, len(values) // 200_000)
    some = np.asarray(values[::step])
    some = some[np.isfinite(some)]
    low, high = np.percentile(some, [0.5, 99.5]) if len(some) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    ours, others = np.zeros(bins, np.int64), np.zeros(bins, np.int64)
    for start in range(0, len(values), 1 << 20):
        part = np.asarray(values[start : start + (1 << 20)])
        mark = np.asarray(kept[start : start + (1 << 20)]).astype(bool)
        known = np.isfinite(part)
        inside = np.clip(part, edges[0], edges[-1])
        ours += np.histogram(inside[known & mark], edges)[0]
        others += np.histogram(inside[known & ~mark], edges)[0]
    return edges, ours, others


def _histogram(axes: Any, values: np.ndarray, kept: np.ndarray) -> None:
    edges, ours, others = counts(values, kept)
    width = np.diff(edges)
    axes.bar(edges[:-1], others, width, align="edge", color=DROPPED, label=f"dropped, {int(others.sum()):,}")
    axes.bar(
        edges[:-1], ours, width, align="edge", bottom=others, color=KEPT, label=f"kept, {int(ours.sum()):,}"
    )
    axes.set_title("scores of the documents")
    axes.set_xlabel("score")
    axes.set_ylabel("documents")
    axes.legend()


def _sources(axes: Any, shown: Sequence[tuple[str, Sequence[int]]], width: int) -> None:
    places = np.arange(len(shown))
    shares = [kept / total if total else 0.0 for _, (total, kept) in shown]
    axes.barh(places, [1.0] * len(shown), color=DROPPED)
    axes.barh(places, shares, color=KEPT)
    for place, (_, (total, kept)) in enumerate(shown):
        axes.text(1.01, place, f"{kept:,} of {total:,}", va="center", fontsize=8.5)
    axes.set_yticks(places, [_short(name or "(none)", width // 26) for name, _ in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 if width > drawing.NARROW else 1.6)
    axes.set_xticks([0, 0.5, 1], ["0", "half", "all"])
    axes.set_title("share kept of each source")


def _examples(axes: Any, examples: Sequence[Mapping[str, Any]], width: int) -> None:
    axes.axis("off")
    axes.set_title("the highest scores, and the lowest")
    step = 1 / max(1, len(examples))
    for place, one in enumerate(examples):
        line = f"{one['score']:>9.3f}  {_short(one['text'], (width - 100) // 7 - 11)}"
        colour = KEPT if one["kept"] else drawing.MUTED
        axes.text(
            0, 1 - (place + 0.5) * step, line, va="center", fontsize=8, family="monospace", color=colour,
            transform=axes.transAxes,
        )  # fmt: skip


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
