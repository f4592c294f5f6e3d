"""Pictures of what was kept of a picture: the image tokens of each stage, drawn over what the encoder saw.

Kept tokens stay as they are and are outlined, dropped ones go pale and grey, merged ones lie in between and carry a
mark. Outline, paleness and mark tell them apart without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from salience.core.drawing import INK, MUTED, WIDE, new_figure, short, style
from salience.core.errors import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["DROPPED", "KEPT", "MERGED", "Stage", "draw_kept"]

DROPPED, KEPT, MERGED = 0, 1, 2
KEPT_LINE, MERGED_LINE = "#0072b2", "#d55e00"
_VEIL, _DETAIL = 0.84, 0.28  # the grey that dropped tokens fade to, and the contrast that is left of them
_NARROWEST, _WIDEST = 108, (250, 250, 190, 190, 150)  # pixels of a panel; smaller for more pictures
_GAP, _GROUP_GAP, _LINE, _EDGE = 6, 16, 15, 4  # pixels
_SHARP = 1.5  # pixels of a picture for each pixel on the page, at most


class Stage(NamedTuple):
    """What became of each image token at one stage.

    Attributes:
        title (str): "layer 8".
        fates (array): [n] `DROPPED`, `KEPT` or `MERGED` for each token; a bool array is dropped and kept.
    """

    title: str
    fates: Any


@dataclass(frozen=True)
class _Column:
    """One column of panels; `fates` is None for the plain pictures. `title` has its lines."""

    title: list[str]
    fates: np.ndarray | None
    left: float


def draw_kept(
    pictures: Sequence[Any],
    places: Any,
    methods: Mapping[str, Sequence[Stage]],
    *,
    labels: Sequence[str] = (),
    most: int = 8,
    width: int = WIDE,
) -> Figure:
    """The pictures plain, and beside them what each method kept at each of its stages.

    A row of panels for each picture, a group of columns for each method. Groups that do not fit the width start a new
    band below, beginning with the plain pictures again.

    Args:
        pictures (Sequence): [3, H, W] arrays in [0, 1].
        places (array): [n, 5] for each image token the number of its picture and top, left, bottom, right there in
            pixels; a row of nan for tokens that lie nowhere (newlines), which are counted and not drawn.
        methods (Mapping): name -> stages, in order.
        labels (Sequence[str]): what the pictures are, drawn above them.
        most (int): pictures that are drawn; a line says how many were left out.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: as wide as asked, and as high as it needs to be.

    Raises:
        ParameterError: if shapes do not agree, or a fate is none of the three.
    """
    images, at = _checked(pictures, places, labels, most, width)
    stages = {name: [_stage(name, stage, len(at)) for stage in rows] for name, rows in methods.items()}
    require(any(stages.values()), "methods", "at least one method with a stage", dict(methods))
    shown = images[:most]
    bands, size = _bands(stages, width, _WIDEST[min(len(shown), len(_WIDEST)) - 1])
    heights = [min(size * image.shape[0] / image.shape[1], 1.6 * size) for image in shown]
    captions = bool(labels) or len(shown) > 1
    tall = sum(heights) + len(shown) * _GAP + captions * len(shown) * _LINE
    lines = [max(len(column.title) for _, columns in band for column in columns) for band in bands]
    heads = [_LINE * (1.4 + count) for count in lines]
    left_out = f"{len(images) - most} more pictures are not drawn." if len(images) > most else ""
    height = 30 + sum(heads) + len(bands) * (tall + 10) + (_LINE + 4 if left_out else 0)
    with style():
        figure = new_figure(width, height)
        figure.set_layout_engine("none")
        page = _Page(figure, width, height)
        _legend(page, any((stage.fates == MERGED).any() for rows in stages.values() for stage in rows))
        down = 30.0
        for band, head in zip(bands, heads):
            _draw_heads(page, band, down, size)
            down += head
            for number, (image, high) in enumerate(zip(shown, heights)):
                here = at[:, 0] == number
                down += captions * _LINE
                for column in (column for _, columns in band for column in columns):
                    fates = None if column.fates is None else column.fates[here]
                    _draw_panel(page, image, at[here, 1:], fates, (column.left, down, size, high))
                    if captions:
                        words = _caption(fates, labels, number, size)
                        page.text(column.left, down - 4, words, colour=MUTED)
                down += high + _GAP
            down += 10
        if left_out:
            page.text(_EDGE, down + 8, left_out, colour=MUTED)
    return figure


class _Page:
    """A figure that is drawn on in pixels from its upper left corner."""

    def __init__(self, figure: Figure, width: float, height: float) -> None:
        self.figure, self.width, self.height = figure, width, height

    def axes(self, left: float, top: float, width: float, height: float) -> Any:
        below = self.height - top - height
        box = (left / self.width, below / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set_axis_off()
        return axes

    def text(
        self, left: float, base: float, words: str, *, colour: str = INK, weight: str = "normal"
    ) -> None:
        at = (left / self.width, 1 - base / self.height)
        ink = {"color": colour, "fontweight": weight, "fontsize": 8 if colour == MUTED else 8.5}
        self.figure.text(*at, words, va="baseline", **ink)

    def line(self, left: float, right: float, down: float) -> None:
        from matplotlib.lines import Line2D

        ends, level = [left / self.width, right / self.width], 1 - down / self.height
        self.figure.add_artist(Line2D(ends, [level, level], color=MUTED, linewidth=0.8))


def _checked(
    pictures: Sequence[Any], places: Any, labels: Sequence[str], most: int, width: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """Pictures [H, W, 3] and places [n, 5]."""
    require(len(pictures) > 0, "pictures", "at least one [3, H, W] array", len(pictures))
    images = [np.asarray(picture, dtype=float) for picture in pictures]
    for image in images:
        fits = image.ndim == 3 and image.shape[0] == 3 and image.size > 0 and np.isfinite(image).all()
        require(fits, "pictures", "finite [3, H, W] arrays", image.shape)
    at = np.asarray(places, dtype=float)
    require(at.ndim == 2 and at.shape[1] == 5 and len(at) > 0, "places", "an [n, 5] array", at.shape)
    numbers = at[np.isfinite(at[:, 0]), 0]
    known = np.isin(numbers, np.arange(len(images))).all()
    require(bool(known), "places", f"of pictures 0 to {len(images) - 1}", sorted(set(numbers.tolist())))
    require(len(labels) in (0, len(images)), "labels", f"none or {len(images)}, one a picture", list(labels))
    require(most >= 1, "most", "at least 1", most)
    require(width >= 2 * _NARROWEST + 40, "width", f"at least {2 * _NARROWEST + 40} pixels", width)
    return [image.clip(0, 1).transpose(1, 2, 0) for image in images], at


def _stage(name: str, stage: Stage, count: int) -> Stage:
    fates = np.asarray(stage.fates)
    fits = fates.shape == (count,) and np.isin(fates, (DROPPED, KEPT, MERGED)).all()
    got = f"shape {fates.shape} with {np.unique(fates)[:6].tolist()}"
    require(bool(fits), f"fates of {name}, {stage.title}", f"{count} numbers of 0, 1 and 2", got)
    return Stage(stage.title, fates.astype(int))


def _bands(
    stages: Mapping[str, Sequence[Stage]], width: int, widest: float
) -> tuple[list[list[tuple[str, list[_Column]]]], float]:
    """Columns, by method, in bands of the page; and the width of a panel in pixels."""
    fitting = max(int((width - 2 * _EDGE + _GAP) // (_NARROWEST + _GAP)) - 1, 1)
    parts = []
    for name, rows in stages.items():
        pieces = math.ceil(len(rows) / fitting)
        each = math.ceil(len(rows) / max(pieces, 1))
        for start in range(0, len(rows), max(each, 1)):
            parts.append((name if not start else f"{name}, continued", rows[start : start + each]))
    bands: list[list[tuple[str, Sequence[Stage]]]] = [[]]
    for part in parts:
        if bands[-1] and sum(len(rows) for _, rows in [*bands[-1], part]) > fitting:
            bands.append([])
        bands[-1].append(part)
    columns = max(1 + sum(len(rows) for _, rows in band) for band in bands)
    groups = max(len(band) for band in bands)
    free = width - 2 * _EDGE - groups * _GROUP_GAP - (columns - groups - 1) * _GAP
    size = min(free / columns, widest)
    placed = []
    for band in bands:
        left = float(_EDGE)
        groups_of: list[tuple[str, list[_Column]]] = [("", [_Column(["picture"], None, left)])]
        left += size + _GROUP_GAP
        for name, rows in band:
            made = []
            for stage in rows:
                made.append(_Column(_title(stage, size), stage.fates, left))
                left += size + _GAP
            left += _GROUP_GAP - _GAP
            groups_of.append((name, made))
        placed.append(groups_of)
    return placed, size


def _draw_heads(page: _Page, band: list[tuple[str, list[_Column]]], down: float, size: float) -> None:
    """Names of methods over their columns, and what each column is."""
    for name, columns in band:
        if name:
            left, end = columns[0].left, columns[-1].left + size
            page.text(left, down + 11, short(name, int((end - left) // 7)), weight="bold")
            page.line(left, end, down + 16)
        for column in columns:
            for number, line in enumerate(column.title):
                page.text(column.left, down + 31 + number * 13, line, colour=MUTED if number else INK)


def _title(stage: Stage, size: float) -> list[str]:
    """ "layer 8: 288 of 576 kept", in as many lines as it takes."""
    kept, merged = int((stage.fates == KEPT).sum()), int((stage.fates == MERGED).sum())
    counts = [f"{kept:,} of {len(stage.fates):,} kept", *([f"{merged:,} merged"] if merged else [])]
    name = short(stage.title, int(size // 6))
    line = f"{name}: {', '.join(counts)}"
    return [line] if 6 * len(line) <= size else [name, *counts]


def _caption(fates: np.ndarray | None, labels: Sequence[str], number: int, size: float) -> str:
    if fates is None:
        return short(labels[number] if labels else f"picture {number + 1}", int(size // 6))
    return f"{int((fates == KEPT).sum()):,} of {len(fates):,}"


def _draw_panel(
    page: _Page, image: np.ndarray, boxes: np.ndarray, fates: np.ndarray | None, place: tuple[float, ...]
) -> None:
    """A picture at left, top, width and height of the page, with its tokens' boxes [n, 4]; plain without fates."""
    from matplotlib.patches import PathPatch

    left, top, width, height = place
    high, wide = image.shape[:2]
    # a tall picture is made narrower so that the row stays low
    width = min(width, height * wide / high)
    axes = page.axes(left, top, width, height)
    picture = _fitted(image if fates is None else _veiled(image, boxes, fates), _SHARP * width)
    axes.imshow(picture, extent=(0, wide, high, 0), aspect="auto", interpolation="nearest")
    axes.set(xlim=(0, wide), ylim=(high, 0))
    if fates is None:
        return
    for fate, colour in ((KEPT, KEPT_LINE), (MERGED, MERGED_LINE)):
        chosen = boxes[fates == fate]
        if not len(chosen):
            continue
        cell = float(np.median(chosen[:, 2] - chosen[:, 0])) * width / wide  # pixels of the page
        thick = min(max(0.1 * cell, 0.5), 1.2)
        drawn = [_path(_outlines(chosen))]
        if fate == MERGED:
            drawn.append(_path(_diamonds(chosen), closed=True))
        for number, path in enumerate(drawn):
            # a pale line under the coloured one shows it on dark pictures
            axes.add_patch(PathPatch(path, fill=False, edgecolor="#ffffff", linewidth=2 * thick, alpha=0.7))
            ink = {"edgecolor": colour, "facecolor": colour, "linewidth": 0.0 if number else thick}
            axes.add_patch(PathPatch(path, fill=bool(number), **ink))


