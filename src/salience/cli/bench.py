"""`salience bench`: rerun what the papers claim, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from salience.claims.harness import Evidence


def bench(
    method: Annotated[
        list[str] | None, typer.Argument(help="The methods whose claims to rerun, one after the other.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All methods, one after the other.")] = False,
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds (at least 2); default: the claim's own.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for the results as JSON.")] = Path("evidence"),
) -> None:
    """Rerun a paper's claim as a fair experiment here, and say whether it holds.

    Every arm gets the same steps, data, order and initial weights, and its own best learning rate. The verdict
    comes from a 95 % interval of paired differences over seeds.

    Examples:

        salience bench ist

        salience bench hip dhsa sale

        salience bench --all --seeds 3
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from salience.claims.harness import load_experiment, run_experiment
    from salience.core.errors import require
    from salience.core.registry import entries, find
    from salience.hosts.checkpoints import check_device

    require(bool(method) != every, "method", "one or several, or --all and none", method)
    if seeds is not None:
        require(seeds >= 2, "seeds", ">= 2 (an interval needs two)", seeds)
    place = str(check_device(device))
    slugs = list(entries()) if every else [find(name).slug for name in method or ()]
    experiments = [load_experiment(slug) for slug in slugs]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for experiment in experiments:
        with Progress(*columns, transient=True) as bars:
            task = bars.add_task(experiment.slug)

            def show(what: str, done: int, total: int) -> None:
                bars.update(task, description=f"{experiment.slug}: {what}", completed=done, total=total)  # noqa: B023

            evidence = run_experiment(experiment, seeds=seeds, device=place, progress=show)
        path = out / f"{experiment.slug}.json"
        evidence.save(path)
        _print(evidence, path)


def _print(evidence: Evidence, path: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(f"\n[bold]{evidence.slug}[/bold]  {evidence.question}")
    console.print(f"{evidence.setting}\npaper: {evidence.paper}", highlight=False)
    console.print(_means(evidence))
    colours = {"holds": "green", "does not hold": "red", "undecided": "yellow"}
    for judged in evidence.judged:
        says, colour = judged.statement["says"], colours[judged.verdict]
        numbers = f"{judged.mean:.4g} [{judged.low:.4g}, {judged.high:.4g}]"
        console.print(f"[{colour}]{judged.verdict}[/{colour}]: {says}: {numbers}", highlight=False)
    seeds = len(next(iter(evidence.values.values())))
    console.print(f"{seeds} seeds, {evidence.seconds:.0f} s, {evidence.about['machine']}; written to {path}")


def _means(evidence: Evidence) -> Table:
    """Means over seeds, arms by metrics or the other way round: whichever has fewer columns."""
    from statistics import fmean

    from rich.table import Table

    cells = {
        arm: {"rate": f"{evidence.rates[arm]:g}"}
        | {name: f"{fmean(row[name] for row in rows):.4g}" for name in evidence.metrics if name in rows[0]}
        for arm, rows in evidence.values.items()
    }
    arms, names = list(cells), ["rate", *evidence.metrics]
    by_arm = len(names) <= len(arms)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm" if by_arm else "metric", overflow="fold")
    for title in names if by_arm else arms:
        table.add_column(title, justify="right", overflow="fold", min_width=6)
    for row in arms if by_arm else names:
        pairs = [(row, name) for name in names] if by_arm else [(arm, row) for arm in arms]
        table.add_row(row, *(cells[arm].get(name, "") for arm, name in pairs))
    return table
