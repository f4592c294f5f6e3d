"""Sequences that get shorter: gathering rows, and what a cache and a mask have to be for that."""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from salience.core.errors import ConflictError


def rows_at(values: Tensor, index: Tensor) -> Tensor:
    """values [B, S, C] at index [B, N]: [B, N, C]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def gathering(keep: Tensor, order: Tensor | None, *, left: bool) -> tuple[Tensor, Tensor]:
    """Places [B, N] that bring the kept tokens together, padded on one side, and which of them are no padding."""
    length = keep.shape[1]
    places = torch.arange(length, device=keep.device).expand_as(keep) if order is None else order
    counts = keep.sum(-1, keepdim=True)
    most = int(counts.max())
    if left:
        index = torch.where(keep, places, -1).argsort(dim=-1, stable=True)[:, length - most :]
        return index, torch.arange(most, device=keep.device) >= most - counts
    index = torch.where(keep, places, length).argsort(dim=-1, stable=True)[:, :most]
    return index, torch.arange(most, device=keep.device) < counts


def renumbered(valid: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... of the tokens that are no padding, 0 in front of them: [B, N]."""
    return (valid.cumsum(-1) - 1).clamp_min(0)


def require_dynamic(cache: Any) -> None:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    if cache is None:
        return
    odd = [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]
    if not isinstance(cache, DynamicCache) or odd:
        raise ConflictError(
            "cache must be a DynamicCache of full-attention layers, whose layers may differ in length, got "
            f"{type(cache).__name__}{' with ' + odd[0] if odd else ''}"
        )


def require_causal(mask: Any, vision: Tensor) -> None:
    """Refuse models whose image tokens see each other in both directions: the masks made here are causal."""
    row = int(vision.sum(-1).argmax())
    places = vision[row].nonzero().flatten()
    first, last = int(places[0]), int(places[-1])
    if first == last or mask is None or getattr(mask, "ndim", 4) != 4:
        return
    if hasattr(mask, "mask_mod"):
        at = [torch.tensor(value, device=vision.device) for value in (row, 0, first, last)]
        seen = bool(mask.mask_mod(*at))
    else:
        value = mask[min(row, len(mask) - 1), 0, first, last]
        seen = bool(value) if mask.dtype == torch.bool else bool(value == 0)
    if seen:
        raise ConflictError(
            "attention of the decoder must be causal to drop image tokens, got image tokens that see later ones"
        )


def report_prompt_length(cache: Any, dropped: int) -> None:
    """A cache whose first layer is short still says how many tokens were read: positions are counted from that."""

    def seen(self: Any, layer_idx: int = 0) -> int:
        return int(type(self).get_seq_length(self, layer_idx)) + (dropped if layer_idx == 0 else 0)

    cache.get_seq_length = types.MethodType(seen, cache)
