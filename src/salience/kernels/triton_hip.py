"""HiP's search in Triton: intervals of the past are halved, scored and kept, in one program for each query block.

A program keeps its n intervals in a few KiB of global memory that stay in the multiprocessor's cache, and its rows in
registers. Each round scores the 2n halves a tile of keys at a time, finds the n-th best score by setting the bits of
a threshold from the highest down, and writes the halves above it back in the order of the keys. No score leaves the
program.

Checked in Triton's interpreter, and compiled for an H100: nothing here has run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from salience.core.errors import ParameterError, require
from salience.kernels.blocks import KeyBlocks
from salience.kernels.triton_setup import INTERPRETED, available, jit, padded, tl

# a score of a key that no sampled row may see, before the maximum: low, but above an empty half
HIDDEN = -32000.0
_REPRESENTATIVES = ("first", "center", "last")
# programs of one launch: more would only take more room for their intervals
_PROGRAMS = 8192
# keys of a tile
_COLUMNS = 64
# slots and rows of a program, which it holds in registers
_MOST_SLOTS = 2048
_MOST_ROWS = 128


def unfit(
    query: Tensor, key: Tensor, *, mask_k: int, q_block: int, q_stride: int, k_block: int
) -> str | None:
    """Why this kernel cannot search for these inputs; None if it can."""
    reason = available(query.device)
    if reason is not None:
        return reason
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32) or query.dtype != key.dtype:
        return f"the Triton kernel needs fp16, bf16 or fp32, got {query.dtype} and {key.dtype}"
    if query.shape[-1] > 256:
        return f"the Triton kernel needs head sizes <= 256, got {query.shape[-1]}"
    if mask_k // k_block > _MOST_SLOTS or k_block > _COLUMNS or -(-q_block // q_stride) > _MOST_ROWS:
        most = f"{_MOST_SLOTS} blocks, {_COLUMNS} keys in each and {_MOST_ROWS} rows"
        return f"the Triton kernel finds up to {most}, got {mask_k // k_block}, {k_block} and {q_block} / {q_stride}"
    return None


@torch.no_grad()
def search(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    mask_k: int,
    q_block: int,
    q_stride: int = 1,
    q_offset: int = 0,
    k_block: int,
    k_stride: int = 1,
    window: int = 0,
    sink_tokens: int = 0,
    representative: str = "center",
    head_group: int = 1,
    dense_queries: int = 0,
    causal_scores: bool = True,
) -> KeyBlocks:
    """The keys that each block of queries attends to.

    Args:
        query (Tensor): [B, H, Q, D], fp16, bf16 or fp32.
        key (Tensor): [B, Hkv, K, D], of the same type; row r stands at position K - Q + r.
        scaling (float): factor of the scores.
        mask_k (int): keys listed for a query block, a multiple of `k_block`; the window comes on top.
        q_block (int): rows that share a search.
        q_stride, q_offset (int): of these the rows `q_offset :: q_stride` ask; a last block too short to have one of
            them asks with its last row.
        k_block, k_stride (int): keys that are listed together, and the step between those that are scored.
        window (int): newest keys that a row sees in any case; they are no candidates.
        sink_tokens (int): first tokens that are always listed, <= mask_k.
        representative (str): "first", "center" or "last".
        head_group (int): heads that share a search, which divides H; their scores are joined by the maximum.
        dense_queries (int): query blocks that end before this position list everything.
        causal_scores (bool): hide keys later than p - window from a row at p also while searching.

    Returns:
        KeyBlocks: lists for [B, H], in blocks of q_block and k_block, with the window; all candidates where they are
            at most `mask_k`, else exactly mask_k / k_block blocks. A score that is not finite loses.

    Raises:
        ParameterError: if the kernel does not serve these inputs (see `unfit`).
    """
    reason = unfit(query, key, mask_k=mask_k, q_block=q_block, q_stride=q_stride, k_block=k_block)
    if reason is not None:
        raise ParameterError(f"backend must be one that serves these inputs, got 'triton': {reason}")
    known = ", ".join(_REPRESENTATIVES)
    require(representative in _REPRESENTATIVES, "representative", f"one of {known}", representative)
    (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
    require(heads % head_group == 0, "head_group", f"a divisor of {heads} heads", head_group)
    device, slots = query.device, mask_k // k_block
    first = torch.arange(0, length, q_block, device=device)
    ends = (first + q_block).clamp_max(length) + keys - length
    # candidates of each query block, and rounds until every interval is one of them
    blocks = ((ends - window).clamp_min(0) + k_block - 1) // k_block
    turns = sum((blocks > slots * 2**turn).int() for turn in range(max(1, (keys // slots).bit_length() + 1)))
    turns = torch.where((blocks > slots) & (ends > dense_queries), turns, 0)
    count = torch.where(turns > 0, slots, blocks).int()
    most = int(count.max()) if len(count) else 0
    owners = batch * heads // head_group
    index = torch.arange(most, dtype=torch.int32, device=device).repeat(owners, len(first), 1)
    if len(turns) and int(turns.max()):
        rows = _places(first, length, q_block, q_stride, q_offset)
        limit = rows + keys - length - window if causal_scores else torch.full_like(rows, keys - 1)
        points = padded(-(-k_block // k_stride), 1)
        programs = owners * len(first)
        room = min(programs, _PROGRAMS)
        halves = padded(2 * slots)
        state = torch.empty(room, 4, halves, dtype=torch.int32, device=device)
        scores = torch.empty(room, halves, dtype=torch.float32, device=device)
        for start in range(0, programs, room):
            _search[(min(room, programs - start),)](
                query,
                key,
                rows.int().contiguous(),
                limit.int().contiguous(),
                blocks.int(),
                turns.int(),
                index,
                state,
                scores,
                *query.stride(),
                *key.stride(),
                start,
                len(first),
                most,
                keys,
                rows.shape[1],
                scaling,
                -(-sink_tokens // k_block),
                HEADS=heads,
                FOLD=heads // groups,
                JOINED=head_group,
                WIDTH=width,
                WIDTH_PAD=padded(width),
                SLOTS=slots,
                HALVES=halves,
                ROWS=padded(rows.shape[1]),
                COLUMNS=_COLUMNS,
                POINTS=points,
                K_BLOCK=k_block,
                K_STRIDE=k_stride,
                REPRESENTATIVE=_REPRESENTATIVES.index(representative),
                LOW=HIDDEN,
                PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
                WIDEN=INTERPRETED and query.dtype == torch.bfloat16,
                num_warps=4,
                num_stages=3 if query.element_size() * width <= 256 else 2,
            )
    index = index.view(batch, heads // head_group, len(first), most).repeat_interleave(head_group, 1)
    count = count.expand(index.shape[:3]).contiguous()
    return KeyBlocks(count, index, q_block, k_block, length, keys, window=window)


def _places(first: Tensor, length: int, q_block: int, q_stride: int, q_offset: int) -> Tensor:
    """The rows that ask, [N, R]; in a block that is cut off the last of its rows stands for those missing."""
    first = first.unsqueeze(-1)
    have = (length - first).clamp_max(q_block)
    steps = torch.arange(q_offset, q_block, q_stride, device=first.device)
    newest = q_offset + (have - 1 - q_offset) // q_stride * q_stride
    return torch.minimum(steps, torch.where(have > q_offset, newest, have - 1)) + first


@jit
def _halves(  # type: ignore[no-untyped-def]
    starts, sizes, child, real, REPRESENTATIVE: tl.constexpr
):
    """Start, size and representative block of children, whose parents are in memory."""
    start = tl.load(starts + child // 2, mask=real, other=0)
    size = tl.load(sizes + child // 2, mask=real, other=0)
    left = size // 2
    start = tl.where(child % 2 == 0, start, start + left)
    size = tl.where(child % 2 == 0, left, size - left)
    if REPRESENTATIVE == 0:
        stands = start
    elif REPRESENTATIVE == 1:
        stands = start + size // 2
    else:
        stands = start + size - 1
    return start, size, stands


@jit
def _rows(query, row, real, q_row, q_width, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):  # type: ignore[no-untyped-def]
    wide = tl.arange(0, WIDTH_PAD)
    mask = real[:, None] & (wide < WIDTH)[None, :]
    return tl.load(query + row.to(tl.int64)[:, None] * q_row + wide[None, :] * q_width, mask=mask, other=0.0)


@jit
def _threshold(score, SLOTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers in the order of the scores, and the SLOTS-th largest of them, both uint32."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    # a negative number grows as its bits fall
    bits = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    ranked = bits.to(tl.uint32, bitcast=True)
    least = tl.full([], 0, tl.uint32)
    for turn in tl.static_range(32):
        raised = least + tl.full([], 1 << (31 - turn), tl.uint32)
        enough = tl.sum((ranked >= raised).to(tl.int32), 0) >= SLOTS
        least = tl.where(enough, raised, least)
    return ranked, least


@jit
def _search(  # type: ignore[no-untyped-def]
    query, key, places, limits, candidates, turns, index, state, scores,
    q_batch, q_head, q_row, q_width, k_batch, k_head, k_row, k_width, begin, blocks, most, keys,
    asking, scaling, sinks,
    HEADS: tl.constexpr, FOLD: tl.constexpr, JOINED: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    SLOTS: tl.constexpr, HALVES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, POINTS: tl.constexpr,
    K_BLOCK: tl.constexpr, K_STRIDE: tl.constexpr, REPRESENTATIVE: tl.constexpr, LOW: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    program = begin + tl.program_id(0)
    block = blocks - 1 - program % blocks
    owner = (program // blocks).to(tl.int64)
    head = owner * JOINED % HEADS
    query += owner * JOINED // HEADS * q_batch
    key += owner * JOINED // HEADS * k_batch
    rounds = tl.load(turns + block)
    total = tl.load(candidates + block).to(tl.int64)
    state += tl.program_id(0).to(tl.int64) * 4 * HALVES
    scores += tl.program_id(0).to(tl.int64) * HALVES

    slot = tl.arange(0, ROWS)
    real = slot < asking
    row = tl.load(places + block * asking + slot, mask=real, other=0)
    limit = tl.load(limits + block * asking + slot, mask=real, other=-1)
    rows = _rows(query + head * q_head, row, real, q_row, q_width, WIDTH, WIDTH_PAD)
    wide = tl.arange(0, WIDTH_PAD)
    half = tl.arange(0, HALVES)
    column = tl.arange(0, COLUMNS)
    each: tl.constexpr = COLUMNS // POINTS
    within = column % POINTS * K_STRIDE

    bound = total * half // SLOTS
    tl.store(state + half, bound.to(tl.int32), mask=half < SLOTS)
    tl.store(state + HALVES + half, (total * (half + 1) // SLOTS - bound).to(tl.int32), mask=half < SLOTS)
    tl.debug_barrier()
    for turn in range(rounds):
        starts = state + turn % 2 * 2 * HALVES
        for tile in range(0, 2 * SLOTS, each):
            child = tile + column // POINTS
            asked = child < 2 * SLOTS
            _, extent, stands = _halves(starts, starts + HALVES, child, asked, REPRESENTATIVE)
            held = stands * K_BLOCK + within
            used = asked & (extent > 0) & (within < K_BLOCK) & (held < keys)
            best = tl.full([COLUMNS], float("-inf"), tl.float32)
            for member in tl.static_range(JOINED):
                at = key + (head + member) // FOLD * k_head + held.to(tl.int64)[:, None] * k_row
                theirs = tl.load(
                    at + wide[None, :] * k_width, mask=used[:, None] & (wide < WIDTH)[None, :], other=0.0
                )
                if JOINED == 1:
                    mine = rows
                else:
                    mine = _rows(
                        query + (head + member) * q_head, row, real, q_row, q_width, WIDTH, WIDTH_PAD
                    )
                if WIDEN:
                    mine, theirs = mine.to(tl.float32), theirs.to(tl.float32)
                made = tl.dot(mine, tl.trans(theirs), input_precision=PRECISION) * scaling
                # the maximum would pass over what is not a number
                made = tl.where(made == made, made, float("inf"))
                made = tl.where(used[None, :] & (held[None, :] <= limit[:, None]), made, LOW)
                made = tl.where(real[:, None] & (within < K_BLOCK)[None, :], made, float("-inf"))
                best = tl.maximum(best, tl.max(made, 0))
            joined = tl.max(tl.reshape(best, [each, POINTS]), 1)
            joined = tl.where(joined == float("inf"), LOW, joined)
            own = tile + tl.arange(0, each)
            tl.store(scores + own, joined, mask=own < 2 * SLOTS)
        tl.debug_barrier()
        valid = half < 2 * SLOTS
        start, size, _ = _halves(starts, starts + HALVES, half, valid, REPRESENTATIVE)
        score = tl.load(scores + half, mask=valid, other=float("-inf"))
        score = tl.where(size > 0, score, float("-inf"))
        score = tl.where((size > 0) & (start < sinks), float("inf"), score)
        ranked, least = _threshold(score, SLOTS)
        above = ranked > least
        level = (ranked == least) & valid
        missing = SLOTS - tl.sum(above.to(tl.int32), 0)
        kept = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= missing))
        # halves rise, and go on rising: of equal scores the leftmost is kept
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        target = state + (turn + 1) % 2 * 2 * HALVES
        tl.store(target + place, start, mask=kept)
        tl.store(target + HALVES + place, size, mask=kept)
        tl.debug_barrier()
    found = tl.load(state + rounds % 2 * 2 * HALVES + half, mask=half < SLOTS, other=0)
    at = index + (owner * blocks + block) * most
    tl.store(at + half, found, mask=(half < SLOTS) & (rounds > 0))
