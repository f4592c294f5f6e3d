"""`salience methods`: the list of methods."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    unit: Annotated[
        str | None, typer.Option(help="Only methods that score this unit: layer, token, ...")
    ] = None,
    job: Annotated[
        str | None, typer.Option(help="Only methods for this job: tune, shrink, select, ...")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Only methods in whose name, title or summary all these words occur.")
    ] = None,
) -> None:
    """List the methods: what each scores, what it spends, and its paper.

    Examples:

        salience methods --unit token

        salience methods --search "memory fine-tuning"
    """
    from rich.console import Console
    from rich.table import Table

    from salience.core.errors import require
    from salience.core.registry import entries

    known = list(entries().values())
    for name, value in (("unit", unit), ("job", job)):
        if value is not None:
            valid = sorted({getattr(entry, name) for entry in known})
            require(value in valid, name, f"one of {', '.join(valid)}", value)
    words = (search or "").lower().split()
    chosen = [
        entry
        for entry in known
        if (unit is None or entry.unit == unit)
        and (job is None or entry.job == job)
        and all(word in f"{entry.slug} {entry.name} {entry.title} {entry.summary}".lower() for word in words)
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("method", "scores", "job", "on", "what it does", "paper"):
        table.add_column(column, no_wrap=column in ("method", "paper"))
    for entry in chosen:
        paper = entry.arxiv or "baseline"
        table.add_row(entry.slug, entry.unit, entry.job, ", ".join(entry.targets), entry.summary, paper)
    console = Console()
    console.print(table if chosen else "no method matches; salience methods lists all")
