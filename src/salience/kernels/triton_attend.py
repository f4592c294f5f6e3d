"""Attention over chosen keys in Triton, forward only; the kernel of the GPU.

One program holds a tile of query rows of one head (or of the heads of a key head, if they share their lists) and
walks their list in tiles of keys, then the stretch of keys of the rows' windows, with an online softmax in fp32. A
tile of keys is gathered from as many listed blocks as fill it, so blocks of 1 or 2 keys are served as well as blocks
of 128. A list rises, so the program finds by bisection which entries lie wholly before every row's window: those
need no mask, and what lies beyond every row's position is never read.

Checked in Triton's interpreter against `naive`, and compiled for an H100: it has not run on a GPU yet. Tiles, warps
and stages are chosen by what the compiler reports of shared memory and registers, not by measured times.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from salience.core.errors import ParameterError
from salience.kernels.blocks import KeyBlocks
from salience.kernels.triton_setup import INTERPRETED, available, jit, padded, tl

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# larger heads leave no room for their tiles in a multiprocessor's 227 KiB
_WIDEST = 256
_LOG2E = math.log2(math.e)


def unfit(query: Tensor, key: Tensor, value: Tensor, blocks: KeyBlocks) -> str | None:
    """Why these inputs cannot be attended to by this kernel; None if they can."""
    reason = available(query.device)
    if reason is not None:
        return reason
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        found = ", ".join(str(one.dtype).removeprefix("torch.") for one in (query, key, value))
        return f"the Triton kernel needs query, key and value alike in fp16, bf16 or fp32, got {found}"
    if max(query.shape[-1], value.shape[-1]) > _WIDEST:
        return f"the Triton kernel needs head sizes <= {_WIDEST}, got {query.shape[-1]} and {value.shape[-1]}"
    if blocks.tail:
        return "the Triton kernel has no tail"
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
        query (Tensor): [B, H, Q, D], D <= 256; fp16, bf16 or fp32.
        key (Tensor): [B, Hkv, K, D], of the same type.
        value (Tensor): [B, Hkv, K, Dv], of the same type.
        blocks (KeyBlocks): for these Q and K, blocks of any size; `tail` is 0.
        scaling (float): factor of the logits.
        softcap (float | None): soft cap of the logits.

    Returns:
        Tensor: [B, H, Q, Dv] in the query's dtype; 0 in rows that see nothing.

    Raises:
        ParameterError: if the kernel does not serve these inputs (see `unfit`).
    """
    reason = unfit(query, key, value, blocks)
    if reason is not None:
        raise ParameterError(f"backend must be one that serves these inputs, got 'triton': {reason}")
    batch, heads, length, width = query.shape
    groups, deep = key.shape[1], value.shape[-1]
    out = query.new_empty(batch, heads, length, deep)
    if not out.numel():
        return out
    fold = heads // groups
    pack = _packed(fold, blocks.q_block) if blocks.count.shape[1] == 1 else 1
    rows, columns, warps, stages = _sizes(query, deep, pack * blocks.q_block)
    parts = -(-blocks.q_block // rows) if pack == 1 else 1
    count, index = blocks.count.contiguous(), blocks.index.contiguous()
    if softcap is None:
        factor, cap = scaling * _LOG2E, 1.0
    else:
        factor, cap = 2.0 * scaling / softcap, softcap * _LOG2E
    tiles = count.shape[2] * parts
    _attend[(tiles * batch * (heads // pack),)](
        query,
        key,
        value,
        out,
        count,
        index,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        *out.stride(),
        index.shape[-1],
        length,
        blocks.keys,
        blocks.window,
        factor,
        cap,
        tiles,
        HEADS=heads,
        FOLD=fold,
        PACK=pack,
        SHARED=count.shape[1] == 1,
        PARTS=parts,
        Q_BLOCK=blocks.q_block,
        K_BLOCK=blocks.k_block,
        WIDTH=width,
        DEEP=deep,
        WIDTH_PAD=padded(width),
        DEEP_PAD=padded(deep),
        ROWS=rows,
        COLUMNS=columns,
        CAPPED=softcap is not None,
        # three products of tf32 numbers keep what fp32 has; one would keep 10 bits
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        # the interpreter multiplies the bits of bf16 numbers as integers
        WIDEN=INTERPRETED and query.dtype == torch.bfloat16,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _packed(fold: int, q_block: int) -> int:
    """How many of the `fold` query heads of a key head one program takes: as many as fill 64 rows."""
    return max(
        pack for pack in range(1, fold + 1) if fold % pack == 0 and (pack == 1 or pack * q_block <= 64)
    )


def _sizes(query: Tensor, deep: int, wanted: int) -> tuple[int, int, int, int]:
    """Rows and keys of a tile, warps and stages, such that 227 KiB and 255 registers a thread are enough."""
    each = query.element_size() * (padded(query.shape[-1]) + padded(deep))
    if each <= 512:
        rows = min(128, padded(wanted))
        return rows, 64, 8 if rows > 64 else 4, 3
    if each <= 1024 and query.element_size() == 2:
        rows = min(64, padded(wanted))
        return rows, 64, 8 if rows == 64 else 4, 2
    return min(64 if each <= 1024 else 32, padded(wanted)), 32, 4, 2


@jit
def _first_beyond(index, count, limit):  # type: ignore[no-untyped-def]
    """How many of the `count` rising numbers at `index` are <= `limit`."""
    low = 0 * count
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(index + middle) <= limit:
            low = middle + 1
        else:
            high = middle
    return low


@jit
def _absorb(  # type: ignore[no-untyped-def]
    total, norm, top, rows, held, values, seen, factor, cap,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax in powers of two: rows [M, D] meet keys [N, D] and values [N, Dv]."""
    if WIDEN:
        rows, held = rows.to(tl.float32), held.to(tl.float32)
    scores = tl.dot(rows, tl.trans(held), input_precision=PRECISION) * factor
    if CAPPED:
        # c tanh(x / c), with the factor 2 / c already in `factor`
        scores = cap * (2.0 * tl.sigmoid(scores) - 1.0)
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    peak = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen nothing yet stays at -inf; -inf - -inf would be NaN
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(top - base)
    norm = norm * fade + tl.sum(weights, 1)
    total = total * fade[:, None]
    weights = weights.to(values.dtype)
    if WIDEN:
        weights, values = weights.to(tl.float32), values.to(tl.float32)
    total = tl.dot(weights, values, total, input_precision=PRECISION)
    return total, norm, peak


@jit
def _attend(  # type: ignore[no-untyped-def]
    query, key, value, out, count, index,
    q_batch, q_head, q_row, q_width, k_batch, k_head, k_row, k_width,
    v_batch, v_head, v_row, v_width, o_batch, o_head, o_row, o_width,
    most, length, keys, window, factor, cap, tiles,
    HEADS: tl.constexpr, FOLD: tl.constexpr, PACK: tl.constexpr, SHARED: tl.constexpr, PARTS: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, WIDTH: tl.constexpr, DEEP: tl.constexpr,
    WIDTH_PAD: tl.constexpr, DEEP_PAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    # the longest lists, those of the last rows, start first; neighbours share a head, and its keys in the cache
    tile = tiles - 1 - program % tiles
    owner = program // tiles
    batch = (owner // (HEADS // PACK)).to(tl.int64)
    head = owner % (HEADS // PACK) * PACK
    group = (head // FOLD).to(tl.int64)
    block = tile // PARTS
    blocks = tiles // PARTS

    begin = block * Q_BLOCK + tile % PARTS * ROWS
    end = tl.minimum(tl.minimum(begin + ROWS, (block + 1) * Q_BLOCK), length)
    slot = tl.arange(0, ROWS)
    if PACK == 1:
        mine = head + 0 * slot
        row = begin + slot
        real = row < end
    else:
        mine = head + slot // Q_BLOCK
        row = begin + slot % Q_BLOCK
        real = (slot < PACK * Q_BLOCK) & (row < end)
    place = row + keys - length
    first = begin + keys - length
    last = end - 1 + keys - length

    wide = tl.arange(0, WIDTH_PAD)
    deep = tl.arange(0, DEEP_PAD)
    at = query + batch * q_batch + mine.to(tl.int64)[:, None] * q_head + row.to(tl.int64)[:, None] * q_row
    rows = tl.load(at + wide[None, :] * q_width, mask=real[:, None] & (wide < WIDTH)[None, :], other=0.0)
    key += batch * k_batch + group * k_head
    value += batch * v_batch + group * v_head

    listing = batch * blocks + block if SHARED else (batch * HEADS + head) * blocks + block
    entries = tl.load(count + listing)
    index += listing * most
    # entries before `full` end before every row's window, those from `used` on start behind every row's listed part
    full = _first_beyond(index, entries, (first - window + 1 + K_BLOCK) // K_BLOCK - 2)
    used = _first_beyond(index, entries, (last - window + K_BLOCK) // K_BLOCK - 1)

    total = tl.zeros([ROWS, DEEP_PAD], tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    column = tl.arange(0, COLUMNS)
    every = real[:, None] & (column >= 0)[None, :]
    even: tl.constexpr = K_BLOCK % COLUMNS == 0

    # listed keys that every row sees, in whole tiles
    ready = full * K_BLOCK // COLUMNS
    for step in range(ready):
        if even:
            held = tl.load(index + step * COLUMNS // K_BLOCK) * K_BLOCK + step * COLUMNS % K_BLOCK + column
        else:
            flat = step * COLUMNS + column
            held = tl.load(index + flat // K_BLOCK) * K_BLOCK + flat % K_BLOCK
        far = held.to(tl.int64)[:, None]
        if WIDTH == WIDTH_PAD:
            theirs = tl.load(key + far * k_row + wide[None, :] * k_width)
        else:
            theirs = tl.load(
                key + far * k_row + wide[None, :] * k_width, mask=(wide < WIDTH)[None, :], other=0.0
            )
        if DEEP == DEEP_PAD:
            values = tl.load(value + far * v_row + deep[None, :] * v_width)
        else:
            values = tl.load(
                value + far * v_row + deep[None, :] * v_width, mask=(deep < DEEP)[None, :], other=0.0
            )
        total, norm, top = _absorb(
            total, norm, top, rows, theirs, values, every, factor, cap, False, CAPPED, PRECISION, WIDEN
        )

    # the rest of the list, around the rows' windows
    for step in range(ready, tl.cdiv(used * K_BLOCK, COLUMNS)):
        flat = step * COLUMNS + column
        listed = flat < used * K_BLOCK
        held = tl.load(index + flat // K_BLOCK, mask=listed, other=0) * K_BLOCK + flat % K_BLOCK
        real_key = listed & (held < keys)
        far = held.to(tl.int64)[:, None]
        theirs = tl.load(
            key + far * k_row + wide[None, :] * k_width,
            mask=real_key[:, None] & (wide < WIDTH)[None, :],
            other=0.0,
        )
        values = tl.load(
            value + far * v_row + deep[None, :] * v_width,
            mask=real_key[:, None] & (deep < DEEP)[None, :],
            other=0.0,
        )
        seen = listed[None, :] & (held[None, :] <= place[:, None] - window)
        total, norm, top = _absorb(
            total, norm, top, rows, theirs, values, seen, factor, cap, True, CAPPED, PRECISION, WIDEN
        )

    # the rows' own windows
    start = tl.maximum(first - window + 1, 0)
    for step in range(tl.cdiv(tl.where(window > 0, last + 1 - start, 0), COLUMNS)):
        held = start + step * COLUMNS + column
        real_key = held <= last
        far = held.to(tl.int64)[:, None]
        theirs = tl.load(
            key + far * k_row + wide[None, :] * k_width,
            mask=real_key[:, None] & (wide < WIDTH)[None, :],
            other=0.0,
        )
        values = tl.load(
            value + far * v_row + deep[None, :] * v_width,
            mask=real_key[:, None] & (deep < DEEP)[None, :],
            other=0.0,
        )
        seen = (held[None, :] <= place[:, None]) & (held[None, :] > place[:, None] - window)
        total, norm, top = _absorb(
            total, norm, top, rows, theirs, values, seen, factor, cap, True, CAPPED, PRECISION, WIDEN
        )

    total = total / tl.where(norm == 0.0, 1.0, norm)[:, None]
    at = out + batch * o_batch + mine.to(tl.int64)[:, None] * o_head + row.to(tl.int64)[:, None] * o_row
    tl.store(
        at + deep[None, :] * o_width,
        total.to(out.dtype.element_ty),
        mask=real[:, None] & (deep < DEEP)[None, :],
    )
