"""PLD: the student learns the teacher's order of the classes, the true one first, by one list-wise loss.

Scored: each class, by its rank in the teacher's order with the label moved to the front, pi.
Spent: the loss. Choosing pi_1, then pi_2 among the rest, and so on (Plackett-Luce) is weighted by the probability
that the teacher gives to what is chosen: a confident one leaves little but the first choice, which is cross-entropy:

    L = sum_k alpha_k ( logsumexp_{l >= k} s[pi_l] - s[pi_k] ),     alpha_k = softmax(t / tau)[pi_k]

There is no cross-entropy beside it, no weight to tune, no temperature on the student and no tau^2. The gradient is

    dL/ds_i = sum_{k <= rank(i)} alpha_k exp(s_i) / sum_{l >= k} exp(s[pi_l]) - alpha_{rank(i)}

Paper: arXiv 2506.12542 (section 4, appendix C). There is no official code but the listing of appendix C.

This differs from the paper and from that listing in:
- tau is a real parameter: the ablation of the paper prefers 1 on ImageNet, its CIFAR experiments use 4;
- where the teacher is wrong and sure of it, the label's weight vanishes and the loss pushes the wrong class up, above
  all but the label; `label_floor` bounds that weight from below (0 is the paper);
- equal teacher logits are ordered by class, on every device; the listing's sort leaves it open;
- logits of half precision are raised to fp32 and shifted by their largest: `logcumsumexp` of 1000 classes is off by
  0.02 in bf16, and by 1e-5 in fp32 at logits around 1000;
- an empty batch has loss 0 and a gradient, not NaN;
- an extension: `top_m` ranks only the teacher's m best classes beside the label, the others are one last group;
- the paper's row "pListMLE" has weights that are those of PLD as printed, with another result; it is not offered.
Soft labels (mixup, CutMix, several labels) have no first class and are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.labels import check_indices
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.classes._plackett_luce import (
    Weights,
    check_loss,
    rank_weights,
    ranked_loss,
    teacher_order,
)
from salience.methods.classes._pld_training import RankedTraining

__all__ = ["PlackettLuceLoss", "rank_weights", "ranked_loss", "teacher_order"]


class PlackettLuceLoss(nn.Module):
    """The loss of the teacher's order, for any loop.

    Example:
        >>> student, teacher = torch.nn.Linear(20, 10), torch.nn.Linear(20, 10)
        >>> criterion, x, y = PlackettLuceLoss(tau=1.0), torch.randn(4, 20), torch.arange(4)
        >>> with torch.no_grad():
        ...     t = teacher(x)
        >>> criterion(student(x), t, y).backward()

    Args:
        tau (float): the teacher's temperature, > 0; the paper has 1 for ImageNet and 4 for CIFAR-100.
        weights (str): "teacher"; "uniform" is ListMLE divided by C; "first" is cross-entropy.
        label_floor (float): least weight of the label, in [0, 1]; 0 is the paper.
        top_m (int | None): rank only so many classes beside the label, for large vocabularies; None ranks all.
        ignore_index (int | None): rows with this label take no part; None allows none.
        reduction (str): "mean" over the rows that take part, "sum" or "none" (ignored rows give 0).
    """

    def __init__(
        self,
        tau: float = 1.0,
        *,
        weights: Weights = "teacher",
        label_floor: float = 0.0,
        top_m: int | None = None,
        ignore_index: int | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        check_loss(tau, weights, label_floor, top_m)
        require(reduction in ("mean", "sum", "none"), "reduction", "one of mean, sum, none", reduction)
        self.tau, self.weights, self.label_floor = tau, weights, label_floor
        self.top_m, self.ignore_index, self.reduction = top_m, ignore_index, reduction

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Args:
            student (Tensor): [..., C] logits with graph, any float dtype.
            teacher (Tensor): [..., C] logits; no gradient reaches them.
            labels (Tensor): [...] class indices in [0, C), any integer dtype.

        Returns:
            Tensor: [] fp32 or fp64, or [...] without reduction; 0 (with graph) where no row takes part.

        Raises:
            ParameterError: if shapes differ, labels are no indices in range, or teacher logits are not finite.
        """
        shape = list(student.shape)
        require(student.dim() >= 2, "student", "logits [..., C] of at least one row", shape)
        classes = f"logits {shape} like the student's"
        require(teacher.shape == student.shape, "teacher", classes, list(teacher.shape))
        require(
            labels.shape == student.shape[:-1], "labels", f"class indices {shape[:-1]}", list(labels.shape)
        )
        check_indices(labels, shape[-1], self.ignore_index)
        if self.top_m is not None:
            require(self.top_m <= shape[-1], "top_m", f"<= {shape[-1]}, the number of classes", self.top_m)
        rows, targets, given = student.flatten(0, -2), labels.flatten(), teacher.detach().flatten(0, -2)
        active = None
        if self.ignore_index is not None:
            # before the sort, which is what costs
            active = (targets != self.ignore_index).nonzero().squeeze(-1)
            rows, targets, given = rows[active], targets[active], given[active]
        _check_finite(given)
        losses, _ = self.rows(rows, given, targets)
        if self.reduction == "none":
            if active is not None:
                losses = losses.new_zeros(labels.numel()).index_put((active,), losses)
            return losses.view(labels.shape)
        total = losses.sum()
        return total if self.reduction == "sum" else total / max(len(losses), 1)

    def rows(self, student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Losses [N] with graph and weights of the ranks [N, K], of rows [N, C] that were checked."""
        order = teacher_order(teacher, labels.long(), self.top_m)
        weights = rank_weights(teacher, order, self.tau, self.weights, self.label_floor)
        return ranked_loss(student, order, weights), weights


@dataclass(frozen=True, kw_only=True)
class PLD(Method):
    """Learn the teacher's order of the classes, the true one first: one list-wise loss instead of two weighted ones.

    On a Trainer the model's own loss makes way for it; in a loop of your own use `PlackettLuceLoss`:

    Example:
        >>> import torch, salience as sal
        >>> student, teacher = torch.nn.Linear(20, 10), torch.nn.Linear(20, 10).requires_grad_(False)
        >>> criterion, optimizer = sal.PlackettLuceLoss(), torch.optim.SGD(student.parameters(), lr=0.1)
        >>> for x, y in [(torch.randn(8, 20), torch.randint(10, (8,))) for _ in range(4)]:
        ...     criterion(student(x), teacher(x), y).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Attributes:
        teacher (nn.Module | str | Path): a model (kept on its device, in its dtype), a checkpoint's folder, or a
            folder of cached logits.
        tau (float): the teacher's temperature, > 0.
        weights (str): "teacher", "uniform" (ListMLE) or "first" (cross-entropy).
        label_floor (float): least weight of the label, in [0, 1].
        top_m (int | None): rank only so many classes beside the label.
        cache (str | Path | None): folder in which the teacher's logits of the training set are kept; it then runs
            once over the data, without augmentation.
    """

    unit: ClassVar[str] = "class"
    spends: ClassVar[str] = "weight"
    job: ClassVar[str] = "distill"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    arxiv: ClassVar[str] = "2506.12542"
    title: ClassVar[str] = "PLD: A Choice-Theoretic List-Wise Knowledge Distillation"
    conflicts: ClassVar[dict[str, str]] = {
        "cutmix": "a mixed image has two labels, and the order of PLD begins with one",
        "dhkd": "both take the teacher's logits for the same student",
    }

    teacher: Any = None
    tau: float = 1.0
    weights: Weights = "teacher"
    label_floor: float = 0.0
    top_m: int | None = None
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        check_loss(self.tau, self.weights, self.label_floor, self.top_m)
        known = self.teacher is None or isinstance(self.teacher, nn.Module | str | Path)
        require(known, "teacher", "a model or a folder", type(self.teacher).__name__)
        fillable = self.cache is None or isinstance(self.teacher, nn.Module)
        require(fillable, "cache", "None unless teacher is a model to fill it", self.cache)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Replace the loss of every training batch; evaluation keeps the model's own."""
        loss = PlackettLuceLoss(
            self.tau, weights=self.weights, label_floor=self.label_floor, top_m=self.top_m, reduction="none"
        )
        return RankedTraining(self, site, loss)


def _check_finite(teacher: Tensor) -> None:
    if teacher.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = ~torch.isfinite(teacher)
        if bool(bad.any()):
            require(False, "teacher", "finite logits", float(teacher[bad][0]))
