"""What an attached method does: a `Part` of a training loop, or of nothing more than a model.

A `Part` may change losses, weight tokens and samples, add penalties, decide which parameters train and change
gradients; it is told when training begins and when an optimizer step starts. Every function here is optional to
override.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

    from salience.core.loop import Loop
    from salience.core.scores import History

State = dict[str, Tensor | int | float | str | bool]


@dataclass
class Batch:
    """One micro-batch, after the forward pass, as the methods see it.

    Attributes:
        inputs (Mapping[str, Tensor]): what the model was called with, labels included.
        labels (Tensor): [B, T] unshifted, -100 where ignored ([B] for classes).
        logits (Tensor): [B, T, V] ([B, C] for classes), with graph.
        losses (Tensor): [B, T] fp32, the loss of token t in column t, with graph ([B, 1] for classes): cross-entropy,
            or what parts made of it.
        active (Tensor): [B, T] bool, the tokens that have a loss.
        weights (Tensor): [B, T] product of the token weights given so far (for sample weights: of all of them).
        outputs (Any): what the model returned.
    """

    inputs: Mapping[str, Any]
    labels: Tensor
    logits: Tensor
    losses: Tensor
    active: Tensor
    weights: Tensor
    outputs: Any = None


@dataclass(frozen=True)
class Site:
    """Where a training method is attached.

    Attributes:
        model (nn.Module): the model whose parameters train, without DDP around it.
        seed (int): of the run; every rank has the same.
        shifted (bool): whether the model's labels are shifted against its logits.
        trainer (Any): the transformers Trainer, or None in a loop of one's own.
        data (Any): batches for probing given to `focus`, or None.
    """

    model: nn.Module
    seed: int = 0
    shifted: bool = True
    trainer: Any = None
    data: Any = None


@dataclass
class Part:
    """The base: a part that does nothing.

    Attributes:
        weights_tokens (bool): whether `token_weights` is to be called.
        weights_samples (bool): whether `sample_weights` is to be called.
        changes_losses (bool): whether `losses` is to be called.
        penalizes (bool): whether `penalty` is to be called.
        histories (dict[str, History]): recorded scores, drawn as maps of units x time.
    """

    weights_tokens: bool = field(default=False, init=False)
    weights_samples: bool = field(default=False, init=False)
    changes_losses: bool = field(default=False, init=False)
    penalizes: bool = field(default=False, init=False)
    histories: dict[str, History] = field(default_factory=dict, init=False)

    def begin(self, loop: Loop) -> None:
        """Training starts: the optimizer exists, every parameter still has the `requires_grad` of the user."""

    def before_step(self, loop: Loop) -> None:
        """An optimizer step starts (once, also under gradient accumulation), before its first forward pass."""

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        """A micro-batch is about to be run."""

    def trainable(self) -> set[str] | None:
        """Names of the parameters that may train in this step; None leaves the choice to others.

        Parameters that the user froze stay frozen whatever is returned. The sets of all parts are intersected.
        """
        return None

    def losses(self, batch: Batch, loop: Loop) -> Tensor:
        """What takes the place of `batch.losses`, of the same shape, in fp32, with graph.

        Every part sees what those before it have made of them; weights come after all of them.
        """
        raise TypeError(f"{type(self).__name__} sets changes_losses and must define losses")

    def token_weights(self, batch: Batch, loop: Loop) -> Tensor:
        """Non-negative weights [B, T] without graph."""
        return torch.ones_like(batch.weights)

    def sample_weights(self, batch: Batch, loop: Loop) -> Tensor:
        """Non-negative weights [B] without graph; `batch.weights` holds the final token weights."""
        return batch.weights.new_ones(batch.weights.shape[0])

    def penalty(self, batch: Batch | None, loop: Loop) -> Tensor:
        """A penalty with graph, already multiplied by its factor lambda.

        [B]: one for each sample, averaged over all samples of the optimizer step; []: added once a step.
        """
        raise TypeError(f"{type(self).__name__} sets penalizes and must define penalty")

    def transform_gradients(self, loop: Loop) -> None:
        """The gradients of the whole step are final, clipping has not seen them yet."""

    def end(self, loop: Loop) -> None:
        """Training is over (also after an exception)."""

    def finish(self) -> None:
        """Make the decision final, outside training: cut out for good what was masked or can still come back.

        Called before a checkpoint is written, perhaps more than once. A part that cuts keeps what would restore the
        model in an `Attachment` of its own, whose `undo` the shared record calls, and forgets it here.
        """

    def undo(self) -> None:
        """The method comes off; hooks and wrapped functions are undone by the record, not here."""

    def scores(self) -> dict[str, Tensor]:
        """The newest scores by name."""
        return {}

    def spent(self) -> dict[str, Any]:
        """What was kept and what it cost, in plain numbers and words: counts, shares, bytes."""
        return {}

    def save(self, folder: Path, *, last: bool = True) -> list[str]:
        """Write what a method on a dataset decided, and if it is the last of several what was picked.

        Args:
            folder (Path): is there.
            last (bool): whether no other method picked after it.

        Returns:
            list[str]: names, relative to the folder, of the files that hold the samples picked.
        """
        raise TypeError(f"{type(self).__name__} acts on a dataset and must define save")

    def draw(self) -> Any:
        """A matplotlib figure of what was decided, None where the histories say it all."""
        return None

    def state(self) -> State:
        """What a resumed run needs to go on exactly where this one is: tensors, numbers and words.

        Histories are kept by the loop and need not be in it.
        """
        return {}

    def load_state(self, state: State) -> None:
        """The inverse of `state`."""


def whole_state(part: Part) -> State:
    """A part's state and the rows of its histories."""
    rows = {
        f"history/{name}/{key}": value
        for name, history in part.histories.items()
        for key, value in history.state().items()
    }
    return part.state() | rows


def load_whole_state(part: Part, state: State) -> None:
    """The inverse of `whole_state`."""
    for name, history in part.histories.items():
        start = f"history/{name}/"
        rows = {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
        history.load({k: v for k, v in rows.items() if isinstance(v, Tensor)})
    part.load_state({name: value for name, value in state.items() if not name.startswith("history/")})


def optimizer_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Exact bytes of the tensors in an optimizer's state, of sharded ones those on this rank."""
    if optimizer is None:
        return 0
    held = (value for entry in optimizer.state.values() for value in entry.values())
    return sum(_bytes(value) for value in held if isinstance(value, Tensor))


def parameter_bytes(model: nn.Module, *, trainable_only: bool = False) -> int:
    """Exact bytes of a model's parameters, shared ones counted once, of sharded ones those on this rank."""
    return sum(_bytes(p) for p in model.parameters() if p.requires_grad or not trainable_only)


def gradient_bytes(model: nn.Module) -> int:
    """Exact bytes of the gradients that are allocated now, of sharded ones those on this rank."""
    return sum(_bytes(p.grad) for p in model.parameters() if p.grad is not None)


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()
