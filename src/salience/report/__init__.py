"""From a run folder to one page that explains it: `build(folder)` writes `folder/report.html`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from salience.core.files import write_text_atomic
from salience.report.read import read_run
from salience.report.view import page

__all__ = ["build", "write_page"]


def build(folder: str | Path) -> Path:
    """Write the report of a run, whole or not at all: one file that needs no network and no other file.

    The folder holds `recipe.json`, `metrics.jsonl` and `result.json`, and may hold `scores.safetensors` and
    `tokens.json`; see `salience.report.read` for what is in them. All arms of a run started from the same weights
    and saw the same data in the same order: the page says so.

    Args:
        folder (str | Path): the run folder.

    Returns:
        Path: the page.

    Raises:
        ParameterError: if a file is missing or broken; the text says which and why.
        WriteError: if the page cannot be written; an earlier one is intact.
    """
    return write_page(Path(folder) / "report.html", "page.html", page(read_run(Path(folder))))


def write_page(path: Path, template: str, values: Mapping[str, Any]) -> Path:
    """Fill a template of this package and write it, whole or not at all.

    Raises:
        WriteError: if the page cannot be written; an earlier one is intact.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = made.get_template(template).render(values)
    # halves of surrogate pairs can stand in JSON but in no file
    write_text_atomic(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path
