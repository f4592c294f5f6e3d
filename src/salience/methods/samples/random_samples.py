"""Random samples: the baseline of every method that chooses data, which keeps as many without looking.

Scored: each document by a draw from [0, 1) that depends on the seed and on its place in the corpus alone, so that
shards, machines and resuming change nothing.
Spent: the best `keep` of the corpus, or of each domain, stay.

A baseline, from no paper; there is no official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from salience.core.budget import check_keep
from salience.core.documents import Scorer
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.selecting import pick


@dataclass(frozen=True, kw_only=True)
class RandomSamples(Method):
    """Keep samples at random: the baseline that a method has to beat.

    Attributes:
        keep (int | float): samples that stay: a share in (0, 1], rounded up, or a count.
        seed (int): of the draws, >= 0.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("datasets",)
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Random samples"

    keep: int | float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(type(self.seed) is int and self.seed >= 0, "seed", "an integer >= 0", self.seed)

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """Draws for every document; no model is needed."""
        return pick(dataset, self, data)

    def scorer(self, model: Any = None, tokenizer: Any = None) -> Scorer:
        """Draws by the documents' numbers."""
        return lambda batch: {"score": score(batch.numbers, self.seed)}


def score(numbers: Tensor, seed: int) -> Tensor:
    """A draw for each number: splitmix64 of number and seed.

    Args:
        numbers (Tensor): [B] int64, >= 0.
        seed (int): >= 0.

    Returns:
        Tensor: [B] float32 in [0, 1).
    """
    # int64 arithmetic wraps around, as the hash wants it; shifts are arithmetic, so the sign is cut off behind them
    mixed = (numbers.cpu() + 1) * _signed(0x9E3779B97F4A7C15) + _signed(
        (seed * 0xD1342543DE82EF95) % (1 << 64)
    )
    mixed = (mixed ^ _shifted(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shifted(mixed, 27)) * _signed(0x94D049BB133111EB)
    return _shifted(mixed ^ _shifted(mixed, 31), 40).float() / (1 << 24)


def _shifted(values: Tensor, by: int) -> Tensor:
    return (values >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
