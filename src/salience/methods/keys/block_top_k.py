"""Block top-k: each block of queries sees the key blocks whose mean key is closest to its mean query.

Scored: key block b for query block i, for each head, by `s = d^-1/2 mean(q in i) . mean(k in b)`.
Spent: of the blocks that lie wholly before the query block, the `keep` share with the highest scores; the first block
(which holds the attention sinks) and the blocks around the diagonal are always seen. It is the block-sparse pattern
of MInference with a share of the past in the place of a fixed number of blocks, and what simple sparse attention
does: one key that matters drowns in the mean of its block.

Paper: the block-sparse pattern of arXiv 2407.02490. Official code: microsoft/MInference.

Differs from the official code in:
- `keep` is a share of each query block's past or a number of blocks (official: 100 blocks), and the first and the
  newest blocks do not count, so that no row is left without a key;
- any block sizes, grouped heads without repeated keys, padding, batches and chunks of a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from salience.core.attach import Attachment
from salience.core.budget import check_keep
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.prefill import Prompt, prefill
from salience.kernels import KeyBlocks
from salience.kernels.blocks import joined, lists

# query blocks that are scored at a time
_SLICE = 256


@dataclass(frozen=True, kw_only=True)
class BlockTopK(Method):
    """See the key blocks that are closest on average.

    Attributes:
        keep (int | float): share of the key blocks wholly before a query block, in (0, 1], or a count, >= 1.
        q_block (int): queries in a block.
        k_block (int): keys in a block.
    """

    unit: ClassVar[str] = "key"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2407.02490"
    title: ClassVar[str] = (
        "MInference 1.0: Accelerating Pre-filling for Long-Context LLMs via Dynamic Sparse Attention"
    )

    keep: int | float = 0.1
    q_block: int = 64
    k_block: int = 64

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name in ("q_block", "k_block"):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, name, "an integer >= 1", value)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Every layer and head chooses for itself while a prompt is read; new tokens see everything."""
        return prefill(model, record, self.choose)

    def choose(self, prompt: Prompt) -> KeyBlocks:
        """The lists of one layer."""
        return spend(prompt.query, prompt.key, keep=self.keep, q_block=self.q_block, k_block=self.k_block)


def score(query: Tensor, key: Tensor, *, q_block: int, k_block: int) -> tuple[Tensor, Tensor]:
    """Mean query of each query block, and mean key of each key block; a shorter last block is averaged over itself.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        q_block (int): queries in a block.
        k_block (int): keys in a block.

    Returns:
        tuple: [B, H, N, D] and [B, Hkv, M, D], at least fp32; their products times D^-1/2 are the scores.
    """
    return _means(query, q_block) * query.shape[-1] ** -0.5, _means(key, k_block)


def spend(query: Tensor, key: Tensor, *, keep: int | float, q_block: int, k_block: int) -> KeyBlocks:
    """The first block, the `keep` best of those before the query block, and those that overlap or touch it.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D]; row r stands at position K - Q + r.
        keep (int | float): share, rounded up, or count of blocks.
        q_block (int): queries in a block.
        k_block (int): keys in a block.

    Returns:
        KeyBlocks: [B, H, N] lists.
    """
    queries, keys = query.shape[2], key.shape[2]
    asked, held = score(query, key, q_block=q_block, k_block=k_block)
    batch, heads, blocks = asked.shape[:3]
    groups, total = held.shape[1:3]
    place = torch.arange(total, device=query.device)
    parts = []
    for start in range(0, blocks, _SLICE):
        rows = asked[:, :, start : start + _SLICE]
        scores = (rows.reshape(batch, groups, -1, rows.shape[-1]) @ held.transpose(-1, -2)).view(
            batch, heads, rows.shape[2], total
        )
        # blocks before the one that holds the first row's key lie wholly in the past of all rows
        first = torch.arange(start, start + rows.shape[2], device=query.device) * q_block + keys - queries
        past = (first // k_block).unsqueeze(-1)
        wanted = past.clamp_max(keep) if isinstance(keep, int) else (past * keep - 1e-9).ceil()
        scores = scores.masked_fill((place >= past) | (place == 0), -torch.inf)
        ranks = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        best = (ranks < wanted) & (place < past)
        last = ((first + q_block - 1) // k_block).unsqueeze(-1)
        near = (place >= past) & (place <= last)
        parts.append(lists(best | near | (place == 0)))
    count, index = joined(parts)
    return KeyBlocks(count, index, q_block, k_block, queries, keys)


def _means(states: Tensor, size: int) -> Tensor:
    batch, heads, length, width = states.shape
    precise = states.to(torch.promote_types(states.dtype, torch.float32))
    sums = pad(precise, (0, 0, 0, -length % size)).view(batch, heads, -1, size, width).sum(3)
    counts = (length - torch.arange(sums.shape[2], device=states.device) * size).clamp_max(size)
    return sums / counts.unsqueeze(-1)
