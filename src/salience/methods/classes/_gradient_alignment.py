"""Gradient alignment: what a second loss asks for against the first one is taken out of its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from salience.core.errors import require

Scope = Literal["all", "shared"]
SCOPES = ("all", "shared")
Gradients = Sequence[Tensor | None]


def align_gradients(first: Gradients, second: Gradients, scope: Scope = "all") -> list[Tensor | None]:
    """The sum of two gradients, the second one without its part against the first.

    With g1, g2 flattened over the parameters: `g2 <- g2 - <g1, g2> / |g1|^2 g1` if `<g1, g2> < 0`; then g1 + g2.
    The first gradient is the reference and is never projected.

    Args:
        first (Sequence[Tensor | None]): of each parameter; None where the first loss does not reach it.
        second (Sequence[Tensor | None]): of the same parameters.
        scope (str): "all" takes products and projection over all parameters, as the official code does: with
            `c = <g1, g2> / |g1|^2`, parameters that only the first loss reaches (the main head) then get
            `(1 + |c|) g1`. "shared" takes both over the parameters that both losses reach; others keep theirs.

    Returns:
        list[Tensor | None]: of each parameter; None where neither loss reaches it.
    """
    both = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    reference = [a for a in first if a is not None] if scope == "all" else [a for a, _ in both]
    if not both:
        return [b if a is None else a for a, b in zip(first, second, strict=True)]
    dot = sum_of((a.double() * b.double()).sum() for a, b in both)
    norm = sum_of(a.double().square().sum() for a in reference)
    # 0 where the gradients do not conflict, and where there is no first gradient to conflict with
    factor = torch.where(dot < 0, -dot / norm.clamp_min(torch.finfo(norm.dtype).tiny), torch.zeros_like(dot))
    return [_joined(a, b, factor, scope) for a, b in zip(first, second, strict=True)]


def aligned_backward(
    first: Tensor, second: Tensor, parameters: Iterable[Tensor], *, scope: Scope = "all"
) -> None:
    """Two backward passes in place of `(first + second).backward()`: adds the aligned gradients to `.grad`.

    Args:
        first (Tensor): [] the loss that is the reference, with its weight: gamma CE.
        second (Tensor): [] the loss whose gradient is projected: alpha times the logit loss.
        parameters (Iterable[Tensor]): of backbone and heads; frozen ones are left out.
        scope (str): as for `align_gradients`.

    Raises:
        ParameterError: for another scope.
    """
    check_scope(scope)
    chosen = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(first, chosen, retain_graph=True, allow_unused=True)
    others = torch.autograd.grad(second, chosen, allow_unused=True)
    for parameter, gradient in zip(chosen, align_gradients(gradients, others, scope), strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def check_scope(scope: Any) -> None:
    """Refuse another word."""
    require(scope in SCOPES, "align_scope", f"one of {', '.join(SCOPES)}", scope)


def sum_of(terms: Iterable[Tensor]) -> Tensor:
    """Of scalars, on the device of the first."""
    total: Tensor | None = None
    for term in terms:
        total = term if total is None else total + term.to(total.device)
    if total is None:
        raise ValueError("sum_of needs at least one term")
    return total


def _joined(a: Tensor | None, b: Tensor | None, factor: Tensor, scope: Scope) -> Tensor | None:
    if a is None:
        return b
    more = factor.to(a.device, a.dtype)
    if b is None:
        return a * (1 + more) if scope == "all" else a
    return a * (1 + more) + b
