"""CutMix where batches are made: a collate function for a DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from torch.utils.data import default_collate, get_worker_info

from salience.core import distributed, draws
from salience.core.errors import require
from salience.methods.samples._cutmix_mixing import mixed_targets

if TYPE_CHECKING:
    from salience.methods.samples.cutmix import CutMix


class CutMixCollate:
    """Collates samples and mixes the batch; made by `CutMix.collate`.

    Samples are pairs (image, label) or mappings with `pixel_values` and `labels`, whatever `collate` makes batches
    from. A batch comes out in the form in which it went in:

    - targets "soft": `images, targets` with targets [N, K] in fp32, or the mapping with these as `labels`: any loss
      that takes probabilities is right without knowing of CutMix;
    - targets "index": `images, labels, partner_labels, lam`, or the mapping with `partner_labels` and `lam` added:
      for `mixed_loss`.

    Args:
        method (CutMix): what mixes.
        targets (str): "soft" or "index".
        classes (int | None): K, needed for soft targets; labels are checked against it.
        collate (Callable): samples to batch; the images [N, C, H, W] that it returns are written into.
        seed (int): of the draws. In a worker they also depend on the worker and the epoch; ranks differ.
        label_smoothing (float): of soft targets, in [0, 1).

    Raises:
        ParameterError: on a batch of one sample, which has no partner (`drop_last=True` avoids a short last batch),
            and on labels that are no class indices in range.
    """

    def __init__(
        self,
        method: CutMix,
        *,
        targets: Literal["soft", "index"] = "soft",
        classes: int | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
        seed: int = 0,
        label_smoothing: float = 0.0,
    ) -> None:
        require(targets in ("soft", "index"), "targets", "one of soft, index", targets)
        counted = type(classes) is int and classes >= 1
        require(counted or (classes is None and targets == "index"), "classes", "an integer >= 1", classes)
        require(0 <= label_smoothing < 1, "label_smoothing", "in [0, 1)", label_smoothing)
        self.method, self.targets, self.classes = method, targets, classes
        self.collate, self.seed, self.label_smoothing = collate, seed, label_smoothing
        self._calls = 0

    def __call__(self, samples: list[Any]) -> Any:
        """One batch, mixed."""
        batch = self.collate(samples)
        named = isinstance(batch, Mapping)
        images, labels = (batch["pixel_values"], batch["labels"]) if named else batch
        worker = get_worker_info()
        numbers = (self.seed, distributed.rank(), worker.seed if worker is not None else -1, self._calls)
        self._calls += 1
        mixed = self.method(
            images, labels, generator=draws.generator(*numbers), inplace=True, classes=self.classes
        )
        if self.targets == "soft":
            classes = self.classes or 0
            both = mixed.labels, mixed.partner_labels
            soft = mixed_targets(*both, mixed.lam, classes, label_smoothing=self.label_smoothing)
            return {**batch, "pixel_values": mixed.images, "labels": soft} if named else [mixed.images, soft]
        if named:
            added = {"partner_labels": mixed.partner_labels, "lam": mixed.lam}
            return {**batch, "pixel_values": mixed.images, **added}
        return [mixed.images, mixed.labels, mixed.partner_labels, mixed.lam]
