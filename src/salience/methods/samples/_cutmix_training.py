"""CutMix in a training loop: the inputs are mixed before the forward pass, the partner's label joins the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.core import distributed, draws
from salience.core.errors import ConflictError, ParameterError, require
from salience.core.loop import Loop
from salience.core.losses import token_losses
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History

if TYPE_CHECKING:
    from salience.methods.samples.cutmix import CutMix, Mixed

_RECORD_EVERY = 10


class Mixing(Part):
    """Mixes each micro-batch with draws of its own.

    The loop computes `CE(y)` of every sample, and `lam CE(y) + (1 - lam) CE(y')` takes its place. It is averaged over
    the samples of the whole step, so that short batches, accumulation and ranks weigh them alike.
    """

    def __init__(
        self, method: CutMix, site: Site, check: Callable[[Tensor, int, int | None], Tensor]
    ) -> None:
        super().__init__()
        if site.trainer is not None:
            if site.shifted:
                raise ConflictError("model must classify images for CutMix, got a causal language model")
            size = site.trainer.args.per_device_train_batch_size
            if size < 2:
                raise ConflictError(
                    f"per_device_train_batch_size must be >= 2 for CutMix (a partner is needed), got {size}"
                )
        self.changes_losses = True
        self._method = method
        self._check = check
        self._seed = site.seed
        self._micro_batch = 0
        self._classes: int | None = getattr(getattr(site.model, "config", None), "num_labels", None)
        self._mixed: Mixed | None = None
        self._given: tuple[MutableMapping[str, Any], str, Tensor] | None = None
        self._seen = self._changed = 0
        self._newest = torch.empty(0)
        self._lam = History()
        self.histories = {"share of the first label": self._lam}

    def before_step(self, loop: Loop) -> None:
        self._micro_batch = 0

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        self._give_back()
        self._mixed = None
        name = image_input(inputs)
        images = inputs[name]
        # a head with several dropout samples may have repeated the labels already
        labels = inputs["labels"][: len(images)]
        if labels.is_floating_point():
            raise ParameterError(
                f"labels must be class indices [{len(images)}] of an integer dtype, got {labels.dtype}"
            )
        labels = self._check(labels, len(images), None)
        outside = (labels < 0) | (labels >= self._classes) if self._classes is not None else labels < 0
        if bool(outside.any()):
            wanted = f"class indices in [0, {self._classes or 'number of classes'})"
            require(False, "labels", wanted, int(labels[outside][0]))
        numbers = self._seed, distributed.rank(), loop.step, self._micro_batch
        self._micro_batch += 1
        self._seen += 1
        if len(images) < 2:
            return  # the short last batch of an epoch: an ordinary step
        mixed = self._method(images, labels, generator=draws.generator(*numbers))
        self._newest = torch.as_tensor(mixed.lam, dtype=torch.float32).detach().cpu().view(-1)
        if not mixed.boxes:
            return
        self._changed += 1
        if loop.step % _RECORD_EVERY == 0:
            self._lam.add(loop.step, self._newest.mean().view(1))
        if not isinstance(inputs, MutableMapping):
            raise ParameterError(f"batch must be a dict, got {type(inputs).__name__}")
        inputs[name] = mixed.images
        self._mixed, self._given = mixed, (inputs, name, images)

    def losses(self, batch: Batch, loop: Loop) -> Tensor:
        if self._mixed is None:
            return batch.losses
        # a head with several dropout samples gives the batch several times, one after the other
        copies = len(batch.logits) // len(self._mixed.labels)
        partner = self._mixed.partner_labels.repeat(copies)
        other, _ = token_losses(batch.logits, partner, shifted=False, smoothing=loop.smoothing)
        lam = torch.as_tensor(self._mixed.lam, dtype=other.dtype, device=other.device)
        lam = lam.repeat(copies).unsqueeze(-1) if lam.dim() else lam
        return lam * batch.losses + (1 - lam) * other

    def transform_gradients(self, loop: Loop) -> None:
        self._give_back()

    def end(self, loop: Loop) -> None:
        self._give_back()
        self._mixed = None

    def undo(self) -> None:
        self._give_back()

    def _give_back(self) -> None:
        """A batch that the caller may use again holds the caller's images again."""
        if self._given is not None:
            inputs, name, images = self._given
            inputs[name] = images
            self._given = None

    def scores(self) -> dict[str, Tensor]:
        return {"lam": self._newest} if len(self._newest) else {}

    def spent(self) -> dict[str, int]:
        return {"batches": self._seen, "mixed": self._changed} if self._seen else {}

    def state(self) -> State:
        return {"seen": self._seen, "changed": self._changed}

    def load_state(self, state: State) -> None:
        self._seen, self._changed = int(state["seen"]), int(state["changed"])


def image_input(inputs: Mapping[str, Any]) -> str:
    """The name under which a batch holds its images: `pixel_values`, or the only floating tensor [N, C, H, W].

    Raises:
        ParameterError: if there is none, or there are several.
    """
    if "pixel_values" in inputs:
        return "pixel_values"
    found = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.dim() == 4 and v.is_floating_point()]
    if len(found) != 1:
        raise ParameterError(f"batch must hold one tensor of images [N, C, H, W], got {sorted(inputs)}")
    return found[0]
