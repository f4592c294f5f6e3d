"""From a budget to an exact count of units, and from scores and a count to a decision.

`keep` is always the share that is kept, a float in (0, 1], or a count, an int >= 1. Ties go to the lower index, so
the same scores give the same decision on every device and in every run.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from salience.core.errors import require

Rounding = Literal["ceil", "floor", "nearest"]


def check_keep(keep: float | int, name: str = "keep") -> None:
    """Refuse a budget that is neither a share in (0, 1] nor a count >= 1.

    Raises:
        ParameterError: `keep must be a share in (0, 1] or a count >= 1, got ...`
    """
    wanted = "a share in (0, 1] or a count >= 1"
    require(isinstance(keep, int | float) and not isinstance(keep, bool), name, wanted, keep)
    valid = keep >= 1 if isinstance(keep, int) else 0.0 < keep <= 1.0
    require(valid, name, wanted, keep)


def count(keep: float | int, total: int, *, rounding: Rounding = "ceil", at_least: int = 0) -> int:
    """How many of `total` units a budget keeps.

    Args:
        keep (float | int): share in [0, 1], or a count (an int; larger than `total` means all of them). Users'
            budgets pass `check_keep` first; schedules may reach exactly 0.
        total (int): number of units, >= 0.
        rounding (str): how a share that is not whole is rounded; a product within 1e-9 of a whole number counts
            as whole, so that 0.6 of 5 is 3 and not 4.
        at_least (int): floor, itself limited by `total`.

    Returns:
        int: in [min(at_least, total), total].
    """
    if isinstance(keep, int):
        wanted = keep
    else:
        exact = keep * total
        nearest = round(exact)
        if rounding == "nearest":
            wanted = math.floor(exact + 0.5)
        elif abs(exact - nearest) < 1e-9 * max(1.0, total):
            wanted = nearest
        else:
            wanted = math.ceil(exact) if rounding == "ceil" else math.floor(exact)
    return max(min(wanted, total), min(at_least, total))


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest scores, in rising order of index.

    Args:
        scores (Tensor): [N], any float dtype; higher matters more; NaN counts as lowest.
        k (int): in [0, N].

    Returns:
        Tensor: [k] int64.
    """
    ranked = torch.sort(scores.nan_to_num(nan=-math.inf), descending=True, stable=True).indices
    return ranked[:k].sort().values


def top_mask(scores: Tensor, k: Tensor, among: Tensor) -> Tensor:
    """For each row keep the `k` largest scores among the allowed columns.

    Args:
        scores (Tensor): [B, N] float.
        k (Tensor): [B] int64, how many to keep in each row.
        among (Tensor): [B, N] bool, the columns that may be kept.

    Returns:
        Tensor: [B, N] bool with min(k, allowed) true entries in each row.
    """
    hidden = scores.nan_to_num(nan=-math.inf).masked_fill(~among, -math.inf)
    # rank of every column: stable, so that of two equal scores the one to the left is kept; disallowed columns
    # could tie at -inf with an allowed one, so they are sorted behind by a second stable pass
    order = torch.sort(hidden, dim=-1, descending=True, stable=True).indices
    allowed = among.gather(-1, order).to(torch.int8)
    order = order.gather(-1, torch.sort(allowed, dim=-1, descending=True, stable=True).indices)
    ranks = torch.empty_like(order)
    places = torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    ranks.scatter_(-1, order, places)
    return (ranks < k.unsqueeze(-1)) & among
