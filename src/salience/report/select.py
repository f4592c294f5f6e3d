"""The page of `salience select`: the scores, what was kept of each source, and texts from both ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.pictures_picked import draw_picked
from salience.report import write_page
from salience.report.view import drawn

_MOST_SKIPPED = 20
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
        "sources": [
            {
                "name": name or "(none)",
                "documents": f"{total:,}",
                "kept": f"{chosen:,}",
                "share": f"{100 * chosen / total:.1f} %",
                "enriched": f"{chosen / total / share:.2f}×" if share else "-",
            }
            for name, (total, chosen) in sources.items()
        ],
        "examples": [
            {**one, "score": f"{one['score']:.4g}", "kept": "kept" if one["kept"] else "dropped"}
            for one in result["examples"]
        ],
        "skipped": result["skipped"][:_MOST_SKIPPED],
        "more": max(0, spent.get("skipped", 0) - _MOST_SKIPPED),
        "command": result["command"],
        "facts": [
            ("Method", result["method"]),
            ("Model", result["model"] or "none"),
            ("Data", result["data"]),
            ("Tokens read", f"{spent['tokens']:,}" if spent.get("tokens") else "none"),
        ],
        "about": {name: str(value) for name, value in result["about"].items() if value},
    }
