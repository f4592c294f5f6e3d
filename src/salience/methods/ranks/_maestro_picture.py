"""The picture of the ranks: how far each layer's components matter, and where it was cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 24  # layers shown; of more, evenly spaced ones
_FLOOR = 1e-4


@dataclass(frozen=True)
class Spectrum:
    """One layer as it was decided.

    Attributes:
        values (Tensor): [full] importances, on the CPU; dropped components are 0.
        rank (int): how many are kept.
        shape (tuple[int, int]): m and n.
        positions (int): output positions of a sample.
    """

    values: Tensor
    rank: int
    shape: tuple[int, int]
    positions: int


def draw_spectra(spectra: Mapping[str, Spectrum]) -> Figure:
    """Importance against component for every layer, as a share of the layer's largest; the kept prefix is shaded.

    Args:
        spectra (Mapping[str, Spectrum]): by path.

    Returns:
        Figure: small panels with one scale; the dotted line is the rank above which factors are larger than dense.
    """
    from matplotlib.figure import Figure

    paths = _spread(list(spectra), _MOST)
    columns = min(len(paths), 4)
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(2.6 * columns, 1.7 * rows + 0.5), layout="constrained")
    panels: Any = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel in panels.flat[len(paths) :]:
        panel.set_visible(False)
    for panel, path in zip(panels.flat, paths):
        _draw(panel, path, spectra[path])
    kept = sum(one.rank for one in spectra.values())
    full = sum(len(one.values) for one in spectra.values())
    shown = "" if len(paths) == len(spectra) else f", {len(paths)} of {len(spectra)} layers shown"
    figure.suptitle(f"Ranks: {kept} of {full} components kept{shown}", fontsize=10, x=0.01, ha="left")
    figure.supxlabel("component", fontsize=8)
    figure.supylabel("importance, share of the layer's largest", fontsize=8)
    return figure


def _draw(panel: Any, path: str, one: Spectrum) -> None:
    first = float(one.values[0]) or 1.0
    heights = (one.values[: one.rank] / first).clamp_min(_FLOOR).tolist()
    full = len(one.values)
    m, n = one.shape
    panel.axvspan(0.5, one.rank + 0.5, color="#2a78d6", alpha=0.12, lw=0)
    panel.plot(range(1, len(heights) + 1), heights, color="#2a78d6", lw=1.2, drawstyle="steps-mid")
    panel.axvline(m * n / (m + n), color="0.4", lw=0.8, ls=":")
    panel.set(yscale="log", ylim=(_FLOOR, 2.0), xlim=(0.5, full + 0.5))
    panel.minorticks_off()  # also most of the drawing time
    panel.set_yticks([1e-4, 1e-2, 1.0])
    panel.set_title(f"{_short(path)}: {one.rank} of {full}", fontsize=7)
    panel.tick_params(labelsize=6)


def _short(path: str) -> str:
    """The last names of a path that fit above a panel."""
    parts = path.split(".")
    while len(".".join(parts)) > 28 and len(parts) > 1:
        parts = parts[1:]
    return ".".join(parts)


def _spread(items: Sequence[str], most: int) -> list[str]:
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
