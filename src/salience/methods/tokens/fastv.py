"""FastV: after the second layer, drop half of the image tokens: those that the last token does not attend to.

Scored: the image tokens of each prompt, by the attention that the last token of the prompt pays them in layer K - 1,
averaged over heads; it is that layer's own attention, so nothing is projected a second time.
Spent: `floor(keep n)` of the prompt's n image tokens go on, once, from layer K on; text always does. Survivors keep
their positions.

Paper: arXiv 2403.06764. Official code: pkunlp-icler/FastV.

Differs from the official code in:
- any transformers model, batches, several images, padding, and SDPA or flash attention: one row of the attention is
  computed from the layer's queries and keys, where the official code runs that layer with its whole attention map;
- the prompt is ranked once, with a cache and without, and never again at each new token;
- the paper speaks of the attention from all tokens, its code takes the last token's: `query="all"` and "last";
- of equal scores the token to the left is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.budget import check_keep
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.attention import AttentionCall, received
from salience.hosts.choices import Choice, Decide, View, floor_share, keep_best, questions
from salience.hosts.pruning import Pruning, prune

_POSITIONS = ("auto", "renumber", "keep")
_QUERIES = ("last", "all")


@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """Drop, once and early, the image tokens that the last token of the prompt does not attend to.

    Attributes:
        keep (int | float): share of the prompt's image tokens that goes on, in (0, 1], or a count, >= 1. The paper's
            R is the share that is dropped.
        layer (int): the first layer without the others, in [1, L - 1]; the one before it scores. The paper's K.
        query (str): who asks: "last", the last token of the prompt, or "all", every token, averaged.
        positions (str): of the survivors: "keep" leaves them, "renumber" counts them anew, "auto" renumbers unless
            positions have several axes.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2403.06764"
    title: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models"
    )

    keep: int | float = 0.5
    layer: int = 2
    query: str = "last"
    positions: str = "keep"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(type(self.layer) is int and self.layer >= 1, "layer", "an integer >= 1", self.layer)
        require(self.query in _QUERIES, "query", f"one of {', '.join(_QUERIES)}", self.query)
        require(self.positions in _POSITIONS, "positions", f"one of {', '.join(_POSITIONS)}", self.positions)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens leave the decoder in front of `layer` whenever the model reads a prompt."""

        def stages(part: Pruning) -> dict[int, Decide]:
            depth = len(part.found.layers)
            wanted = f"in [1, {depth - 1}] for {depth} layers of {part.found.name}"
            require(self.layer < depth, "layer", wanted, self.layer)
            seen: list[AttentionCall] = []

            def see(call: AttentionCall) -> None:
                seen[:] = [call]

            part.watch(self.layer - 1, record, see)

            def decide(view: View) -> Choice:
                rows = questions(view) if self.query == "last" else view.valid
                scores = score(seen.pop(), rows, view.valid)
                return keep_best(view, scores, spend(view.count, self.keep))

            return {self.layer: decide}

        return prune(model, record, stages, positions=self.positions)


def score(call: AttentionCall, rows: Tensor, valid: Tensor) -> Tensor:
    """`s_j = mean_t mean_h softmax_j(q_t k_j / sqrt(d))` over the asking tokens t.

    Args:
        call (AttentionCall): queries and keys of the layer that ran last.
        rows (Tensor): [B, S] bool, the tokens that ask.
        valid (Tensor): [B, S] bool, no padding.

    Returns:
        Tensor: [B, S], at least fp32.
    """
    return received(call, rows, valid)


def spend(count: Tensor, keep: int | float) -> Tensor:
    """How many of [B] image tokens go on in each row: `floor(keep n)` of a share, at most all of a count."""
    if isinstance(keep, int):
        return count.clamp_max(keep)
    return floor_share(count, keep)
