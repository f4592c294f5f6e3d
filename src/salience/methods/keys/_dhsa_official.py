"""What the official code of DHSA computes, faults included: to be compared with, not to be used.

It breaks ties as `torch.topk` happens to, fills short lists with the last key of the sequence, overwrites the first
slots with the first keys, and attends to a key as often as a list holds it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from salience.methods.keys._dhsa_lists import overwritten


def ends(rows: int, keys: int, q_block: int) -> Tensor:
    """[N] int64: the newest key of each block, as if the last block were full."""
    stops = torch.arange(q_block, rows + q_block, q_block)
    return stops.clamp_max(keys) - 1


def chosen(scores: Tensor, bounds: Tensor, last: Tensor, *, budget: int, local: int) -> Tensor:
    """Lists before the first keys are put in.

    Args:
        scores (Tensor): [B, N, C] of chunks.
        bounds (Tensor): [B, C + 1] int64.
        last (Tensor): [N], from `ends`.
        budget (int): keys of a list.
        local (int): newest keys of a block, always in its list.

    Returns:
        Tensor: [B, N, min(budget, keys)] int32, rising.
    """
    keys = int(bounds[0, -1])
    budget = min(budget, keys)
    place = torch.arange(keys).expand(len(bounds), keys).contiguous()
    tokens = scores.gather(
        2, (torch.searchsorted(bounds, place, right=True) - 1)[:, None].expand(-1, len(last), -1)
    )
    out = torch.full((*tokens.shape[:2], budget), keys - 1, dtype=torch.int64)
    for block, stop in enumerate((last + 1).tolist()):
        newest = min(local, budget, stop)
        count = min(budget, stop) - newest
        row = tokens[:, block].clone()
        row[:, stop - newest :] = -torch.inf
        out[:, block, :count] = row.topk(count, dim=-1).indices
        out[:, block, budget - newest :] = torch.arange(stop - newest, stop)
    return out.sort(-1).values.int()


def with_first(index: Tensor, last: Tensor, first: int) -> Tensor:
    """Lists [B, N, M] with the first keys in their first slots."""
    return overwritten(index.unsqueeze(1), last, first)[:, 0]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    *,
    q_block: int,
    instruction_tokens: int,
    scaling: float | None = None,
) -> Tensor:
    """Attention to lists that may hold a key several times; the last rows see all keys.

    Args:
        query (Tensor): [B, H, L, D].
        key, value (Tensor): [B, Hkv, L, D].
        index (Tensor): [B, N, M], for all heads.
        q_block (int): rows of a block.
        instruction_tokens (int): rows at the end that see all keys.
        scaling (float | None): of the logits; None is D^-0.5.

    Returns:
        Tensor: [B, H, L, D].
    """
    heads, length = query.shape[1:3]
    key, value = (one.repeat_interleave(heads // one.shape[1], 1) for one in (key, value))
    place = torch.arange(length)
    out = sdpa(query, key, value, is_causal=True, scale=scaling)
    for start in range(0, length - instruction_tokens, q_block):
        stop = min(start + q_block, length - instruction_tokens)
        for row, listed in enumerate(index[:, start // q_block].long()):
            seen = listed <= place[start:stop, None]
            out[row, :, start:stop] = sdpa(
                query[row, :, start:stop],
                key[row][:, listed],
                value[row][:, listed],
                attn_mask=seen,
                scale=scaling,
            )
    return out
