"""CutMix: a box of every training image is replaced by the same box of another one, and the label is split by area.

Scored: the region, by its area: what the box covers is the other image's share of the label.
Spent: nothing at run time but one copy of the batch; the purity of labels, so that every pixel still teaches
something. Each batch draws `lam ~ Beta(alpha, alpha)`, a centre, and a partner for each image; the box has sides
`sqrt(1 - lam)` of the image's and is clipped; then `lam = 1 - box area / image area` and the loss is

    lam CE(f(x), y) + (1 - lam) CE(f(x), y[partner])

Paper: arXiv 1905.04899 (section 3.1, algorithm A1). Official code: clovaai/CutMix-PyTorch (2d8eb68), train.py.

The official code differs from the paper, and this differs from the official code, in:
- the official recipe for CIFAR mixes half of the batches, the paper all of them; `prob` is 1 here;
- the paper lacks the correction of `lam` to the clipped area, without which labels claim pixels that were cut off (at
  alpha 1 the box covers 0.32 of a large image on average, not 0.5); it is done unless `correct_lam=False`;
- official boxes are even-sided (half a side is floored on either side, so small boxes vanish); `box_rounding="exact"`
  keeps odd sides;
- the official `np.int` no longer exists in NumPy, its accuracy calls `view` on what is not contiguous, and it logs
  training accuracy against the first label only: here training accuracy of mixed batches is not reported at all;
- it draws from two global generators, so that ranks with one seed cut one box; here from one generator, and each
  rank, step and micro-batch of a Trainer draws its own;
- a batch of one sample has no partner: an error where the batch is yours to make, and an ordinary step where it is
  the short last batch of a Trainer;
- the official figures are those of the best epoch on the test set; the experiment here reports the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.labels import check_indices
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.samples._cutmix_collate import CutMixCollate
from salience.methods.samples._cutmix_mixing import (
    Box,
    Rounding,
    cut_box,
    kept_share,
    mixed_loss,
    mixed_targets,
    paste,
    paste_masked,
)
from salience.methods.samples._cutmix_training import Mixing

__all__ = [
    "CutMixCollate",
    "Mixed",
    "cut_box",
    "kept_share",
    "mixed_loss",
    "mixed_targets",
    "paste",
    "paste_masked",
]


@dataclass(frozen=True)
class Mixed:
    """A mixed batch.

    Attributes:
        images (Tensor): [N, C, H, W].
        labels (Tensor): [N] class indices or [N, K] soft targets, as they were given.
        partner_labels (Tensor): the same of the partners.
        partners (Tensor): [N] int64, where each image's box came from.
        lam (float | Tensor): share of the first label, in [0, 1]; [N] fp32 with `per_sample`. 1 if nothing was mixed.
        boxes (tuple[Box, ...]): `top, bottom, left, right`: none, one for the batch, or one for each image.
    """

    images: Tensor
    labels: Tensor
    partner_labels: Tensor
    partners: Tensor
    lam: float | Tensor
    boxes: tuple[Box, ...] = ()

    def loss(self, logits: Tensor, **settings: Any) -> Tensor:
        """`mixed_loss` of the model's logits [N, K]; settings are `weight`, `ignore_index`, `label_smoothing`."""
        return mixed_loss(logits, self.labels, self.partner_labels, self.lam, **settings)

    def targets(self, classes: int, *, label_smoothing: float = 0.0) -> Tensor:
        """Soft targets [N, classes] for losses that take probabilities."""
        both = self.labels, self.partner_labels
        return mixed_targets(*both, self.lam, classes, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class CutMix(Method):
    """Paste a box of one training image into another, and split the label by the area.

    Called with a batch, it mixes it; `collate` makes a DataLoader do so; on a Trainer every training batch is mixed.

    Example:
        >>> import torch, salience as sal
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        >>> cutmix, optimizer = sal.CutMix(alpha=1.0), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for images, labels in [(torch.rand(8, 3, 8, 8), torch.randint(10, (8,))) for _ in range(4)]:
        ...     mixed = cutmix(images, labels)
        ...     mixed.loss(model(mixed.images)).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Attributes:
        alpha (float): of `Beta(alpha, alpha)`, >= 0; 1 is uniform, 0 mixes nothing.
        prob (float): share of the batches that are mixed, in [0, 1].
        correct_lam (bool): whether labels are split by the area that was really replaced, not by what was drawn.
        per_sample (bool): a box and a share for each image instead of one for the batch.
        box_rounding (str): "floor_half" (the official boxes, even-sided) or "exact".
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "merge"
    job: ClassVar[str] = "regularize"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "1905.04899"
    title: ClassVar[str] = (
        "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features"
    )

    alpha: float = 1.0
    prob: float = 1.0
    correct_lam: bool = True
    per_sample: bool = False
    box_rounding: Rounding = "floor_half"

    def __post_init__(self) -> None:
        require(math.isfinite(self.alpha) and self.alpha >= 0, "alpha", ">= 0 and finite", self.alpha)
        require(0 <= self.prob <= 1, "prob", "in [0, 1]", self.prob)
        roundings = get_args(Rounding)
        require(
            self.box_rounding in roundings,
            "box_rounding",
            f"one of {', '.join(roundings)}",
            self.box_rounding,
        )

    def __call__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator | None = None,
        inplace: bool = False,
        classes: int | None = None,
    ) -> Mixed:
        """Mix one batch.

        Args:
            images (Tensor): [N, C, H, W] of any dtype and device, N >= 2.
            labels (Tensor): [N] class indices (any integer dtype), or [N, K] soft targets.
            generator (torch.Generator | None): of the draws, on the CPU; None takes torch's own, as
                `torch.randperm` does (in a DataLoader's worker that is one of its own).
            inplace (bool): write into `images`; otherwise they stay as they are.
            classes (int | None): if given, labels have to be below it.

        Returns:
            Mixed: images, both labels and the share of the first.

        Raises:
            ParameterError: if images or labels have another shape or dtype, or there are fewer than two.
        """
        shape = list(images.shape)
        require(images.dim() == 4, "images", "a batch [N, C, H, W]", shape)
        require(len(images) >= 2, "batch", "at least two samples to mix (drop_last=True)", len(images))
        labels = checked_labels(labels, len(images), classes)
        drawn = self.draw(*shape[:1], *shape[2:], generator=generator)
        if drawn is None:
            rows = torch.arange(len(images), device=images.device)
            return Mixed(images, labels, labels, rows, 1.0)
        partners, boxes, lams = drawn
        partners = partners.to(images.device)
        lam: float | Tensor = lams[0]
        if self.per_sample:
            lam = torch.tensor(lams, dtype=torch.float32, device=images.device)
            mixed = paste_masked(images, partners, torch.tensor(boxes, device=images.device))
            mixed = images.copy_(mixed) if inplace else mixed
        else:
            mixed = paste(images, partners, boxes[0], inplace=inplace)
        return Mixed(mixed, labels, labels[partners.to(labels.device)], partners, lam, tuple(boxes))

    def draw(
        self, count: int, height: int, width: int, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, list[Box], list[float]] | None:
        """What one batch is mixed with: partners [N], boxes, and shares of the first label; None: not mixed.

        Args:
            count (int): N; with `per_sample` there are N boxes and shares, else one.
            height, width (int): of the images.
            generator (torch.Generator | None): as in a call.
        """
        if self.alpha == 0 or float(torch.rand((), dtype=torch.float64, generator=generator)) >= self.prob:
            return None
        # torch draws from a Beta distribution with its global generator only
        beta = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        partners = torch.randperm(count, generator=generator)
        boxes, lams = [], []
        for _ in range(count if self.per_sample else 1):
            lam = float(beta.beta(self.alpha, self.alpha))
            row, column = (int(torch.randint(size, (), generator=generator)) for size in (height, width))
            boxes.append(cut_box(lam, (row, column), height, width, rounding=self.box_rounding))
            lams.append(kept_share(boxes[-1], height, width) if self.correct_lam else lam)
        return partners, boxes, lams

    def collate(
        self,
        *,
        targets: Literal["soft", "index"] = "soft",
        classes: int | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> CutMixCollate:
        """A collate function for `DataLoader(collate_fn=...)`, explained at `CutMixCollate`."""
        return CutMixCollate(
            self,
            targets=targets,
            classes=classes,
            collate=collate,
            seed=seed,
            label_smoothing=label_smoothing,
        )

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Mixes the images of every training batch, and adds the partner's label to the loss."""
        return Mixing(self, site, checked_labels)


def checked_labels(labels: Tensor, count: int, classes: int | None = None) -> Tensor:
    """Class indices [N] as int64, or soft targets [N, K] as they are.

    Raises:
        ParameterError: if they are neither, or an index is out of range.
    """
    got = f"{str(labels.dtype).removeprefix('torch.')} {list(labels.shape)}"
    soft = labels.is_floating_point() and labels.dim() == 2
    whole = labels.dim() == 1 and not labels.is_floating_point() and labels.dtype != torch.bool
    wanted = f"class indices [{count}] of an integer dtype, or soft targets [{count}, K]"
    require((soft or whole) and len(labels) == count, "labels", wanted, got)
    if soft:
        return labels
    labels = labels.long()
    if classes is not None:
        check_indices(labels, classes)
    return labels
