"""LoRAPrune on a Trainer, and its own short training loop on a plain model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, TargetError, TrainingError, require
from salience.core.loop import Loop
from salience.core.part import Site
from salience.hosts._cutting_lora import Wrapped, has_adapters, merged_model, trained_model
from salience.hosts.cutting import Originals, cut, find_units, refuse_saving, refuse_uncuttable
from salience.hosts.transformers import loss_kind
from salience.methods.heads._loraprune_part import Pruning
from salience.methods.heads._loraprune_plan import Plan, plan

if TYPE_CHECKING:
    from salience.methods.heads.loraprune import LoRAPrune

_CLIP = 1.0
_PASSES = 2


def attach(method: LoRAPrune, site: Site, record: Attachment) -> Pruning:
    """Score and mask in a loop whose model is a PEFT model."""
    model = site.model
    base = trained_model(model)
    refuse_uncuttable(base)
    trainer = site.trainer
    if trainer is None and method.steps is None:
        raise ConflictError(
            "steps must be given for a loop of one's own (the schedule needs their number), got None"
        )
    if trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        raise ConflictError("DeepSpeed and FSDP must be off for LoRAPrune (it scores whole weights), got on")
    planned = plan(method, base)
    seed = site.seed if method.seed is None else method.seed
    # masks come off at finish as well as by undo
    masks = Attachment()
    record.on_undo(masks.undo)
    part = Pruning(method, planned, masks, method.steps, seed)

    def finish() -> None:
        before = _size(base)
        masks.undo()
        plain = merged_model(trainer, model)
        cut(plain, part.kept(), originals := Originals())
        _guard(part, plain, originals)
        part.removed = before, _size(plain)

    part.finisher = finish
    return part


def shrink(method: LoRAPrune, model: nn.Module, record: Attachment, data: Iterable[Any] | None) -> Pruning:
    """Tune, prune, merge and cut a plain model in place."""
    refuse_uncuttable(model)
    if has_adapters(model):
        raise TargetError(
            "model must have no adapters (LoRAPrune puts LoRA on it), got some: merge them first"
        )
    steps, batches = _batches(method, data)
    planned = plan(method, model)
    own, masks = Attachment(), Attachment()
    record.on_undo(own.undo)
    originals = Originals(own)
    before = _size(model)
    seed = 0 if method.seed is None else method.seed
    with _seeded(model, seed), _training(model):
        wrapped = Wrapped(
            model,
            list(planned.units.values()),
            own,
            rank=method.rank,
            alpha=method.alpha,
            dropout=method.dropout,
        )
        # the projections are now inside of tuner layers
        planned = _found_again(model, planned)
        part = Pruning(method, planned, masks, steps, seed)
        try:
            _train(method, model, part, batches, steps)
        finally:
            masks.undo()
    wrapped.merge_and_cut(part.kept(), originals)
    _guard(part, model, originals)
    part.removed = before, _size(model)
    part.finisher = own.forget
    return part


def _train(method: LoRAPrune, model: nn.Module, part: Pruning, batches: Iterator[Any], steps: int) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=method.learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps)
    loop = Loop(model, [part], optimizer=optimizer, shifted=loss_kind(model) == "causal")
    loop.total_steps = steps
    loop.begin()
    try:
        for _ in range(steps):
            batch = loop.to_device(next(batches))
            loop.start_step([batch])
            loss = loop.loss(batch)
            if not math.isfinite(float(loss.detach())):
                raise TrainingError(
                    f"loss must be finite, got {float(loss.detach())} in step {loop.step + 1}"
                )
            loss.backward()
            loop.finish_step()
            nn.utils.clip_grad_norm_(trained, _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
    finally:
        loop.end()


def _guard(part: Pruning, model: nn.Module, originals: Originals) -> None:
    """Let saving fail at once if no checkpoint can hold the model."""
    if part.plan.unsayable:
        refuse_saving(model, part.plan.unsayable, originals)


def _found_again(model: nn.Module, planned: Plan) -> Plan:
    return replace(planned, units={kind: find_units(model, kind) for kind in planned.units})


def _batches(method: LoRAPrune, data: Iterable[Any] | None) -> tuple[int, Iterator[Mapping[str, Any]]]:
    """How many steps, and the batches again and again; the first one is looked at before any work."""
    if data is None:
        raise ConflictError("data must be batches to tune on (dictionaries with labels), got None")
    steps = method.steps
    if steps is None:
        require(hasattr(data, "__len__"), "steps", "given for data without a length", None)
        steps = _PASSES * len(data)  # type: ignore[arg-type]
    if iter(data) is data:
        data = list(itertools.islice(data, steps))  # an iterator gives its batches once
    first = next(iter(data), None)
    valid = isinstance(first, Mapping) and first.get("labels") is not None
    got = sorted(first) if isinstance(first, Mapping) else type(first).__name__
    require(valid, "data", "batches (dictionaries) with labels", got)

    def again() -> Iterator[Mapping[str, Any]]:
        while True:
            yield from data

    return steps, again()


def _size(model: nn.Module) -> int:
    """Parameters of the model itself, without those of adapters."""
    return sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """LoRA's weights and all dropout draw from this seed; the global generators are put back."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Training mode inside the block; afterwards every module of before has its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
