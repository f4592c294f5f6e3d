"""A progress bar for long work, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Tells a bar that some steps are done."""

    def __call__(self, steps: int = 1, /) -> None: ...


@contextmanager
def bar(says: str, total: int | None, shown: bool | None = None, *, done: int = 0) -> Iterator[Advance]:
    """A bar that goes away at the end; what the block is given is called for each step.

    Args:
        says (str): what is done, in a few words.
        total (int | None): steps; None where that is not known.
        shown (bool | None): None shows it where standard error is a terminal.
        done (int): steps that were done before.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    hidden = not (console.is_terminal if shown is None else shown)
    with Progress(console=console, disable=hidden, transient=console.is_terminal) as bars:
        task = bars.add_task(says, total=total, completed=done)
        yield lambda steps=1: bars.advance(task, steps)