def _path(shapes: Sequence[Sequence[Any]], closed: bool = False) -> Any:
    """Many lines or polygons as one path, which stays small in a page."""
    from matplotlib.path import Path

    codes: list[Any] = []
    ends: list[Any] = []
    for shape in shapes:
        ends += [*shape, shape[0]] if closed else shape
        codes += [Path.MOVETO, *[Path.LINETO] * (len(shape) - 1), *[Path.CLOSEPOLY] * closed]
    return Path(np.reshape(ends, (-1, 2)), codes)


def _diamonds(boxes: np.ndarray) -> list[Any]:
    """A mark in the middle of each box, as wide as a third of it."""
    top, left, bottom, right = boxes.T
    down, across, reach = (top + bottom) / 2, (left + right) / 2, (bottom - top) / 6
    corners = [across - reach, down, across, down - reach, across + reach, down, across, down + reach]
    return np.stack(corners, axis=1).reshape(-1, 4, 2).tolist()


def _fitted(image: np.ndarray, pixels: float) -> np.ndarray:
    """[H, W, 3] bytes, made smaller where it is wider than `pixels`."""
    from PIL import Image

    data = np.round(255 * image).astype(np.uint8)
    high, wide = data.shape[:2]
    if wide <= pixels:
        return data
    size = (max(round(pixels), 1), max(round(high * pixels / wide), 1))
    return np.asarray(Image.fromarray(data).resize(size, Image.Resampling.BOX))


