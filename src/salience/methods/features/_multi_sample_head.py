"""A head that runs several times on one batch of features, each time with other units dropped."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.core.errors import require
from salience.core.labels import check_indices

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
Reduce = Literal["loss", "logits"]


class MultiSampleHead(nn.Module):
    """Wraps a head: in training it gives logits for `num_samples` dropout masks, in eval mode it is the head.

    The weights are shared, and the keys of `state_dict` are those of the head alone, so that checkpoints fit either
    way.

    Example:
        >>> backbone = torch.nn.Linear(20, 16)
        >>> head = MultiSampleHead(torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(16, 10)), 8)
        >>> x, y = torch.randn(4, 20), torch.arange(4)
        >>> multi_sample_loss(head(backbone(x)), y).backward()

    Args:
        head (nn.Module): features [B, ...] to logits [B, ...]; it holds a Dropout module, or `p` is given.
        num_samples (int): M >= 1.
        p (float | None): ratio of one dropout in front of a head that has none, in [0, 1).
        chunk (int | None): how many samples run in one call of the head, in 1..M; None runs all at once. With
            BatchNorm in the head its statistics are those of one call.
        augment (Callable | None): changes the features of sample m, `augment(features, m)`: flips, shifts.
    """

    def __init__(
        self,
        head: nn.Module,
        num_samples: int = 8,
        *,
        p: float | None = None,
        chunk: int | None = None,
        augment: Callable[[Tensor, int], Tensor] | None = None,
    ) -> None:
        super().__init__()
        check_samples(num_samples, p)
        whole = chunk is None or (type(chunk) is int and 1 <= chunk <= num_samples)
        require(whole, "chunk", f"an integer in [1, {num_samples}]", chunk)
        check_dropouts(dropouts_of(head), p, "head", type(head).__name__)
        self.head = head
        self.dropout = None if p is None else nn.Dropout(p)
        self.num_samples = num_samples
        self.chunk = chunk or num_samples
        self.augment = augment
        self._normed = has_batch_norm(head)
        self.register_state_dict_post_hook(_without_prefix)
        self.register_load_state_dict_pre_hook(_with_prefix)

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, ...] to logits: [M, B, ...] in training, [B, ...] in eval mode."""
        if not self.training:
            return self.head(features)
        starts = range(0, self.num_samples, self.chunk)
        return torch.cat([self._samples(features, start) for start in starts])

    def backward(self, features: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Backward of the mean loss in the memory of one `chunk`, through the head and then once through the rest.

        Args:
            features (Tensor): [B, ...] with graph.
            criterion (Callable): logits [B, ...] of one sample to its loss [].

        Returns:
            Tensor: [] the mean loss, without graph; gradients are where `loss.backward()` would have left them.
        """
        leaf = features.detach().requires_grad_()
        total = torch.zeros((), device=features.device)
        for start in range(0, self.num_samples, self.chunk):
            losses = torch.stack([criterion(logits) for logits in self._samples(leaf, start)])
            share = losses.sum() / self.num_samples
            share.backward()
            total = total + share.detach()
        features.backward(leaf.grad)
        return total

    def _samples(self, features: Tensor, start: int) -> Tensor:
        count = min(self.chunk, self.num_samples - start)
        check_batch(self._normed, len(features))
        if self.augment is None:
            rows = repeated(features, count)
        else:
            rows = torch.cat([self.augment(features, start + m) for m in range(count)])
        if self.dropout is not None:
            rows = self.dropout(rows)
        logits: Tensor = self.head(rows)
        return logits.view(count, len(features), *logits.shape[1:])


def multi_sample_loss(
    logits: Tensor,
    labels: Tensor,
    criterion: Callable[..., Tensor] = F.cross_entropy,
    *,
    reduce: Reduce = "loss",
) -> Tensor:
    """The mean over dropout samples of each sample's loss; of logits without samples simply the loss.

    Args:
        logits (Tensor): [M, B, K] from `MultiSampleHead` in training, or [B, K]; half precision is raised to fp32.
        labels (Tensor): what `criterion` takes: [B] class indices, or [B, K] floats.
        criterion (Callable): `criterion(logits [B, K], labels)`, with any reduction.
        reduce (str): "loss" is the method. "logits" takes one loss of the mean logits, which much code calls
            multi-sample dropout: it is never larger, and as M grows the dropout averages away.

    Returns:
        Tensor: as `criterion` gives it.
    """
    require(reduce in ("loss", "logits"), "reduce", "one of loss, logits", reduce)
    if criterion is F.cross_entropy and not (labels.is_floating_point() and labels.dim() > 1):
        check_indices(labels, logits.shape[-1])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logits.dim() == labels.dim() + (1 if labels.dim() == 1 else 0):
        return criterion(logits, labels)
    if reduce == "logits":
        return criterion(logits.mean(0), labels)
    return torch.stack([criterion(one, labels) for one in logits]).mean(0)


def repeated(rows: Tensor, count: int) -> Tensor:
    """[B, ...] to [count * B, ...]: the whole batch several times, one after the other."""
    return rows.repeat(count, *[1] * (rows.dim() - 1)) if count > 1 else rows


def check_samples(num_samples: Any, p: float | None) -> None:
    """Refuse numbers out of range."""
    require(type(num_samples) is int and num_samples >= 1, "num_samples", "an integer >= 1", num_samples)
    require(p is None or 0 <= p < 1, "p", "None or in [0, 1)", p)


def dropouts_of(module: nn.Module) -> list[nn.Module]:
    """The Dropout modules in a module, itself included."""
    return [one for one in module.modules() if isinstance(one, DROPOUTS)]


def has_batch_norm(module: nn.Module) -> bool:
    """Whether it normalises over the batch."""
    return any(isinstance(one, _BATCH_NORMS) for one in module.modules())


def check_batch(normed: bool, size: int) -> None:
    """Refuse one sample for batch statistics: its copies are no batch."""
    require(size >= 2 or not normed, "batch", "at least two samples for a head with BatchNorm", size)


def check_dropouts(found: list[Any], p: float | None, name: str, got: str) -> None:
    """There is dropout in the part that is run several times, once, with ratios below 1; warn if all are 0.

    Raises:
        ParameterError: if not.
    """
    wanted = "a module with a Dropout in it (or give p for one in front of it)"
    require(bool(found) or p is not None, name, wanted, got)
    require(not found or p is None, "p", "None for a head that has Dropout of its own", p)
    ratios = [one.p for one in found] if p is None else [p]
    require(max(ratios) < 1, "p", "in [0, 1) in every Dropout of the head", max(ratios))
    if max(ratios) == 0:
        warnings.warn("every Dropout of the head has p = 0: all dropout samples are equal", stacklevel=3)


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}head.")]:
        state[prefix + name.removeprefix(f"{prefix}head.")] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}head.{name.removeprefix(prefix)}"] = state.pop(name)
