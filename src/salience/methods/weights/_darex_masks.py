"""Which entries of a delta are kept: at random, by size, by size times input norm, or in random columns.

A tensor is walked in blocks of whole rows, so that the same code serves a tensor in memory and one that is streamed
from a file, and gives the same mask. Each tensor has a generator of its own, made from the seed and its name: the
mask does not depend on the order of tensors, shards or ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from salience.hosts._streaming import as_rows, row_blocks

Score = Literal["random", "magnitude", "wanda"]
# (first row, row after the last) -> those rows of a tensor seen as [rows, columns]
Rows = Callable[[int, int], Tensor]


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for the tensor `name`; a seed's masks also depend on the size of a block."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def rows_of(tensor: Tensor) -> Rows:
    """The rows of a tensor in memory."""
    flat = tensor.detach().reshape(as_rows(tensor.shape))
    return lambda start, stop: flat[start:stop]


def random_mask(shape: Sequence[int], keep: float, random: torch.Generator) -> Tensor:
    """Bool, true where an entry is kept: independently, each with probability `keep`."""
    # the tensor form draws one number after the other; the scalar form depends on the number of threads
    return ~torch.bernoulli(torch.full(tuple(shape), 1.0 - keep), generator=random).bool()


def magnitude_mask(delta: Tensor, keep: float) -> Tensor:
    """Bool: drops |delta| up to the k-th smallest, ties with it included, `k = int(numel (1 - keep))`."""
    threshold = kth_smallest(rows_of(delta), delta.shape, dropped(delta.numel(), keep))
    return delta.detach().float().abs() > threshold


def wanda_mask(delta: Tensor, norms: Tensor, keep: float) -> Tensor:
    """Bool [out, in]: in each row the top share by `|delta_ij| norm_j`, ties to the lower column.

    Args:
        delta (Tensor): [out, in].
        norms (Tensor): [in], norm of each input over the calibration tokens.
        keep (float): share, in (0, 1].
    """
    columns = delta.shape[-1]
    count = columns - dropped(columns, keep)
    ranked = (delta.abs() * norms).argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(delta, dtype=torch.bool).scatter_(-1, ranked, True)


def dropped(total: int, keep: float) -> int:
    """`int(total (1 - keep))`, where a product within 1e-6 of a whole number counts as whole."""
    return int(total * (1.0 - keep) + 1e-6)


def kth_smallest(rows: Rows, shape: Sequence[int], k: int) -> float:
    """The k-th smallest magnitude in fp32, exactly, in two passes and constant memory; -1 for k = 0 (drop nothing).

    Non-negative floats sort like their bits: the first pass counts the upper 16, the second the lower 16 of those
    that share the k-th value's upper half.
    """
    if k == 0:
        return -1.0
    upper = torch.zeros(1 << 16, dtype=torch.int64)
    for block in row_blocks(shape):
        upper += torch.bincount((_bits(rows(*block)) >> 16).long(), minlength=1 << 16)
    high = int(torch.searchsorted(upper.cumsum(0), k))
    before = int(upper[:high].sum())
    lower = torch.zeros(1 << 16, dtype=torch.int64)
    for block in row_blocks(shape):
        bits = _bits(rows(*block))
        lower += torch.bincount((bits[bits >> 16 == high] & 0xFFFF).long(), minlength=1 << 16)
    low = int(torch.searchsorted(lower.cumsum(0), k - before))
    return float(torch.tensor((high << 16) + low, dtype=torch.int32).view(torch.float32))


def masks(
    name: str,
    shape: Sequence[int],
    rows: Rows,
    *,
    keep: float,
    score: Score = "random",
    columns: float = 1.0,
    seed: int = 0,
    norms: Tensor | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """The mask of one tensor, block by block.

    Args:
        name (str): of the tensor, for its generator.
        shape (Sequence[int]): of the tensor.
        rows (Rows): rows of the delta, any float dtype; only read by "magnitude" and "wanda".
        keep (float): share of the entries, in (0, 1].
        score (str): "wanda" without norms (a tensor that takes no inputs) goes by magnitude.
        columns (float): share of the columns that may hold entries, in [keep, 1]; for "random", on matrices.
        seed (int): of the mask.
        norms (Tensor | None): [in] for "wanda".

    Yields:
        tuple: first row, row after the last, and the bool mask [rows, columns] of the block.
    """
    total, width = as_rows(shape)
    if score == "random":
        random = named_generator(seed, name)
        chosen = max(1, round(columns * width)) if columns < 1 and len(shape) > 1 else width
        picked = torch.randperm(width, generator=random)[:chosen] if chosen < width else None
        inside = min(1.0, keep * width / max(chosen, 1))
        for start, stop in row_blocks(shape):
            mask = random_mask((stop - start, chosen), inside, random)
            if picked is not None:
                whole = torch.zeros(stop - start, width, dtype=torch.bool)
                whole[:, picked] = mask
                mask = whole
            yield start, stop, mask
    elif score == "wanda" and norms is not None:
        for start, stop in row_blocks(shape):
            yield start, stop, wanda_mask(rows(start, stop).float(), norms.float(), keep)
    else:
        threshold = kth_smallest(rows, shape, dropped(total * width, keep))
        for start, stop in row_blocks(shape):
            yield start, stop, rows(start, stop).float().abs() > threshold


def _bits(block: Tensor) -> Tensor:
    return block.float().abs().contiguous().view(torch.int32).flatten()
