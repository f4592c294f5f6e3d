"""The arithmetic of CutMix on tensors: the box, the paste, the share that is left, and the loss of two labels."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from salience.core.errors import require
from salience.core.labels import check_indices
from salience.core.losses import IGNORE

Box = tuple[int, int, int, int]
Rounding = Literal["floor_half", "exact"]


def cut_box(
    lam: float, center: tuple[int, int], height: int, width: int, *, rounding: Rounding = "floor_half"
) -> Box:
    """The box that is replaced: sides `sqrt(1 - lam)` times the image's, around a centre, clipped to the image.

    Args:
        lam (float): share of the image that should stay, in [0, 1].
        center (tuple[int, int]): row in [0, height) and column in [0, width).
        height, width (int): of the image, in pixels.
        rounding (str): "floor_half" is the official code's: `floor(side) // 2` pixels to either side, so that every
            unclipped side is even and a side of 1 is empty. "exact" keeps odd sides.

    Returns:
        tuple: `top, bottom, left, right`; rows `top:bottom` and columns `left:right` are replaced.
    """
    ratio = math.sqrt(1.0 - lam)
    edges: list[int] = []
    for size, middle in ((height, center[0]), (width, center[1])):
        side = int(size * ratio)
        before, after = side // 2, (side + 1) // 2 if rounding == "exact" else side // 2
        edges += [min(max(middle - before, 0), size), min(max(middle + after, 0), size)]
    return edges[0], edges[1], edges[2], edges[3]


def kept_share(box: Box, height: int, width: int) -> float:
    """Lambda after clipping and rounding: the share of pixels outside of the box, `1 - area / (H W)`."""
    top, bottom, left, right = box
    return 1.0 - (bottom - top) * (right - left) / (height * width)


def paste(images: Tensor, partners: Tensor, box: Box, *, inplace: bool = False) -> Tensor:
    """Fill the box of every image with the same box of its partner.

    Args:
        images (Tensor): [N, C, H, W] of any dtype, also feature maps with graph (then not in place).
        partners (Tensor): [N] int64, the row that each image takes the box from.
        box (tuple): from `cut_box`.
        inplace (bool): write into `images` instead of a copy.

    Returns:
        Tensor: [N, C, H, W]; outside of the box bit-equal to `images`, inside to `images[partners]`.
    """
    top, bottom, left, right = box
    # a copy: every row is read before any row is written; index_select copies bytes much faster than [partners]
    source = images[:, :, top:bottom, left:right].index_select(0, partners)
    mixed = images if inplace else images.clone()
    mixed[:, :, top:bottom, left:right] = source
    return mixed


def paste_masked(images: Tensor, partners: Tensor, boxes: Tensor) -> Tensor:
    """`paste` with boxes in a tensor: one for each image, or one that `torch.compile` does not compile anew.

    Args:
        images (Tensor): [N, C, H, W], also with graph.
        partners (Tensor): [N] int64.
        boxes (Tensor): [N, 4] or [4] int64, `top, bottom, left, right`.

    Returns:
        Tensor: [N, C, H, W].
    """
    top, bottom, left, right = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    rows = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    columns = torch.arange(images.shape[3], device=images.device).view(1, 1, 1, -1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside, images[partners], images)


def mixed_loss(
    logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    lam: float | Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE,
    label_smoothing: float = 0.0,
) -> Tensor:
    """`lam CE(logits, labels) + (1 - lam) CE(logits, partner_labels)`, each mean as `F.cross_entropy` takes it.

    Args:
        logits (Tensor): [N, K], any float dtype; at least fp32 inside.
        labels, partner_labels (Tensor): [N] class indices, or [N, K] soft targets.
        lam (float | Tensor): share of the first label, in [0, 1], or one for each sample [N].
        weight (Tensor | None): [K] class weights; each of the two means has its own normaliser.
        ignore_index (int): index that has no loss.
        label_smoothing (float): of both terms.

    Returns:
        Tensor: [] fp32 with graph.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = isinstance(lam, Tensor) and lam.dim() > 0
    means = []
    for targets, share in ((labels, lam), (partner_labels, 1 - lam)):
        soft = targets.is_floating_point()
        if not soft:
            check_indices(targets, logits.shape[-1], ignore_index)
        losses = F.cross_entropy(
            logits,
            targets.to(logits.dtype) if soft else targets,
            weight=weight,
            ignore_index=IGNORE if soft else ignore_index,
            reduction="none" if each else "mean",
            label_smoothing=label_smoothing,
        )
        if each:
            divisor: Tensor | int = len(losses)
            if not soft:
                counted = (targets != ignore_index).to(losses.dtype)
                shares = counted if weight is None else counted * weight[targets.clamp_min(0)]
                divisor = shares.sum()
            means.append((losses * share).sum() / divisor)
        else:
            means.append(losses * share)
    return means[0] + means[1]


def mixed_targets(
    labels: Tensor, partner_labels: Tensor, lam: float | Tensor, classes: int, *, label_smoothing: float = 0.0
) -> Tensor:
    """Soft targets `lam onehot(labels) + (1 - lam) onehot(partner_labels)` [N, K] in fp32.

    Without class weights and ignored labels their cross-entropy is `mixed_loss`.

    Args:
        labels, partner_labels (Tensor): [N] class indices, or [N, K] soft targets.
        lam (float | Tensor): [] or [N].
        classes (int): K.
        label_smoothing (float): the share that is spread evenly over all classes.
    """
    both = []
    for targets in (labels, partner_labels):
        if targets.is_floating_point():
            require(
                targets.shape[-1] == classes, "labels", f"soft targets [N, {classes}]", list(targets.shape)
            )
            both.append(targets.float())
        else:
            check_indices(targets, classes, None)
            both.append(F.one_hot(targets, classes).float())
    share = lam.to(both[0]).view(-1, 1) if isinstance(lam, Tensor) else lam
    mixed = both[0] * share + both[1] * (1 - share)
    return mixed * (1 - label_smoothing) + label_smoothing / classes
