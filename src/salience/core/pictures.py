"""Pictures of scores and runs: importance maps, loss curves, memory bars.

Their look is `drawing`'s; maps use a perceptually uniform scale.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from salience.core.drawing import ARMS, MUTED, NARROW, PAPER, WIDE, colours, new_figure, short, style, wrapped
from salience.core.svg import as_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from salience.core.scores import History

__all__ = ["as_svg", "bytes_text", "draw_histories", "loss_curves", "memory_bars", "memory_total"]

# key in a run's result, name on screen, colour; neighbours differ in lightness
MEMORY = (
    ("parameters", "parameters", "#4a5568"),
    ("gradients", "gradients", "#d3ae23"),
    ("optimizer", "optimizer state", "#a05195"),
    ("saved_for_backward", "kept for backward", "#85b4d1"),
)
_SCALE = "viridis"
_MARKS = "oosD^v"
_MOST_COLUMNS, _MOST_ROWS = 600, 512


def draw_histories(
    histories: Mapping[str, tuple[str, History]], *, until: int | None = None, width: int = WIDE
) -> Figure:
    """Importance maps, one panel for each history: units upwards, steps to the right, brighter is higher.

    A history of a single row is drawn as bars. What is not finite stays grey. Several hundred columns at most are
    drawn: of more, and of unevenly spaced steps, each column shows the newest row at its step.

    Args:
        histories (Mapping): title -> (unit, history); the unit labels the axis, unless the title says "of each X".
        until (int | None): where training ended; the last column would else be as wide as the others.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: as many panels as histories with at least one row.
    """
    shown = {title: pair for title, pair in histories.items() if pair[1].steps}
    heights = [min(1.05 + 0.16 * pair[1].values().shape[1], 4.0) for pair in shown.values()] or [1.0]
    with style():
        figure = new_figure(width, 96 * sum(max(height, 1.9) for height in heights))
        panels = figure.subplots(max(len(shown), 1), 1, squeeze=False, height_ratios=heights)[:, 0]
        if not shown:
            panels[0].set_axis_off()
        for axes, (title, (unit, history)) in zip(panels, shown.items()):
            each = re.search(r"of each (\w+)", title)
            _draw_history(figure, axes, wrapped(title, width), each.group(1) if each else unit, history)
            if until is not None and axes.images:
                start, end = axes.get_xlim()
                axes.set_xlim(start, min(end, until) if until > history.steps[-1] else end)
    return figure


def loss_curves(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    labels: Mapping[str, str] | None = None,
    baseline: str | None = None,
    width: int = WIDE,
) -> Figure:
    """Training loss of each arm against the step, and of several arms against the time too.

    A faint line shows every step, a strong one its running mean, dots the held-out loss. Where a loss is not finite
    the line has a gap.

    Args:
        rows (Mapping): arm -> rows with "step" and "loss" (and "seconds"), or "step" and "eval_loss".
        labels (Mapping | None): arm -> name on screen.
        baseline (str | None): the arm that is drawn in grey and dashed.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel ("step"), or two ("step", "training time").
    """
    from matplotlib.ticker import MaxNLocator

    paint, labels = colours(rows, baseline), labels or {}
    curves = {arm: _curve(arm_rows) for arm, arm_rows in rows.items()}
    timed = [arm for arm, curve in curves.items() if np.isfinite(curve["seconds"]).sum() > 1]
    axis_names = ["step"] + (["seconds"] if len(curves) > 1 and len(timed) == len(curves) else [])
    unit = _in_readable_time(curves)
    beside = width > 1.5 * NARROW
    with style():
        names = [short(labels.get(arm, arm), width // 8 - 6) for arm in curves]
        columns = max(width // (7 * max([len(name) for name in names] + [13]) + 60), 1)
        legend_rows = math.ceil((len(names) + 1) / columns)
        figure = new_figure(width, (270 if beside else 235 * len(axis_names)) + 22 * legend_rows)
        grid = (1, len(axis_names)) if beside else (len(axis_names), 1)
        panels = figure.subplots(*grid, squeeze=False, sharey=True).ravel()
        for axes, axis in zip(panels, axis_names):
            for place, (arm, curve) in enumerate(curves.items()):
                _draw_curve(axes, curve, axis, paint[arm], place, dashed=arm == baseline and len(curves) > 1)
            axes.grid(axis="y")
            axes.spines["left"].set_visible(False)
            axes.tick_params(left=False)
            axes.margins(x=0.02)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=axis == "step"))
            axes.set_xlabel("step" if axis == "step" else f"training time ({unit})")
            if axes is panels[0] or not beside:
                axes.set_ylabel("loss")
            axes.set_ylim(*_loss_range(curves))
        _legend(figure, dict(zip(curves, names)), curves, paint, baseline, columns)
    return figure


def memory_bars(
    arms: Mapping[str, Mapping[str, Any]], *, baseline: str | None = None, width: int = WIDE
) -> Figure:
    """What training holds in memory, one stacked bar for each arm: the four parts of `MEMORY`.

    Args:
        arms (Mapping): arm -> {"label": str, "memory": {"parameters": bytes, ...}}; a part that is missing is zero.
        baseline (str | None): the arm whose name is grey.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel.
    """
    paint = colours(arms, baseline)
    totals = [memory_total(arm["memory"]) for arm in arms.values()]
    unit, size = byte_unit(max([*totals, 1]))
    narrow = width <= 1.5 * NARROW
    with style():
        figure = new_figure(width, 62 * len(arms) + (112 if narrow else 92))
        axes = figure.subplots()
        for place, (arm, entry) in enumerate(arms.items()):
            start = 0.0
            for key, name, colour in MEMORY:
                part = (entry["memory"].get(key) or 0) / size
                label = None if place else name
                axes.barh(place, part, 0.52, start, color=colour, edgecolor=PAPER, linewidth=0.8, label=label)
                if part * size > (0.24 if narrow else 0.11) * max(totals):
                    light = key in ("parameters", "optimizer")
                    text = bytes_text(part * size)
                    ink = {"color": "#ffffff" if light else "#1f2732", "fontsize": 9}
                    axes.text(start + part / 2, place, text, ha="center", va="center", **ink)
                start += part
            name_ink = {"color": paint[arm], "fontweight": "bold"}
            axes.text(0, place - 0.36, short(entry.get("label", arm), width // 9), va="bottom", **name_ink)
            axes.annotate(
                bytes_text(start * size), (start, place), (5, 0), textcoords="offset points", va="center"
            )
        axes.set_ylim(len(arms) - 0.6, -0.8)
        axes.set_xlim(0, max([*totals, 1]) / size * (1.3 if narrow else 1.14))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(f"training memory ({unit})")
        figure.legend(
            loc="outside upper left", ncols=2 if narrow else 4, handlelength=1.0, handleheight=1.0, borderpad=0,
            columnspacing=1.4, handletextpad=0.5,
        )  # fmt: skip
    return figure


def memory_total(memory: Mapping[str, Any]) -> float:
    """Bytes of all parts of `MEMORY` together."""
    return float(sum(memory.get(key) or 0 for key, _, _ in MEMORY))


def byte_unit(count: float) -> tuple[str, int]:
    """The unit in which a number of bytes reads well, and its size: ("MiB", 1048576)."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(count) >= 1024**power:
            return unit, 1024**power
    return "bytes", 1


