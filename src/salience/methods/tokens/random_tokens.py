"""Random tokens: the baseline of every method on image tokens, which drops as many of them without looking.

Scored: the image tokens of each prompt, by draws from [0, 1).
Spent: `floor(r_s n)` of the prompt's n image tokens go on after stage s; text always does. A prompt is drawn for
once, so kept sets are nested. The i-th image token of every row has the same draw, so beams of a prompt agree and a
row of a batch is treated as it would be alone; the next prompt is drawn for anew.

A baseline, from no paper; there is no official code.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.choices import Choice, Decide, View, floor_share, keep_best
from salience.hosts.pruning import Pruning, prune

_POSITIONS = ("auto", "renumber", "keep")
_SEEDS = 1 << 62


@dataclass(frozen=True, kw_only=True)
class RandomTokens(Method):
    """Drop image tokens at random: the baseline that a method has to beat.

    Attributes:
        ratios (tuple[float, ...]): share of the prompt's image tokens that goes on after each stage, falling, in
            [0, 1]; 0 drops them all.
        layers (tuple[int, ...]): the first layer of each stage, rising, in [0, L - 1]; 0 drops in front of the
            decoder.
        positions (str): of the survivors: "renumber" counts them anew, "keep" leaves them, "auto" renumbers unless
            positions have several axes.
        seed (int): of the draws, >= 0.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Random image tokens"

    ratios: tuple[float, ...] = (0.5,)
    layers: tuple[int, ...] = (2,)
    positions: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        falling = all(a >= b for a, b in itertools.pairwise(self.ratios))
        inside = all(0.0 <= ratio <= 1.0 for ratio in self.ratios)
        require(bool(self.ratios) and inside and falling, "ratios", "in [0, 1] and not rising", self.ratios)
        rising = all(a < b for a, b in itertools.pairwise(self.layers))
        require(rising and min(self.layers, default=0) >= 0, "layers", "rising and >= 0", self.layers)
        same = len(self.layers) == len(self.ratios)
        require(same, "layers", f"one for each of the {len(self.ratios)} ratios", self.layers)
        require(self.positions in _POSITIONS, "positions", f"one of {', '.join(_POSITIONS)}", self.positions)
        require(type(self.seed) is int and self.seed >= 0, "seed", "an integer >= 0", self.seed)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens leave the decoder in front of `layers` whenever the model reads a prompt."""
        return prune(model, record, self._stages, positions=self.positions)

    def _stages(self, part: Pruning) -> dict[int, Decide]:
        generator = torch.Generator().manual_seed(self.seed)
        scores = torch.empty(0)

        def decide(view: View, ratio: float) -> Choice:
            nonlocal scores
            if view.layer == self.layers[0]:  # nothing has left yet: a new prompt
                # one number moves the generator on, however many tokens the prompt has
                prompt = int(torch.randint(_SEEDS, (), generator=generator))
                scores = score(view.vision, torch.Generator().manual_seed(prompt))
            return keep_best(view, scores.gather(1, view.source), spend(view.count, ratio))

        def stage(ratio: float) -> Decide:
            return lambda view: decide(view, ratio)

        return {layer: stage(ratio) for layer, ratio in zip(self.layers, self.ratios, strict=True)}


def score(vision: Tensor, generator: torch.Generator) -> Tensor:
    """The i-th image token of each row gets the i-th draw.

    Args:
        vision (Tensor): [B, S] bool, image tokens.
        generator (torch.Generator): on the CPU, so that all devices draw alike.

    Returns:
        Tensor: [B, S] float32 in [0, 1), 0 for text.
    """
    draws = torch.rand(vision.shape[1], generator=generator).to(vision.device)
    rank = (vision.cumsum(-1) - 1).clamp_min(0)
    return draws[rank].masked_fill(~vision, 0.0)


def spend(count: Tensor, ratio: float) -> Tensor:
    """`n_s = floor(r_s n)` for each row: [B] of the prompt's image tokens [B]."""
    return floor_share(count, ratio)
