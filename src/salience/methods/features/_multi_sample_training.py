"""Multi-sample dropout in a training loop: the head of a model that is already there runs on repeated features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from salience.core import distributed, draws
from salience.core.attach import Attachment
from salience.core.errors import ParameterError, StructureError, require
from salience.core.loop import Loop
from salience.core.part import Batch, Part, Site
from salience.hosts.transformers import unwrap
from salience.methods.features._multi_sample_head import (
    DROPOUTS,
    check_batch,
    check_dropouts,
    dropouts_of,
    has_batch_norm,
    repeated,
)

if TYPE_CHECKING:
    from salience.methods.features.multi_sample_dropout import MultiSampleDropout


class SampledHead(Part):
    """Repeats the features in front of the head, and the labels with them.

    The loop then averages `M B` losses, which is the mean over the samples of the mean loss of each; with
    `reduce="logits"` the head's output is averaged instead. Masks come from a generator that is seeded with seed,
    rank, step and micro-batch, so that a resumed run finds them again and no global random state moves.
    """

    def __init__(self, method: MultiSampleDropout, site: Site, record: Attachment) -> None:
        super().__init__()
        # the loop's own loss of each row is wanted, not the model's
        self.weights_samples = True
        self._method = method
        self._seed = site.seed
        self._numbers: tuple[int, ...] = ()
        self._random: torch.Generator | None = None
        self._micro_batch = 0
        self._armed = self._ran = False
        self._given: tuple[MutableMapping[str, Any], Tensor] | None = None
        self._newest = torch.empty(0)
        name, start, head, found = find_head(site.model, method.start)
        check_dropouts(found, method.p, "start", f"{name!r} ({type(start).__name__})")
        self._head, self._normed = head, has_batch_norm(start) or has_batch_norm(head)
        for dropout in found:
            record.wrap(dropout, "forward", self._masking(dropout))
        record.hook(start.register_forward_pre_hook(self._repeat, with_kwargs=True))
        record.hook(head.register_forward_hook(self._after))

    def before_step(self, loop: Loop) -> None:
        self._micro_batch = 0

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        self._give_back()
        self._armed, self._ran = self._head.training, False
        self._numbers = self._seed, distributed.rank(), loop.step, self._micro_batch
        self._random = None
        self._micro_batch += 1
        if self._armed and self._method.reduce == "loss" and self._method.num_samples > 1:
            if not isinstance(inputs, MutableMapping):
                raise ParameterError(f"batch must be a dict, got {type(inputs).__name__}")
            labels = inputs["labels"]
            require(
                not labels.is_floating_point(), "labels", "class indices of an integer dtype", labels.dtype
            )
            self._given = inputs, labels
            inputs["labels"] = repeated(labels, self._method.num_samples)

    def sample_weights(self, batch: Batch, loop: Loop) -> Tensor:
        if self._method.reduce == "loss" and self._armed:
            rows = batch.losses.detach().flatten(1).sum(1).view(self._method.num_samples, -1)
            counts = batch.active.flatten(1).sum(1).view_as(rows)
            self._newest = rows.sum(1) / counts.sum(1).clamp_min(1)
        return super().sample_weights(batch, loop)

    def transform_gradients(self, loop: Loop) -> None:
        self._give_back()
        self._armed = False

    def end(self, loop: Loop) -> None:
        self._give_back()
        self._armed = False

    def undo(self) -> None:
        self._give_back()

    def scores(self) -> dict[str, Tensor]:
        return {"loss of each dropout sample": self._newest.cpu()} if len(self._newest) else {}

    def spent(self) -> dict[str, int]:
        return {"passes of the head": self._method.num_samples, "passes of the rest": 1}

    def _give_back(self) -> None:
        """A batch that the caller may use again holds the caller's labels again."""
        if self._given is not None:
            inputs, labels = self._given
            inputs["labels"] = labels
            self._given = None

    # --- inside the model ------------------------------------------------------------------------------------

    def _repeat(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (self._armed and self._head.training):
            return None
        if not args:
            raise StructureError(f"start must be called with features first, got {sorted(kwargs)} by name")
        check_batch(self._normed, len(args[0]))
        self._ran = True
        rows = repeated(args[0], self._method.num_samples)
        if self._method.p is not None:
            rows = self._masked(rows, self._method.p)
        return (rows, *args[1:]), kwargs

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        if not (self._armed and self._head.training):
            return None
        if not self._ran:
            raise StructureError(
                f"start must run before the head in the model's forward pass, got a head {type(module).__name__} "
                "whose input did not come from it: name another start"
            )
        if self._method.reduce == "logits":
            return output.view(self._method.num_samples, -1, *output.shape[1:]).mean(0)
        return None

    def _masking(self, dropout: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(features: Tensor) -> Tensor:
                if not (self._armed and self._ran and dropout.training):
                    kept: Tensor = original(features)
                    return kept
                return self._masked(features, dropout.p)

            return forward

        return make

    def _masked(self, features: Tensor, p: float) -> Tensor:
        if self._random is None:
            self._random = draws.generator(*self._numbers, device=features.device)
        number = torch.rand(features.shape, generator=self._random, device=features.device)
        return dropped(features, number >= p, p)


def dropped(features: Tensor, keep: Tensor, p: float) -> Tensor:
    """Inverted dropout with a given mask: what is kept is divided by `1 - p`, the rest is 0; shapes are equal."""
    return features * keep.to(features.dtype) / (1 - p)


def find_head(model: nn.Module, start: str | None) -> tuple[str, nn.Module, nn.Module, list[nn.Module]]:
    """Where the part begins that runs several times, and the module that gives the logits.

    Args:
        model (nn.Module): adapters around it are looked through.
        start (str | None): name of a module; None finds it: the Dropout beside the head, else the head.

    Returns:
        tuple: name of the start, the start, the head (the last child that has weights), and the Dropout modules of
        both and beside them.

    Raises:
        ParameterError: if there is no module of that name.
        StructureError: if no head is found.
    """
    core = unwrap(model)
    children = dict(core.named_children())
    weighted = [name for name, child in children.items() if any(True for _ in child.parameters())]
    if not weighted:
        raise StructureError(
            f"model must have a head among its children, got {type(core).__name__} without any"
        )
    beside = [name for name, child in children.items() if isinstance(child, DROPOUTS)]
    name = start or (beside[-1] if beside else weighted[-1])
    module, head = dict(core.named_modules()).get(name), children[weighted[-1]]
    if module is None or module is core:
        raise ParameterError(f"start must name a module ({', '.join(children)} or one inside), got {name!r}")
    found = [*dropouts_of(module), *dropouts_of(head), *(children[one] for one in beside)]
    return name, module, head, list({id(one): one for one in found}.values())
