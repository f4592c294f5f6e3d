"""One call of an attention function, and the logits and probabilities that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention function, as the model made it.

    Attributes:
        module (nn.Module): the attention module.
        query (Tensor): [B, H, Q, D] after rotary.
        key (Tensor): [B, Hkv, K, D] after rotary, with what a cache holds; Hkv divides H.
        value (Tensor): [B, Hkv, K, Dv].
        mask (Any): None, [B, 1 or H, Q, K] bool (True is attended) or additive, [B, K] padding, or flex's BlockMask.
        scaling (float): factor of the logits.
        options (Mapping[str, Any]): the other keywords: softcap, sliding_window, s_aux, position_bias, is_causal ...
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Any
    scaling: float
    options: Mapping[str, Any]

    def logits(self, start: int, stop: int, attended: Tensor | None = None) -> Tensor:
        """Attention logits of the query rows `start` to `stop`, -inf where a key is not attended.

        Args:
            start (int): first row.
            stop (int): row after the last.
            attended (Tensor | None): [B, K] bool, keys that are not padding; used where the layer's own mask
                says nothing of single keys.

        Returns:
            Tensor: [B, H, R, K] in at least fp32, without dropout.
        """
        batch, heads, _, width = self.query.shape
        groups = self.key.shape[1]
        precise = torch.promote_types(self.query.dtype, torch.float32)
        with torch.autocast(self.query.device.type, enabled=False):
            # the query heads of a group lie side by side: [B, Hkv, H / Hkv * R, D]
            rows = self.query[:, :, start:stop].to(precise).reshape(batch, groups, -1, width)
            product = rows @ self.key.to(precise).transpose(-1, -2)
        logits = product.view(batch, heads, stop - start, -1) * self.scaling
        softcap = self.options.get("softcap")
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        bias = self.options.get("position_bias")
        if bias is not None:
            logits = logits + bias[:, :, start:stop, : logits.shape[-1]]
        return self._masked(logits, start, stop, attended)

    def probabilities(self, start: int, stop: int, attended: Tensor | None = None) -> Tensor:
        """Softmax of `logits` over keys and the layer's sinks, [B, H, R, K]; 0 in rows that attend to nothing."""
        logits = self.logits(start, stop, attended)
        sinks = self.options.get("s_aux")
        if sinks is not None:
            column = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            return torch.cat((logits, column), -1).softmax(-1)[..., :-1]
        return logits.softmax(-1).nan_to_num(nan=0.0)

    def _masked(self, logits: Tensor, start: int, stop: int, attended: Tensor | None) -> Tensor:
        keys = logits.shape[-1]
        if hasattr(self.mask, "mask_mod"):
            return logits.masked_fill(
                ~_block_mask_rows(self.mask, start, stop, keys, logits.device), -torch.inf
            )
        if self.mask is not None and self.mask.dim() == 4:
            rows = self.mask[:, :, start:stop, :keys]
            if rows.dtype == torch.bool:
                return logits.masked_fill(~rows, -torch.inf)
            # eager models hide a key by their smallest number, which is no bias that anyone would add
            return (logits + rows).masked_fill(rows <= torch.finfo(rows.dtype).min / 2, -torch.inf)
        allowed = self._causal(start, stop, keys, logits.device)
        for padding in (self.mask, attended):
            if padding is not None:
                allowed = allowed & padding[:, None, None, -keys:].bool()
        return logits.masked_fill(~allowed, -torch.inf)

    def _causal(self, start: int, stop: int, keys: int, device: torch.device) -> Tensor:
        """[1, 1, R, K] bool: what a layer without a mask of its own attends, by the rules of its function."""
        length = self.query.shape[2]
        causal = self.options.get("is_causal")
        if causal is None:
            causal = getattr(self.module, "is_causal", True)
        # a single query is the newest token and sees all that the cache holds
        first = start if length > 1 else keys - 1
        places = torch.arange(first, first + stop - start, device=device).view(1, 1, -1, 1)
        key_places = torch.arange(keys, device=device)
        allowed = (key_places <= places) if causal else torch.ones_like(key_places <= places)
        window = self.options.get("sliding_window")
        return allowed if window is None else allowed & (key_places > places - window)


def _block_mask_rows(mask: Any, start: int, stop: int, keys: int, device: torch.device) -> Tensor:
    """Rows of a flex BlockMask as [B or 1, H or 1, R, K] bool."""
    from torch.nn.attention.flex_attention import create_mask

    batch, heads = mask.shape[:2]

    def shifted(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        allowed: Tensor = mask.mask_mod(b, h, q + start, k)
        return allowed

    return create_mask(shifted, batch, heads, stop - start, keys, device=device)