def bytes_text(count: float) -> str:
    """Bytes as people read them: 12.5 MiB."""
    unit, size = byte_unit(count)
    return f"{count:.0f} {unit}" if size == 1 else f"{three_digits(count / size)} {unit}"


def three_digits(value: float) -> str:
    """Three significant digits, of thousands all: 1.50, 30.0, 411, 1234."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:#.3g}" if value else "0"


def _draw_history(figure: Figure, axes: Any, title: str, unit: str, history: History) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    values = history.values().double().numpy()
    values = np.where(np.isfinite(values), values, np.nan)
    units = values.shape[1]
    axes.set_ylabel(unit)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1))
    if len(values) == 1:
        axes.stairs(np.nan_to_num(values[0]), np.arange(units + 1) - 0.5, orientation="horizontal", fill=True,
                    color=ARMS[0])  # fmt: skip
        axes.set(xlabel="score", title=f"{title}, at step {history.steps[0]}", ylim=(-0.5, units - 0.5))
        axes.grid(axis="x")
        return
    image, extent = _grid(values, history.steps)
    scale = colormaps[_SCALE].with_extremes(bad=(0.6, 0.6, 0.6, 0.3))
    low, high = _range(values)
    drawn = axes.imshow(
        np.ma.masked_invalid(image), scale, aspect="auto", origin="lower", extent=extent, interpolation="none",
        vmin=low, vmax=high,
    )  # fmt: skip
    axes.set(xlabel="step", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, pad=0.015, fraction=0.05, aspect=16)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    bar.locator = MaxNLocator(nbins=4)


def _grid(values: np.ndarray, steps: Sequence[int]) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """[U, columns] picture of [T, U] rows, evenly spaced in steps, and the rectangle that it covers."""
    order = np.argsort(np.asarray(steps), kind="stable")
    at, values = np.asarray(steps, dtype=float)[order], values[order]
    gaps = np.diff(at)
    gap = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 1.0
    units = values.shape[1]
    if len(at) > _MOST_COLUMNS or not np.allclose(gaps, gap):
        finest = float(gaps[gaps > 0].min()) if (gaps > 0).any() else 1.0
        columns = min(_MOST_COLUMNS, round((at[-1] + gap - at[0]) / finest))
        edges = np.linspace(at[0], at[-1] + gap, columns, endpoint=False)
        values = values[np.searchsorted(at, edges + 1e-9, side="right") - 1]
    if units > _MOST_ROWS:
        blocks = np.array_split(values, _MOST_ROWS, axis=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of blocks without any number
            values = np.stack([np.nanmean(block, axis=1) for block in blocks], axis=1)
    return values.T, (float(at[0]), float(at[-1] + gap), -0.5, units - 0.5)


def _range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    # differences that are rounding beside the values themselves are no picture
    visible = high - low > 1e-5 * max(abs(low), abs(high))
    return (low, high) if visible else (low - 0.5, high + 0.5)


def _curve(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Columns of an arm's metrics, by step; losses that are not numbers are nan."""
    trained = sorted((row for row in rows if "loss" in row), key=lambda row: row["step"])
    held_out = sorted((row for row in rows if "eval_loss" in row), key=lambda row: row["step"])
    step, eval_step = _column(trained, "step"), _column(held_out, "step")
    seconds = _column(trained, "seconds")
    known = np.isfinite(seconds)
    at = np.interp(eval_step, step[known], seconds[known]) if known.any() else np.full(len(eval_step), np.nan)
    loss = _column(trained, "loss")
    return {
        "step": step, "seconds": seconds, "loss": loss, "mean": _running_mean(loss, len(loss) // 40),
        "eval_step": eval_step, "eval_seconds": at, "eval_loss": _column(held_out, "eval_loss"),
    }  # fmt: skip


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    values = np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows], dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def _running_mean(values: np.ndarray, around: int) -> np.ndarray:
    """Mean of each value and up to `around` on both sides; nan where a value is nan.

    Near the start both sides are equally short, since losses fall steeply there; near the end only the right one is.
    """
    known = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    count = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    reach = np.minimum(around, at)
    low, high = at - reach, np.minimum(at + reach + 1, len(values))
    mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
    return np.where(known, mean, np.nan)


