"""The page of `salience select`: scores, sources and texts from both ends, or clusters and what each was asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.pictures_picked import draw_clusters, draw_picked
from salience.report import write_page
from salience.report.view import drawn

_MOST_SKIPPED, _MOST_SOURCES = 20, 50
# counts of `spent` that a reader wants to know about, and what they mean
_COUNTS = {
    "unscored": "could not be scored and are not kept",
    "short": "are shorter than the method scores",
    "cut": "are longer than what was read of them",
    "floored": "have so low a loss that it was raised before dividing by it",
    "skipped": "rows or files could not be read and were left out",
}


def build_select(folder: str | Path, result: Mapping[str, Any], values: np.ndarray, kept: np.ndarray) -> Path:
    """Write `folder/report.html`, whole or not at all: one file that needs no network and no other file.

    Args:
        folder (str | Path): of the page.
        result (Mapping): as `salience.jobs.select` makes it.
        values (np.ndarray): [N] scores.
        kept (np.ndarray): [N] nonzero where kept.

    Raises:
        FileError: if the page cannot be written; an earlier one is intact.
    """
    return write_page(Path(folder) / "report.html", "select.html", _page(result, values, kept))


def build_release(folder: str | Path, result: Mapping[str, Any]) -> Path:
    """Write `folder/report.html` on a method that clusters samples; see `build_select`."""
    spent, clusters = result["spent"], result["clusters"]
    chart = drawn(
        lambda width: draw_clusters(clusters, width=width),
        "samples of each cluster, and how many of them were chosen",
        "clusters",
    )
    page = {
        "title": result["title"],
        "eyebrow": f"{result['method']} on {result['data']}",
        "summary": f"Chosen from {len(clusters)} pseudo-skills. Of pool and arrivals {spent['pool']:,} samples "
        f"stay in the pool and {spent['pruned']:,} leave it.",
        "notes": [],
        "sources": [],
        "examples": [],
        "chart": chart,
        "chart_title": "Clusters",
        "clusters": [
            {
                "name": number,
                "samples": f"{one['samples']:,}",
                "chosen": f"{one['chosen']:,}",
                "expert": one["expert"] or "chance",
            }
            for number, one in sorted(enumerate(clusters), key=lambda pair: -pair[1]["samples"])
        ],
        "facts": [
            ("Method", result["method"]),
            ("Model", result["model"]),
            ("Data", result["data"]),
            ("Release", spent["release"]),
            ("Scored again", f"{spent['scored again']:,}"),
        ],
        **_shared(result),
    }
    return write_page(Path(folder) / "report.html", "select.html", page)


def _shared(result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "skipped": result["skipped"][:_MOST_SKIPPED],
        "more": max(0, len(result["skipped"]) - _MOST_SKIPPED),
        "command": result["command"],
        "about": {name: str(value) for name, value in result["about"].items() if value},
    }


def _page(result: Mapping[str, Any], values: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    spent, sources = result["spent"], result["sources"]
    share = spent["kept"] / spent["documents"]
    chart = drawn(
        lambda width: draw_picked(values, kept, sources, width=width),
        "scores of kept and dropped documents, and the share kept of each source",
        "picked",
    )
    return {
        "title": result["title"],
        "eyebrow": f"{result['method']} on {result['data']}",
        "summary": f"{100 * share:.1f} % of the documents are kept: those with a score of "
        f"{spent['threshold']:.4g} or more.",
        "notes": [f"{spent[name]:,} {what}." for name, what in _COUNTS.items() if spent.get(name)],
        "chart": chart,
        "chart_title": "Scores",
        "clusters": [],
        "sources": [
            {
                "name": name or "(none)",
                "documents": f"{total:,}",
                "kept": f"{chosen:,}",
                "share": f"{100 * chosen / total:.1f} %",
                "enriched": f"{chosen / total / share:.2f}×" if share else "-",
            }
            for name, (total, chosen) in list(sources.items())[:_MOST_SOURCES]
        ],
        "more_sources": max(0, len(sources) - _MOST_SOURCES),
        "examples": [
            {**one, "score": f"{one['score']:.4g}", "kept": "kept" if one["kept"] else "dropped"}
            for one in result["examples"]
        ],
        **_shared(result),
        "more": max(0, spent.get("skipped", 0) - _MOST_SKIPPED),
        "facts": [
            ("Method", result["method"]),
            ("Model", result["model"] or "none"),
            ("Data", result["data"]),
            ("Tokens read", f"{spent['tokens']:,}" if spent.get("tokens") else "none"),
        ],
    }
