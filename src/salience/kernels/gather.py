"""Attention over chosen keys by gathering them: any block size, any device, with gradients; the kernel of the CPU.

For each query block the listed keys are copied side by side and multiplied as one small dense matrix. Query blocks
with lists of about the same length go together, a slice at a time that stays in the processor's cache, so memory is
that of the output. Keys that all rows of a query block see need no mask; only those around the diagonal and in the
rows' windows get one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from salience.kernels.blocks import KeyBlocks, Split, split

# scores held at a time, in elements: 2 MiB in fp32; more falls out of the cache of a CPU core
_SLICE_CPU = 1 << 19
_SLICE = 1 << 25
# lists that are filled up to the longest of their slice may waste this share
_WASTE = 0.15


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: KeyBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """As `naive.attend`, in at least fp32, without a tail.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        value (Tensor): [B, Hkv, K, Dv].
        blocks (KeyBlocks): for these Q and K; `tail` is 0.
        scaling (float): factor of the logits.
        softcap (float | None): soft cap of the logits.

    Returns:
        Tensor: [B, H, Q, Dv] in the query's dtype; 0 in rows that see nothing. Differentiable in all three inputs.
    """
    batch, heads, length, width = query.shape
    groups = key.shape[1]
    # lists that serve all heads serve the query heads of a key head in one product
    shared = blocks.count.shape[1] == 1 and groups < heads
    owners = groups if shared or heads == groups else heads
    fold, size, count = heads // owners, blocks.q_block, blocks.count.shape[2]
    precise = torch.promote_types(query.dtype, torch.float32)
    missing = count * size - length
    rows = torch.nn.functional.pad(query, (0, 0, 0, missing)) if missing else query
    rows = rows.to(precise).reshape(batch, owners, fold, count, size, width).transpose(2, 3)
    rows = rows.reshape(batch * owners * count, fold * size, width)

    item = torch.arange(len(rows), device=query.device)
    owner = item // count
    group = owner // owners * groups + owner % owners // (owners // groups)
    listing = blocks.count.shape[1]
    source = (
        owner // owners * (listing * count) + (owner % owners if listing > 1 else 0) * count + item % count
    )
    found = split(blocks)
    plan = Split(
        *(one.flatten(0, 2) for one in (found.full, found.edge, found.near, found.member, found.first))
    )
    index = blocks.index.flatten(0, 2)
    step, held_key, held_value = _stacked(key, value, blocks.k_block)

    # what is computed together has stretches of one length, and lists of about one length
    order = (plan.near * (int(plan.full.max()) + 1) + plan.full)[source].argsort()
    differentiable = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    out = None if differentiable else rows.new_empty(len(rows), fold * size, value.shape[-1])
    pieces = []
    for part, most, near in _slices(plan, source, order, fold * size, blocks.k_block):
        own = source[part]
        stretch = plan.edge[own].unsqueeze(-1) + torch.arange(near, device=query.device)
        chosen = torch.cat((index[own, :most].long(), stretch), 1)
        taken = (group[part].unsqueeze(-1) * step + chosen.clamp_max(step - 1)).flatten()
        held = held_key.index_select(0, taken).view(len(part), -1, width).to(precise)
        asked = rows.index_select(0, part)
        scores = asked.new_empty(len(part), asked.shape[1], held.shape[1])
        scores = torch.baddbmm(scores, asked, held.transpose(1, 2), beta=0, alpha=scaling)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        ready = most * blocks.k_block
        dead = _mask(scores, ready, plan, own, near, blocks, fold)
        held = held_value.index_select(0, taken).view(len(part), -1, value.shape[-1]).to(precise)
        made = scores.softmax(-1) @ held
        made = made if dead is None else made.masked_fill(dead, 0.0)
        if out is None:
            pieces.append(made)
        else:
            out.index_copy_(0, part, made)
    made = torch.cat(pieces)[order.argsort()] if out is None else out
    made = made.view(batch, owners, count, fold, size, -1).transpose(2, 3)
    return made.reshape(batch, heads, count * size, -1)[:, :, :length].to(query.dtype)


def _stacked(key: Tensor, value: Tensor, k_block: int) -> tuple[int, Tensor, Tensor]:
    """Key blocks of a key head, and the blocks of all as rows: [B Hkv blocks, k_block D] of keys and of values."""
    missing = -key.shape[2] % k_block
    if missing:
        key, value = (torch.nn.functional.pad(one, (0, 0, 0, missing)) for one in (key, value))
    held = [one.reshape(-1, k_block * one.shape[-1]) for one in (key, value)]
    return key.shape[2] // k_block, held[0], held[1]


def _slices(
    plan: Split, source: Tensor, order: Tensor, rows: int, k_block: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Items in slices, the longest list in each, and the blocks of their stretches."""
    most = _SLICE_CPU if source.device.type == "cpu" else _SLICE
    sorted_source = source[order]
    full, near = plan.full[sorted_source].tolist(), plan.near[sorted_source].tolist()
    start = 0
    while start < len(full):
        stop = start + 1
        allowed = full[start] + _WASTE * (full[start] + near[start]) + 1
        while stop < len(full) and full[stop] <= allowed and near[stop] == near[start]:
            if (stop + 1 - start) * rows * (full[stop] + near[stop]) * k_block > most:
                break
            stop += 1
        yield order[start:stop], full[stop - 1], near[start]
        start = stop


def _mask(
    scores: Tensor, ready: int, plan: Split, own: Tensor, near: int, blocks: KeyBlocks, fold: int
) -> Tensor | None:
    """Put -inf where a row does not see a key; returns the rows that see nothing, [S, R, 1], if there are any."""
    full = plan.full[own]
    # lists rise in length within a slice: what the first one fills, all fill
    filled = int(full[0]) * blocks.k_block
    if filled < ready:
        slots = torch.arange(filled, ready, device=scores.device) // blocks.k_block
        scores[..., filled:ready].masked_fill_((slots >= full.unsqueeze(-1)).unsqueeze(1), -torch.inf)
    # the stretch's first keys are new to some rows' windows, its last are in some rows' future; all see those between
    border, span = blocks.q_block + blocks.k_block, near * blocks.k_block
    sides = ((0, border), (span - border, span)) if span > 2 * border and blocks.window else ((0, span),)
    split = scores[..., ready:].view(len(own), fold, blocks.q_block, -1)
    place = plan.first[own].unsqueeze(-1) + torch.arange(blocks.q_block, device=scores.device)
    # rows that only fill the last block stand at the last place: what they see is cut off
    place = place.clamp_max(blocks.keys - 1).unsqueeze(-1)
    begin = (plan.edge[own] * blocks.k_block).view(-1, 1, 1)
    # within its window a row sees itself
    alive = None if blocks.window else (full > 0).view(-1, 1, 1)
    for start, stop in sides:
        columns = torch.arange(start, stop, device=scores.device)
        listed = plan.member[own][:, columns // blocks.k_block].unsqueeze(1)
        edge = begin + columns
        seen = (listed | (edge > place - blocks.window)) & (edge <= place)
        if alive is not None:
            alive = alive | seen.any(-1, keepdim=True)
            # the scores of rows that see nothing stay finite, so that neither output nor gradient is NaN
            seen = seen | ~alive
        split[..., start:stop].masked_fill_(~seen.unsqueeze(1), -torch.inf)
    if alive is None or bool(alive.all()):
        return None
    return (~alive).repeat(1, fold, 1)
