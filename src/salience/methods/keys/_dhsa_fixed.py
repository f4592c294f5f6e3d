"""Blocks of fixed size, as the current official repository of DHSA chooses them: top-k, A-shape, vertical-slash.

Scored: key blocks of `k_block` tokens for query blocks of `q_block`, each head by itself. Top-k and A-shape compare
means of queries and keys; vertical-slash takes the softmax of the last block of queries over all keys and sums it
along columns (keys) and diagonals (distances).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from salience.kernels.blocks import KeyBlocks, joined, lists

# scores of blocks held at a time, in elements
_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Grid:
    """Query blocks against key blocks.

    Attributes:
        queries (int): Q.
        keys (int): K.
        q_block (int): rows in a query block.
        k_block (int): keys in a key block.
        most (int): key blocks that a query block keeps.
    """

    queries: int
    keys: int
    q_block: int
    k_block: int
    most: int

    @property
    def rows(self) -> int:
        """Query blocks."""
        return -(-self.queries // self.q_block)

    @property
    def columns(self) -> int:
        """Key blocks."""
        return -(-self.keys // self.k_block)

    @property
    def offset(self) -> int:
        """Position of row 0."""
        return self.keys - self.queries

    def recent(self, rows: Tensor) -> Tensor:
        """The newest key block that each query block sees."""
        return ((rows + 1) * self.q_block).clamp_max(self.queries).add(self.offset - 1) // self.k_block


def kept_blocks(keys: int, k_block: int, density: float) -> int:
    """`max(1, int(density n))` of the n key blocks."""
    return max(1, int(density * -(-keys // k_block)))


def means(states: Tensor, block: int) -> Tensor:
    """[B, H, ceil(T / block), D] in at least fp32; the last block averages what it holds."""
    length = states.shape[2]
    precise = states.to(torch.promote_types(states.dtype, torch.float32))
    padded = F.pad(precise, (0, 0, 0, -length % block))
    sums = padded.unflatten(2, (-1, block)).sum(3)
    starts = torch.arange(0, length, block, device=states.device)
    return sums / (length - starts).clamp_max(block).view(-1, 1)


def top_k(query: Tensor, key: Tensor, grid: Grid, *, causal: bool = True) -> KeyBlocks:
    """The key blocks with the highest `mean q . mean k`.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        grid (Grid): sizes.
        causal (bool): choose among the blocks that a query block sees, and let every row see itself. The official
            code does neither: blocks of the future use up the budget, and rows may see nothing.
    """
    left, right = means(query, grid.q_block), _repeated(means(key, grid.k_block), query.shape[1])
    columns = torch.arange(grid.columns, device=query.device)

    def kept(rows: Tensor) -> Tensor:
        scores = left[:, :, rows] @ right.transpose(-1, -2)
        if not causal:
            return _best(scores, torch.full_like(rows, grid.most))
        recent = grid.recent(rows)
        seen = columns <= recent.unsqueeze(-1)
        return _best(scores.masked_fill(~seen, -torch.inf), (recent + 1).clamp_max(grid.most))

    return _blocks(kept, query, grid, window=int(causal))


def a_shape(query: Tensor, key: Tensor, grid: Grid) -> KeyBlocks:
    """The first key block, the newest one, and in between those with the highest `mean q . mean k`."""
    left, right = means(query, grid.q_block), _repeated(means(key, grid.k_block), query.shape[1])

    def kept(rows: Tensor) -> Tensor:
        return _with_ends(left[:, :, rows] @ right.transpose(-1, -2), rows, grid)

    return _blocks(kept, query, grid)


def vertical_slash(
    query: Tensor, key: Tensor, grid: Grid, *, ratio: float = 0.5, scaling: float | None = None
) -> KeyBlocks:
    """The first and the newest key block, and those that the heaviest columns and diagonals of the end pass.

    A share `ratio` of the token budget goes to columns, the rest to diagonals. The query blocks within the budget
    and the last one see all.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        grid (Grid): sizes.
        ratio (float): in [0, 1].
        scaling (float | None): of the logits; None is D^-0.5.
    """
    tokens = min(grid.keys, grid.most * grid.k_block)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    column, diagonal = _lines(query, key, grid, scaling)
    column = _only_best(column, int(tokens * ratio))
    diagonal = _only_best(diagonal, tokens - int(tokens * ratio))
    padded = F.pad(column, (0, grid.columns * grid.k_block - grid.keys))
    vertical = padded.unflatten(-1, (-1, grid.k_block)).sum(-1)
    # mass of the chosen distances below each one: a diagonal o passes the block at d = first row - first key iff
    # d - k_block < o < d + q_block, whatever the row
    below = F.pad(diagonal.double().cumsum(-1), (1, 0))
    columns = torch.arange(grid.columns, device=query.device) * grid.k_block

    def kept(rows: Tensor) -> Tensor:
        apart = (rows * grid.q_block + grid.offset).unsqueeze(-1) - columns
        high, low = (
            below[..., edge.clamp(0, grid.keys).flatten()].unflatten(-1, edge.shape)
            for edge in (apart + grid.q_block, apart - grid.k_block + 1)
        )
        scores = vertical.unsqueeze(2) + (high - low).to(vertical.dtype)
        dense = (rows < math.ceil(tokens / grid.q_block)) | (rows == grid.rows - 1)
        return _with_ends(scores, rows, grid, dense)

    return _blocks(kept, query, grid)


def vertical_slash_blockwise(
    query: Tensor, key: Tensor, grid: Grid, *, ratio: float = 0.5, scaling: float | None = None
) -> KeyBlocks:
    """As `vertical_slash`, by the mean of the last queries and the means of key blocks instead of all tokens.

    Columns are key blocks and distances are counted in them; masses are logits, not shares. All blocks around the
    diagonal are kept besides the first one.

    Args:
        query, key (Tensor), grid (Grid), ratio (float), scaling (float | None): as for `vertical_slash`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    asking = means(query, grid.q_block)[:, :, -1:] * scaling
    mass = (asking @ _repeated(means(key, grid.k_block), query.shape[1]).transpose(-1, -2)).squeeze(2)
    most = min(grid.most, grid.columns)
    vertical = _only_best(mass, int(most * ratio))
    # the newest key block is at distance 0
    slash = _only_best(mass, most - int(most * ratio)).flip(-1)
    below = F.pad(slash.double().cumsum(-1), (1, 0))
    columns = torch.arange(grid.columns, device=query.device)

    def kept(rows: Tensor) -> Tensor:
        recent = grid.recent(rows).unsqueeze(-1)
        first = ((rows * grid.q_block + grid.offset) // grid.k_block).unsqueeze(-1)
        high, low = (
            below[..., edge.clamp(0, grid.columns).flatten()].unflatten(-1, edge.shape)
            for edge in (recent - columns + 1, first - columns)
        )
        scores = vertical.unsqueeze(2) + (high - low).to(vertical.dtype)
        tokens = min(grid.keys, most * grid.k_block)
        dense = (rows < math.ceil(tokens / grid.q_block)) | (rows == grid.rows - 1)
        return _with_ends(scores, rows, grid, dense, first)

    return _blocks(kept, query, grid)


def _lines(query: Tensor, key: Tensor, grid: Grid, scaling: float) -> tuple[Tensor, Tensor]:
    """Attention of the last block of rows summed by key and by distance, both [B, H, K] in at least fp32."""
    count = min(grid.q_block, grid.queries)
    place = torch.arange(grid.keys - count, grid.keys, device=query.device).unsqueeze(-1)
    at = torch.arange(grid.keys, device=query.device)
    precise = torch.promote_types(query.dtype, torch.float32)
    fold = query.shape[1] // key.shape[1]
    column, diagonal = [], []
    # head by head: the map of all heads at 128K tokens would be gigabytes
    for head in range(query.shape[1]):
        asking = query[:, head, -count:].to(precise) * scaling
        logits = asking @ key[:, head // fold].to(precise).transpose(-1, -2)
        mass = logits.masked_fill_(at > place, -torch.inf).softmax(-1)
        column.append(mass.sum(1))
        # rows shifted against each other, so that a diagonal becomes a column
        shifted = F.pad(mass, (count - 1, 0))
        wide = shifted.shape[-1]
        shape, strides = (len(mass), count, grid.keys), (count * wide, wide + 1, 1)
        diagonal.append(shifted.as_strided(shape, strides).sum(1).flip(-1))
    return torch.stack(column, 1), torch.stack(diagonal, 1)


def _only_best(mass: Tensor, count: int) -> Tensor:
    """The `count` largest entries of each row; the others are 0."""
    order = mass.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(mass).scatter(-1, order, mass.gather(-1, order))


def _with_ends(
    scores: Tensor, rows: Tensor, grid: Grid, dense: Tensor | None = None, first: Tensor | None = None
) -> Tensor:
    """[B, H, R, columns] bool: first and newest block, the best in between; all that is seen where it fits.

    `dense` [R] bool sees all as well; from `first` [R, 1] on, all blocks up to the newest are kept.
    """
    columns = torch.arange(grid.columns, device=scores.device)
    recent = grid.recent(rows).unsqueeze(-1)
    first = recent if first is None else first
    whole = recent < grid.most
    if dense is not None:
        whole = whole | dense.unsqueeze(-1)
    ends = (columns == 0) | ((columns >= first) & (columns <= recent))
    left = (grid.most - (recent - first + 1) - (first > 0).long()).clamp_min(0)
    left = torch.minimum(left, (recent - 1).clamp_min(0)).masked_fill(whole, 0)
    middle = (columns > 0) & (columns < recent)
    best = _best(scores.masked_fill(~middle, -torch.inf), left.squeeze(-1))
    return best | torch.where(whole, columns <= recent, ends)


def _best(scores: Tensor, counts: Tensor) -> Tensor:
    """[B, H, R, n] bool: the `counts` [R] highest of each row, of equal ones the left."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(scores.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, kept.expand(scores.shape))


def _blocks(kept: Callable[[Tensor], Tensor], query: Tensor, grid: Grid, window: int = 0) -> KeyBlocks:
    """Lists of all query blocks, chosen in slices."""
    step = max(1, _ELEMENTS // max(1, query.shape[0] * query.shape[1] * grid.columns))
    rows = torch.arange(grid.rows, device=query.device)
    count, index = joined([lists(kept(part)) for part in rows.split(step)])
    return KeyBlocks(count, index, grid.q_block, grid.k_block, grid.queries, grid.keys, window)


def _repeated(states: Tensor, heads: int) -> Tensor:
    return states.repeat_interleave(heads // states.shape[1], dim=1)
