"""LoRAPrune on tensors: the gradient of the merged weight from LoRA's factors, group scores, schedule, choice."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_EPS = 1e-8
_ROUNDING = 1e-6  # a share that is whole but for rounding counts as whole


def lora_gradient(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> Tensor:
    """What stands for the gradient of the weight: G = gB A + B gA - gB gA (eq. 9).

    It is how much B A would fall in one step of plain gradient descent of size 1. Because of the last term it is not
    homogeneous in the gradients: they must be those of the loss itself, not of a scaled one.

    Args:
        A (Tensor): [r, in].
        B (Tensor): [out, r].
        grad_A (Tensor): [r, in].
        grad_B (Tensor): [out, r].

    Returns:
        Tensor: [out, in].
    """
    return grad_B @ (A - grad_A) + B @ grad_A


def importance(weight: Tensor, gradient: Tensor | float = 1.0) -> Tensor:
    """First-order change of the loss when an entry is set to 0: S = |G (W + s B A)|, elementwise (eq. 5).

    Args:
        weight (Tensor): [out, in] merged.
        gradient (Tensor | float): [out, in], or what broadcasts to it; 1 gives the magnitude.
    """
    return (weight * gradient).abs()


def unit_scores(entries: Tensor, index: Tensor, *, out: bool) -> Tensor:
    """Sum the importance of entries over each unit's rows or columns.

    Args:
        entries (Tensor): [out, in] from `importance`.
        index (Tensor): [U, width] int64, the rows (columns) of each unit.
        out (bool): units are rows.

    Returns:
        Tensor: [U].
    """
    return entries.sum(1 if out else 0)[index.to(entries.device)].sum(1)


def normalised(scores: Tensor) -> Tensor:
    """Scores of one projection's units by their L2 norm, [U] of [U]: all projections then have the same say."""
    return scores / (scores.norm() + _EPS)


def moved(average: Tensor, scores: Tensor, decay: float = 0.9) -> Tensor:
    """Moving average of the group scores: decay * average + (1 - decay) * scores, [U] (eq. 10)."""
    return decay * average + (1 - decay) * scores


def ratio_at(step: int, total: int, *, start: float, target: float, warmup: float, cooldown: float) -> float:
    """Share of units to be masked at a step: cubic, from `start` to exactly `target`.

    Args:
        step (int): optimizer steps done, this one included, in [0, total].
        total (int): T, steps in all.
        start (float): rho0, the share before and during the warm-up.
        target (float): rho1, the share at the end.
        warmup (float): w, share of the steps before pruning begins.
        cooldown (float): c, share of the steps after it has ended.
    """
    if step <= warmup * total:
        return start
    if step > total - cooldown * total:
        return target
    progress = (step - warmup * total) / (total - (warmup + cooldown) * total)
    return target + (start - target) * (1 - progress) ** 3


def masked_count(total: int, ratio: float) -> int:
    """How many of `total` units a share masks: rounded down, but a share that is whole up to rounding is whole."""
    return math.floor(total * ratio + _ROUNDING)


def lowest_masked(scores: Tensor, mask: Tensor, count: int) -> Tensor:
    """Mask the `count` units with the lowest scores; what is masked already comes first, so masks only grow.

    Args:
        scores (Tensor): [U] >= 0.
        mask (Tensor): [U] bool, False where masked.
        count (int): units to be masked in all; fewer than are masked already changes nothing.

    Returns:
        Tensor: [U] bool. Of equal scores the lower index is masked.
    """
    order = torch.where(mask, scores, -1.0).argsort(stable=True)
    chosen = mask.clone()
    chosen[order[:count]] = False
    return chosen
