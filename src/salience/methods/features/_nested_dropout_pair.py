"""Co-teaching: two networks, each picks the samples of small loss that the other one trains on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.core.errors import StructureError, require
from salience.core.loop import evaluating
from salience.core.losses import logits_of
from salience.hosts.classifier import find_classifier
from salience.methods.features._nested_dropout_layer import (
    NestedMask,
    choose_prefix,
    collect,
    prefix_accuracy,
)

_NORMS = (nn.modules.batchnorm._BatchNorm,)


def remembered(size: int, forget_rate: float) -> int:
    """How many of `size` samples are kept: `floor((1 - forget_rate) size)`, free of rounding ((1 - 0.9) 10 is 1).

    Raises:
        ParameterError: if none would be left.
    """
    require(0 <= forget_rate < 1, "forget_rate", "in [0, 1)", forget_rate)
    kept = math.floor((1 - forget_rate) * size + 1e-9)
    require(kept >= 1, "forget_rate", f"small enough to keep one of {size} samples", forget_rate)
    return kept


def small_losses(losses: Tensor, keep: int) -> Tensor:
    """[keep] int64: the places of the smallest of the losses [B], smallest first; ties in order, NaN last."""
    return losses.detach().argsort(stable=True)[:keep]


class CoTeaching(nn.Module):
    """Two classifiers with the same classes that train each other on the samples they find easy.

    Called with labels in training mode it returns the sum of two losses, one for each network; their parameters are
    disjoint, so one optimizer over both is two. Otherwise it returns the mean of their logits. It is an ordinary
    module: a bare loop, DDP and a transformers Trainer (`Trainer(model=CoTeaching(a, b))`) run it alike.

    With `NestedMask` inside, both keep the same freshly drawn prefix in a training pass, and their `keep` when they
    select and predict; `choose` sets that from validation data. Other dropout is off while they select.

    Args:
        first, second (nn.Module): called with the inputs as keywords, return logits [B, C] (or something with
            `logits`); trained before, from different seeds.
        forget_rate (float): share of samples that are passed over, in [0, 1): about the share of wrong labels.
        ramp_steps (int): training passes in which the share rises from 0, >= 0.
        split_batch (bool): each scores one half of the batch and trains on what the other picked in the other half
            (an odd row is left out); False: both score the whole batch, as in co-teaching elsewhere.
        freeze_norm (bool): batch normalisation keeps its statistics and its weights do not train. Of these weights
            `requires_grad` is set to False here.

    Attributes:
        picked (tuple[Tensor, Tensor]): rows of the last training batch that the first and the second one trained on.

    Shape:
        labels [B] int64 and any inputs whose tensors have B rows -> {"loss": [], "logits": [B', C]}, B' the rows that
        were trained on by the first network and then by the second; without labels {"logits": [B, C]}.

    Example:
        >>> import torch, salience as sal
        >>> pair = sal.CoTeaching(torch.nn.Linear(4, 2), torch.nn.Linear(4, 2), forget_rate=0.25)
        >>> pair(input=torch.randn(8, 4), labels=torch.zeros(8, dtype=torch.long))["logits"].shape
        torch.Size([6, 2])
    """

    # tells a Trainer to average over micro-batches itself: each has a mean over its own selection
    accepts_loss_kwargs = False
    passes: Tensor

    def __init__(
        self,
        first: nn.Module,
        second: nn.Module,
        *,
        forget_rate: float = 0.2,
        ramp_steps: int = 0,
        split_batch: bool = True,
        freeze_norm: bool = True,
    ) -> None:
        super().__init__()
        require(0 <= forget_rate < 1, "forget_rate", "in [0, 1)", forget_rate)
        require(ramp_steps >= 0, "ramp_steps", ">= 0", ramp_steps)
        shared = {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
        require(
            not shared, "first and second", "two networks without shared parameters", f"{len(shared)} shared"
        )
        self.first, self.second = first, second
        self.forget_rate, self.ramp_steps = forget_rate, ramp_steps
        self.split_batch, self.freeze_norm = split_batch, freeze_norm
        self.picked: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        if freeze_norm:
            for module in self._norms():
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> CoTeaching:
        """As in any module, but frozen batch normalisation stays in eval mode."""
        super().train(mode)
        if self.freeze_norm:
            for module in self._norms():
                module.eval()
        return self

    def forward(self, labels: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """See the class."""
        inputs.pop("num_items_in_batch", None)
        if labels is None or not self.training:
            logits = self._mean_logits(inputs)
            found = {"logits": logits}
            # the loss comes first: a Trainer takes it off the front
            return found if labels is None else {"loss": F.cross_entropy(logits.float(), labels), **found}
        loss, logits = self._exchange(labels, inputs)
        self.passes.add_(1)
        return {"loss": loss, "logits": logits}

    def rate(self) -> float:
        """The forget rate of the next training pass, after the ramp."""
        if self.ramp_steps == 0 or int(self.passes) >= self.ramp_steps:
            return self.forget_rate
        return self.forget_rate * int(self.passes) / self.ramp_steps

    def choose(self, batches: Iterable[Any], *, penalty: float = 1e-5) -> tuple[int, Tensor]:
        """Choose the prefix on validation batches, never on test ones, and set it in both networks.

        Args:
            batches (Iterable[dict]): inputs and `labels` [B]. Clean labels, if there are any.
            penalty (float): see `choose_prefix`.

        Returns:
            tuple[int, Tensor]: k in 1..N, and the accuracy [N] of the mean logits for every k.
        """
        models = (self.first, self.second)
        masks = [self._masks(model) for model in models]
        if not all(len(found) == 1 for found in masks):
            raise StructureError(
                "each network must hold one NestedMask, got " + " and ".join(str(len(m)) for m in masks)
            )
        accuracy = accuracy_of_prefixes(models, batches)
        keep = choose_prefix(accuracy, penalty=penalty)
        for found in masks:
            found[0].limit(keep)
        return keep, accuracy

    def _exchange(self, labels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        batch = len(labels)
        half = batch // 2 if self.split_batch else batch
        require(half >= 1, "batch", "of two rows at least, one for each network", batch)
        every = torch.arange(batch, device=labels.device)
        seen = (every[:half], every[half : 2 * half]) if self.split_batch else (every, every)
        keep = remembered(half, self.rate())
        models = (self.first, self.second)
        picked = [rows[self._easy(m, inputs, labels, rows, keep)] for m, rows in zip(models, seen)]
        # the first trains on what the second one picked
        self.picked = picked[1], picked[0]
        self._align()
        losses, logits = [], []
        for model, rows in zip(models, self.picked):
            logits.append(logits_of(model(**_rows(inputs, rows, batch))))
            losses.append(F.cross_entropy(logits[-1].float(), labels[rows]))
        return losses[0] + losses[1], torch.cat(logits)

    def _easy(
        self, model: nn.Module, inputs: dict[str, Any], labels: Tensor, rows: Tensor, keep: int
    ) -> Tensor:
        with evaluating(model), torch.no_grad():
            logits = logits_of(model(**_rows(inputs, rows, len(labels)))).float()
        return small_losses(F.cross_entropy(logits, labels[rows], reduction="none"), keep)

    def _mean_logits(self, inputs: dict[str, Any]) -> Tensor:
        with ExitStack() as stack:
            if not self.training:
                stack.enter_context(evaluating(self))
            return (logits_of(self.first(**inputs)) + logits_of(self.second(**inputs))) / 2

    def _align(self) -> None:
        """The same prefix for both: the draws of the second follow those of the first."""
        for a, b in zip(self._masks(self.first), self._masks(self.second)):
            b.seed = a.seed
            b.calls.copy_(a.calls)

    def _masks(self, model: nn.Module) -> list[NestedMask]:
        return [module for module in model.modules() if isinstance(module, NestedMask)]

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, _NORMS)]


def accuracy_of_prefixes(
    models: Sequence[nn.Module], batches: Iterable[Any], *, classifiers: Sequence[str | None] | None = None
) -> Tensor:
    """Accuracy of the mean logits of these models with the first k features, for every k.

    Args:
        models (Sequence[nn.Module]): their classifiers read equally many features.
        batches (Iterable[dict]): keywords of a call, with `labels` [B].
        classifiers (Sequence[str | None] | None): paths of their classifiers; None finds them.

    Returns:
        Tensor: [N] float64.
    """
    paths = classifiers or [None] * len(models)
    layers = [find_classifier(model, path)[1] for model, path in zip(models, paths)]
    features, labels = collect(models, batches, paths)
    biases = [getattr(layer, "bias", None) for layer in layers]
    weights: list[Any] = [layer.weight for layer in layers]
    return prefix_accuracy(features, weights, labels, biases)


def _rows(inputs: dict[str, Any], rows: Tensor, batch: int) -> dict[str, Any]:
    """These rows of every tensor that has one for each sample."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value
        for name, value in inputs.items()
    }
