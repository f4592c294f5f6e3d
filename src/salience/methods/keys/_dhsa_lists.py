"""From scores of chunks to lists of keys for blocks of queries.

All tokens of a chunk have its score, so the best tokens are whole chunks in falling order of score, and of the last
one, which does not fit, its first tokens: nothing of the size blocks x keys is built or sorted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Limits:
    """How many keys a list may hold and which it always holds.

    Attributes:
        budget (int): keys.
        local (int): the newest ones.
        first (int): the first ones.
    """

    budget: int
    local: int
    first: int


def newest(rows: int, q_block: int, *, offset: int = 0, device: torch.device | None = None) -> Tensor:
    """[N] int64: the newest key that the last row of each block sees; row 0 stands at position `offset`."""
    stops = torch.arange(q_block, rows + q_block, q_block, device=device)
    return stops.clamp_max(rows) - 1 + offset


def spend(scores: Tensor, bounds: Tensor, last: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """Lists of the best keys, besides the newest and the first ones, within one budget and without a key twice.

    Where the budget is short, the newest keys come before the first ones, and these before the best. Of equal scores
    the keys to the left are taken.

    Args:
        scores (Tensor): [B, h, N, C] of chunks for blocks of queries.
        bounds (Tensor): [B, C + 1] int64, where chunks begin; chunks may be empty.
        last (Tensor): [N] int64, newest key that a block sees.
        limits (Limits): of each list.

    Returns:
        tuple: `count` [B, h, N] and `index` [B, h, N, M] int32, rising, M = min(budget, keys); behind `count` stands
        the last key of the sequence.
    """
    keys = int(bounds[0, -1])
    # chunks that no block sees need no sorting
    seen = int((bounds[:, :-1] <= int(last.max())).sum(-1).max()) if len(last) else 0
    scores, bounds = scores[..., :seen], bounds[:, None, None, : seen + 1]
    newest_ones = (last + 1).clamp_max(min(limits.local, limits.budget))
    edge = last + 1 - newest_ones  # where they begin
    first = torch.minimum(edge, (limits.budget - newest_ones).clamp_max(limits.first))
    slots = limits.budget - newest_ones - first
    start = torch.maximum(bounds[..., :-1], first.unsqueeze(-1))
    width = (torch.minimum(bounds[..., 1:], edge.unsqueeze(-1)) - start).clamp_min(0)
    width, start = width.expand(scores.shape), start.expand(scores.shape)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranked = width.gather(-1, order)
    before = ranked.cumsum(-1) - ranked
    taken = torch.minimum((slots.unsqueeze(-1) - before).clamp_min(0), ranked)
    taken = torch.zeros_like(taken).scatter(-1, order, taken)
    # the list is a row of runs: first keys, what is taken of each chunk, newest keys
    shape = (*scores.shape[:3], 1)
    runs = torch.cat((first.view(-1, 1).expand(shape), taken, newest_ones.view(-1, 1).expand(shape)), -1)
    begin = torch.cat((torch.zeros_like(runs[..., :1]), start, edge.view(-1, 1).expand(shape)), -1)
    ends = runs.cumsum(-1)
    count = ends[..., -1:]
    most = min(limits.budget, keys)
    place = torch.arange(most, device=scores.device).expand(*scores.shape[:3], most).contiguous()
    of = torch.searchsorted(ends, place, right=True).clamp_max(runs.shape[-1] - 1)
    index = (begin - ends + runs).gather(-1, of) + place
    index = torch.where(place < count, index, keys - 1)
    return count.squeeze(-1).int(), index.int()


def overwritten(index: Tensor, last: Tensor, first: int) -> Tensor:
    """Lists whose first slots give way to the first keys, as in the official code.

    A block whose newest key lies among them holds that key several times, and up to `first` chosen keys are lost.

    Args:
        index (Tensor): [B, h, N, M], rising.
        last (Tensor): [N], newest key that a block sees.
        first (int): keys.
    """
    keys = torch.arange(first, device=index.device)
    keys = torch.minimum(keys, last.unsqueeze(-1)).to(index.dtype)
    return torch.cat((keys.expand(*index.shape[:3], first), index[..., first:]), -1)[..., : index.shape[-1]]


def unique(index: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """`count` and `index` of lists with keys held several times or in the future of the whole block."""
    beyond = int(index.max()) + 1 if index.numel() else 0
    index = index.masked_fill(index > last.unsqueeze(-1), beyond).sort(-1).values
    again = F.pad(index[..., 1:] == index[..., :-1], (1, 0))
    index = index.masked_fill(again, beyond).sort(-1).values
    count = (index < beyond).sum(-1).int()
    return count, index.clamp_max(max(0, beyond - 1)).int()
