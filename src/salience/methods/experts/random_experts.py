"""Random experts: the baseline of every method on experts, which keeps as many of them without looking.

Scored: the routed experts of each layer, by draws from [0, 1), each layer by its own.
Spent: the best `keep` of each layer stay, as many in every layer, and the router chooses among them.

A baseline, from no paper; there is no official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.core.selection import generator
from salience.hosts.experts import check_cut, cut_unseen


@dataclass(frozen=True, kw_only=True)
class RandomExperts(Method):
    """Keep experts of a mixture at random: the baseline that a method has to beat.

    Attributes:
        keep (int | float): experts of each layer that stay: a share in (0, 1], rounded up, or a count, at least as
            many as a token is sent to.
        mode (str): "prune" cuts at once; "mask" leaves the expert tensors whole until `finish` or `save`.
        seed (int): of the draws, >= 0.
    """

    unit: ClassVar[str] = "expert"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "shrink"
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Random experts"
    cuts: ClassVar[bool] = True

    keep: int | float = 0.5
    mode: str = "prune"
    seed: int = 0

    def __post_init__(self) -> None:
        check_cut(self.keep, self.mode)
        require(type(self.seed) is int and self.seed >= 0, "seed", "an integer >= 0", self.seed)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """All but the drawn experts of each layer leave the model; `data` is not read."""
        return cut_unseen(
            model,
            record,
            lambda layers, experts: score(layers, experts, self.seed),
            keep=self.keep,
            mode=self.mode,
        )


def score(layers: int, experts: int, seed: int) -> Tensor:
    """Draws [L, E] fp64 in [0, 1), the same on every rank."""
    return torch.rand(layers, experts, dtype=torch.float64, generator=generator(seed))
