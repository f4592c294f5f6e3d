"""Nested dropout: train short prefixes of the features, so that a few of them classify and noise stays out.

Scored: the features in front of the classifier, by their place. In each step all but the first k are zero, k drawn
for the whole batch from `p_i ~ exp(-((i - mu) / std)^2)`: feature j is trained in a share `sum over i >= j of p_i` of
the steps, so that the first ones become the most important. Spent: the features behind a prefix K, chosen on
validation data as the k of the largest `accuracy_k - 1e-5 (k - 1)`. Second stage, co-teaching (`CoTeaching`): of two
networks each picks the samples of small loss for the other one.

Paper: arXiv 2206.13140 (short: 2104.13766). Official code: yingyichen-cyy/Nested-Co-teaching (9a2fc40).

Differs from the official code in:
- K is chosen on the validation data that you give; every published ANIMAL-10N recipe gives it the test set, so that
  epoch and K are chosen on test. Clean validation labels help both there and here: say so in a comparison;
- K counts features (1 is one), there it is 0-based, and a best K of one feature is not turned into all of them
  (`one_means_all=True`); reported accuracies do not contain the penalty;
- `std` has no 2 under the square (as in the code; `convention="gauss"` is the paper's formula);
- the number of samples kept is free of rounding (`int((1 - 0.9) * 10)` is 0 there), an empty selection is an error
  instead of NaN, and ties are in order;
- all K are tried with one running sum, not with N products;
- the draw depends on seed and step alone, is equal on all ranks and goes on in a resumed run;
- not here: the two masked layers in turn of the VGG variant, and the warm-up (use the Trainer's).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, require
from salience.core.loop import Loop
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.core.scores import History
from salience.hosts.classifier import find_classifier
from salience.hosts.transformers import unwrap
from salience.methods.features._nested_dropout_layer import (
    NestedMask,
    choose_prefix,
    cut,
    penalized,
    prefix_accuracy,
    prefix_law,
    training_share,
    truncate,
)
from salience.methods.features._nested_dropout_pair import (
    CoTeaching,
    accuracy_of_prefixes,
    remembered,
    small_losses,
)

__all__ = [
    "CoTeaching", "NestedMask", "accuracy_of_prefixes", "choose_prefix", "penalized", "prefix_accuracy", "prefix_law",
    "remembered", "small_losses", "training_share", "truncate",
]  # fmt: skip
_RECORD_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class NestedDropout(Method):
    """Order the features in front of the classifier by training short prefixes of them, and keep only a prefix.

    On a Trainer it masks in training; evaluation reads all features. On a model it keeps the first `keep`, or as many
    as do best on `data`. `mask` and `CoTeaching` are for loops of one's own.

    Attributes:
        std (float): width of the law of k, > 0. Small ones starve the network; about half of the width of a small
            layer, or 100 of 512, is a start.
        mu (float): where the law peaks.
        convention (str): "code" without, "gauss" with a 2 under the square.
        keep (int | None): on a model: features kept, >= 1; None chooses on `data`.
        penalty (float): taken from the accuracy for each feature when K is chosen, >= 0.
        classifier (str | None): path of the linear layer behind the features; None finds it.

    Example:
        >>> import torch, salience as sal
        >>> from salience.sandbox.views import noisy_digits
        >>> data, mask = noisy_digits(noise=0.4), sal.NestedDropout(std=30.0).mask(128)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), mask, torch.nn.Linear(128, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for rows in torch.arange(1000).split(100):
        ...     loss = torch.nn.functional.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> valid = [{"input": data.valid_images, "labels": data.valid_labels}]
        >>> mask.limit(sal.choose_prefix(sal.accuracy_of_prefixes([model], valid)))
    """

    unit: ClassVar[str] = "feature"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "regularize"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2206.13140"
    title: ClassVar[str] = "Compressing Features for Learning with Noisy Labels"

    std: float = 100.0
    mu: float = 0.0
    convention: Literal["code", "gauss"] = "code"
    keep: int | None = None
    penalty: float = 1e-5
    classifier: str | None = None

    def __post_init__(self) -> None:
        require(math.isfinite(self.penalty) and self.penalty >= 0, "penalty", ">= 0 and finite", self.penalty)
        require(self.keep is None or self.keep >= 1, "keep", "None or >= 1", self.keep)
        self.law(1)

    def law(self, features: int) -> Tensor:
        """[N] float64: the probability of each prefix length."""
        return prefix_law(features, self.std, mu=self.mu, convention=self.convention)

    def mask(self, features: int, *, seed: int = 0) -> NestedMask:
        """The layer to put between the last features and the classifier of a model of one's own."""
        return NestedMask(features, std=self.std, mu=self.mu, convention=self.convention, seed=seed)

    def order(self, features: int | nn.Module) -> Tensor:
        """[N] int64: the features, the most important first: by the share of steps that trains them.

        Args:
            features (int | nn.Module): N, or a model whose classifier reads N.
        """
        width = features if isinstance(features, int) else _width(features, self.classifier)
        return training_share(self.law(width)).argsort(descending=True, stable=True)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """One k for each optimizer step, the same on all ranks and in all of its micro-batches."""
        return _Training(self, site, record)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any) -> Part:
        """Keeps a prefix of the features; `finish` writes it into the classifier's weights."""
        return _Prefix(self, model, record, data)


