"""What a method on key blocks is asked: the queries and keys of one attention layer, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """What one attention layer asks, in rows without padding.

    Attributes:
        query (Tensor): [B, H, Q, D] after rotary.
        key (Tensor): [B, Hkv, K, D], K >= Q, with what a cache holds; row r stands at position K - Q + r.
        value (Tensor): [B, Hkv, K, Dv].
        scaling (float): factor of the logits.
        softcap (float | None): soft cap of the logits.
        layer (int): number of the layer among the decoder's.
        depth (int): layers of the decoder.
        shared (dict[str, Any]): of all layers of one forward pass and these samples; empty when it starts.
        state (dict[str, Any]): of this layer and these samples, from the prompt on through decoding; empty for a new
            prompt, and when the cache is not what it was (beams that changed places, a cache cut short).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    layer: int
    depth: int
    shared: dict[str, Any]
    state: dict[str, Any]