def _draw_curve(
    axes: Any, curve: dict[str, np.ndarray], axis: str, colour: str, place: int, *, dashed: bool
) -> None:
    axes.plot(curve[axis], curve["loss"], color=colour, alpha=0.28, linewidth=0.8)
    # a single recorded step would be a line of no length
    mark = "o" if len(curve["loss"]) == 1 else ""
    line = (0, (4, 1.6)) if dashed else "-"
    axes.plot(curve[axis], curve["mean"], color=colour, linewidth=1.8, linestyle=line, marker=mark)
    # the baseline's marks are open and larger: others that fall on them stay visible, in grey print too
    axes.plot(
        curve[f"eval_{axis}"], curve["eval_loss"], color=colour, linestyle="", marker=_MARKS[place % len(_MARKS)],
        markersize=8 if dashed else 5, markerfacecolor=PAPER if dashed else colour,
        markeredgecolor=colour if dashed else PAPER, markeredgewidth=1.3 if dashed else 0.6, zorder=3 + place,
    )  # fmt: skip


def _in_readable_time(curves: Mapping[str, dict[str, np.ndarray]]) -> str:
    """Divide the seconds of all curves, in place, so that they read well; returns the unit."""
    seconds = np.concatenate([curve["seconds"] for curve in curves.values()] or [np.empty(0)])
    longest = float(np.nanmax(seconds, initial=0.0, where=np.isfinite(seconds)))
    unit, size = ("h", 3600) if longest > 2 * 3600 else ("min", 60) if longest > 180 else ("s", 1)
    for curve in curves.values():
        curve["seconds"], curve["eval_seconds"] = curve["seconds"] / size, curve["eval_seconds"] / size
    return unit


def _loss_range(curves: Mapping[str, dict[str, np.ndarray]]) -> tuple[float, float]:
    """From the means and the held-out losses, so that one wild batch does not flatten the picture."""
    columns = [curve[name] for curve in curves.values() for name in ("mean", "eval_loss")]
    low, high = _range(np.concatenate([*columns, np.empty(0)]))
    return low - 0.07 * (high - low), high + 0.05 * (high - low)


def _legend(
    figure: Figure,
    names: Mapping[str, str],
    curves: Mapping[str, dict[str, np.ndarray]],
    paint: Mapping[str, str],
    baseline: str | None,
    columns: int,
) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for arm, name in names.items():
        line = (0, (4, 1.6)) if arm == baseline and len(names) > 1 else "-"
        handles.append(Line2D([], [], color=paint[arm], linewidth=1.8, linestyle=line, label=name))
    if any(len(curve["eval_loss"]) for curve in curves.values()):
        handles.append(
            Line2D([], [], color=MUTED, linestyle="", marker="o", markersize=6, label="held-out loss")
        )
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=columns,
        borderpad=0,
        columnspacing=1.6,
        handlelength=1.9,
    )
