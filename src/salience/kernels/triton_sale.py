"""SALE's choice of key blocks in Triton: codes, statistics over near keys, and products of 8-bit integers.

Codes of 4 bits are held as int8: Hopper's matrix units have no 4-bit product, and one of int8 takes half the time of
one of bf16. A pair's score exceeds the threshold of its row if `s_k (a.b + c) > limit`, where the row's limit
already holds tau, the row's statistics, the scaling, a soft cap and the scale of the row's codes: one comparison a
pair, and one byte for a pair of blocks leaves the kernel.

Checked in Triton's interpreter, and compiled for an H100: nothing here has run on a GPU yet.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from salience.core.errors import ParameterError
from salience.kernels.blocks import KeyBlocks, joined, lists
from salience.kernels.triton_codes import MAGIC, quantise_key, quantise_query
from salience.kernels.triton_setup import INTERPRETED, available, jit, padded, tl

# pairs of blocks whose map is held at a time: 32 MiB, and eight times that for turning it into lists
_MAP = 1 << 25
# keys of a tile
_COLUMNS = 128


class Regions(Protocol):
    """What is read of SALE's grid; see there."""

    @property
    def q_block(self) -> int: ...
    @property
    def k_block(self) -> int: ...
    @property
    def sink_blocks(self) -> int: ...
    def regions(
        self, queries: int, keys: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]: ...


def unfit(query: Tensor, key: Tensor, grid: Regions, bits: int | None = 4) -> str | None:
    """Why these kernels cannot choose for these inputs; None if they can."""
    reason = available(query.device)
    if reason is not None:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or query.dtype != key.dtype:
        return f"the Triton kernel needs fp16, bf16 or fp32, got {query.dtype} and {key.dtype}"
    if bits is None:
        return "the Triton kernel needs codes of 4 or 8 bits, got exact scores"
    if max(grid.q_block, grid.k_block) > _COLUMNS or query.shape[-1] > 256:
        sizes = f"{grid.q_block} x {grid.k_block} and {query.shape[-1]}"
        return f"the Triton kernel needs blocks <= {_COLUMNS} and head sizes <= 256, got {sizes}"
    return None