def _veiled(picture: np.ndarray, boxes: np.ndarray, fates: np.ndarray) -> np.ndarray:
    """The picture where tokens were kept, pale grey elsewhere, and in between where they were merged."""
    clear = np.zeros(picture.shape[:2])
    for box, fate in zip(boxes, fates):
        if fate:
            top, left, bottom, right = (round(float(side)) for side in box)
            clear[top : max(bottom, top + 1), left : max(right, left + 1)] = 1.0 if fate == KEPT else 0.45
    grey = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    pale = _VEIL + _DETAIL * (grey - _VEIL)
    return pale + clear[..., None] * (picture - pale)


def _outlines(boxes: np.ndarray) -> list[list[tuple[float, float]]]:
    """The border of the union of boxes as straight lines, joined where one goes on in the other."""
    sides: dict[tuple[bool, float], dict[tuple[float, float], int]] = {}
    for top, left, bottom, right in np.round(boxes, 2).tolist():
        rows = [(True, level, left, right) for level in (top, bottom)]
        for across, level, start, end in [*rows, (False, left, top, bottom), (False, right, top, bottom)]:
            spans = sides.setdefault((across, level), {})
            spans[start, end] = spans.get((start, end), 0) + 1
    lines = []
    for (across, level), spans in sides.items():
        joined: list[list[float]] = []
        # what is there twice lies between two boxes
        for start, end in sorted(span for span, times in spans.items() if times == 1):
            if joined and joined[-1][1] == start:
                joined[-1][1] = end
            else:
                joined.append([start, end])
        lines += [[(s, level), (e, level)] if across else [(level, s), (level, e)] for s, e in joined]
    return lines


def _legend(page: _Page, merged: bool) -> None:
    """Three small samples with their words."""
    from matplotlib.patches import PathPatch, Rectangle

    pale = f"{_VEIL + _DETAIL * (0.45 - _VEIL):.3f}"
    kinds = [("kept", "#7fa3b8", KEPT_LINE, 1.4), ("dropped", pale, pale, 0.0)]
    if merged:
        kinds.insert(1, ("merged into another", "#b5b9bd", MERGED_LINE, 1.4))
    left = float(_EDGE)
    for words, fill, line, thick in kinds:
        axes = page.axes(left, 4, 14, 14)
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.add_patch(Rectangle((0.08, 0.08), 0.84, 0.84, facecolor=fill, edgecolor=line, linewidth=thick))
        if line == MERGED_LINE:
            mark = _path(_diamonds(np.array([[0.0, 0.0, 1.0, 1.0]])), closed=True)
            axes.add_patch(PathPatch(mark, facecolor=line, linewidth=0))
        page.text(left + 19, 15, words)
        left += 19 + 6.2 * len(words) + 22
