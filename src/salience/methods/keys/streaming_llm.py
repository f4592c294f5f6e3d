"""StreamingLLM: every token sees the first few tokens and the newest ones, whatever they hold.

Scored: nothing; key j is seen from position i iff `j < sinks` or `i - j < window`, in every layer and head.
Spent: `sinks + window` keys a token, so time and memory grow with the length alone.

Paper: arXiv 2309.17453. Official code: mit-han-lab/streaming-llm.

Differs from the official code in:
- it reads a whole prompt with this mask, at the tokens' own positions. The official code evicts keys from a cache
  while single tokens come in, and counts positions anew inside the cache;
- the cache keeps all keys and new tokens see all of them, as the other methods on key blocks decode; `decode=True`
  gives new tokens the same sinks and window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.prefill import Prompt, prefill
from salience.kernels import KeyBlocks


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Read a prompt through attention sinks and a sliding window.

    Attributes:
        sinks (int): first tokens that every token sees, >= 0. The official default is 4.
        window (int): newest tokens that every token sees, itself included, >= 1. The official default is 512.
        q_block (int): queries that are computed together; changes speed alone.
        decode (bool): whether new tokens see sinks and window alone, too.
    """

    unit: ClassVar[str] = "key"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2309.17453"
    title: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks"

    sinks: int = 4
    window: int = 512
    q_block: int = 64
    decode: bool = False

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("q_block", 1)):
            value = getattr(self, name)
            require(type(value) is int and value >= least, name, f"an integer >= {least}", value)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Every layer sees the same keys; nothing is computed to choose them."""
        return prefill(model, record, self.choose, decodes=self.decode)

    def choose(self, prompt: Prompt) -> KeyBlocks:
        """The lists of one layer."""
        queries, keys = prompt.query.shape[2], prompt.key.shape[2]
        return spend(
            queries,
            keys,
            sinks=self.sinks,
            window=self.window,
            q_block=self.q_block,
            batch=len(prompt.query),
            device=prompt.query.device,
        )


def spend(
    queries: int,
    keys: int,
    *,
    sinks: int,
    window: int,
    q_block: int = 64,
    batch: int = 1,
    device: torch.device | str | None = None,
) -> KeyBlocks:
    """Key j is seen from position i iff `j < sinks` or `i - j < window`.

    Args:
        queries (int): Q.
        keys (int): K >= Q.
        sinks (int): first keys that all rows see.
        window (int): newest keys that a row sees.
        q_block (int): rows in a block.
        batch (int): B.
        device (torch.device | str | None): of the lists.

    Returns:
        KeyBlocks: [B, 1, N] lists of single keys, the sinks, and the window.
    """
    blocks, listed = -(-queries // q_block), min(sinks, keys)
    count = torch.full((batch, 1, blocks), listed, dtype=torch.int32, device=device)
    index = torch.arange(listed, dtype=torch.int32, device=device).expand(batch, 1, blocks, -1)
    return KeyBlocks(count, index, q_block, 1, queries, keys, window=window)