def statistics(
    query: Tensor,
    key: Tensor,
    grid: Regions,
    *,
    scaling: float,
    softcap: float | None = None,
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`m_i = max_j z_ij` and `l_i = sum_j exp(z_ij - m_i)` over the sink and local keys that row i sees, exactly.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D], centred or not.
        grid (Regions): the regions.
        scaling (float): `z = scaling q.k`.
        softcap (float | None): soft cap of z.
        mean (Tensor | None): [B, Hkv, 1, D] fp32; z is then `scaling q.(k - mean)`, from products with keys as they
            are: 16-bit keys stay 16-bit.

    Returns:
        tuple: row maxima and row sums, [B, H, Q] fp32 each.
    """
    batch, heads, length, width = query.shape
    keys, groups = key.shape[2], key.shape[1]
    peak = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    total = torch.empty_like(peak)
    if not peak.numel():
        return peak, total
    _, middles = grid.regions(length, keys, query.device)
    rows = padded(grid.q_block)
    _statistics[(len(middles) * batch * heads,)](
        query,
        key,
        query if mean is None else mean.float().contiguous(),
        middles.int(),
        peak,
        total,
        *query.stride(),
        *key.stride(),
        length,
        keys,
        len(middles),
        scaling,
        1.0 if softcap is None else softcap,
        HEADS=heads,
        FOLD=heads // groups,
        WIDTH=width,
        WIDTH_PAD=padded(width),
        Q_BLOCK=grid.q_block,
        K_BLOCK=grid.k_block,
        SINKS=grid.sink_blocks,
        ROWS=rows,
        COLUMNS=32,
        CENTRED=mean is None,
        CAPPED=softcap is not None,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        WIDEN=INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=8 if rows > 64 else 4,
        num_stages=2,
    )
    return peak, total


@torch.no_grad()
def choose(
    query: Tensor,
    key: Tensor,
    tau: Tensor,
    *,
    scaling: float,
    grid: Regions,
    softcap: float | None = None,
    bits: int | None = 4,
) -> KeyBlocks:
    """The sink, the local keys, and every block in between with a pair of `RAS > tau`; means are over all rows.

    Args:
        query (Tensor): [B, H, Q, D], fp16, bf16 or fp32.
        key (Tensor): [B, Hkv, K, D] of the same type; row r stands at position K - Q + r.
        tau (Tensor): [H]; a head under 1e-5 sees everything.
        scaling (float): of the logits.
        grid (Regions): blocks and regions.
        softcap (float | None): soft cap of the logits.
        bits (int | None): of the codes, 4 or 8.

    Returns:
        KeyBlocks: [B, H, N] lists without a window.

    Raises:
        ParameterError: if the kernels do not serve these inputs (see `unfit`).
    """
    reason = unfit(query, key, grid, bits)
    if reason is not None or bits is None:
        raise ParameterError(f"backend must be one that serves these inputs, got 'triton': {reason}")
    (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
    mean_query = query.mean(2, keepdim=True, dtype=torch.float32)
    mean_key = key.mean(2, keepdim=True, dtype=torch.float32)
    query_codes, query_scale = quantise_query(query, bits, mean=mean_query)
    key_codes, key_scale = quantise_key(key, grid.k_block, bits, mean=mean_key)
    # a soft cap looks at the logits themselves, which a constant would move
    near = None if softcap is not None else mean_key
    peak, total = statistics(query, key, grid, scaling=scaling, softcap=softcap, mean=near)
    level = tau.to(peak).log().view(-1, 1) + peak + total.log()
    if softcap is not None:
        level = softcap * torch.atanh((level / softcap).clamp(-1.0, 1.0))
    level = level / scaling
    if softcap is not None:
        level = level - _mean_products(query, mean_key)
    limit = level / query_scale
    limit, dense = limit.contiguous(), tau < 1e-5
    # per query head, in units of the key's scale
    folded = mean_query.view(batch, groups, heads // groups, width)
    carried = (folded @ (key.float() - mean_key).transpose(-1, -2)) / key_scale.unsqueeze(2)
    carried = carried.view(batch, heads, keys).contiguous()

    ends, middles = grid.regions(length, keys, query.device)
    blocks = torch.arange(-(-keys // grid.k_block), device=query.device)
    middle = middles.int()
    span = padded(grid.k_block, 8)
    side = max(1, _COLUMNS // span)
    step = max(1, _MAP // (batch * heads * len(blocks)))
    parts = []
    for start in range(0, len(ends), step):
        stop = min(start + step, len(ends))
        near_blocks = (blocks < grid.sink_blocks) | (blocks >= middles[start:stop].unsqueeze(-1))
        kept = near_blocks.to(torch.int8).repeat(batch, heads, 1, 1)
        _select[((stop - start) * batch * heads,)](
            query_codes,
            query_scale,
            limit,
            key_codes,
            key_scale,
            carried,
            middle,
            dense.int(),
            kept,
            start,
            stop - start,
            length,
            keys,
            len(blocks),
            HEADS=heads,
            FOLD=heads // groups,
            WIDTH=width,
            WIDTH_PAD=padded(width, 32),
            Q_BLOCK=grid.q_block,
            K_BLOCK=grid.k_block,
            SINKS=grid.sink_blocks,
            ROWS=padded(grid.q_block),
            SPAN=span,
            SIDE=side,
            MAGIC=MAGIC,
            num_warps=8 if grid.q_block > 64 else 4,
            num_stages=3,
        )
        seen = (kept > 0) | dense.view(-1, 1, 1)
        parts.append(lists(seen & (blocks < ends[start:stop].unsqueeze(-1))))
    count, index = joined(parts)
    return KeyBlocks(count, index, grid.q_block, grid.k_block, length, keys)


def _mean_products(query: Tensor, mean_key: Tensor) -> Tensor:
    """`q . mean k` in fp32, [B, H, Q]."""
    mean = mean_key.repeat_interleave(query.shape[1] // mean_key.shape[1], 1)
    return (query.float() @ mean.transpose(-1, -2)).squeeze(-1)


@jit
def _near(  # type: ignore[no-untyped-def]
    peak, total, rows, own, place, key, begin, end, k_row, k_width, scaling, cap,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, COLUMNS: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of the rows go on over the keys from `begin` to `end`."""
    wide = tl.arange(0, WIDTH_PAD)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = (column < end)[:, None] & (wide < WIDTH)[None, :]
        held = tl.load(
            key + column.to(tl.int64)[:, None] * k_row + wide[None, :] * k_width, mask=mask, other=0.0
        )
        if WIDEN:
            held = held.to(tl.float32)
        scores = (tl.dot(rows, tl.trans(held), input_precision=PRECISION) - own[:, None]) * scaling
        if CAPPED:
            scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)
        seen = (column < end)[None, :] & (column[None, :] <= place[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        most = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(most == float("-inf"), 0.0, most)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(scores - base[:, None]), 1)
        peak = most
    return peak, total


@jit
def _statistics(  # type: ignore[no-untyped-def]
    query, key, mean, middles, peaks, totals,
    q_batch, q_head, q_row, q_width, k_batch, k_head, k_row, k_width, length, keys, blocks, scaling, cap,
    HEADS: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CENTRED: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One query block of one head."""
    program = tl.program_id(0)
    block = program % blocks
    owner = (program // blocks).to(tl.int64)
    group = owner % HEADS // FOLD
    slot = tl.arange(0, ROWS)
    row = block * Q_BLOCK + slot
    real = (slot < Q_BLOCK) & (row < length)
    wide = tl.arange(0, WIDTH_PAD)
    at = query + owner // HEADS * q_batch + owner % HEADS * q_head + row.to(tl.int64)[:, None] * q_row
    rows = tl.load(at + wide[None, :] * q_width, mask=real[:, None] & (wide < WIDTH)[None, :], other=0.0)
    own = tl.zeros([ROWS], tl.float32)
    if not CENTRED:
        centre = tl.load(mean + owner // FOLD * WIDTH + wide, mask=wide < WIDTH, other=0.0)
        own = tl.sum(rows.to(tl.float32) * centre[None, :], 1)
    if WIDEN:
        rows = rows.to(tl.float32)
    key += owner // HEADS * k_batch + group * k_head
    place = row + keys - length
    end = tl.minimum((block + 1) * Q_BLOCK, length) + keys - length
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak, total = _near(
        peak, total, rows, own, place, key, 0, tl.minimum(SINKS * K_BLOCK, end), k_row, k_width, scaling, cap,
        WIDTH, WIDTH_PAD, COLUMNS, CAPPED, PRECISION, WIDEN,
    )  # fmt: skip
    peak, total = _near(
        peak, total, rows, own, place, key, tl.load(middles + block) * K_BLOCK, end, k_row, k_width, scaling, cap,
        WIDTH, WIDTH_PAD, COLUMNS, CAPPED, PRECISION, WIDEN,
    )  # fmt: skip
    at = owner * length + row
    tl.store(peaks + at, peak, mask=real)
    tl.store(totals + at, total, mask=real)


@jit
def _select(  # type: ignore[no-untyped-def]
    codes, scales, limits, key_codes, key_scales, carried, middles, dense, kept, start, blocks, length, keys, most,
    HEADS: tl.constexpr, FOLD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, Q_BLOCK: tl.constexpr,
    K_BLOCK: tl.constexpr, SINKS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, SIDE: tl.constexpr,
    MAGIC: tl.constexpr,
):  # fmt: skip
    """Mark the key blocks of one query block's middle that hold a pair above its row's limit, SIDE at a time."""
    program = tl.program_id(0)
    # the longest middles, those of the last query blocks, start first
    block = start + blocks - 1 - program % blocks
    owner = (program // blocks).to(tl.int64)
    shared = owner // FOLD
    slot = tl.arange(0, ROWS)
    row = block * Q_BLOCK + slot
    real = (slot < Q_BLOCK) & (row < length)
    wide = tl.arange(0, WIDTH_PAD)
    at = owner * length + row
    rows = tl.load(
        codes + at[:, None] * WIDTH + wide[None, :], mask=real[:, None] & (wide < WIDTH)[None, :], other=0
    )
    share = 1.0 / tl.load(scales + at, mask=real, other=1.0)
    limit = tl.load(limits + at, mask=real, other=float("inf"))
    key_codes += shared * keys * WIDTH
    key_scales += shared * keys
    carried += owner * keys
    kept += (owner * blocks + block - start) * most
    middle = tl.load(middles + block)
    # a dense head keeps everything anyway
    middle = tl.where(tl.load(dense + owner % HEADS) != 0, 0, middle)
    column = tl.arange(0, SIDE * SPAN)
    side = tl.arange(0, SIDE)
    for first in range(SINKS, middle, SIDE):
        number = first + column // SPAN
        held = number * K_BLOCK + column % SPAN
        used = (number < middle) & (column % SPAN < K_BLOCK)
        theirs = tl.load(
            key_codes + held.to(tl.int64)[:, None] * WIDTH + wide[None, :],
            mask=used[:, None] & (wide < WIDTH)[None, :],
            other=0,
        )
        factor = tl.load(key_scales + held, mask=used, other=0.0)
        extra = tl.load(carried + held, mask=used, other=0.0)
        dots = tl.dot(rows, tl.trans(theirs), out_dtype=tl.int32)
        add = extra[None, :] * share[:, None]
        # beyond 2^22 an fp32 number is an integer, or half of one in millions
        add = tl.where(tl.abs(add) < 4194304.0, (add + MAGIC) - MAGIC, add)
        above = ((dots.to(tl.float32) + add) * factor[None, :] > limit[:, None]) & used[None, :]
        found = tl.reshape(tl.max(above.to(tl.int32), 0), [SIDE, SPAN])
        tl.store(kept + first + side, tl.max(found, 1).to(tl.int8), mask=first + side < middle)
