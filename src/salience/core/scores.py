"""What several methods do with scores: scaling inside a masked row, and keeping a history to draw."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def masked_min_max(values: Tensor, mask: Tensor, eps: float) -> Tensor:
    """Scale each row to [0, 1] by the minimum and maximum of its unmasked entries.

    `(v - min) / (max - min + eps)`; masked entries and rows without an unmasked entry give 0.

    Args:
        values (Tensor): [B, N] float.
        mask (Tensor): [B, N] bool, the entries that take part.
        eps (float): > 0, keeps rows of equal values finite (they give 0).

    Returns:
        Tensor: [B, N], dtype of `values`.
    """
    low = values.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = values.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return torch.where(mask, (values - low) / (high - low + eps), torch.zeros_like(values))


@dataclass
class History:
    """Scores of the same units over time: one row for each recorded step. Drawn as a map, units x time."""

    steps: list[int] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, step: int, row: Tensor) -> None:
        """Record `row` [U] (any dtype; kept as fp32 on the CPU) at `step`."""
        self.steps.append(step)
        self.rows.append(row.detach().float().cpu().clone())

    def values(self) -> Tensor:
        """[T, U] fp32, T = number of recorded steps (0 rows when nothing was recorded)."""
        return torch.stack(self.rows) if self.rows else torch.empty(0, 0)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint; `load` is the inverse."""
        return {"steps": torch.tensor(self.steps, dtype=torch.int64), "values": self.values()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Replace the content by what `state` returned."""
        self.steps = [int(step) for step in state["steps"]]
        self.rows = list(state["values"].clone()) if self.steps else []
