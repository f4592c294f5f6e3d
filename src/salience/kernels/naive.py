"""The specification: attention over chosen keys, written plainly, with the whole map of scores in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from salience.kernels.blocks import KeyBlocks


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: KeyBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """`out_p = sum_{j seen by p} softmax_j(f(scaling q_p k_j)) v_j`, with f(x) = c tanh(x / c) under a soft cap c.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D]; head h reads key head h // (H / Hkv).
        value (Tensor): [B, Hkv, K, Dv].
        blocks (KeyBlocks): the keys that are seen.
        scaling (float): factor of the logits.
        softcap (float | None): c.
        dtype (torch.dtype): of everything inside.

    Returns:
        Tensor: [B, H, Q, Dv] in the query's dtype; 0 in rows that see nothing.
    """
    logits = scores(query, key, scaling=scaling, softcap=softcap, dtype=dtype)
    logits = logits.masked_fill(~blocks.visible(), -torch.inf)
    # a row that sees nothing is all -inf, and its softmax would be NaN
    weights = (logits - logits.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    return (weights @ _repeated(value, query.shape[1]).to(dtype)).to(query.dtype)


def scores(
    query: Tensor, key: Tensor, *, scaling: float, softcap: float | None = None, dtype: torch.dtype
) -> Tensor:
    """Logits of all rows and keys, [B, H, Q, K], before any mask."""
    logits = query.to(dtype) @ _repeated(key, query.shape[1]).to(dtype).transpose(-1, -2) * scaling
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _repeated(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1)
