"""The Plackett-Luce loss of an order of classes, with its closed-form gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from salience.core.errors import require

Weights = Literal["teacher", "uniform", "first"]


def teacher_order(teacher: Tensor, labels: Tensor, keep: int | None = None) -> Tensor:
    """The order that the student is to produce: the label first, then the other classes as the teacher ranks them.

    Among equal logits the smaller class comes first, on every device.

    Args:
        teacher (Tensor): [N, C] logits, finite.
        labels (Tensor): [N] in [0, C).
        keep (int | None): how many other classes are ranked; None is all.

    Returns:
        Tensor: [N, 1 + keep] int64, the class at each rank.
    """
    labels = labels.unsqueeze(-1)
    # the label is lifted above every finite logit, so that one sort puts it in front
    lifted = teacher.detach().scatter(-1, labels, torch.inf)
    order = lifted.sort(dim=-1, descending=True, stable=True).indices
    return order if keep is None else order[..., : keep + 1]


def rank_weights(
    teacher: Tensor, order: Tensor, tau: float = 1.0, rule: Weights = "teacher", label_floor: float = 0.0
) -> Tensor:
    """What each choice counts: `alpha_k = softmax(t / tau)[pi_k]`, at least in fp32.

    Args:
        teacher (Tensor): [N, C] logits.
        order (Tensor): [N, K] from `teacher_order`.
        tau (float): > 0.
        rule (str): "teacher"; "uniform" gives 1 / C to every choice (ListMLE); "first" the label alone.
        label_floor (float): the least weight of the label, in [0, 1].

    Returns:
        Tensor: [N, K] without graph.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    if rule == "teacher":
        weights = (teacher.detach().to(dtype) / tau).softmax(-1).gather(-1, order)
    elif rule == "uniform":
        weights = torch.full(order.shape, 1.0 / teacher.shape[-1], dtype=dtype, device=teacher.device)
    else:
        weights = torch.zeros(order.shape, dtype=dtype, device=teacher.device)
        weights[..., 0] = 1.0
    if label_floor > 0:
        weights = torch.cat([weights[..., :1].clamp_min(label_floor), weights[..., 1:]], -1)
    return weights


def ranked_loss(student: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """`sum_k alpha_k (logsumexp_{l >= k} s[pi_l] - s[pi_k])` of each row.

    Where `order` names only some classes, the others are one last group: they stay in every logsumexp and have no
    order among themselves.

    Args:
        student (Tensor): [N, C] logits with graph; half precision is raised to fp32.
        order (Tensor): [N, K], K <= C.
        weights (Tensor): [N, K], of dtype fp32 or fp64.

    Returns:
        Tensor: [N] with graph.
    """
    student = student.to(torch.promote_types(student.dtype, torch.float32))
    ranked = student.gather(-1, order)
    if order.shape[-1] < student.shape[-1]:
        rest = student.scatter(-1, order, -torch.inf).logsumexp(-1, keepdim=True)
        ranked = torch.cat([ranked, rest], -1)
        weights = torch.cat([weights, weights.new_zeros(*weights.shape[:-1], 1)], -1)
    losses: Tensor = _RankedLoss.apply(ranked, weights.to(ranked.dtype))[0]
    return losses


class _RankedLoss(torch.autograd.Function):
    """autograd of logcumsumexp costs two more scans than the closed form."""

    @staticmethod
    def forward(ranked: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shifted, suffix = _scanned(ranked)
        # what counts nothing may lie infinitely low: a class that the student masks out
        terms = torch.where(weights > 0, weights * (suffix - shifted), 0.0)
        return terms.sum(-1), shifted, suffix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        (ranked, weights), (_, shifted, suffix) = inputs, output
        ctx.mark_non_differentiable(shifted, suffix)
        ctx.save_for_backward(ranked, weights, shifted, suffix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None]:
        ranked, weights, shifted, suffix = ctx.saved_tensors
        if torch.is_grad_enabled():
            shifted, suffix = _scanned(ranked)  # once more with a graph, for second derivatives
        # dL/ds_i = sum_{k <= rank(i)} alpha_k exp(s_i) / sum_{l >= k} exp(s[pi_l]) - alpha_{rank(i)}; in logarithms,
        # because the sums of late ranks may be too small for floating point
        chosen = torch.where(weights > 0, weights.log() - suffix, -torch.inf).logcumsumexp(-1)
        return grad.unsqueeze(-1) * ((shifted + chosen).exp() - weights), None


def _scanned(ranked: Tensor) -> tuple[Tensor, Tensor]:
    """Rows without their largest (the loss stays, its rounding does not), and logsumexp from each rank on."""
    shifted = ranked - ranked.detach().amax(-1, keepdim=True)
    return shifted, shifted.flip(-1).logcumsumexp(-1).flip(-1)


def check_loss(tau: Any, weights: Any, label_floor: Any, top_m: Any) -> None:
    """Refuse settings out of range."""
    number = isinstance(tau, int | float) and not isinstance(tau, bool)
    require(number and 0 < tau < float("inf"), "tau", "> 0 and finite", tau)
    require(weights in ("teacher", "uniform", "first"), "weights", "one of teacher, uniform, first", weights)
    require(
        isinstance(label_floor, int | float) and 0 <= label_floor <= 1,
        "label_floor",
        "in [0, 1]",
        label_floor,
    )
    require(top_m is None or (type(top_m) is int and top_m >= 1), "top_m", "None or an integer >= 1", top_m)
