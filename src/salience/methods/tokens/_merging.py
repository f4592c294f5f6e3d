"""Of many rows a few: the best stay, and the others are merged along the similarity of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from salience.core.budget import top_indices
from salience.hosts.choices import Choice, View


@dataclass(frozen=True)
class Groups:
    """What becomes of n tokens.

    Attributes:
        dominant (Tensor): [D] places that stay as they are, rising.
        target (Tensor): [C] places that others join, rising.
        follower (Tensor): [n - D - C] the others.
        joins (Tensor): [n - D - C] which target each joins, in [0, C); all 0 without targets.
    """

    dominant: Tensor
    target: Tensor
    follower: Tensor
    joins: Tensor


def group(scores: Tensor, keys: Tensor, dominant: int, contextual: int) -> Groups:
    """Who stays, who is joined, and by whom; of equal scores or similarities the first wins.

    Args:
        scores (Tensor): [n].
        keys (Tensor): [n, d].
        dominant, contextual (int): D and C, with D + C <= n.
    """
    kept = top_indices(scores, dominant)
    alone = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    alone[kept] = False
    (rest,) = alone.nonzero(as_tuple=True)
    if not contextual:
        return Groups(kept, rest[:0], rest, torch.zeros_like(rest))
    step = max(1, len(rest) // contextual)
    target = rest[::step][:contextual]
    alone[target] = False
    (follower,) = alone.nonzero(as_tuple=True)
    unit = F.normalize(keys, dim=-1)
    return Groups(kept, target, follower, (unit[follower] @ unit[target].T).argmax(-1))


def merge(rows: Tensor, groups: Groups) -> Tensor:
    """`x_t + mean of the rows that joined t` for each target: rows [n, C] -> [targets, C], at least fp32."""
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
    numbers = torch.arange(len(groups.target), device=rows.device)
    joined = (groups.joins == numbers[:, None]).to(precise.dtype)
    means = joined @ precise[groups.follower] / joined.sum(-1, keepdim=True).clamp_min(1)
    return precise[groups.target] + means


def choose(
    view: View,
    pictures: Tensor,
    scores: Tensor,
    keys: Tensor,
    counts: tuple[int, int],
    *,
    layout: str = "append",
    rows: Tensor | None = None,
    leading: Tensor | None = None,
) -> Choice:
    """Reduce the image tokens of each prompt that has more than D + C, picture by picture.

    Args:
        view (View): B sequences of S tokens.
        pictures (Tensor): [B, S] which picture each image token belongs to.
        scores (Tensor): [B, S].
        keys (Tensor): [B, S, d].
        counts (tuple[int, int]): D and C of a prompt.
        layout (str): "append" or "in_place".
        rows (Tensor | None): [B, S, C] what is merged; None takes the hidden states.
        leading (Tensor | None): [pictures, C] a row for each picture that is its first dominant token.

    Returns:
        Choice: `hidden` has rows' width; `merged` are the places where it differs: targets that others joined, and
        leading rows.
    """
    dominant, contextual = counts
    hidden = (view.hidden if rows is None else rows).clone()
    keep, merged = view.vision.clone(), torch.zeros_like(view.vision)
    order = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep), 1)
    with torch.autocast(hidden.device.type, enabled=False):
        for row in (view.vision.sum(-1) > dominant + contextual).nonzero().flatten().tolist():
            own = pictures[row].masked_fill(~view.vision[row], -1)
            numbers, sizes = (found.tolist() for found in own[view.vision[row]].unique(return_counts=True))
            for number, size, d, c in zip(
                numbers, sizes, share(dominant, sizes), share(contextual, sizes), strict=True
            ):
                if d + c >= size:
                    continue
                (places,) = (own == number).nonzero(as_tuple=True)
                first = leading is not None and d > 0
                groups = group(scores[row, places], keys[row, places], d - first, c)
                new = merge(hidden[row, places], groups)
                stays, target, goes = (
                    places[one] for one in (groups.dominant, groups.target, groups.follower)
                )
                hidden[row, target] = new.to(hidden.dtype)
                if leading is not None and first:
                    # it takes the place of a token that goes
                    slot, goes = goes[:1], goes[1:]
                    hidden[row, slot] = leading[number].to(hidden)
                    stays = torch.cat((slot, stays))
                    merged[row, slot] = True
                keep[row, goes] = False
                merged[row, target[groups.joins.unique()] if c else target] = True
                if layout == "append":
                    moved = torch.cat((stays, target))
                    order[row, moved] = moved.sort().values
    return Choice(keep, scores, hidden, merged, order if layout == "append" else None)


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to sizes, whole numbers by largest remainder; of equal remainders the first."""
    whole = sum(sizes)
    parts = [total * size // whole for size in sizes]
    by_rest = sorted(range(len(sizes)), key=lambda i: -(total * sizes[i] % whole))
    for index in by_rest[: total - sum(parts)]:
        parts[index] += 1
    return parts
