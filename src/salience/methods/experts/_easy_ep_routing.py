"""Routing in groups when experts are missing: groups first, then the best experts of the chosen groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def route(
    logits: Tensor,
    bias: Tensor,
    keep: Tensor,
    *,
    groups: int,
    chosen: int,
    top_k: int,
    renormalize: bool = True,
    official: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sigmoid routing among the kept experts of the best groups, numbered as in the pruned model.

    Args:
        logits (Tensor): [T, E] of the router.
        bias (Tensor): [E] score correction, which counts for the choice and not for the weights.
        keep (Tensor): [E] bool.
        groups (int): G; a group's score is the sum of its two best experts.
        chosen (int): how many groups a token may use.
        top_k (int): k experts a token; fewer where the chosen groups hold fewer.
        renormalize (bool): weights of a token sum to 1.
        official (bool): as the official server does: groups are chosen by all experts, and the removed ones score 0
            instead of -inf in the choice after that. A removed expert can then be chosen, and gets id -1.

    Returns:
        tuple[Tensor, Tensor]: weights [T, k] fp32 and ids [T, k] int64 in [0, M), -1 where there was none.
    """
    tokens, experts = logits.shape
    weights = logits.float().sigmoid()
    scores = weights + bias
    if not official:
        scores = scores.masked_fill(~keep, -math.inf)
    in_groups = scores.view(tokens, groups, -1)
    # a group with one kept expert is worth that expert
    best = in_groups.topk(min(2, in_groups.shape[-1]), dim=-1).values
    worth = best.sum(-1) if official else best.masked_fill(best == -math.inf, 0.0).sum(-1)
    worth = worth.masked_fill((in_groups == -math.inf).all(-1), -math.inf)
    allowed = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.topk(chosen, dim=-1).indices, True)
    allowed = allowed.repeat_interleave(experts // groups, dim=1)
    scores = scores.masked_fill(~allowed, 0.0 if official else -math.inf)
    if official:
        scores = scores * keep
    top, ids = scores.topk(top_k, dim=-1)
    found = weights.gather(1, ids).masked_fill(top == -math.inf, 0.0)
    if renormalize:
        found = found / found.sum(-1, keepdim=True)
    numbers = torch.where(keep, keep.cumsum(0) - 1, -1)
    return found, numbers[ids].masked_fill(top == -math.inf, -1)
