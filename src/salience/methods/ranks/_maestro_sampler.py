"""Draws of (layer, rank): every pair exactly once in each cycle, in an order that the step number decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from salience.core.errors import require

# odd, so that different starts and cycles give different generators
_CYCLE, _START = 1_000_003, 7_919


class OrderedRanks:
    """Walks through all pairs {layer i, 1 <= b <= ranks[i]} in shuffled order, then shuffles anew.

    A layer is so chosen in proportion to its rank. What is drawn depends on the step, the seed and `start` alone:
    data-parallel ranks agree without talking, and a resumed run needs no more than `ranks` and `start`.

    Args:
        ranks (Sequence[int]): rank of each layer, >= 1.
        seed (int): of the order, >= 0.
        start (int): the step with which the first cycle begins.

    Example:
        >>> import salience as sal
        >>> draws = sal.OrderedRanks([2, 1], seed=0)
        >>> sorted(draws.at(step) for step in range(len(draws)))
        [(0, 1), (0, 2), (1, 1)]
    """

    def __init__(self, ranks: Sequence[int], *, seed: int = 0, start: int = 0) -> None:
        require(
            len(ranks) > 0 and all(rank >= 1 for rank in ranks), "ranks", "whole numbers >= 1", list(ranks)
        )
        require(seed >= 0, "seed", ">= 0", seed)
        self.ranks = tuple(int(rank) for rank in ranks)
        self.seed = seed
        self.start = start
        self._pairs = [(layer, rank) for layer, r in enumerate(self.ranks) for rank in range(1, r + 1)]
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        """Number of pairs: the steps of one cycle."""
        return len(self._pairs)

    def at(self, step: int) -> tuple[int, int]:
        """The layer (from 0) that runs cut in this step, and the rank (from 1) to which it is cut."""
        cycle, position = divmod(step - self.start, len(self))
        if self._order is None or self._order[0] != cycle:
            random = torch.Generator().manual_seed(_CYCLE * self.seed + _START * self.start + cycle)
            self._order = (cycle, torch.randperm(len(self), generator=random).tolist())
        return self._pairs[self._order[1][position]]

    def independent(self, step: int) -> list[int]:
        """One rank for every layer, each uniform in 1..r: the variant in which all layers run cut at once."""
        random = torch.Generator().manual_seed(_CYCLE * self.seed + step)
        return [int(torch.randint(1, rank + 1, (1,), generator=random)) for rank in self.ranks]
