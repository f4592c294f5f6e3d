"""What tells rows of data, and teachers, apart: digests of their content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import require
from salience.hosts.transformers import unwrap

# what says how much was right, and is not shown to a teacher
ANSWERS = ("labels", "label", "label_ids")


def row_digests(inputs: Mapping[str, Any]) -> Tensor:
    """64 bits for the content of each row of a batch, labels and padding left out.

    Args:
        inputs (Mapping[str, Tensor]): tensors [B, ...] on any device; where an `attention_mask` [B, T] is given,
            tensors of its shape count only where it is not 0, so that the padding of a batch does not matter.

    Returns:
        Tensor: [B] int64 on the CPU.
    """
    rows = {name: value.detach().cpu().contiguous() for name, value in sorted(shown(inputs).items())}
    mask = rows.get("attention_mask")
    digests = []
    for row in range(len(next(iter(rows.values())))):
        state = hashlib.blake2b(digest_size=8)
        for name, value in rows.items():
            one = value[row]
            if mask is not None and value.shape == mask.shape:
                one = one[mask[row] != 0]
            state.update(f"{name} {one.dtype} {list(one.shape)} ".encode())
            state.update(one.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digests.append(int.from_bytes(state.digest(), "little", signed=True))
    return torch.tensor(digests, dtype=torch.int64)


def weights_digest(model: nn.Module) -> str:
    """Of every weight and buffer of a model, whatever device it is on."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(unwrap(model).state_dict().items()):
        if isinstance(value, Tensor):
            state.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
            state.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def shown(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What identifies a batch: its tensors with rows, without the answers."""
    found = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and v.dim() and k not in ANSWERS}
    require(bool(found), "batch", "a mapping with at least one tensor besides the labels", sorted(inputs))
    return found
