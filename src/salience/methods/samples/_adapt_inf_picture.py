"""The picture of a release: clusters, how much of each is trained on, and whom it was chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_clusters(clusters: Sequence[dict[str, Any]]) -> Figure:
    """One bar a cluster, the largest on top: its samples, and in front of them those that were chosen.

    Args:
        clusters (Sequence[dict]): with samples, chosen and expert.
    """
    from matplotlib.figure import Figure as Canvas

    ranked = sorted(enumerate(clusters), key=lambda pair: pair[1]["samples"])
    figure = Canvas(figsize=(7, 1.2 + 0.3 * len(ranked)), layout="constrained")
    axes = figure.subplots()
    places = range(len(ranked))
    axes.barh(places, [one["samples"] for _, one in ranked], color="#d5d9de", label="in pool and arrivals")
    axes.barh(places, [one["chosen"] for _, one in ranked], color="#2a6f97", label="to train on")
    axes.set_yticks(
        places, [f"{number}: by {one['expert'] or 'chance'}" for number, one in ranked], fontsize=8
    )
    axes.set_xlabel("samples")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("pseudo-skills and the expert that was asked in each", loc="left", fontsize=10)
    return figure
