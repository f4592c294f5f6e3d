"""AdamR: Adam with a decoupled decay towards the pre-trained weights, by which a fine-tuned delta stays small.

Before each Adam step, with `vhat` the corrected second moment and `vbar` the root of its mean over all elements of
all parameters that have a gradient (1 where that is 0):

    L2:  p -= lr lambda / vbar (p - p_pre),      L1:  p -= lr lambda / vbar sign(p - p_pre).

The moments see the raw gradient only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from salience.core.errors import ConflictError, ParameterError, require

Norm = Literal["l2", "l1"]


@torch.no_grad()
def pull_back(
    optimizer: torch.optim.Optimizer, pretrained: Mapping[Tensor, Tensor], decay: float, norm: Norm = "l2"
) -> float:
    """One decay towards the pre-trained weights, for an Adam that is about to step.

    Args:
        optimizer (Optimizer): Adam or AdamW, gradients in place.
        pretrained (Mapping[Tensor, Tensor]): parameter -> what it is pulled towards; others are left alone.
        decay (float): lambda, >= 0.
        norm (str): of the penalty whose gradient this is.

    Returns:
        float: vbar; 1 without any gradient.
    """
    total, elements = 0.0, 0
    for parameter, group in _stepped(optimizer):
        total += _corrected_sum(optimizer.state.get(parameter, {}), parameter.grad, group["betas"][1])
        elements += parameter.numel()
    vbar = math.sqrt(total / elements) if total > 0 else 1.0
    for parameter, group in _stepped(optimizer):
        anchor = pretrained.get(parameter)
        if anchor is not None and decay > 0:
            away = parameter - anchor
            parameter.sub_(away if norm == "l2" else away.sign(), alpha=float(group["lr"]) * decay / vbar)
    return vbar


def refuse_other_optimizers(optimizer: Any) -> None:
    """Refuse optimizers without Adam's second moments, or with a decay inside the gradient.

    Raises:
        ConflictError: naming what was found.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one too
        raise ConflictError(
            f"optimizer must be torch's Adam or AdamW for the decay of DAREx, got {type(optimizer).__name__}"
        )
    for group in optimizer.param_groups:
        coupled = group["weight_decay"] and not group.get("decoupled_weight_decay", False)
        refused = (
            (group["amsgrad"], "amsgrad must be False", True),
            (group["maximize"], "maximize must be False", True),
            (
                coupled,
                "weight_decay must be 0 or decoupled (AdamW): moments see raw gradients",
                group["weight_decay"],
            ),
        )
        for wrong, wanted, got in refused:
            if wrong:
                raise ConflictError(f"{wanted} for the decay of DAREx, got {got}")


class AdamR(torch.optim.Adam):
    """Adam that is pulled towards the pre-trained weights; see the top of this file.

    Args:
        params (Any): parameters or groups of them.
        pretrained (Mapping[Tensor, Tensor] | None): parameter -> target; None takes their values now.
        lr, betas, eps: as for Adam.
        decay (float): lambda, >= 0.
        norm (str): "l2" or "l1".

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = AdamR([weight], lr=0.1, decay=0.5)
    """

    def __init__(
        self,
        params: Any,
        pretrained: Mapping[Tensor, Tensor] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 1e-4,
        norm: Norm = "l2",
    ) -> None:
        require(math.isfinite(decay) and decay >= 0, "decay", ">= 0 and finite", decay)
        require(norm in ("l2", "l1"), "norm", "one of l2, l1", norm)
        super().__init__(params, lr=lr, betas=betas, eps=eps)
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        # outside of the groups: neither copied into state_dict nor matched by position
        self._pretrained = {p: p.detach().clone() for p in own} if pretrained is None else dict(pretrained)
        for parameter, anchor in self._pretrained.items():
            if parameter.shape != anchor.shape:
                raise ParameterError(
                    f"pretrained must be of its parameter's shape {list(parameter.shape)}, "
                    f"got {list(anchor.shape)}"
                )
        self._decay, self._norm = decay, norm
        self.register_step_pre_hook(self._pull)

    def _pull(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *kwargs.values())):
            raise ConflictError("closure must be None for AdamR (gradients come first), got one")
        pull_back(self, self._pretrained, self._decay, self._norm)


def _stepped(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    return [(p, group) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _corrected_sum(state: Mapping[str, Any], grad: Tensor | None, beta: float) -> float:
    """Sum of the corrected second moment as it will be in the coming step."""
    if grad is None:
        return 0.0
    wide = grad.detach() if grad.dtype == torch.float64 else grad.detach().float()
    squares = float(wide.square().sum(dtype=torch.float64)) * (1 - beta)
    step = float(state["step"]) if state else 0.0
    if state:
        squares += beta * float(state["exp_avg_sq"].sum(dtype=torch.float64))
    return squares / (1 - beta ** (step + 1))
