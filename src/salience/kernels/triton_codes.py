"""Symmetric codes of 4 or 8 bits in Triton, for SALE: read once, centred, scaled by groups of rows, rounded.

Checked in Triton's interpreter, and compiled for an H100: nothing here has run on a GPU yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from salience.kernels.triton_setup import jit, padded, tl

# rounds an fp32 number below 2^22 to the nearest integer, half to even, when added and taken away again
MAGIC = 12582912.0


def quantise_query(states: Tensor, bits: int = 4, *, mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric codes; the rows r and r + 8 of each tile of 16 rows share a scale over all channels.

    Args:
        states (Tensor): [B, H, Q, D], centred, or with their `mean`.
        bits (int): 4 gives codes in [-7, 7], 8 in [-127, 127].
        mean (Tensor | None): [B, H, 1, D] fp32, taken off first.

    Returns:
        tuple: codes [B, H, Q, D] int8, rounded half to even; scales [B, H, Q] fp32, 1 of a group of zeros.
    """
    return _codes(states, mean, bits, tile=16, groups=8)


def quantise_key(
    states: Tensor, k_block: int = 32, bits: int = 4, *, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `quantise_query`; in each key block the keys with equal `(index mod 8) // 2` share a scale."""
    return _codes(states, mean, bits, tile=k_block, groups=4)


def _codes(
    states: Tensor, mean: Tensor | None, bits: int, *, tile: int, groups: int
) -> tuple[Tensor, Tensor]:
    batch, heads, length, width = states.shape
    codes = torch.empty(states.shape, dtype=torch.int8, device=states.device)
    scale = torch.empty(states.shape[:3], dtype=torch.float32, device=states.device)
    if not codes.numel():
        return codes, scale
    members = padded(tile // groups, 1)
    tiles = max(1, 64 // (groups * members))
    steps = -(-length // (tile * tiles))
    _quantise[(steps * batch * heads,)](
        states,
        states if mean is None else mean.float().contiguous(),
        codes,
        scale,
        *states.stride(),
        length,
        steps,
        float(2 ** (bits - 1) - 1),
        HEADS=heads,
        WIDTH=width,
        WIDTH_PAD=padded(width),
        TILE=tile,
        TILES=tiles,
        GROUPS=groups,
        MEMBERS=members,
        CENTRED=mean is None,
        MAGIC=MAGIC,
        num_warps=4,
    )
    return codes, scale


@jit
def _quantise(  # type: ignore[no-untyped-def]
    states, mean, codes, scale, s_batch, s_head, s_row, s_width, length, steps, largest,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    GROUPS: tl.constexpr, MEMBERS: tl.constexpr, CENTRED: tl.constexpr, MAGIC: tl.constexpr,
):  # fmt: skip
    """TILES tiles of rows, those that share a scale side by side."""
    program = tl.program_id(0)
    owner = (program // steps).to(tl.int64)
    slot = tl.arange(0, TILES * GROUPS * MEMBERS)
    member = slot % MEMBERS
    group = slot // MEMBERS % GROUPS
    within = group + 8 * member if GROUPS == 8 else member // 2 * 8 + 2 * group + member % 2
    row = (program % steps * TILES + slot // (GROUPS * MEMBERS)) * TILE + within
    real = (member < TILE // GROUPS) & (row < length)
    wide = tl.arange(0, WIDTH_PAD)
    mask = real[:, None] & (wide < WIDTH)[None, :]
    at = states + owner // HEADS * s_batch + owner % HEADS * s_head
    held = tl.load(at + row.to(tl.int64)[:, None] * s_row + wide[None, :] * s_width, mask=mask, other=0.0)
    held = held.to(tl.float32)
    if not CENTRED:
        centre = tl.load(mean + owner * WIDTH + wide, mask=wide < WIDTH, other=0.0)
        held = tl.where(mask, held - centre[None, :], 0.0)
    peak = tl.reshape(tl.max(tl.abs(held), 1), [TILES * GROUPS, MEMBERS])
    shared = tl.div_rn(tl.max(peak, 1), largest)
    shared = tl.where(shared > 0.0, shared, 1.0)
    shared = tl.reshape(
        tl.broadcast_to(shared[:, None], [TILES * GROUPS, MEMBERS]), [TILES * GROUPS * MEMBERS]
    )
    code = tl.div_rn(held, tl.broadcast_to(shared[:, None], [TILES * GROUPS * MEMBERS, WIDTH_PAD]))
    code = ((code + MAGIC) - MAGIC).to(tl.int8)
    at = owner * length + row
    tl.store(codes + at[:, None] * WIDTH + wide[None, :], code, mask=mask)
    tl.store(scale + at, shared, mask=real)
