"""Attention over chosen keys by torch's flex_attention, compiled; forward only.

The lists go into a BlockMask as they are: blocks that all rows see as full blocks, those around the diagonal and in
the rows' windows with a mask function. flex_attention that is not compiled ignores the lists of a BlockMask and
applies its mask function alone, so it is never run here. On a CPU torch compiles it for each shape (about 20 s, with
a C++ compiler): worth it for many prompts of one length, and left to whoever asks for this backend by name.
"""

from __future__ import annotations

import functools
import shutil
from typing import Any

import torch
from torch import Tensor

from salience.kernels.blocks import KeyBlocks, split

# smaller key blocks leave nothing for the hardware's matrix units
_LEAST = 16


def unfit(query: Tensor, key: Tensor, value: Tensor, blocks: KeyBlocks) -> str | None:
    """Why these lists cannot be attended to by this kernel; None if they can."""
    if blocks.k_block < _LEAST or blocks.k_block % _LEAST or blocks.q_block % _LEAST:
        return f"flex_attention needs blocks that are multiples of {_LEAST}, got {blocks.q_block} x {blocks.k_block}"
    if query.device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++")):
        return "flex_attention on a CPU needs a C++ compiler, found neither g++ nor clang++"
    if query.device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            return "flex_attention on a GPU needs triton, which is not installed or does not know this GPU"
    return None


@torch.no_grad()
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: KeyBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """As `naive.attend`, in fp32 inside, without a tail and without gradients.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        value (Tensor): [B, Hkv, K, Dv].
        blocks (KeyBlocks): for these Q and K; blocks are multiples of 16, `tail` is 0.
        scaling (float): factor of the logits.
        softcap (float | None): soft cap of the logits.

    Returns:
        Tensor: [B, H, Q, Dv] in the query's dtype; 0 in rows that see nothing.
    """
    from torch.nn.attention.flex_attention import BlockMask

    found = split(blocks)
    edge, member, span = found.edge, found.member, found.member.shape[-1]
    total = -(-blocks.keys // blocks.k_block)
    stretch = edge.unsqueeze(-1) + torch.arange(span, device=edge.device)
    q_block, k_block, offset, window = blocks.q_block, blocks.k_block, blocks.offset, blocks.window
    heads = blocks.count.shape[1]

    def seen(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        owner = head if heads > 1 else head * 0
        place, block = row + offset, row // q_block
        near = (column // k_block - edge[batch, owner, block]).clamp(0, span - 1)
        listed = member[batch, owner, block, near]
        return (column <= place) & (listed | (column > place - window))

    # a list of no entries still needs a place, and torch's template for the CPU places for all blocks
    least = total if query.device.type == "cpu" else 1
    mask = BlockMask.from_kv_blocks(
        (stretch < total).sum(-1, dtype=torch.int32),
        _wide(stretch.clamp_max(total - 1).int(), least),
        found.full.int(),
        _wide(blocks.index, least),
        BLOCK_SIZE=(q_block, k_block),
        mask_mod=seen,
        seq_lengths=(blocks.queries, blocks.keys),
        compute_q_blocks=False,
    )
    options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1], "scale": scaling}
    if query.device.type == "cuda":
        options["kernel_options"] = {"BLOCK_M": q_block, "BLOCK_N": k_block}
    if softcap is not None:
        options["score_mod"] = _capped(softcap)
    made: Tensor = _compiled(query.device.type)(query, key, value, block_mask=mask, **options)
    return made


def _wide(index: Tensor, least: int) -> Tensor:
    return torch.nn.functional.pad(index, (0, max(0, least - index.shape[-1])))


@functools.cache
def _capped(softcap: float) -> Any:
    """One function for each cap: a new one would be compiled anew."""

    def cap(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


@functools.cache
def _compiled(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # C++ for a length that is not fixed does not compile in torch 2.13
    compiled = torch.compile(flex_attention, dynamic=False if device == "cpu" else None)

    def run(*args: Any, **options: Any) -> Any:
        # every length is a program of its own on a CPU
        with torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
            return compiled(*args, **options)

    return run
