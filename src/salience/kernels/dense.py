"""Causal attention to all keys, or to a sliding window, in torch's own kernels and in memory that grows with T."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

# rows whose scores are held at a time where torch's kernel has to be given a mask
_ROWS = 256


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Row r at position p = K - Q + r attends to the keys p - window < j <= p, or to all j <= p.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        value (Tensor): [B, Hkv, K, Dv].
        scaling (float): factor of the logits.
        softcap (float | None): soft cap of the logits.
        window (int | None): keys of a sliding window, the row's own included; None sees all.

    Returns:
        Tensor: [B, H, Q, Dv] in the query's dtype.
    """
    length, keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    slides = window is not None and window < keys
    if softcap is None and not slides and length in (1, keys):
        return sdpa(query, key, value, is_causal=length > 1, scale=scaling, enable_gqa=grouped)
    pieces = []
    for start in range(0, length, _ROWS):
        stop = min(start + _ROWS, length)
        end = keys - length + stop
        begin = max(0, keys - length + start - window + 1) if slides and window is not None else 0
        place = torch.arange(keys - length + start, end, device=query.device).unsqueeze(-1)
        at = torch.arange(begin, end, device=query.device)
        seen = at <= place
        if slides and window is not None:
            seen = seen & (at > place - window)
        part = query[:, :, start:stop], key[:, :, begin:end], value[:, :, begin:end]
        if softcap is None:
            pieces.append(sdpa(*part, attn_mask=seen, scale=scaling, enable_gqa=grouped))
        else:
            pieces.append(_capped(*part, seen, scaling, softcap))
    return torch.cat(pieces, 2)


def _capped(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, softcap: float
) -> Tensor:
    """torch's kernels know no soft cap: the scores of these rows are held, in at least fp32."""
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    rows = query.to(precise).reshape(batch, groups, -1, width)
    scores = (rows @ key.to(precise).transpose(-1, -2)).view(batch, heads, length, -1) * scaling
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).view(batch, groups, -1, scores.shape[-1])
    return (weights @ value.to(precise)).view(batch, heads, length, -1).to(query.dtype)
