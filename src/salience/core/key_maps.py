"""Pictures of which keys were seen: a map of each head, and the attention that the kept share caught."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from salience.core.drawing import INK, MUTED, NARROW, WIDE, colours, new_figure, short, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Kept", "draw", "draw_recall"]

_UNSEEN, _FUTURE, _SEEN = "#eef2f6", "#c9d0d8", "#0b4f8a"
_PANEL, _HEAD = 150, 34  # pixels: the least side of a map, and what its title takes


class Kept(Protocol):
    """What one layer kept: `layer`, `share` [H], `recall` [H], `map` [H, R, C] with NaN in the future."""

    layer: int

    @property
    def share(self) -> Any: ...
    @property
    def recall(self) -> Any: ...
    @property
    def map(self) -> Any: ...


def draw(
    records: Sequence[Kept],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    points: bool = True,
    width: int = WIDE,
) -> Figure:
    """Maps of chosen layers (downwards) and heads (to the right), and below them recall against kept share.

    In a map queries go down and keys to the right, both in the order of the prompt; the darker a cell, the more of
    its keys are seen, and what lies in the future is grey. A point below is a head.

    Args:
        records (Sequence[Kept]): one for each layer, at least one.
        layers (Sequence[int] | None): those that are drawn; None takes up to four, evenly spaced.
        heads (Sequence[int] | None): those that are drawn; None takes up to four, evenly spaced.
        points (bool): whether recall is drawn below.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: maps, and one panel below.
    """
    by_layer = {record.layer: record for record in records}
    fits = max(1, min(4, width // _PANEL))
    shown = [by_layer[layer] for layer in (layers if layers is not None else _some(sorted(by_layer), 4))]
    chosen = list(heads) if heads is not None else _some(range(len(shown[0].share)), fits)
    side = width / len(chosen)
    height = min(side, 210.0) + _HEAD
    with style():
        figure = new_figure(width, height * len(shown) + (240 if points else 0))
        above: Any = figure
        if points:
            above, below = figure.subfigures(2, 1, height_ratios=[height * len(shown), 240])
            _draw_points(below.subplots(), {"heads": records})
        panels = above.subplots(len(shown), len(chosen), squeeze=False)
        for row, record in zip(panels, shown):
            for axes, head in zip(row, chosen):
                _draw_map(axes, record, head, first=axes in panels[-1:, 0])
    return figure


def draw_recall(methods: Mapping[str, Sequence[Kept]], *, width: int = WIDE) -> Figure:
    """Recall against kept share of every layer and head, a colour for each method.

    Args:
        methods (Mapping): name -> records.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel.
    """
    with style():
        figure = new_figure(width, 300)
        _draw_points(figure.subplots(), methods)
        columns = 1 if width <= 1.5 * NARROW else min(len(methods), 3)
        figure.legend(
            loc="outside upper left", ncols=columns, borderpad=0, columnspacing=1.6, handletextpad=0.3
        )
    return figure


def _some(numbers: Sequence[int], most: int) -> list[int]:
    places = np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)
    return [numbers[place] for place in places]


def _draw_map(axes: Axes, record: Kept, head: int, *, first: bool) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    paint = LinearSegmentedColormap.from_list("seen", [_UNSEEN, _SEEN]).with_extremes(bad=_FUTURE)
    # a block among many keys is faint; the root keeps it in sight
    values = np.sqrt(np.asarray(record.map[head], dtype=float))
    axes.imshow(
        np.ma.masked_invalid(values), cmap=paint, vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    share, recall = float(record.share[head]), float(record.recall[head])
    axes.set_title(
        f"layer {record.layer}, head {head}\n{100 * share:.1f} % kept, recall {recall:.3f}", fontsize=8.5
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    if first:
        axes.set_xlabel("keys →", fontsize=8.5)
        axes.set_ylabel("← queries", fontsize=8.5)


def _draw_points(axes: Axes, methods: Mapping[str, Sequence[Kept]]) -> None:
    paint = colours(methods, None)
    lowest, most = 1.0, 0.0
    for name, mark in zip(methods, "osD^vP" * len(methods)):
        records = methods[name]
        kept = np.concatenate([np.asarray(record.share, dtype=float) for record in records])
        recalled = np.concatenate([np.asarray(record.recall, dtype=float) for record in records])
        lowest, most = min(lowest, float(recalled.min())), max(most, 100 * float(kept.max()))
        axes.plot(
            100 * kept,
            recalled,
            mark,
            color=paint[name],
            markersize=5,
            alpha=0.75,
            markeredgewidth=0,
            label=short(name, 46),
        )
    axes.axhline(1.0, color=MUTED, linewidth=0.7)
    axes.set_ylim(max(0.0, lowest - 0.06), 1.02)
    axes.set_xlim(0, 1.06 * most)
    axes.grid()
    axes.set_xlabel("share of (query, key) pairs kept, %", color=INK)
    axes.set_ylabel("attention recalled", color=INK)
