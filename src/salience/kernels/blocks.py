"""Which keys each block of queries attends to: the one form that every choice of keys and every kernel speaks.

Rows are queries. With Q queries and K >= Q keys, row r stands at position p = K - Q + r: the keys end where the
queries end, as in the prefill of a prompt, in a chunk of it behind a cache, and in decoding. Nothing sees the future.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from salience.core.errors import require


@dataclass(frozen=True)
class KeyBlocks:
    """Lists of key blocks for blocks of queries, a window for each row, and rows at the end that see everything.

    A row at position p sees key j <= p if j lies in a block listed for the row's query block, or in the row's own
    window p - window < j <= p, or if the row is one of the last `tail` rows. Query blocks count from the first row;
    key blocks from the first key. The lists hold no block twice.

    Attributes:
        count (Tensor): [B, H or 1, N] int32, blocks listed for each of the N = ceil((Q - tail) / q_block) query
            blocks; one list may serve all heads.
        index (Tensor): [B, H or 1, N, M] int32, their numbers in rising order; what is beyond `count` is arbitrary
            but a valid number.
        q_block (int): rows in a query block.
        k_block (int): keys in a key block; 1 lists single keys.
        queries (int): Q.
        keys (int): K.
        window (int): newest keys that a row always sees, itself included; 0 leaves everything to the lists.
        tail (int): last rows that see all keys up to themselves.
    """

    count: Tensor
    index: Tensor
    q_block: int
    k_block: int
    queries: int
    keys: int
    window: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        require(self.q_block >= 1, "q_block", ">= 1", self.q_block)
        require(self.k_block >= 1, "k_block", ">= 1", self.k_block)
        require(
            0 <= self.queries <= self.keys, "queries", f"in [0, {self.keys}] for so many keys", self.queries
        )
        require(self.window >= 0, "window", ">= 0", self.window)
        require(0 <= self.tail <= self.queries, "tail", f"in [0, {self.queries}]", self.tail)
        blocks = -(-(self.queries - self.tail) // self.q_block)
        wanted = f"[B, H, {blocks}] for {self.queries - self.tail} rows in blocks of {self.q_block}"
        require(
            self.count.dim() == 3 and self.count.shape[2] == blocks, "count", wanted, list(self.count.shape)
        )
        require(self.index.shape[:3] == self.count.shape, "index", f"{wanted} x M", list(self.index.shape))

    @property
    def offset(self) -> int:
        """Position of row 0."""
        return self.keys - self.queries

    @property
    def rows(self) -> int:
        """Rows that the lists speak of: all but the tail."""
        return self.queries - self.tail

    @property
    def listed(self) -> Tensor:
        """[B, H or 1, N, M] bool: which entries of `index` count."""
        places = torch.arange(self.index.shape[-1], device=self.index.device)
        return places < self.count.unsqueeze(-1)

    def visible(self, rows: Tensor | None = None) -> Tensor:
        """The keys that some rows see, [B, H or 1, R, K] bool.

        Args:
            rows (Tensor | None): [R] int64, rising numbers of rows; None takes all.
        """
        device = self.index.device
        rows = torch.arange(self.queries, device=device) if rows is None else rows
        place = (rows + self.offset).unsqueeze(-1)
        keys = torch.arange(self.keys, device=device)
        seen = (keys > place - self.window) | (rows >= self.rows).unsqueeze(-1)
        seen = seen.expand(*self.count.shape[:2], len(rows), self.keys)
        if self.index.shape[-1] and self.rows:
            block, of_row = (rows.clamp_max(self.rows - 1) // self.q_block).unique_consecutive(
                return_inverse=True
            )
            shape = (*self.count.shape[:2], len(block), -(-self.keys // self.k_block))
            kept = torch.zeros(shape, dtype=torch.int8, device=device)
            listed = self.listed[:, :, block].to(torch.int8)
            kept.scatter_reduce_(-1, self.index[:, :, block].long(), listed, "amax")
            listed = kept.bool()[:, :, of_row][..., keys // self.k_block]
            seen = seen | (listed & (rows < self.rows).unsqueeze(-1))
        return seen & (keys <= place)

    def pairs(self) -> Tensor:
        """[B, H or 1] float64: how many (query, key) pairs are seen."""
        device = self.index.device
        first = torch.arange(self.count.shape[2], device=device) * self.q_block
        last = (first + self.q_block).clamp_max(self.rows) - 1
        starts = self.index.double() * self.k_block
        width = (self.keys - starts).clamp(0, self.k_block)
        # a row at p sees min(width, p + 1 - window - start) keys of a block besides its window: summed over rows
        newest = last.view(-1, 1) + self.offset + 1 - self.window - starts
        oldest = first.view(-1, 1) + self.offset + 1 - self.window - starts
        listed = (_ramp(newest, width) - _ramp(oldest - 1, width)) * self.listed
        places = torch.arange(self.queries, device=device, dtype=torch.float64) + self.offset + 1
        own = places[: self.rows].clamp_max(self.window).sum() + places[self.rows :].sum()
        return listed.sum((-1, -2)) + own

    def share(self) -> Tensor:
        """[B, H or 1] float64 in [0, 1]: seen pairs of all pairs that causal attention has."""
        whole = self.queries * self.offset + self.queries * (self.queries + 1) / 2
        return self.pairs() / max(whole, 1.0)

    def coarser(self, k_block: int) -> KeyBlocks:
        """The same lists in larger key blocks, which hold what the small ones held and the keys between them.

        Args:
            k_block (int): a multiple of this one's.
        """
        require(
            k_block >= self.k_block and k_block % self.k_block == 0,
            "k_block",
            f"a multiple of {self.k_block}",
            k_block,
        )
        if k_block == self.k_block or not self.index.shape[-1]:
            return replace(self, k_block=k_block)
        beyond = -(-self.keys // k_block)
        index = torch.where(self.listed, self.index // (k_block // self.k_block), beyond)
        # rising already, so that equal numbers lie side by side
        again = torch.zeros_like(index, dtype=torch.bool)
        again[..., 1:] = index[..., 1:] == index[..., :-1]
        index = index.masked_fill(again, beyond).sort(-1).values
        count = (index < beyond).sum(-1).int()
        most = int(count.max()) if count.numel() else 0
        return replace(
            self, count=count, index=index[..., :most].clamp_max(beyond - 1).contiguous(), k_block=k_block
        )

    def to_mask(self) -> Tensor:
        """The lists as [B, H or 1, N, ceil(K / k_block)] bool."""
        shape = (*self.count.shape, -(-self.keys // self.k_block))
        kept = torch.zeros(shape, dtype=torch.int8, device=self.index.device)
        if self.index.shape[-1]:
            kept.scatter_reduce_(-1, self.index.long(), self.listed.to(torch.int8), "amax")
        return kept.bool()

    @staticmethod
    def from_mask(
        mask: Tensor,
        *,
        q_block: int,
        k_block: int,
        queries: int,
        keys: int,
        window: int = 0,
        tail: int = 0,
    ) -> KeyBlocks:
        """Lists from a map of blocks.

        Args:
            mask (Tensor): [B, H or 1, N, ceil(K / k_block)] bool; blocks wholly in a row's future may be set, they
                are never seen.
            q_block, k_block, queries, keys, window, tail (int): see the class.
        """
        blocks = -(-keys // k_block)
        require(
            mask.dim() == 4 and mask.shape[-1] == blocks, "mask", f"[B, H, N, {blocks}]", list(mask.shape)
        )
        count, index = lists(mask)
        return KeyBlocks(count, index, q_block, k_block, queries, keys, window, tail)

    @staticmethod
    def everything(
        queries: int, keys: int, *, batch: int = 1, device: torch.device | str | None = None
    ) -> KeyBlocks:
        """Causal attention to all keys."""
        count = torch.zeros(batch, 1, 0, dtype=torch.int32, device=device)
        index = torch.zeros(batch, 1, 0, 0, dtype=torch.int32, device=device)
        return KeyBlocks(count, index, 1, 1, queries, keys, tail=queries)


@dataclass(frozen=True)
class Split:
    """What all rows of a query block see of its list, and the stretch of keys around the diagonal that they do not.

    Attributes:
        full (Tensor): [B, H or 1, N] int64; so many entries of the list lie wholly before every row's window.
        edge (Tensor): [B, H or 1, N] int64, the first block of the stretch.
        near (Tensor): [B, H or 1, N] int64, blocks of the stretch up to the last row's own.
        member (Tensor): [B, H or 1, N, E] bool, which of the stretch's E blocks are listed.
        first (Tensor): [B, H or 1, N] int64, position of the first row.
    """

    full: Tensor
    edge: Tensor
    near: Tensor
    member: Tensor
    first: Tensor


def split(blocks: KeyBlocks) -> Split:
    """Divide lists so that only the stretch needs a mask; the blocks behind it are in every row's future."""
    size, keys_in = blocks.q_block, blocks.k_block
    first = torch.arange(blocks.count.shape[2], device=blocks.index.device) * size + blocks.offset
    first = first.expand(blocks.count.shape)
    before = (first - blocks.window + 1).clamp_min(0)
    index = blocks.index.long()
    full = (blocks.listed & ((index + 1) * keys_in <= before.unsqueeze(-1))).sum(-1)
    edge = before // keys_in
    span = max(0, (size + blocks.window - 1 + keys_in - 2) // keys_in + 1)
    slots = full.unsqueeze(-1) + torch.arange(span, device=index.device)
    member = torch.zeros(*full.shape, span + 1, dtype=torch.bool, device=index.device)
    if index.shape[-1]:
        held = index.gather(-1, slots.clamp_max(index.shape[-1] - 1)) - edge.unsqueeze(-1)
        # what is not listed, or lies behind the stretch, goes to a place that is cut off
        place = held.masked_fill((slots >= blocks.count.unsqueeze(-1)) | (held >= span), span)
        member.scatter_(-1, place, True)
    last = (first + size).clamp_max(blocks.keys) - 1
    near = (last // keys_in - edge + 1).clamp(0, span)
    return Split(full, edge, near, member[..., :span], first)


def lists(mask: Tensor) -> tuple[Tensor, Tensor]:
    """`count` [...] and `index` [..., M] int32 of a map [..., blocks] bool; M is the longest list."""
    count = mask.sum(-1, dtype=torch.int32)
    most = int(count.max()) if count.numel() else 0
    # set entries first, in order
    index = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :most]
    return count, index.int()


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """`count` and `index` of consecutive query blocks put together, [B, H, N] and [B, H, N, M].

    Args:
        parts (Sequence): of (count, index), which may differ in M.
    """
    most = max(index.shape[-1] for _, index in parts)
    padded = [torch.nn.functional.pad(index, (0, most - index.shape[-1])) for _, index in parts]
    return torch.cat([count for count, _ in parts], 2), torch.cat(padded, 2)


def _ramp(last: Tensor, width: Tensor) -> Tensor:
    """Sum of min(x, width) over x = 1 .. last; 0 where last < 1."""
    last = last.clamp_min(0)
    low = torch.minimum(last, width)
    return low * (low + 1) / 2 + (last - low) * width
