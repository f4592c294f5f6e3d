"""Scores of single tokens from a model's logits, and their means over a document, in at least fp32.

Every function of logits takes [N, V] and the [N] tokens that really came, and returns [N].
"""

from __future__ import annotations

import torch
from torch import Tensor


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log likelihood in nats: `logsumexp_v z - z_y`."""
    return logits.logsumexp(-1) - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def el2n(logits: Tensor, targets: Tensor) -> Tensor:
    """Length of the error vector `||softmax(z) - onehot(y)||_2`, in [0, sqrt 2]."""
    error = logits.softmax(-1)
    error.scatter_add_(-1, targets.unsqueeze(-1), error.new_full((len(targets), 1), -1.0))
    return error.norm(dim=-1)


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of the predicted distribution, in nats: `-sum_v p_v log p_v`; the targets are not read."""
    logs = logits.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def row_means(values: Tensor, active: Tensor) -> Tensor:
    """Mean of each row over its active entries.

    Args:
        values (Tensor): [B, T] float.
        active (Tensor): [B, T] bool.

    Returns:
        Tensor: [B] float64; NaN for rows without an active entry.
    """
    total = torch.where(active, values, torch.zeros_like(values)).double().sum(-1)
    return total / active.sum(-1)
