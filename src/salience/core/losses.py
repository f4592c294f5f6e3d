"""Losses of single tokens or samples, aligned with the labels, in fp32.

Everything that weights tokens or samples works on the same two tensors: `losses[i, t]`, the loss OF token t of
sample i, and `active[i, t]`, whether that token takes part. What a model's own loss shifts is shifted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from salience.core.errors import StructureError

IGNORE = -100


def token_losses(
    logits: Tensor, labels: Tensor, *, shifted: bool = True, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each label, without any reduction.

    Args:
        logits (Tensor): [B, T, V] for tokens or [B, C] for classes, any float dtype; computed in at least fp32.
        labels (Tensor): [B, T] or [B] int64, unshifted; -100 takes no part.
        shifted (bool): causal models predict token t with logits row t-1: column 0 has no loss. False for
            masked, token-classification and encoder-decoder models. Ignored for classes.
        smoothing (float): label smoothing in [0, 1): `(1 - e) * nll + e * mean over the vocabulary of -log p`.

    Returns:
        tuple[Tensor, Tensor]: losses [B, T] ([B, 1] for classes) with graph, 0 where inactive; active, bool,
        same shape.

    Raises:
        StructureError: if the shapes do not belong together.
    """
    if labels.dim() == logits.dim() - 1 and labels.shape[0] == logits.shape[0]:
        if labels.dim() == 1:
            logits, labels, shifted = logits.unsqueeze(1), labels.unsqueeze(1), False
    else:
        raise StructureError(
            f"labels must have the shape of the logits without their last dimension, got labels "
            f"{list(labels.shape)} and logits {list(logits.shape)}"
        )
    if shifted:
        logits, targets = logits[:, :-1], labels[:, 1:]
    else:
        targets = labels
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    flat = F.cross_entropy(
        logits.flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="none",
        label_smoothing=smoothing,
    )
    losses, active = flat.view_as(targets), targets != IGNORE
    if shifted:
        losses, active = F.pad(losses, (1, 0)), F.pad(active, (1, 0))
    return losses, active


def sample_losses(losses: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of each row: `sum_t w l / sum_t w`, 0 where the row has no weight.

    Args:
        losses (Tensor): [B, T] from `token_losses`.
        weights (Tensor): [B, T] float or bool, token weights.

    Returns:
        tuple[Tensor, Tensor]: means [B] with graph; total weight of each row [B].
    """
    total = weights.to(losses.dtype).sum(-1)
    mean = (losses * weights).sum(-1) / total.clamp_min(torch.finfo(losses.dtype).tiny)
    return torch.where(total > 0, mean, torch.zeros_like(mean)), total


def logits_of(outputs: Any) -> Tensor:
    """The logits that a model returned: a tensor, an object or a mapping with `logits`.

    Raises:
        StructureError: if there are none.
    """
    return outputs if isinstance(outputs, Tensor) else _member(outputs, "logits")


def loss_of(outputs: Any) -> Tensor:
    """The loss that a model returned: an object or a mapping with `loss`.

    Raises:
        StructureError: if there is none.
    """
    return _member(outputs, "loss")


def _member(outputs: Any, name: str) -> Tensor:
    found = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    if not isinstance(found, Tensor):
        raise StructureError(f"model must return {name}, got {type(outputs).__name__} without")
    return found
