"""What LoRAPrune removed: maps of layer x unit, brighter for a higher score, grey where it is gone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def draw(averages: Mapping[Any, Tensor], masks: Mapping[Any, Tensor]) -> Any:
    """One panel for each kind of unit, layers upwards.

    Args:
        averages (Mapping[str, Tensor]): kind -> [L, U] scores.
        masks (Mapping[str, Tensor]): kind -> [L, U] bool, False where removed.

    Returns:
        matplotlib.figure.Figure: the figure; of the channels, each layer is sorted by its score.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers = next(iter(masks.values())).shape[0]
    figure = Figure(figsize=(8.5, len(masks) * (1.1 + 0.16 * min(layers, 20))), layout="constrained")
    panels = figure.subplots(len(masks), 1, squeeze=False)[:, 0]
    scale = colormaps["viridis"].with_extremes(bad=(0.6, 0.6, 0.6, 1.0))
    for axes, (kind, mask) in zip(panels, masks.items()):
        scores = averages[kind].masked_fill(~mask, float("nan")).double().numpy()
        title = f"{kind}: importance, grey where removed"
        if kind == "channels":
            # thousands in an order that means nothing: sorted, the share that is gone shows as a grey end
            scores = -np.sort(-scores, axis=1)
            title += " (sorted in each layer)"
        drawn = axes.imshow(
            np.ma.masked_invalid(scores), scale, aspect="auto", origin="lower", interpolation="none"
        )
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set(xlabel=kind, ylabel="layer")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
        bar = figure.colorbar(drawn, ax=axes, pad=0.015, fraction=0.05)
        bar.locator = MaxNLocator(nbins=3)
    return figure
