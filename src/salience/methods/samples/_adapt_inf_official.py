"""AdaptInf as its released scripts compute it, where that differs: for comparison with their numbers only.

- The histogram that chooses an expert covers 4 standard deviations of the raw score on both sides, but is filled
  with standardised scores: the choice depends on the unit of the score. Where nothing falls inside, the entropy is
  NaN, and a NaN is chosen.
- Shares of clusters are rounded up everywhere, so that they add up to more than the budget, and are equal for all if
  the smallest cluster could fill them.
- The share of a bin is only worked out anew after one that could not fill it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from salience.methods.samples._adapt_inf_spend import histogram_entropy, redundancy


def official_spread(values: Tensor, *, edges: int = 50) -> float:
    """The entropy of standardised values over 4 standard deviations of the raw ones; NaN where none is inside."""
    values = values.double().nan_to_num()
    deviation = values.std(correction=0)
    return histogram_entropy((values - values.mean()) / deviation, 4 * float(deviation), edges)


def official_choice(scores: Tensor, *, edges: int = 50) -> tuple[int, list[float]]:
    """The expert of the largest entropy, or the first one whose entropy is NaN; and the entropies [S]."""
    bits = [official_spread(row, edges=edges) for row in scores]
    undefined = [index for index, value in enumerate(bits) if math.isnan(value)]
    return (undefined[0] if undefined else max(range(len(bits)), key=lambda i: bits[i])), bits


def official_shares(sizes: Sequence[int], total: int) -> list[int]:
    """Shares of a budget that are rounded up at every step; they may add up to more than it."""
    count = len(sizes)
    if min(sizes) * count >= total:
        return [math.ceil(total / count)] * count
    share, shares = math.ceil(total / count), [0] * count
    for place, index in enumerate(sorted(range(count), key=lambda i: sizes[i])):
        shares[index] = min(sizes[index], share)
        if sizes[index] < share:
            share += math.ceil((share - sizes[index]) / (count - place - 1))
    return shares


def official_cover(scores: Tensor, budget: int, bins: int, draw: random.Random) -> list[int]:
    """Positions in the order in which bins from high to low are drawn from."""
    values = scores.tolist()
    ranked = sorted(values)
    low, high = ranked[int(len(ranked) * 0.05)], ranked[int(len(ranked) * 0.95)]
    right, remaining, share = high, budget, math.ceil(budget / bins)
    chosen: list[int] = []
    for index in range(bins):
        left = right - (high - low) / bins
        members = [place for place, value in enumerate(values) if left < value <= right]
        if len(members) < share:
            chosen += members
            remaining -= len(members)
            if index + 1 < bins:
                share = math.ceil(remaining / (bins - index - 1))
        else:
            chosen += draw.sample(members, k=share)
            remaining -= share
        right = left
    return chosen


def official_prune(vectors: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Positions that stay with the shares above, and the redundancies laid cluster by cluster."""
    clusters = int(labels.max()) + 1
    shares = official_shares(torch.bincount(labels, minlength=clusters).tolist(), total)
    kept, most = [], []
    for cluster, share in enumerate(shares):
        members = (labels == cluster).nonzero().squeeze(1)
        most.append(redundancy(vectors[members]))
        kept.append(members[most[-1].argsort(stable=True)[:share]])
    return torch.cat(kept), torch.cat(most)