class _Training(Part):
    def __init__(self, method: NestedDropout, site: Site, record: Attachment) -> None:
        super().__init__()
        self._method = method
        width = _width(site.model, method.classifier)
        self._mask = method.mask(width, seed=site.seed)
        self._root, self._in_step, self._keep = unwrap(site.model), False, width
        self._share = training_share(method.law(width))
        self._drawn = History()
        self.histories = {"features that train": self._drawn}
        _, layer = find_classifier(site.model, method.classifier)
        record.hook(layer.register_forward_pre_hook(self._cut))

    def before_step(self, loop: Loop) -> None:
        # a function of seed and step: a resumed run needs no state for it
        self._keep, self._in_step = int(self._mask.draw(loop.step)), True
        if loop.step % _RECORD_EVERY == 0:
            self._drawn.add(loop.step, (torch.arange(len(self._share)) < self._keep).float())

    def transform_gradients(self, loop: Loop) -> None:
        self._in_step = False

    def scores(self) -> dict[str, Tensor]:
        return {"training share": self._share.float()}

    def spent(self) -> dict[str, Any]:
        expected = float(self._share.sum())
        return {"features": len(self._share), "last k": self._keep, "mean k of the law": round(expected, 1)}

    def _cut(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not (self._in_step and self._root.training and torch.is_grad_enabled()):
            return None
        return (cut(args[0], self._keep), *args[1:])


class _Prefix(Part):
    def __init__(self, method: NestedDropout, model: nn.Module, record: Attachment, data: Any) -> None:
        super().__init__()
        _, layer = find_classifier(model, method.classifier)
        weight: Any = layer.weight
        width = weight.shape[1]
        self._layer, self._accuracy = weight, torch.empty(0)
        if method.keep is None:
            if data is None:
                raise ConflictError(
                    "data must be validation batches with labels where keep is None, got None"
                )
            self._accuracy = accuracy_of_prefixes([model], _batches(data), classifiers=[method.classifier])
            self._keep = choose_prefix(self._accuracy, penalty=method.penalty)
        else:
            require(method.keep <= width, "keep", f"in [1, {width}]", method.keep)
            self._keep = method.keep
        record.hook(layer.register_forward_pre_hook(lambda _, args: (cut(args[0], self._keep), *args[1:])))

    def finish(self) -> None:
        """The columns of the features that are not kept become zero: an ordinary checkpoint says the same."""
        with torch.no_grad():
            self._layer[:, self._keep :] = 0

    def scores(self) -> dict[str, Tensor]:
        return {"accuracy by prefix": self._accuracy} if len(self._accuracy) else {}

    def spent(self) -> dict[str, Any]:
        found: dict[str, Any] = {"features": self._layer.shape[1], "kept": self._keep}
        if len(self._accuracy):
            found["validation accuracy"] = round(float(self._accuracy[self._keep - 1]), 4)
            found["validation accuracy with all"] = round(float(self._accuracy[-1]), 4)
        return found


def _width(model: nn.Module, path: str | None) -> int:
    weight: Any = find_classifier(model, path)[1].weight
    return int(weight.shape[1])


def _batches(data: Any) -> Iterable[Any]:
    if isinstance(data, dict):
        return [data]
    if not isinstance(data, Iterable):
        raise StructureError(f"data must be a batch or batches with labels, got {type(data).__name__}")
    return data
