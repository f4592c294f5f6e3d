"""What AdaptInf decides from scores and vectors: budgets of clusters, their experts, who trains, who leaves."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_SPAN = 4.0  # standard deviations on both sides of the mean that the histogram covers


def water_fill(sizes: Sequence[int], total: int) -> list[int]:
    """Equal shares of a budget, except that nobody gets more than it holds and the surplus goes to the larger ones.

    From the smallest on, each gets `min(size, ceil(remaining / number of clusters left))`.

    Args:
        sizes (Sequence[int]): of the clusters, >= 0.
        total (int): the budget, >= 0.

    Returns:
        list[int]: one for each cluster; they add up to min(total, sum of sizes) exactly.
    """
    shares, remaining = [0] * len(sizes), total
    order = sorted(range(len(sizes)), key=lambda index: sizes[index])
    for place, index in enumerate(order):
        shares[index] = min(sizes[index], -(-remaining // (len(sizes) - place)))
        remaining -= shares[index]
    return shares


def spread(values: Tensor, *, edges: int = 50) -> float:
    """`H = -sum p log2 p` of the histogram of the standardised values over -4 to 4 standard deviations.

    Args:
        values (Tensor): [m] the scores of a cluster; all of them finite.
        edges (int): of the histogram, which has one cell less, each open on its left.

    Returns:
        float: bits; -inf where the values do not differ.
    """
    values = values.double()
    if not len(values):
        return -torch.inf
    deviation = values.std(correction=0)
    # what a constant leaves is rounding, which would be blown up to a histogram of its own
    if deviation <= 1e-12 * values.abs().max():
        return -torch.inf
    return histogram_entropy((values - values.mean()) / deviation, _SPAN, edges)


def histogram_entropy(values: Tensor, span: float, edges: int) -> float:
    """Bits of the histogram over (-span, span]; what lies outside is not counted; NaN where everything does."""
    borders = torch.linspace(-span, span, edges, dtype=torch.float64)
    cells = torch.bucketize(values, borders).bincount(minlength=edges + 1)[1:edges].double()
    shares = cells / cells.sum()
    return float(-torch.xlogy(shares, shares).sum() / torch.log(torch.tensor(2.0, dtype=torch.float64)))


def choose_expert(scores: Tensor, *, edges: int = 50) -> tuple[int | None, list[float]]:
    """The expert whose scores are most spread out in a cluster; of equal ones the first.

    Args:
        scores (Tensor): [S, m] of every expert; one with a value that is not finite takes no part.
        edges (int): as for `spread`.

    Returns:
        tuple[int | None, list[float]]: which, None where no expert tells the samples apart; and the bits of each,
        -inf where it takes no part.
    """
    bits = [spread(row, edges=edges) if bool(row.isfinite().all()) else -torch.inf for row in scores]
    best = max(range(len(bits)), key=lambda index: bits[index], default=None)
    return (best if best is not None and bits[best] > -torch.inf else None), bits


def priorities(ids: Sequence[str], seed: int) -> Tensor:
    """[n] int64, random but the same for a sample whatever stands beside it: a hash of the seed and its id."""
    hashed = (hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest() for name in ids)
    return torch.tensor([int.from_bytes(value, "big") >> 1 for value in hashed], dtype=torch.int64)


def cover(scores: Tensor, budget: int, priority: Tensor, *, bins: int = 50, tail: float = 0.05) -> Tensor:
    """Samples drawn evenly over the range of a score (coverage-centric selection), without both tails.

    Bins of equal width are served from high to low, each with `ceil(remaining / bins left)`; one with fewer is taken
    whole and passes its surplus on. What is still missing then comes from the range, at last from the tails.

    Args:
        scores (Tensor): [m] finite.
        budget (int): how many, >= 0.
        priority (Tensor): [m] int64; of equals the smaller is drawn.
        bins (int): >= 1.
        tail (float): share left out at each end, in [0, 0.5).

    Returns:
        Tensor: [min(budget, m)] int64 positions, rising.
    """
    size = len(scores)
    wanted = min(budget, size)
    if wanted == 0:
        return torch.empty(0, dtype=torch.int64)
    scores = scores.double()
    ranked = scores.sort().values
    low, high = ranked[int(size * tail)], ranked[min(int(size * (1 - tail)), size - 1)]
    inside = (scores > low) & (scores <= high)
    order = priority.argsort(stable=True)
    taken = torch.zeros(size, dtype=torch.bool)
    # bin 0 holds the highest scores; a score on a border belongs to the bin below it
    width = (high - low) / bins
    cell = (
        ((high - scores) / width).floor().clamp(0, bins - 1).long() if width > 0 else torch.zeros_like(order)
    )
    remaining = wanted
    for index in range(bins):
        members = order[(inside & (cell == index))[order]]
        drawn = members[: -(-remaining // (bins - index))]
        taken[drawn] = True
        remaining -= len(drawn)
    for rest in (inside & ~taken, ~inside):
        drawn = order[rest[order]][:remaining]
        taken[drawn] = True
        remaining -= len(drawn)
    return taken.nonzero().squeeze(1)


def redundancy(vectors: Tensor, *, block: int = 1024) -> Tensor:
    """`M_j = max(0, max_{i < j} cos(e_i, e_j))`: how much each sample repeats one that stands before it.

    Args:
        vectors (Tensor): [m, d] of one cluster, in order of arrival; lengths do not matter.
        block (int): rows that are compared at a time, which bounds memory by block x m.

    Returns:
        Tensor: [m] fp32; 0 for the first.
    """
    units = F.normalize(vectors.float(), dim=-1)
    most = torch.zeros(len(units))
    for start in range(0, len(units), block):
        rows = units[start : start + block]
        cosines = rows @ units[: start + len(rows)].T
        # row r stands at start + r, and only what stands before that counts
        most[start : start + len(rows)] = cosines.tril(start - 1).amax(1).clamp_min(0)
    return most


def prune(
    vectors: Tensor, labels: Tensor, total: int, *, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The samples that stay in a pool of at most `total`: in each cluster those that repeat others least.

    Args:
        vectors (Tensor): [n, d] in order of arrival; float16 will do, also mapped from a file.
        labels (Tensor): [n] int64, the cluster of each, from 0; -1 leaves.
        total (int): the pool's limit; its share of each cluster is that of `water_fill`.
        groups (Tensor | None): [n] int64, parts of clusters in which samples are compared; None: whole clusters.

    Returns:
        tuple[Tensor, Tensor]: positions that stay, cluster by cluster, each from the least redundant on; and the
        redundancy of all, [n] fp32, NaN for -1.
    """
    most = torch.full((len(labels),), torch.nan)
    compared = labels if groups is None else groups
    for group in compared[labels >= 0].unique().tolist():
        members = (compared == group).nonzero().squeeze(1)
        most[members] = redundancy(vectors[members])
    shares = water_fill(torch.bincount(labels[labels >= 0]).tolist(), total)
    kept = [torch.empty(0, dtype=torch.int64)]
    for cluster, share in enumerate(shares):
        members = (labels == cluster).nonzero().squeeze(1)
        kept.append(members[most[members].argsort(stable=True)[:share]])
    return torch.cat(kept), most
