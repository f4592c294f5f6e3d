"""Dense attention: every token sees all tokens before it, counted and drawn as the methods that choose are.

Scored and spent: nothing. It is what the others are compared with: torch's scaled_dot_product_attention in the same
place, with the same masks, so that only the choice of keys differs. Memory grows with the length alone.

Paper and official code: none; a baseline.
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
class DenseAttention(Method):
    """See everything: the baseline of the methods on key blocks.

    Attributes:
        listed (bool): attend through lists that hold every block, as the other methods' kernels do, instead of
            torch's dense attention: the overhead of the kernels.
        block (int): queries and keys in a block of such lists.
    """

    unit: ClassVar[str] = "key"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = ""

    listed: bool = False
    block: int = 64

    def __post_init__(self) -> None:
        require(type(self.block) is int and self.block >= 1, "block", "an integer >= 1", self.block)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Every layer sees everything."""
        return prefill(model, record, self.choose)

    def choose(self, prompt: Prompt) -> KeyBlocks | None:
        """The lists of one layer, if there are to be any."""
        return spend(prompt, self.block) if self.listed else None


def spend(prompt: Prompt, block: int) -> KeyBlocks:
    """Lists of all key blocks up to each query block's last row."""
    queries, keys = prompt.query.shape[2], prompt.key.shape[2]
    rows, total = -(-queries // block), -(-keys // block)
    last = (torch.arange(1, rows + 1) * block + keys - queries - 1).clamp_max(keys - 1) // block
    index = torch.arange(total, dtype=torch.int32).expand(len(prompt.query), 1, rows, -1)
    count = (last + 1).int().expand(len(prompt.query), 1, -1)
    device = prompt.query.device
    return KeyBlocks(count.to(device), index.to(device), block, block, queries, keys)
