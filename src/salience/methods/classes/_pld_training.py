"""Plackett-Luce distillation in a training loop: the loop's cross-entropy makes way for the loss of the order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.core.errors import ConflictError
from salience.core.labels import check_indices
from salience.core.loop import Loop
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History
from salience.hosts.teachers import cache_logits, check_pair, open_teacher, training_rows

if TYPE_CHECKING:
    from salience.methods.classes.pld import PLD, PlackettLuceLoss

_RECORD_EVERY = 10


class RankedTraining(Part):
    """Puts the loss of the order in the place of every sample's cross-entropy.

    The loop averages it over the samples of the whole step, so that short batches, accumulation and ranks weigh
    alike. The teacher sees what the student saw, also where another method changed the batch.
    """

    def __init__(self, method: PLD, site: Site, loss: PlackettLuceLoss) -> None:
        super().__init__()
        if site.trainer is not None and site.shifted:
            raise ConflictError(
                "model must classify whole samples for PLD on a Trainer, got a causal language model: use "
                "PlackettLuceLoss(top_m=..., ignore_index=-100) in a loop of your own"
            )
        self.changes_losses = True
        self._method, self._loss = method, loss
        self._source = open_teacher(method.teacher, site.model, "PLD")
        self._trainer = site.trainer
        if method.cache is not None and site.trainer is None:
            raise ConflictError(
                "cache must be None in a loop of your own: fill it with cache_logits and give its folder"
            )
        self._newest = torch.empty(0)
        self._label = History()
        self.histories = {"weight of the label": self._label}

    def begin(self, loop: Loop) -> None:
        if self._method.cache is not None:
            dataset, collate = training_rows(self._trainer)
            size = self._trainer.args.per_device_train_batch_size
            model = self._source.model  # type: ignore[attr-defined]
            self._source = cache_logits(model, dataset, self._method.cache, collate=collate, batch_size=size)

    def losses(self, batch: Batch, loop: Loop) -> Tensor:
        check_indices(batch.labels, batch.logits.shape[-1], None)
        found = self._source.logits(batch.inputs, batch.logits)
        teacher = check_pair(batch.logits, found)
        losses, weights = self._loss.rows(batch.logits, teacher, batch.labels)
        if loop.step % _RECORD_EVERY == 0:
            self._newest = weights.mean(0).cpu()
            if not (self._label.steps and self._label.steps[-1] == loop.step):
                self._label.add(loop.step, self._newest[:1])
        return losses.view_as(batch.losses)

    def scores(self) -> dict[str, Tensor]:
        return {"weight of each rank": self._newest} if len(self._newest) else {}

    def spent(self) -> dict[str, Any]:
        return {"teacher passes": self._source.passes}

    def state(self) -> State:
        return {"teacher passes": self._source.passes}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._source.passes = int(state["teacher passes"])
