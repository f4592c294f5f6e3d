"""What was kept of the keys of a prompt, in numbers that stay small: shares, sampled recall, a map of each head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from salience.hosts.prompts import Prompt
from salience.kernels import KeyBlocks

# sampled rows of a prompt, and columns that their keys are drawn in
ROWS, COLUMNS = 48, 96
# logits of sampled rows held at a time, in elements: 16 MiB in fp32
_ELEMENTS = 1 << 22


@dataclass
class LayerRecord:
    """What one layer attended to while the newest prompt was read.

    Attributes:
        layer (int): its number.
        kernel (str): which kernel attended; "dense" where all keys were.
        pairs (Tensor): [H] float64, (query, key) pairs that were seen, over samples and chunks of the prompt.
        whole (float): pairs of causal attention.
        recall (Tensor): [H] share of the true attention of sampled rows that fell on seen keys.
        map (Tensor): [H, R, C] share of the seen keys among those in a cell's past, of sampled rows; NaN in the
            future.
        choosing (float): seconds in choosing keys.
        attending (float): seconds in attending to them.
    """

    layer: int
    kernel: str = ""
    pairs: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    whole: float = 0.0
    recall: Tensor = field(default_factory=lambda: torch.zeros(1))
    map: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1))
    choosing: float = 0.0
    attending: float = 0.0

    @property
    def share(self) -> Tensor:
        """[H] seen pairs of all pairs."""
        return self.pairs / max(self.whole, 1.0)

    def add(
        self,
        *,
        kernel: str,
        pairs: Tensor,
        whole: float,
        recall: Tensor | None,
        map: Tensor | None,
        choosing: float,
        attending: float,
    ) -> None:
        """Count another sample or chunk of the prompt; recall is weighted by pairs, the map is the newest."""
        before = self.whole
        if recall is not None:
            self.recall = (before * self.recall + whole * recall.cpu()) / max(before + whole, 1.0)
        self.map = self.map if map is None else map
        self.kernel, self.whole = kernel, before + whole
        self.pairs = self.pairs + pairs.cpu()
        self.choosing, self.attending = self.choosing + choosing, self.attending + attending


@torch.no_grad()
def sampled(prompt: Prompt, blocks: KeyBlocks | None) -> tuple[Tensor, Tensor]:
    """Recall of each head, averaged over samples, and the first sample's map, from evenly spaced rows.

    Args:
        prompt (Prompt): what the layer asked.
        blocks (KeyBlocks | None): what it was given; None is everything.

    Returns:
        tuple: recall [H] fp32; map [H, R, C] fp16.
    """
    query, key = prompt.query, prompt.key
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1:3]
    rows = torch.linspace(0, length - 1, min(ROWS, length), device=query.device).round().long()
    columns = min(COLUMNS, keys)
    cell = torch.arange(keys, device=query.device) * columns // keys
    held = KeyBlocks.everything(length, keys, batch=batch, device=query.device) if blocks is None else blocks
    step = max(1, _ELEMENTS // (batch * heads * keys))
    recalled, maps = [], []
    for some in rows.split(step):
        seen = held.visible(some)
        past = torch.arange(keys, device=query.device) <= (some + keys - length).unsqueeze(-1)
        counted = torch.stack((seen[0].expand(heads, -1, -1), past.expand(heads, -1, -1))).float()
        cells = counted.new_zeros(2, heads, len(some), columns).index_add_(-1, cell, counted)
        maps.append((cells[0] / cells[1]).half())
        if blocks is None:
            continue
        asked = query[:, :, some].float().reshape(batch, groups, -1, width)
        logits = (asked @ key.float().transpose(-1, -2)).view(batch, heads, len(some), keys) * prompt.scaling
        if prompt.softcap is not None:
            logits = prompt.softcap * torch.tanh(logits / prompt.softcap)
        share = logits.masked_fill(~past, -torch.inf).softmax(-1)
        recalled.append((share * seen).sum(-1))
    recall = torch.cat(recalled, -1).mean((0, 2)) if recalled else query.new_ones(heads, dtype=torch.float32)
    return recall, torch.cat(maps, 1).cpu()
