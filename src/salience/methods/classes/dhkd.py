"""DHKD: a second classifier on the same backbone learns the teacher's logits, the first one learns the labels.

Scored: each class, as a problem of its own: by how far the student's logit is from the teacher's. Softmax forgets
what all logits have in common; a loss for each class does not.
Spent: one auxiliary head in training. The loss on logits and cross-entropy pull one classifier in opposite directions
while they agree about the features; with two heads each has its own classifier and the backbone hears both:

    L = gamma CE(main(f), y) + alpha tau^2 sum_k log cosh((aux(f)_k - t_k) / (2 tau))

The auxiliary head is dropped after training. With alignment the part of the second gradient that goes against the
first is taken out of it. The main head never hears the teacher: noise in the labels reaches it undamped.

Paper: arXiv 2411.08937 (section 4). Official code: penghui-yang/DHKD (7976c69), distiller_zoo, helper/optimizer.py.

The official code has faults, and this differs from it in:
- its two losses are inf with zero gradient from (z - t) / tau = 17 on in fp32, because the clamp at 1 - 1e-8 is 1.0
  there, and constant with zero gradient below -18.4: a head that is far off never comes back, and the loop stops at
  NaN only. Here both are in closed form, finite with the right gradient at any distance, in at least fp32;
- gradient alignment over all parameters takes the main head into |g1|^2 and then adds to the main head's gradient
  (1.3 and 2.9 times it in two cases looked at); that is kept as `align_scope="all"`, and "shared" aligns only what
  both losses reach;
- under data parallelism both gradients are averaged over ranks before they are compared;
- its ImageNet script ignores alignment, and stops with an error after the first validation (an option that its parser
  does not know); its learning rate falls one epoch late; its best CIFAR checkpoint is chosen on the test set;
- a batch of one sample for the nonlinear head, other numbers of classes, and teacher logits that are not finite are
  errors with a name; the teacher runs in eval mode without gradients, in its own device and dtype;
- "mse", sum (z - t)^2 / 8, is the same loss for large tau, and offered for comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.classes._binary_kl import (
    Form,
    binary_kl,
    binary_kl_norm,
    check_logits,
    check_loss,
    logit_loss,
)
from salience.methods.classes._dhkd_training import DualTraining
from salience.methods.classes._dual_head import AuxiliaryHead, DualHead, Shape, check_shape
from salience.methods.classes._gradient_alignment import (
    Scope,
    align_gradients,
    aligned_backward,
    check_scope,
)

__all__ = [
    "AuxiliaryHead",
    "BinaryKLLoss",
    "DualHead",
    "align_gradients",
    "aligned_backward",
    "binary_kl",
    "binary_kl_norm",
]


class BinaryKLLoss(nn.Module):
    """Matches logits with a teacher's class by class, for any loop.

    Example:
        >>> student, teacher, x = torch.nn.Linear(20, 10), torch.nn.Linear(20, 10), torch.randn(4, 20)
        >>> with torch.no_grad():
        ...     t = teacher(x)
        >>> BinaryKLLoss(tau=2.0)(student(x), t).backward()

    Args:
        tau (float): temperature, > 0.
        form (str): "binary_kl_norm"; "binary_kl", the first form; "mse", what both are near 0, up to a factor.
        reduction (str): over rows: "mean", "sum" or "none". Classes are summed.
    """

    def __init__(
        self,
        tau: float = 2.0,
        *,
        form: Form = "binary_kl_norm",
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_loss(tau, form)
        require(reduction in ("mean", "sum", "none"), "reduction", "one of mean, sum, none", reduction)
        self.tau, self.form, self.reduction = tau, form, reduction

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss.

        Args:
            student (Tensor): [..., C] logits with graph, any float dtype.
            teacher (Tensor): [..., C] logits; no gradient reaches them.

        Returns:
            Tensor: [] fp32 or fp64, or [...] without reduction; 0 (with graph) for no rows.

        Raises:
            ParameterError: if shapes differ, or teacher logits are not finite.
        """
        check_logits(student, teacher)
        losses = logit_loss(student, teacher, self.tau, self.form)
        if self.reduction == "none":
            return losses
        return losses.sum() if self.reduction == "sum" else losses.sum() / max(losses.numel(), 1)


@dataclass(frozen=True, kw_only=True)
class DHKD(Method):
    """Learn labels with one classifier and the teacher's logits with a second one that is dropped afterwards.

    On a Trainer the auxiliary head is made, trained and dropped for you; in a loop of your own:

    Example:
        >>> import torch, salience as sal
        >>> head = sal.DualHead(torch.nn.Linear(16, 10))
        >>> student = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), head)
        >>> teacher, criterion = torch.nn.Linear(20, 10).requires_grad_(False), sal.BinaryKLLoss()
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> for x, y in [(torch.randn(8, 20), torch.randint(10, (8,))) for _ in range(4)]:
        ...     main, auxiliary = student(x)
        ...     (torch.nn.functional.cross_entropy(main, y) + criterion(auxiliary, teacher(x))).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> student[-1] = student[-1].main

    Attributes:
        teacher (nn.Module | str | Path): a model (kept on its device, in its dtype), a checkpoint's folder, or a
            folder of cached logits.
        gamma (float): weight of cross-entropy on the main head, >= 0.
        alpha (float): weight of the logit loss on the auxiliary head, >= 0; the paper has 1 for CIFAR-100 and 0.1 for
            ImageNet. Not both may be 0.
        tau (float): temperature of the logit loss, > 0.
        loss (str): "binary_kl_norm", "binary_kl" or "mse".
        aux_head (str): "linear", or "nonlinear" for a teacher of another architecture.
        align (bool): take out of the logit loss's gradient what goes against that of the rest (one more backward).
        align_scope (str): "all" parameters as in the official code, or "shared".
        stop_epoch (int | None): from this epoch on there is cross-entropy alone, and no teacher.
        classifier (str | None): path of the student's classifier; None finds it.
        cache (str | Path | None): folder in which the teacher's logits of the training set are kept; it then runs
            once over the data, without augmentation.
    """

    unit: ClassVar[str] = "class"
    spends: ClassVar[str] = "train"
    job: ClassVar[str] = "distill"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    arxiv: ClassVar[str] = "2411.08937"
    title: ClassVar[str] = (
        "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head"
    )
    conflicts: ClassVar[dict[str, str]] = {"pld": "both take the teacher's logits for the same student"}

    teacher: Any = None
    gamma: float = 1.0
    alpha: float = 1.0
    tau: float = 2.0
    loss: Form = "binary_kl_norm"
    aux_head: Shape = "linear"
    align: bool = False
    align_scope: Scope = "all"
    stop_epoch: int | None = None
    classifier: str | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        for name in ("gamma", "alpha"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, name, ">= 0 and finite", value)
        require(self.gamma > 0 or self.alpha > 0, "gamma, alpha", "not both 0", (self.gamma, self.alpha))
        check_loss(self.tau, self.loss)
        check_shape(self.aux_head)
        check_scope(self.align_scope)
        stop = self.stop_epoch
        require(
            stop is None or (type(stop) is int and stop >= 0), "stop_epoch", "None or an integer >= 0", stop
        )
        known = self.teacher is None or isinstance(self.teacher, nn.Module | str | Path)
        require(known, "teacher", "a model or a folder", type(self.teacher).__name__)
        fillable = self.cache is None or isinstance(self.teacher, nn.Module)
        require(fillable, "cache", "None unless teacher is a model to fill it", self.cache)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Train an auxiliary head beside the model; evaluation and checkpoints see none of it."""
        return DualTraining(self, site, record)
