"""Errors that a user can act on. Each says what was expected, what was found and what to do.

`SalienceError` is the common base: the command line prints its text alone and exits with code 2; any other
exception is a fault of ours and keeps its traceback.
"""

from typing import Any


class SalienceError(Exception):
    """Base of every error that is about the user's input and not about our code."""


class ParameterError(SalienceError, ValueError):
    """A value is outside its valid range: `keep must be in (0, 1], got 1.5`."""


class TargetError(SalienceError, TypeError):
    """A method was given a target of a kind that it does not act on."""


class StructureError(SalienceError, ValueError):
    """Layers, heads or other units could not be found in a model; the text shows the module tree seen."""


class ConflictError(SalienceError, ValueError):
    """Two methods, or a method and the target's own settings, contradict each other."""


class TrainingError(SalienceError, RuntimeError):
    """Training had to stop: for example the loss is not finite."""


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line of at most 300 characters; its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def require(condition: bool, name: str, wanted: str, got: Any) -> None:
    """Raise `ParameterError("{name} must be {wanted}, got {got!r}")` unless `condition` holds.

    Args:
        condition (bool): what has to be true.
        name (str): the parameter as the user writes it.
        wanted (str): what is valid, read after "must be": "in (0, 1]", "one of keep, drop, reset".
        got (Any): what was given.

    Raises:
        ParameterError: if `condition` is false.
    """
    if not condition:
        raise ParameterError(f"{name} must be {wanted}, got {got!r}")
