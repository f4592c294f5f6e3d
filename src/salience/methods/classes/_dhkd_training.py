"""Dual-head distillation in a training loop: the auxiliary head lives beside the model, never in it.

So checkpoints, evaluation and export have no trace of it. Its parameters are one more group of the optimizer, its
weights are in the method's own state, and its gradients are averaged over ranks here, because DDP does not know it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from salience.core import distributed, draws
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, require
from salience.core.labels import check_indices
from salience.core.loop import Loop
from salience.core.noise import uniform
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History
from salience.hosts.classifier import find_classifier
from salience.hosts.teachers import cache_logits, check_pair, open_teacher, training_rows
from salience.methods.classes._binary_kl import logit_loss
from salience.methods.classes._dual_head import AuxiliaryHead, made_for
from salience.methods.classes._gradient_alignment import align_gradients

if TYPE_CHECKING:
    from salience.methods.classes.dhkd import DHKD

_RECORD_EVERY = 10
_PREFIX = "dhkd.auxiliary."


class DualTraining(Part):
    """Adds `alpha` times the logit loss of the auxiliary head, and weighs the loop's own loss by `gamma`."""

    def __init__(self, method: DHKD, site: Site, record: Attachment) -> None:
        super().__init__()
        if site.trainer is not None:
            _refuse(site, method)
        elif method.stop_epoch is not None or method.cache is not None:
            raise ConflictError(
                "stop_epoch and cache must be None in a loop of your own, which knows no epochs or data"
            )
        self.penalizes = True
        self.changes_losses = method.gamma != 1
        self._method, self._trainer, self._seed = method, site.trainer, site.seed
        self._source = open_teacher(method.teacher, site.model, "DHKD")
        path, classifier = find_classifier(site.model, method.classifier)
        self._path, self._classifier = path, classifier
        self._head: AuxiliaryHead | None = made_for(classifier, method.aux_head, draws.number(site.seed))
        self._head.uniform = self._uniform
        self._parameters = {_PREFIX + name: p for name, p in self._head.named_parameters()}
        self._optimizer: Any = None
        self._inputs: Mapping[str, Any] = {}
        self._features: Tensor | None = None
        self._logits: Tensor | None = None
        self._armed = self._stopped = False
        self._counter = self._micro_batch = 0
        self._second: dict[str, Tensor] = {}
        self._newest = torch.empty(0)
        self._gap = History()
        self.histories = {"gap to the teacher": self._gap}
        record.hook(classifier.register_forward_hook(self._keep))
        if site.trainer is not None:
            record.wrap(site.trainer, "create_optimizer", self._wrap_create_optimizer)

    # --- what the loop says ----------------------------------------------------------------------------------

    def begin(self, loop: Loop) -> None:
        if self._head is None:
            return
        self._head.to(next(self._classifier.parameters()).device).train()
        if loop.optimizer is None:
            raise ConflictError(
                "optimizer must be given to the loop for DHKD (it trains the auxiliary head), got None"
            )
        self._add_group(loop.optimizer)
        # gradients that the loop scales or keeps apart include those of the head
        loop.adopt(self._parameters)
        sharded = any(hasattr(parameter, "placements") for parameter in loop.trained.values())
        if sharded and self._method.align:
            raise ConflictError("align must be False on a sharded model (FSDP): it needs whole gradients")
        if self._method.cache is not None:
            dataset, collate = training_rows(self._trainer)
            size = self._trainer.args.per_device_train_batch_size
            model = self._source.model  # type: ignore[attr-defined]
            self._source = cache_logits(model, dataset, self._method.cache, collate=collate, batch_size=size)

    def before_step(self, loop: Loop) -> None:
        self._micro_batch, self._second = 0, {}
        # a Trainer clears the gradients of its model, and these are not of it
        for parameter in self._parameters.values():
            parameter.grad = None
        stop = self._method.stop_epoch
        self._stopped = self._head is None or (
            stop is not None and (self._trainer.state.epoch or 0.0) >= stop
        )

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        self._inputs, self._features, self._logits, self._armed = inputs, None, None, True
        self._counter = draws.number(loop.step, self._micro_batch)
        self._micro_batch += 1

    def losses(self, batch: Batch, loop: Loop) -> Tensor:
        return self._method.gamma * batch.losses

    def penalty(self, batch: Batch | None, loop: Loop) -> Tensor:
        features, logits, self._armed = self._features, self._logits, False
        if features is None or logits is None:
            raise StructureError(
                f"classifier must run in the model's forward pass, got {self._path!r} that did not"
            )
        # not of the labels, which a head with several dropout samples has repeated as it repeated the features
        samples = next(len(v) for k, v in self._inputs.items() if k != "labels" and isinstance(v, Tensor))
        check_indices(self._inputs["labels"], logits.shape[-1], None)
        if self._stopped or self._head is None or self._method.alpha == 0:
            return logits.new_zeros(samples)
        found = self._source.logits(self._inputs, logits)
        teacher = check_pair(logits, found)
        auxiliary = self._head(features)
        losses = logit_loss(auxiliary, teacher, self._method.tau, self._method.loss)
        distilled = self._method.alpha * losses.view(-1, samples).mean(0)
        if loop.step % _RECORD_EVERY == 0 and (not self._gap.steps or self._gap.steps[-1] != loop.step):
            self._newest = (auxiliary.detach().float() - teacher).abs().mean(0).cpu()
            self._gap.add(loop.step, self._newest)
        if not self._method.align:
            return distilled
        self._keep_gradients(distilled, loop)
        return distilled.detach()

    def transform_gradients(self, loop: Loop) -> None:
        self._features = self._logits = None
        self._inputs = {}
        if self._head is None or self._stopped:
            return
        for parameter in self._parameters.values():
            if parameter.grad is not None and not self._method.align:
                parameter.grad = distributed.all_reduce_mean(parameter.grad)
        if not self._second:
            return
        # averaged over ranks before they are compared; what backward() left is averaged already
        second = {name: distributed.all_reduce_mean(grad) for name, grad in sorted(self._second.items())}
        trained = loop.trained
        first = [parameter.grad for parameter in trained.values()]
        joined = align_gradients(first, [second.get(name) for name in trained], self._method.align_scope)
        for parameter, gradient in zip(trained.values(), joined, strict=True):
            parameter.grad = gradient
        self._second = {}

    def finish(self) -> None:
        self._drop()

    def undo(self) -> None:
        self._drop()

    def scores(self) -> dict[str, Tensor]:
        return {"gap of each class": self._newest} if len(self._newest) else {}

    def spent(self) -> dict[str, Any]:
        count = sum(parameter.numel() for parameter in self._parameters.values())
        return {"teacher passes": self._source.passes, "auxiliary parameters in training": count}

    def state(self) -> State:
        held: State = {"teacher passes": self._source.passes}
        if self._head is not None:
            held |= {_PREFIX + name: value for name, value in self._head.state_dict().items()}
        return held

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._source.passes = int(state["teacher passes"])
        if self._head is not None:
            stored = {k.removeprefix(_PREFIX): v for k, v in state.items() if k.startswith(_PREFIX)}
            self._head.load_state_dict(stored)

    # --- inside ----------------------------------------------------------------------------------------------

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._armed and module.training:
            if not args or args[0].dim() != 2:
                got = list(args[0].shape) if args else "features by name"
                raise StructureError(f"classifier must be called with features [B, D] for DHKD, got {got}")
            self._features, self._logits = args[0], output

    def _keep_gradients(self, distilled: Tensor, loop: Loop) -> None:
        trained = loop.trained
        found = torch.autograd.grad(
            distilled.sum() * loop.sample_share, list(trained.values()), retain_graph=True, allow_unused=True
        )
        for name, grad in zip(trained, found, strict=True):
            if grad is not None:
                held = self._second.get(name)
                self._second[name] = grad if held is None else held + grad

    def _uniform(self, like: Tensor) -> Tensor:
        index = torch.arange(like.numel(), device=like.device).view_as(like)
        return uniform(index, seed=draws.number(self._seed, distributed.rank()), counter=self._counter)

    def _wrap_create_optimizer(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def create_optimizer(*args: Any, **kwargs: Any) -> Any:
            optimizer = original(*args, **kwargs)
            # before the scheduler is made and a checkpoint's state is read, which both know every group
            self._add_group(self._trainer.optimizer)
            return optimizer

        return create_optimizer

    def _add_group(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        own = list(self._parameters.values())
        if self._head is None or any(parameter is own[0] for parameter in _held(optimizer)):
            return
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
        optimizer.add_param_group({**settings, "params": own})

    def _drop(self) -> None:
        """No group, no state, no head."""
        if self._optimizer is not None:
            own = {id(parameter) for parameter in self._parameters.values()}
            groups = self._optimizer.param_groups
            kept = [group for group in groups if not any(id(p) in own for p in group["params"])]
            groups[:] = kept
            for parameter in self._parameters.values():
                self._optimizer.state.pop(parameter, None)
        self._optimizer = self._head = self._features = self._logits = None
        self._second, self._inputs = {}, {}


def _held(optimizer: Any) -> Iterable[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _refuse(site: Site, method: DHKD) -> None:
    trainer = site.trainer
    if site.shifted:
        raise ConflictError("model must classify whole samples for DHKD, got a causal language model")
    if trainer.is_deepspeed_enabled:
        raise ConflictError("DeepSpeed must be off for DHKD (its optimizer takes no more parameters), got on")
    if method.align:
        # the scaler's factor is not known when the gradients are compared
        require(not trainer.args.fp16, "align", "False with fp16 (use bf16)", True)
