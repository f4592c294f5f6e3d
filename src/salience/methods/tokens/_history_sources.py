"""Where the losses under a history model come from while another model trains."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.errors import ConflictError, ParameterError
from salience.core.loop import Loop, evaluating
from salience.core.part import State
from salience.methods.tokens._history_losses import HistoryLosses, forward_losses, shown


class HistorySource:
    """The base: tells the losses of a batch under the history model.

    Attributes:
        passes (int): forward passes that it cost so far.
    """

    def __init__(self) -> None:
        self.passes = 0

    def begin(self, loop: Loop) -> None:
        """Training starts."""

    def before_step(self, loop: Loop) -> None:
        """An optimizer step starts."""

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        """The loss of token t in column t, [B, T]."""
        raise TypeError(f"{type(self).__name__} must define losses")

    def state(self) -> State:
        """What a resumed run needs; `load_state` is the inverse."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""


class FrozenBase(HistorySource):
    """The base model of a PEFT model, run beside each batch with adapters off."""

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        self.passes += 1
        with evaluating(loop.model), torch.no_grad(), adapters_off(loop.model):
            return forward_losses(loop.model, inputs)[0]


class MovingAverage(HistorySource):
    """The model itself as it was a while ago: an exponential moving average of the weights that train, in fp32.

    Args:
        decay (float): a in `average <- a average + (1 - a) weights`, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        self._decay = decay
        self._weights: dict[str, Tensor] = {}

    def begin(self, loop: Loop) -> None:
        trains = {name: p for name, p in loop.model.named_parameters() if p.requires_grad}
        if any(hasattr(parameter, "placements") for parameter in trains.values()):
            raise ConflictError("history must not be 'ema' on a sharded model (FSDP), got 'ema'")
        if not self._weights:
            self._weights = {name: p.detach().float().clone() for name, p in trains.items()}

    def before_step(self, loop: Loop) -> None:
        if loop.step == 0:
            return  # nothing was learnt yet
        own = dict(loop.model.named_parameters())
        for name, average in self._weights.items():
            now = own[name].detach().float()
            self._weights[name] = average.to(now.device).lerp_(now, 1 - self._decay)

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        self.passes += 1
        own = dict(loop.model.named_parameters())
        weights = {name: average.to(own[name]) for name, average in self._weights.items()}

        def call(**given: Any) -> Any:
            return torch.func.functional_call(loop.model, weights, (), given)

        with evaluating(loop.model), torch.no_grad():
            return forward_losses(call, inputs)[0]

    def state(self) -> State:
        return dict(self._weights)

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._weights = dict(state)


class StoredLosses(HistorySource):
    """Losses measured beforehand: read from a file, or of the training set before the first step.

    Args:
        read (HistoryLosses | None): what a file held; None measures the model that training starts with.
        name (str): the parameter that named the file, for errors.
    """

    def __init__(self, read: HistoryLosses | None = None, *, name: str = "history") -> None:
        super().__init__()
        self._name = name
        self._measures = read is None
        self._losses = read or HistoryLosses()

    def before_step(self, loop: Loop) -> None:
        # not in begin: a resumed run brings its losses along, and its weights are no longer those of the base
        if self._measures and not len(self._losses):
            self.passes += _measure(self._losses, loop, self.measure, f"{self._name} losses")

    def measure(self, losses: HistoryLosses, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Add one batch; the model is in eval mode and builds no graph."""
        losses.add(inputs, *forward_losses(model, inputs))

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        return self._losses.find(inputs)

    def state(self) -> State:
        if self._measures:
            return dict(self._losses.tensors())
        # a file is there again when the run goes on
        return {"digest": self._losses.digest()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._measures:
            self._losses.take(state)
        elif self._losses.digest() != state["digest"]:
            raise ParameterError(
                f"{self._name} must be the file that the stored run used, got one with other losses"
            )


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model of a PEFT model inside the block; afterwards every flag is what it was."""
    peft: Any = model
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with peft.disable_adapter():
            yield
    finally:
        # enabling adapters makes all of them trainable, also those that another method froze
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def base_is_frozen(model: nn.Module, names: Collection[str] | None = None) -> bool:
    """Whether taking the adapters of a PEFT model away leaves the base model, now and after training.

    With `names`, whether it leaves the base's parameters of these names.
    """
    peft: Any = model
    prefix = getattr(getattr(peft, "base_model", None), "prefix", None)
    if not callable(getattr(peft, "disable_adapter", None)) or not prefix:
        return False
    starts = [getattr(config, "init_lora_weights", True) for config in peft.peft_config.values()]
    # the other initialisations move a part of the base weights into the adapter
    apart = all(isinstance(start, bool) or start in ("gaussian", "eva") for start in starts)
    own = (prefix, "modules_to_save", "token_adapter")
    trains = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    trains = trains if names is None else [name for name in trains if name in names]
    return apart and all(any(word in name for word in own) for name in trains)


def _measure(
    losses: HistoryLosses,
    loop: Loop,
    measure: Callable[[HistoryLosses, nn.Module, Mapping[str, Any]], None],
    says: str,
) -> int:
    """Measure a loop's training set under its model as it is, shared out over ranks; returns this rank's passes."""
    trainer = getattr(loop, "trainer", None)
    size = trainer.args.per_device_train_batch_size if trainer is not None else 1
    ranks, rank, passes = distributed.size(), distributed.rank(), 0
    with evaluating(loop.model), torch.no_grad():
        for group in _groups(shown(loop.ordered_batches(size), says=says), ranks):
            # sharded weights are gathered in every forward pass: a rank without a batch left repeats one
            inputs = loop.to_device(group[min(rank, len(group) - 1)])
            measure(losses, loop.model, inputs)
            passes += 1
    losses.gather()
    return passes


def _groups(batches: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[Mapping[str, Any]]]:
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group
