"""Losses that match a student's logits with a teacher's class by class, without a softmax over the classes."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from salience.core.errors import require

Form = Literal["binary_kl_norm", "binary_kl", "mse"]
FORMS = ("binary_kl_norm", "binary_kl", "mse")


def binary_kl_norm(student: Tensor, teacher: Tensor, tau: float = 2.0) -> Tensor:
    """`tau^2 sum_k log cosh(d_k / 2)`, d = (student - teacher) / tau: BinaryKL-Norm in closed form.

    It is the divergence of `sigmoid(d)` from 1/2: near 0 `(student - teacher)^2 / 8`, far away of slope `tau / 2`. It
    is finite, and so is its gradient `tau / 2 tanh(d / 2)`, at any distance.

    Args:
        student (Tensor): [..., C] logits with graph; half precision is raised to fp32.
        teacher (Tensor): [..., C] logits; no gradient reaches them.
        tau (float): > 0.

    Returns:
        Tensor: [...], the sum over classes.
    """
    student, teacher = _raised(student), _raised(teacher.detach())
    half = ((student - teacher) / (2 * tau)).abs()
    return tau**2 * (half + F.softplus(-2 * half) - math.log(2)).sum(-1)


def binary_kl(student: Tensor, teacher: Tensor, tau: float = 2.0) -> Tensor:
    """`tau^2 sum_k KL(sigmoid(t_k / tau) || sigmoid(s_k / tau))`, the first form, without probabilities near 1.

    Args, Returns: as for `binary_kl_norm`. Its gradient is `tau (sigmoid(s / tau) - sigmoid(t / tau))`.
    """
    q, p = _raised(student) / tau, _raised(teacher.detach()) / tau
    return tau**2 * (F.softplus(q) - F.softplus(p) + p.sigmoid() * (p - q)).sum(-1)


def squared(student: Tensor, teacher: Tensor, tau: float = 2.0) -> Tensor:
    """`sum_k (s_k - t_k)^2 / 8`: what `binary_kl_norm` becomes as tau grows; `tau` is not used."""
    return (_raised(student) - _raised(teacher.detach())).square().sum(-1) / 8


def logit_loss(student: Tensor, teacher: Tensor, tau: float = 2.0, form: Form = "binary_kl_norm") -> Tensor:
    """One of the losses of this file by name; shapes as for `binary_kl_norm`."""
    function = {"binary_kl_norm": binary_kl_norm, "binary_kl": binary_kl, "mse": squared}[form]
    return function(student, teacher, tau)


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """Refuse logits of other shapes, and teacher logits (on the CPU) that are not finite.

    Raises:
        ParameterError: if so.
    """
    shape = list(student.shape)
    require(student.dim() >= 2, "student", "logits [..., C] of at least one row", shape)
    require(
        teacher.shape == student.shape, "teacher", f"logits {shape} like the student's", list(teacher.shape)
    )
    if teacher.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~torch.isfinite(teacher)
        if bool(bad.any()):
            require(False, "teacher", "finite logits", float(teacher[bad][0]))


def check_loss(tau: Any, form: Any) -> None:
    """Refuse settings out of range."""
    number = isinstance(tau, int | float) and not isinstance(tau, bool)
    require(number and 0 < tau < math.inf, "tau", "> 0 and finite", tau)
    require(form in FORMS, "loss", f"one of {', '.join(FORMS)}", form)


def _raised(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
