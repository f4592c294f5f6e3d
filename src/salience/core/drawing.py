"""The look of all pictures: sizes, colours, an empty figure, and names that fit.

Figures are made without pyplot, so nothing global changes and no window opens; matplotlib is imported when the first
one is drawn. Colours tell apart for colour-blind readers and in grey print.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE, NARROW = 820, 370  # pixels of a page's column and of a phone
INK, MUTED, GRID, PAPER, BASELINE = "#1f2733", "#5c6673", "#dde2e8", "#fffffe", "#6b7480"
ARMS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#997700", "#56b4e9")
_STYLE: dict[str, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 8.0,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 3.0,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "figure.facecolor": PAPER,
    "axes.facecolor": "none",
    "savefig.facecolor": PAPER,
    "text.parse_math": False,  # labels are the user's words, dollar signs included
}


@contextmanager
def style() -> Iterator[None]:
    """Figures that are made in the block have the look of all others."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many pixels at 96 an inch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 96, height / 96), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.06, wspace=0.04, hspace=0.06)
    return figure


def _clean(text: object) -> str:
    """Text on one line without characters that no font shows."""
    return "".join(char if char.isprintable() else " " for char in str(text))


def wrapped(text: object, width: int) -> str:
    """A title on at most two lines of a figure of `width` pixels."""
    return "\n".join(textwrap.wrap(_clean(text), max((width - 60) // 8, 20), max_lines=2, placeholder=" …"))


def short(text: object, characters: int) -> str:
    """Without its middle if it is longer: names of arms differ at their ends."""
    text, half = _clean(text), (characters - 1) // 2
    return text if len(text) <= characters else f"{text[:half].rstrip()}…{text[-half:].lstrip()}"


def colours(arms: Mapping[str, Any] | Sequence[str], baseline: str | None = None) -> dict[str, str]:
    """A colour for each arm, the same in every picture: grey for the baseline, if there are others beside it."""
    names = list(arms)
    others = [name for name in names if name != baseline or len(names) == 1]
    return {name: ARMS[others.index(name) % len(ARMS)] if name in others else BASELINE for name in names}
