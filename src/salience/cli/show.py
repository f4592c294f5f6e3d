"""`salience show SLUG`: everything about one method."""

from __future__ import annotations

import itertools
from typing import Annotated

import typer


def show(
    slug: Annotated[str, typer.Argument(help="The method's name, as `salience methods` lists it.")],
) -> None:
    """Show one method: parameters, paper, how it differs from the official code, and how to use it."""
    import dataclasses
    import inspect
    import sys

    from rich.console import Console
    from rich.table import Table

    from salience.core.registry import find, load

    entry = find(slug)
    cls = load(entry.slug)
    console = Console()
    paper = f"arXiv {entry.arxiv}" if entry.arxiv else "baseline"
    console.print(f"[bold]{entry.name}[/bold]  {entry.title}  {paper}", highlight=False)
    console.print(
        f"scores each {entry.unit}, spends: {entry.spends}; job: {entry.job}; on: {', '.join(entry.targets)}"
    )
    console.print()
    console.print(inspect.cleandoc(sys.modules[cls.__module__].__doc__ or ""), highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold", title="Parameters", title_justify="left")
    table.add_column("name", no_wrap=True)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning")
    meanings = _attributes(inspect.getdoc(cls) or "")
    for field in dataclasses.fields(cls):
        table.add_row(field.name, repr(field.default), meanings.get(field.name, ""))
    console.print()
    console.print(table)
    console.print("\n[bold]Use[/bold]")
    target = "trainer" if "trainer" in entry.targets else entry.targets[0]
    given = "teacher=teacher" if "teacher" in cls.needs else ""
    console.print(f"  import salience as sal\n  sal.focus({target}, sal.{entry.name}({given}))", markup=False)
    if "trainer" in entry.targets and entry.job == "tune":
        console.print(f"  salience tune --method {entry.slug}", markup=False)
    if "model" in entry.targets and entry.unit == "token":
        console.print(f"  salience see --method {entry.slug}", markup=False)
    if entry.arxiv:
        console.print(f"  salience bench {entry.slug}      # rerun the paper's claim here", markup=False)
    example = _example(inspect.getdoc(cls) or "")
    if example:
        console.print("\n[bold]In a loop of your own[/bold]")
        for line in example:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def _example(text: str) -> list[str]:
    """The code of the `Example:` section of a Google docstring, without prompts."""
    _, _, section = text.partition("\nExample:\n")
    lines = itertools.takewhile(lambda line: line.startswith("    "), section.splitlines())
    return [line[8:] for line in lines if line[4:8] in (">>> ", "... ")]


def _attributes(text: str) -> dict[str, str]:
    """The `Attributes:` section of a Google docstring: name -> meaning."""
    found: dict[str, str] = {}
    name, inside = "", False
    for line in text.splitlines():
        if line.strip() == "Attributes:":
            inside = True
        elif (
            inside
            and line.startswith("    ")
            and not line.startswith("     ")
            and "(" in line
            and ":" in line
        ):
            name, _, meaning = line.strip().partition(":")
            name = name.partition(" ")[0]
            found[name] = meaning.strip()
        elif inside and name and line.startswith("     "):
            found[name] += " " + line.strip()
        elif inside and line.strip():
            break
    return found
