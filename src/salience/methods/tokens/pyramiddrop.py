"""PyramidDrop: the deeper the decoder, the fewer image tokens it needs; drop the least asked-for ones in stages.

Scored: the image tokens of each prompt, by the attention that the last token of the instruction pays them, averaged
over heads, with the norm, queries and keys of the layer in front of which the stage ends.
Spent: `n_s = floor(r_s n)` of the prompt's n image tokens go on after stage s; text always does. Ratios are relative
to the full number, so kept sets are nested. Works while answering and while training, where the queries are the last
tokens in front of every answer (so that a chat of several turns is ranked by all its questions).

Paper: arXiv 2410.17247. Official code: Cooperx521/PyramidDrop (6444f304aee4).

Differs from the official code in:
- any transformers model: grouped key heads, left padding, eager, SDPA and flex attention, batches of different image
  counts; the official one fails on the first two, on eager, and on SDPA with padding;
- several images of a prompt are ranked together (the paper does not say);
- of equal scores the token to the left is kept;
- only the asked rows of the attention are computed;
- nothing is cut to the tokenizer's longest length after a drop;
- positions of models with several position axes (M-RoPE) are kept, all others are numbered anew as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.hosts.attention import AttentionCall, received
from salience.hosts.choices import Choice, Decide, View, equal_stages, floor_share, keep_best, questions
from salience.hosts.pruning import Pruning, prune

_POSITIONS = ("auto", "renumber", "keep")


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Method):
    """Drop the image tokens that the question does not attend to, in stages, while answering or training.

    Attributes:
        ratios (tuple[float, ...]): share of the prompt's image tokens that goes on after each stage, falling, in
            [0, 1]; 0 drops them all.
        layers (tuple[int, ...] | None): the first layer of each later stage, rising, in [1, L - 1]; None cuts the
            decoder into equal stages (8, 16, 24 of 32).
        query (tuple[int, ...]): which tokens ask, counted from the end of the prompt: -1 is the last. In training the
            tokens in front of each answer ask, whatever this says.
        positions (str): of the survivors: "renumber" counts them anew, "keep" leaves them, "auto" renumbers unless
            positions have several axes.
        min_tokens (int): never fewer image tokens than this, >= 0.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2410.17247"
    title: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction"
    )

    ratios: tuple[float, ...] = (0.5, 0.25, 0.125)
    layers: tuple[int, ...] | None = None
    query: tuple[int, ...] = (-1,)
    positions: str = "auto"
    min_tokens: int = 0

    def __post_init__(self) -> None:
        falling = all(a >= b for a, b in zip(self.ratios, self.ratios[1:], strict=False))
        inside = all(0.0 <= ratio <= 1.0 for ratio in self.ratios)
        require(bool(self.ratios) and inside and falling, "ratios", "in [0, 1] and not rising", self.ratios)
        if self.layers is not None:
            rising = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
            require(rising and min(self.layers, default=1) >= 1, "layers", "rising and >= 1", self.layers)
            same = len(self.layers) == len(self.ratios)
            require(same, "layers", f"one for each of the {len(self.ratios)} ratios", self.layers)
        negative = bool(self.query) and all(place < 0 for place in self.query)
        require(negative, "query", "negative places from the end", self.query)
        require(self.positions in _POSITIONS, "positions", f"one of {', '.join(_POSITIONS)}", self.positions)
        require(self.min_tokens >= 0, "min_tokens", ">= 0", self.min_tokens)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens leave the decoder in front of `layers` whenever the model reads a prompt."""
        return prune(model, record, self._stages, positions=self.positions)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """The same in training steps and in evaluation."""
        return prune(site.model, record, self._stages, positions=self.positions)

    def _stages(self, part: Pruning) -> dict[int, Decide]:
        layers = self.layers or equal_stages(len(part.found.layers), len(self.ratios), name="ratios")
        return {layer: self._decide(ratio) for layer, ratio in zip(layers, self.ratios, strict=True)}

    def _decide(self, ratio: float) -> Decide:
        def decide(view: View) -> Choice:
            rows = questions(view) if view.labels is not None else asked(view, self.query)
            scores = score(view.attention(), rows, view.valid)
            return keep_best(view, scores, spend(view.count, ratio, self.min_tokens))

        return decide


def asked(view: View, query: tuple[int, ...]) -> Tensor:
    """[B, S] bool: the tokens at these places from the end of each row."""
    behind = view.valid.sum(-1, keepdim=True) - view.valid.cumsum(-1)  # tokens behind each
    rows = torch.zeros_like(view.valid)
    for place in query:
        rows |= view.valid & (behind == -place - 1)
    return rows


def score(call: AttentionCall, rows: Tensor, valid: Tensor) -> Tensor:
    """`s_j = mean_t mean_h softmax_j(q_t k_j / sqrt(d))` over the asking tokens t.

    Args:
        call (AttentionCall): queries and keys of the next stage's first layer.
        rows (Tensor): [B, S] bool, the tokens that ask.
        valid (Tensor): [B, S] bool, no padding.

    Returns:
        Tensor: [B, S], at least fp32.
    """
    return received(call, rows, valid)


def spend(count: Tensor, ratio: float, min_tokens: int = 0) -> Tensor:
    """`n_s = floor(r_s n)` for each row: [B] of the prompt's image tokens [B]."""
    return torch.maximum(floor_share(count, ratio), count.clamp_max(min_tokens))
