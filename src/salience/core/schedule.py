"""How a value moves over training: `schedule(progress)` for progress in [0, 1].

Constant, linear, cosine, cubic (fast at first, as in gradual pruning: arXiv 1710.01878) and staged. A schedule
reaches exactly its start at progress 0 and exactly its end at progress 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from salience.core.errors import require

Shape = Literal["constant", "linear", "cosine", "cubic", "staged"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value over progress; build it with `constant`, `linear`, `cosine`, `cubic` or `staged`.

    Attributes:
        shape (str): which curve.
        start (float): the value up to `begin`.
        end (float): the value from `finish` on.
        begin (float): progress at which it starts to move, in [0, 1].
        finish (float): progress at which it has arrived, in (begin, 1].
        stages (tuple[tuple[float, float], ...]): for "staged": (progress from which it holds, value), rising.
    """

    shape: Shape
    start: float = 0.0
    end: float = 0.0
    begin: float = 0.0
    finish: float = 1.0
    stages: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        require(0.0 <= self.begin < self.finish <= 1.0, "begin, finish", "0 <= begin < finish <= 1",
                (self.begin, self.finish))  # fmt: skip
        if self.shape == "staged":
            points = [at for at, _ in self.stages]
            rising = all(a < b for a, b in pairwise(points))
            valid = bool(points) and points[0] == 0.0 and points[-1] <= 1.0 and rising
            require(
                valid, "stages", "(progress, value) pairs that start at 0 and rise to at most 1", self.stages
            )

    def __call__(self, progress: float) -> float:
        """The value at `progress`, which is clamped to [0, 1]."""
        progress = min(max(progress, 0.0), 1.0)
        if self.shape == "staged":
            return next(value for at, value in reversed(self.stages) if progress >= at)
        if self.shape == "constant" or progress >= self.finish:
            return self.end
        if progress <= self.begin:
            return self.start
        x = (progress - self.begin) / (self.finish - self.begin)
        moved = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "cubic": 1 - (1 - x) ** 3}[
            self.shape
        ]
        return self.start + (self.end - self.start) * moved


def constant(value: float) -> Schedule:
    """Always `value`."""
    return Schedule(shape="constant", start=value, end=value)


def linear(start: float, end: float, *, begin: float = 0.0, finish: float = 1.0) -> Schedule:
    """A straight line from `start` to `end`."""
    return Schedule(shape="linear", start=start, end=end, begin=begin, finish=finish)


def cosine(start: float, end: float, *, begin: float = 0.0, finish: float = 1.0) -> Schedule:
    """Half a cosine: slow, fast, slow."""
    return Schedule(shape="cosine", start=start, end=end, begin=begin, finish=finish)


def cubic(start: float, end: float, *, begin: float = 0.0, finish: float = 1.0) -> Schedule:
    """Fast at first, slow at the end: `end + (start - end) (1 - x)^3`."""
    return Schedule(shape="cubic", start=start, end=end, begin=begin, finish=finish)


def staged(*stages: tuple[float, float]) -> Schedule:
    """Steps: `staged((0.0, 1.0), (0.5, 0.25))` is 1 in the first half and 0.25 in the second."""
    return Schedule(shape="staged", stages=stages)
