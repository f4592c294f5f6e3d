"""How attached methods act together in a training loop, whoever owns that loop.

With losses `l[i,t]` of single tokens (cross-entropy, or what a method puts in its place), token weights `m_k[i,t]`,
sample weights `w_k[i]` and penalties `P_j`, one optimizer step minimises

    sum_it (prod_k w_k[i]) (prod_k m_k[i,t]) l[i,t]  /  sum_it (prod_k w_k[i]) (prod_k m_k[i,t])  +  sum_j P_j

where both sums run over all micro-batches of the step and all data-parallel ranks, so that one batch of 8, four
accumulated batches of 2 and two ranks with 4 each give the same gradient. Weights may depend on the forward pass:
the denominator is then known only after the last micro-batch, so numerators are accumulated with a provisional
divisor (the number of labels) and the gradients are scaled once, before clipping sees them.

In a loop of one's own:

    loop = salience.loop(model, [SsToken(keep=0.6)], optimizer=optimizer)
    loop.begin()
    for micro_batches in steps:
        loop.start_step(micro_batches)
        for inputs in micro_batches:
            loop.loss(inputs).backward()
        loop.finish_step()
        optimizer.step(); optimizer.zero_grad()
    loop.end()
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, ParameterError
from salience.core.losses import IGNORE, logits_of, loss_of, token_losses
from salience.core.part import Batch, Part, State, load_whole_state, whole_state


class Loop:
    """Drives the parts of a training loop; the Trainer host is a subclass.

    Args:
        model (nn.Module): the model whose parameters train (unwrapped: no DDP around it).
        parts (Sequence[Part]): what the methods attached.
        optimizer (Optimizer | None): may also be given to `begin`.
        shifted (bool): whether labels are shifted against the logits (causal language models).
        smoothing (float): label smoothing of the weighted loss.
        record (Attachment | None): where changes are recorded.
        own_loss (bool): whether the model gives its loss itself when it is called with labels. A plain module that
            returns logits does not: it is called without labels, and cross-entropy is taken here.
        call (nn.Module | None): the module that runs the forward pass, if it is not `model` (DDP).
        data (Iterable[dict] | None): batches to probe with or to score beforehand.

    Attributes:
        step (int): index of the current optimizer step, from 0.
        total_steps (int | None): how many there will be, if known.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        shifted: bool = True,
        smoothing: float = 0.0,
        record: Attachment | None = None,
        own_loss: bool = True,
        call: nn.Module | None = None,
        data: Iterable[dict[str, Any]] | None = None,
    ) -> None:
        self.model = model
        self.data = data
        self.parts = list(parts)
        self.optimizer = optimizer
        self.shifted = shifted
        self.smoothing = smoothing
        self.record = record if record is not None else Attachment()
        self.own_loss = own_loss
        self.step = 0
        self.total_steps: int | None = None
        self._call = model if call is None else call
        self._named = dict(model.named_parameters())
        self._user_trains = {name for name, p in self._named.items() if p.requires_grad}
        self._now_trains = set(self._user_trains)
        self._micro_batches = 1
        self._samples = 1.0
        self._labels = 1.0
        self._numerator = self._denominator = self._penalty_total = torch.zeros(())
        self._penalty_grads: dict[str, Tensor] = {}
        self._probes: list[dict[str, Any]] | None = None
        self.record.on_undo(lambda: self._set_trainable(self._user_trains))

    @property
    def weighted(self) -> bool:
        """Whether losses of single tokens are needed, so that the model's own mean loss cannot be used."""
        return not self.own_loss or any(
            part.weights_tokens or part.weights_samples or part.changes_losses for part in self.parts
        )

    @property
    def penalized(self) -> bool:
        """Whether any part adds a penalty."""
        return any(part.penalizes for part in self.parts)

    def begin(self, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Training starts; call it after the optimizer was built over everything that may ever train."""
        self.optimizer = optimizer or self.optimizer
        distributed.reshard(self.model)
        distributed.prepare_sharded(self.model)
        # sharding replaces the parameter objects; their names stay
        self._named = dict(self.model.named_parameters())
        for part in self.parts:
            part.begin(self)

    def end(self) -> None:
        """Training is over: every parameter may train again that the user let train."""
        for part in self.parts:
            part.end(self)
        self._set_trainable(self._user_trains)

    # --- one optimizer step, in order -----------------------------------------------------------------------

    def count(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """Take the step's size from its micro-batches: labels and samples over all of them and all ranks."""
        labels = [batch["labels"] for batch in micro_batches if batch.get("labels") is not None]
        samples = [next(len(v) for v in batch.values() if isinstance(v, Tensor)) for batch in micro_batches]
        counted = [sum(self._label_count(one) for one in labels), sum(samples)]
        total = distributed.all_reduce_sum(torch.tensor(counted, dtype=torch.float64)).tolist()
        self._micro_batches = max(len(micro_batches), 1)
        self._labels, self._samples = max(total[0], 1.0), max(total[1], 1.0)

    def before_step(self) -> None:
        """Let the parts decide, and set what trains: the intersection of their sets and of the user's."""
        self._numerator = self._denominator = self._penalty_total = torch.zeros(())
        self._penalty_grads = {}
        for part in self.parts:
            part.before_step(self)
        chosen = set(self._user_trains)
        for part in self.parts:
            names = part.trainable()
            if names is not None:
                chosen &= names
        self._set_trainable(chosen)

    def start_step(self, micro_batches: Sequence[Mapping[str, Any]]) -> None:
        """`count` and `before_step` in one, for loops of one's own."""
        self.count(micro_batches)
        self.before_step()

    def before_forward(self, inputs: Mapping[str, Any]) -> None:
        """Tell the parts that a micro-batch is about to run."""
        for part in self.parts:
            part.before_forward(self, inputs)

    def loss(self, inputs: Mapping[str, Any]) -> Tensor:
        """Forward and weighted loss of one micro-batch, for loops of one's own."""
        self.before_forward(inputs)
        outputs = self._call(**(inputs if self.own_loss else without_labels(inputs)))
        if self.weighted:
            return self.weighted_loss(inputs, outputs)
        base = loss_of(outputs)
        # the model's own mean over this micro-batch, as its share of the labels of the whole step
        share = self._label_count(inputs["labels"]) * distributed.size() / self._labels
        return self.with_penalty(base * share, None)

    def weighted_loss(self, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """This micro-batch's share of the formula at the top of the file, to be summed over the step.

        Args:
            inputs (Mapping[str, Tensor]): with `labels`.
            outputs (Any): logits, or something with `logits`.

        Returns:
            Tensor: [] with graph.
        """
        logits = logits_of(outputs)
        labels = inputs["labels"]
        losses, active = token_losses(logits, labels, shifted=self.shifted, smoothing=self.smoothing)
        batch = Batch(inputs, labels, logits, losses, active, active.to(losses.dtype), outputs)
        for part in self.parts:
            if part.changes_losses:
                batch.losses = _shaped(part, "losses", part.losses(batch, self), losses.shape)
        losses = batch.losses
        for part in self.parts:
            if part.weights_tokens:
                batch.weights = batch.weights * _shaped(
                    part, "weights", part.token_weights(batch, self).detach(), losses.shape
                )
        weights = batch.weights
        for part in self.parts:
            if part.weights_samples:
                given = part.sample_weights(batch, self).detach()
                given = _shaped(part, "weights", given, losses.shape[:1])
                weights = weights * given.unsqueeze(-1)
        # where() and not a product: an ignored position may hold an infinite loss
        numerator = torch.where(weights > 0, losses, losses.new_zeros(())).mul(weights).sum()
        return self.with_penalty(self._divide(numerator, weights.detach().sum()), batch)

    def with_penalty(self, loss: Tensor, batch: Batch | None) -> Tensor:
        """Add the parts' penalties to a loss that is already a share of the step's."""
        for part in self.parts:
            if part.penalizes:
                value = part.penalty(batch, self)
                share = self.sample_share if value.dim() else 1.0 / self._micro_batches
                term = value.sum() * share
                self._penalty_total = term.detach() + self._penalty_total
                loss = loss + (self._defer(term) if self._deferred and term.requires_grad else term)
        return loss

    def finish_step(self, scale: float = 1.0) -> None:
        """After the last backward pass: scale the gradients once, then let the parts change them.

        Args:
            scale (float): factor that a gradient scaler put on the loss.
        """
        if self._deferred:
            self._denominator = distributed.all_reduce_sum(self._denominator)
            total = float(self._denominator)
            grads = [p.grad for p in self._named.values() if p.grad is not None]
            if grads:
                torch._foreach_mul_(grads, self._labels / total if total > 0 else 0.0)
            self._add_penalty_gradients(scale)
        for part in self.parts:
            part.transform_gradients(self)
        self.step += 1

    def reported_loss(self) -> float:
        """The step's loss over this rank's micro-batches times ranks, as the formula defines it."""
        total = float(self._denominator)
        mean = float(self._numerator) * distributed.size() / total if total > 0 else 0.0
        return mean + float(self._penalty_total)

    # --- for the parts ---------------------------------------------------------------------------------------

    def probe_loss(self, inputs: Mapping[str, Tensor]) -> float:
        """Mean loss of one batch in eval mode without graph, averaged over ranks; modes are put back after it."""
        with evaluating(self.model), torch.no_grad():
            given = self.to_device(inputs)
            if self.own_loss:
                loss = loss_of(self.model(**given))
            else:
                logits = logits_of(self.model(**without_labels(given)))
                losses, active = token_losses(logits, given["labels"], shifted=self.shifted)
                loss = losses.sum() / active.sum()
        return float(distributed.all_reduce_mean(loss.detach().double()))

    def to_device(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The batch on the model's device."""
        device = next(self.model.parameters()).device
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}

    def sampled_batches(self, size: int, random: torch.Generator) -> Iterator[dict[str, Any]]:
        """Endless batches of training samples (or of `data`) in an order of the generator's, for probing.

        A loop of one's own draws from the ready batches in `data`, whatever their size.

        Raises:
            ConflictError: if the loop knows no data.
        """
        if self.data is None:
            raise ConflictError("data must be a sequence of batches for this method, got None")
        if self._probes is None:
            self._probes = list(self.data)
        batches = self._probes
        while True:
            for index in torch.randperm(len(batches), generator=random).tolist():
                yield batches[index]

    def ordered_batches(self, size: int) -> Iterable[dict[str, Any]]:
        """The data once, in its own order.

        Raises:
            ConflictError: if the loop knows no data.
        """
        if self.data is None:
            raise ConflictError("data must be a sequence of batches for this method, got None")
        return self.data

    def adopt(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Let parameters beside the model train with it: what is done to its gradients is done to theirs.

        They are the caller's to put into the optimizer, to clear, to average over ranks and to store.
        """
        self._named |= parameters

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train in this step by name, the model's and the adopted ones."""
        return {name: p for name, p in self._named.items() if p.requires_grad}

    @property
    def sample_share(self) -> float:
        """What one sample's penalty is multiplied with on this rank, so that the step has the mean over all."""
        return distributed.size() / self._samples

    def drop_optimizer_state(self, names: Iterable[str]) -> None:
        """Delete the optimizer's state of these parameters, so that its memory is really free."""
        if self.optimizer is not None:
            for name in names:
                self.optimizer.state.pop(self._named[name], None)

    def state(self) -> dict[str, State]:
        """State of every part with its histories, keyed by the part's place in the list and its class."""
        return {f"{i}.{type(part).__name__}": whole_state(part) for i, part in enumerate(self.parts)}

    def load_state(self, states: Mapping[str, State]) -> None:
        """Restore what `state` returned.

        Raises:
            ParameterError: if the stored run had other methods.
        """
        expected = list(self.state())
        if list(states) != expected:
            raise ParameterError(f"methods must be those of the stored run {list(states)}, got {expected}")
        for part, state in zip(self.parts, states.values()):
            load_whole_state(part, state)

    # --- inside ----------------------------------------------------------------------------------------------

    @property
    def _deferred(self) -> bool:
        return self.weighted and self._micro_batches > 1

    def _label_count(self, labels: Tensor) -> int:
        counted = labels[:, 1:] if self.shifted and labels.dim() > 1 else labels
        return int((counted != IGNORE).sum())

    def _divide(self, numerator: Tensor, weight: Tensor) -> Tensor:
        ranks = distributed.size()
        self._numerator = numerator.detach().double() + self._numerator
        if self._deferred:
            self._denominator = weight.double() + self._denominator
            return numerator * (ranks / self._labels)
        self._denominator = distributed.all_reduce_sum(weight)
        # gradients are averaged over ranks, the formula sums over them; without any weight the numerator is 0
        return numerator * (ranks / self._denominator.clamp_min(torch.finfo(weight.dtype).tiny))

    def _defer(self, term: Tensor) -> Tensor:
        """Keep a penalty's gradient apart, because the step's own gradients are yet to be scaled."""
        trained = self.trained
        if any(hasattr(parameter, "placements") for parameter in trained.values()):
            raise ConflictError(
                "gradient accumulation must be 1 when penalties meet token or sample weights on a sharded model "
                f"(FSDP), got {self._micro_batches} micro-batches"
            )
        grads = torch.autograd.grad(term, list(trained.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(trained, grads):
            if grad is not None:
                held = self._penalty_grads.get(name)
                self._penalty_grads[name] = grad if held is None else held + grad
        return term.detach() * 0.0

    def _add_penalty_gradients(self, scale: float) -> None:
        for name, grad in self._penalty_grads.items():
            # DDP averages what backward() leaves; autograd.grad went past it
            mean = distributed.all_reduce_mean(grad) * scale
            parameter = self._named[name]
            parameter.grad = mean if parameter.grad is None else parameter.grad + mean

    def _set_trainable(self, names: set[str]) -> None:
        if names == self._now_trains:
            return
        distributed.reshard(self.model)
        for name in names ^ self._now_trains:
            parameter = self._named[name]
            parameter.requires_grad_(name in names)
            if name not in names:
                parameter.grad = None
        self._now_trains = set(names)


def without_labels(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as a model gets it that is not to compute its loss."""
    return {name: value for name, value in inputs.items() if name != "labels"}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shaped(part: Part, what: str, given: Tensor, shape: torch.Size) -> Tensor:
    if given.shape != shape:
        raise TypeError(f"{type(part).__name__} must give {what} {list(shape)}, got {list(given.shape)}")
    return given
