"""What commands that run a model have in common: quiet libraries, bars, runs that Ctrl-C ends at a step, columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet_libraries(console: Any) -> Iterator[None]:
    """Import transformers, silence what it says to its own developers, and show that the block takes a while.

    Args:
        console (Console): of rich, on standard error.
    """
    import warnings

    with console.status("loading torch and transformers"):
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # what transformers says to its own developers
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        yield


class Bar:
    """Bars that appear with the first call and go at the end of the block: one of the sandbox may come before them.

    Args:
        console (Console): of rich, on standard error.
        what (str): is done, in a few words.
        remaining (bool): whether the time that is left is told.
    """

    def __init__(self, console: Any, what: str = "", *, remaining: bool = False) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        left = (TimeRemainingColumn(),) if remaining else ()
        self._bar = Progress(*columns, *left, console=console, transient=True)
        self._what = what
        self._tasks: dict[str, Any] = {}

    def __call__(self, done: int, total: int, what: str = "", note: str = "") -> None:
        """So many of so many are done.

        Args:
            done (int): in [0, total].
            total (int): >= 1.
            what (str): is done; each has a bar of its own. Empty: what the bar was made for.
            note (str): is told behind it.
        """
        what = what or self._what
        if not self._tasks:
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, description=f"{what}: {note}" if note else what)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


@contextmanager
def stoppable(console: Any) -> Iterator[Callable[[], bool]]:
    """Run the block so that Ctrl-C ends it at the next step; what it gives says whether to stop.

    A second Ctrl-C stops at once. A block that was stopped ends the command with the shell's code for that, 130.

    Args:
        console (Console): of rich, on standard error.
    """
    import signal

    import typer

    from salience.hosts.arms import Stopped

    asked: list[int] = []

    def interrupt(*_: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(1)
        console.print("stopping at the end of this step (press again to stop at once)")

    previous = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: bool(asked)
    except Stopped as stopped:
        console.print(str(stopped))
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGINT, previous)


def column_names(pairs: list[str] | None) -> dict[str, str] | None:
    """`--column OURS=THEIRS`, as often as given, as a dictionary.

    Raises:
        ParameterError: if one is not written so.
    """
    from salience.core.errors import ParameterError

    if not pairs:
        return None
    found = {}
    for pair in pairs:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ParameterError(f"column must be written OURS=THEIRS, got {pair!r}")
        found[ours] = theirs
    return found
