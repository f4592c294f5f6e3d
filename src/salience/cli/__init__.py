"""The command line: one file a command, found by its name. `salience --help` imports no torch."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Annotated

import typer

from salience.core.errors import SalienceError

app = typer.Typer(
    name="salience",
    help="Find what matters in a model and its data, and spend only there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Start with [bold]salience tune[/bold] (no arguments needed) or [bold]salience methods[/bold].",
)


def _version(asked: bool) -> None:
    if asked:
        from salience import __version__

        typer.echo(f"salience {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Find what matters in a model and its data, and spend only there."""


def _register() -> None:
    for found in pkgutil.iter_modules(__path__):
        if not found.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{found.name}")
            app.command(name=found.name)(getattr(module, found.name))


_register()


def main() -> None:
    """Entry point: an error that is about the input is one line and exit code 2; anything else keeps its trace."""
    try:
        app()
    except SalienceError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
