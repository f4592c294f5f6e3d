"""Scores of whole samples from one pass: perplexity, EL2N, entropy over the tokens with a label, and GraNd.

They take logits [B, T', V] and labels [B, T] unshifted with -100 where nothing is learned. T' may be larger
than T where a model puts image tokens in front of the text: the last T positions are the text's. The model predicts
token t with logits row t - 1. Rows without a label give NaN: they have no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from salience.core.errors import StructureError
from salience.core.losses import IGNORE
from salience.core.token_scores import el2n, entropy, nll

_TOKENS = 1024  # rows of [V] logits that are brought to fp32 at a time


def mean_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log likelihood of the labels of each sample, the logarithm of its perplexity: [B], fp32."""
    return _mean_over_labels(logits, labels, nll)


def perplexities(logits: Tensor, labels: Tensor, *, of_tokens: bool = False) -> Tensor:
    """`exp(mean NLL)` of each sample, [B]; with `of_tokens` the mean of `exp(NLL)`, which one bad token rules."""
    if of_tokens:
        return _mean_over_labels(logits, labels, lambda rows, targets: nll(rows, targets).exp())
    return mean_losses(logits, labels).exp()


def error_norms(logits: Tensor, labels: Tensor) -> Tensor:
    """EL2N: mean over labels of `||softmax(z) - onehot(y)||_2`, [B] in [0, sqrt(2)]."""
    return _mean_over_labels(logits, labels, el2n)


def entropies(logits: Tensor, labels: Tensor, *, everywhere: bool = False) -> Tensor:
    """Mean entropy of the predicted distributions in nats, [B], where labels are predicted or at all T' positions."""
    if everywhere:
        rows = [row.new_zeros(len(row), dtype=torch.int64) for row in logits]
        return torch.stack([_mean(row, unread, entropy) for row, unread in zip(logits, rows)])
    return _mean_over_labels(logits, labels, entropy)


def gradient_norms(gradients: Tensor) -> Tensor:
    """GraNd: the length of each sample's gradient [B, P], [B]."""
    return gradients.norm(dim=-1)


def _precise(rows: Tensor) -> Tensor:
    return rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows


def _mean_over_labels(logits: Tensor, labels: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if (
        logits.dim() != 3
        or labels.dim() != 2
        or logits.shape[1] < labels.shape[1]
        or len(logits) != len(labels)
    ):
        raise StructureError(
            f"labels must be [B, T] and logits [B, T or more, V], got {list(labels.shape)} and {list(logits.shape)}"
        )
    return torch.stack([_mean(row, targets, of) for row, targets in _rows(logits, labels)])


def _rows(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each sample the logits that predict a label, and the labels."""
    for row, targets in zip(logits[:, -labels.shape[1] :], labels):
        active = targets[1:] != IGNORE
        yield row[:-1][active], targets[1:][active]


def _mean(rows: Tensor, targets: Tensor, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    if not len(targets):
        return rows.new_full((), torch.nan, dtype=_precise(rows[:0]).dtype)
    parts = [of(_precise(some), few) for some, few in zip(rows.split(_TOKENS), targets.split(_TOKENS))]
    return torch.cat(parts).mean()
