"""Collectives that do nothing when there is no process group, so that methods are written once."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def active() -> bool:
    """Whether more than one process takes part."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if active() else 1


def rank() -> int:
    """This process's number in the whole job (not on its node); 0 without a process group."""
    return dist.get_rank() if active() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, as a new tensor of the same shape, dtype and device."""
    if not active():
        return value
    summed = _movable(value).clone()
    dist.all_reduce(summed)
    return summed.to(value.device)


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean over ranks, as a new tensor."""
    return all_reduce_sum(value) / size()


def all_gather(value: Tensor) -> Tensor:
    """Rows of all ranks in rank order: [B, ...] on each of W ranks gives [W * B, ...]. Equal shapes are needed."""
    if not active():
        return value
    sent = _movable(value).contiguous()
    parts = [torch.empty_like(sent) for _ in range(size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(value.device)


def broadcast(value: Tensor) -> Tensor:
    """Rank 0's value on every rank."""
    if not active():
        return value
    sent = _movable(value).clone()
    dist.broadcast(sent, src=0)
    return sent.to(value.device)


def prepare_sharded(model: nn.Module) -> None:
    """Let FSDP2 look at the parameters while all of them train; does nothing to a model that it does not shard.

    FSDP2 settles the dtype of a group's gradients at the first forward pass, from the parameters that train then: a
    block that is frozen at that moment gets gradients of the wrong dtype when it is trained later, and torch refuses
    them. There is no public call for this; a forward pass does the same and needs a batch.
    """
    sharded = _sharded(model)
    # only the outermost sharded module may be asked, and inside of a larger one it is not known which that is
    outermost = bool(sharded) and sharded[0] is model
    if outermost:
        sharded[0]._get_fsdp_state()._lazy_init()


def reshard(model: nn.Module) -> None:
    """Register FSDP2's sharded parameters again; does nothing without FSDP2.

    A forward pass without a backward pass (evaluation, probing) leaves the outermost group gathered, and gathered
    parameters do not follow when `requires_grad` of the sharded ones changes.
    """
    for module in _sharded(model):
        module.reshard()


def _sharded(model: nn.Module) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _movable(value: Tensor) -> Tensor:
    # NCCL moves GPU tensors only; decisions are made on the CPU
    if dist.get_backend() == "nccl" and value.device.type == "cpu":
        return value.to(torch.device("cuda", torch.cuda.current_device()))
    return value
