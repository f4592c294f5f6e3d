"""The picture of a cut mixture: one row a layer, one column an expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from salience.core.drawing import MUTED, WIDE, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_experts(scores: Tensor, kept: Tensor, *, width: int = WIDE) -> Figure:
    """Scores of each layer's experts as a map, and a dot on those that stay.

    Args:
        scores (Tensor): [L, E]; each row is divided by its largest entry.
        kept (Tensor): [L, M] int64.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel.
    """
    layers, experts = scores.shape
    shares = (scores / scores.amax(-1, keepdim=True).clamp_min(1e-300)).cpu().numpy()
    with style():
        figure = new_figure(width, 96 * min(1.4 + 0.22 * layers, 8.0))
        axes = figure.subplots()
        image = axes.imshow(shares, aspect="auto", origin="lower", vmin=0.0, vmax=1.0, cmap="viridis")
        figure.colorbar(image, ax=axes, label="score / best of the layer", pad=0.02)
        across = kept.flatten().cpu().numpy()
        up = [layer for layer in range(layers) for _ in range(kept.shape[1])]
        size = max(min(400.0 / experts, 26.0), 2.0)
        axes.scatter(across, up, s=size, c="white", edgecolors=MUTED, linewidths=0.6)
        axes.set_title(f"experts of each layer: {kept.shape[1]} of {experts} stay (dots)")
        axes.set_xlabel("expert")
        axes.set_ylabel("layer with experts")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure
