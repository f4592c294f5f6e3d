"""Random choice of units with a generator of one's own: no global random state is read or moved."""

from __future__ import annotations

import torch
from torch import Tensor

from salience.core import distributed


def generator(seed: int) -> torch.Generator:
    """A CPU generator; every rank makes it from the same seed, so every rank draws the same units."""
    return torch.Generator().manual_seed(seed)


def draw(weights: Tensor, k: int, random: torch.Generator) -> Tensor:
    """Draw `k` distinct units without replacement, then agree on them across ranks.

    Args:
        weights (Tensor): [N] float, unnormalised and non-negative, at least `k` of them positive.
        k (int): how many, in [0, N].
        random (torch.Generator): CPU generator.

    Returns:
        Tensor: [k] int64, rising, the same on every rank (rank 0's draw).
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64)
    chosen = torch.multinomial(weights.detach().cpu(), k, replacement=False, generator=random)
    return distributed.broadcast(chosen.sort().values)
