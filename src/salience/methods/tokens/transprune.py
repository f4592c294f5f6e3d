"""TransPrune: an image token that the decoder's modules still change is one that they work on; keep those.

Scored: the image tokens of each prompt, by two sums. Token transition: for each attention and each feed-forward
module of a band of layers, `m_j w_j` with `m = |a| / |b|` of the module's output a before the residual and its input
b, and w a softmax over image tokens of the turn `1 - |cos(a, b)|`. Guidance: the attention that the text behind the
image pays to the token in the layer that runs next, averaged over heads and over that text. Each is divided by its
sum over the image tokens present: `s = alpha transition + (1 - alpha) guidance`.
Spent: `n_s = floor(r_s n)` of the prompt's n image tokens go on after stage s; text always does. Ratios are relative
to the full number, so kept sets are nested. No attention map is asked for.

Paper: arXiv 2507.20630. Official code: liaolea/TransPrune (c9e8284f5808).

Differs from the official code in:
- the turn is the paper's, `1 - |cos|`; the code has `1 - cos` (`direction="signed"`), which reverses the order of
  tokens that a module adds to or takes from;
- the softmax runs over the image tokens of one prompt, as in the paper; the code's runs over everything in the batch
  (`softmax_over="all"`), so that the weight of a layer, and another prompt's tokens, depend on the batch. That one
  leaves padding out here;
- batches, padding, grouped key heads, several images (guided by the text behind the last one), SDPA and flash;
- without text behind the image the transition decides alone, where the code has no number;
- where a norm follows a module inside its branch (GLM-4V), a is what that norm gives, which is what is added;
- of equal scores the token to the left is kept; positions of models with several position axes (M-RoPE) are kept.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.losses import IGNORE
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.attention import received
from salience.hosts.branches import follow
from salience.hosts.choices import Choice, Decide, View, floor_share, keep_best
from salience.hosts.pruning import Pruning, prune

_POSITIONS = ("auto", "renumber", "keep")
_DIRECTIONS = ("abs", "signed")
_SOFTMAX = ("image", "all")
_TRANSITIONS = ("both", "length", "turn")
# layers of 32 after which the paper prunes
_PRUNE, _DEPTH = (7, 9, 12), 32


@dataclass(frozen=True, kw_only=True)
class TransPrune(Method):
    """Keep the image tokens that a band of middle layers changes most and that the question attends to, in stages.

    Attributes:
        ratios (tuple[float, ...]): share of the prompt's image tokens that goes on after each stage, falling, in
            [0, 1].
        prune (tuple[int, ...] | None): after how many layers each stage ends, rising, in [1, L - 1]; None takes the
            paper's 7, 9 and 12 of 32 in proportion.
        accumulate (tuple[int, ...] | None): the layers whose transitions add up, counted from 1 (layer 7 is the
            seventh), rising, each stage's last layer among them and none behind the last stage; None takes all from
            the first stage's last to the last stage's (the paper's 7 to 12).
        alpha (float): weight of the transition against the guidance, in [0, 1].
        direction (str): of the turn: "abs" for `1 - |cos|`, "signed" for `1 - cos`.
        softmax_over (str): "image", the image tokens of each prompt, or "all", every token of the batch.
        transition (str): "both", or for comparison its "length" ratio or the softmax of its "turn" alone.
        positions (str): of the survivors: "renumber" counts them anew, "keep" leaves them, "auto" renumbers unless
            positions have several axes.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2507.20630"
    title: ClassVar[str] = "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model"

    ratios: tuple[float, ...] = (0.875, 0.625, 0.125)
    prune: tuple[int, ...] | None = None
    accumulate: tuple[int, ...] | None = None
    alpha: float = 0.5
    direction: str = "abs"
    softmax_over: str = "image"
    transition: str = "both"
    positions: str = "auto"

    def __post_init__(self) -> None:
        falling = all(a >= b for a, b in itertools.pairwise(self.ratios))
        inside = all(0.0 <= ratio <= 1.0 for ratio in self.ratios)
        require(bool(self.ratios) and inside and falling, "ratios", "in [0, 1] and not rising", self.ratios)
        if self.prune is not None:
            require(_rising(self.prune), "prune", "rising and >= 1", self.prune)
        same = len(_PRUNE if self.prune is None else self.prune) == len(self.ratios)
        require(same, "prune", f"one for each of the {len(self.ratios)} ratios", self.prune)
        if self.accumulate is not None:
            require(_rising(self.accumulate), "accumulate", "rising and >= 1", self.accumulate)
            if self.prune is not None:
                _fits(self.accumulate, self.prune)
        require(0.0 <= self.alpha <= 1.0, "alpha", "in [0, 1]", self.alpha)
        for name, allowed in (
            ("direction", _DIRECTIONS),
            ("softmax_over", _SOFTMAX),
            ("transition", _TRANSITIONS),
            ("positions", _POSITIONS),
        ):
            value = getattr(self, name)
            require(value in allowed, name, f"one of {', '.join(allowed)}", value)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens leave the decoder after `prune` layers whenever the model reads a prompt."""
        return prune(model, record, functools.partial(self._stages, record), positions=self.positions)

    def plan(self, depth: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(accumulating layers, counted from 1; pruning stages) in a decoder of so many layers.

        Raises:
            ParameterError: if they do not fit into it or each other.
        """
        stages = scaled(depth) if self.prune is None else self.prune
        require(stages[-1] < depth, "prune", f"in [1, {depth - 1}] for a decoder of {depth} layers", stages)
        layers = self.accumulate or tuple(range(stages[0], stages[-1] + 1))
        _fits(layers, stages)
        return layers, stages

    def _stages(self, record: Attachment, part: Pruning) -> dict[int, Decide]:
        layers, stages = self.plan(len(part.found.layers))
        run = _Run(self, part)
        followed = [part.found.layers[number - 1] for number in layers]
        # the layer's own hooks: asking it for queries and keys does not run them
        record.hook(followed[0].module.register_forward_pre_hook(run.start))
        for layer in followed:
            follow(layer, record, run.see)
        return {
            layer: functools.partial(run.decide, ratio)
            for layer, ratio in zip(stages, self.ratios, strict=True)
        }


class _Run:
    """What the layers of one attached method have added up for the prompt that is read."""

    def __init__(self, method: TransPrune, part: Pruning) -> None:
        self._method, self._part = method, part
        self._sum: Tensor | None = None

    def start(self, module: nn.Module, args: Any) -> None:
        self._sum = None

    def see(self, before: Tensor, after: Tensor) -> None:
        """Add what one module did to the tokens present, by their place in the prompt."""
        if not self._part.reading:
            return
        valid, vision, source = self._part.places
        method = self._method
        own = transition(
            before,
            after,
            vision if method.softmax_over == "image" else valid,
            direction=method.direction,
            together=method.softmax_over == "all",
            factors=method.transition,
        )
        if self._sum is None:
            self._sum = torch.zeros_like(own)
        # padding repeats places of other tokens and adds nothing
        self._sum.scatter_add_(1, source, own)

    def decide(self, ratio: float, view: View) -> Choice:
        assert self._sum is not None  # a stage's last layer accumulates
        moved = self._sum.gather(1, view.source)
        rows = view.behind()
        if view.labels is not None:
            rows &= view.labels == IGNORE  # answers do not ask
        guided = torch.zeros_like(moved)
        if self._method.alpha < 1.0 and bool(rows.any()):
            guided = received(view.attention(), rows, view.valid).to(moved)
        scores = score(moved, guided, view.vision, self._method.alpha)
        return keep_best(view, scores, spend(view.count, ratio))


@torch.no_grad()
def transition(
    before: Tensor,
    after: Tensor,
    among: Tensor,
    *,
    direction: str = "abs",
    together: bool = False,
    factors: str = "both",
) -> Tensor:
    """`m_j softmax_j(1 - |cos|)` with `m = |a| / |b|`: how much one module changes each token.

    Args:
        before (Tensor): [B, S, C] b, what the module is given.
        after (Tensor): [B, S, C] a, what is added to the residual.
        among (Tensor): [B, S] bool, the tokens that are scored; the softmax runs over them.
        direction (str): "abs", or "signed" for `1 - cos`.
        together (bool): one softmax over all rows, as in the official code.
        factors (str): "both", "length" for m alone, "turn" for the softmax alone.

    Returns:
        Tensor: [B, S], at least fp32, >= 0; 0 elsewhere, and m is 0 where b is 0.
    """
    precise = torch.promote_types(before.dtype, torch.float32)
    b, a = before.to(precise), after.to(precise)
    long_b, long_a = b.norm(dim=-1), a.norm(dim=-1)
    tiny = torch.finfo(precise).tiny
    length = (long_a / long_b.clamp_min(tiny)).masked_fill(long_b == 0, 0.0)
    cosine = ((a * b).sum(-1) / (long_a * long_b).clamp_min(tiny)).clamp(-1.0, 1.0)
    turn = 1.0 - (cosine.abs() if direction == "abs" else cosine)
    logits = turn.masked_fill(~among, -torch.inf)
    shared = logits.flatten().softmax(0).view_as(logits) if together else logits.softmax(-1)
    shared = shared.masked_fill(~among, 0.0)  # a row without such tokens has no softmax
    chosen = {"both": length * shared, "length": length, "turn": shared}[factors]
    return chosen.masked_fill(~among, 0.0)


def score(moved: Tensor, guided: Tensor, vision: Tensor, alpha: float, eps: float = 1e-8) -> Tensor:
    """`alpha t_j / sum t + (1 - alpha) g_j / sum g` over the image tokens present.

    Args:
        moved (Tensor): [B, S] transitions added up, >= 0.
        guided (Tensor): [B, S] attention from the instruction, >= 0; 0 everywhere in rows without one, where the
            transition decides alone.
        vision (Tensor): [B, S] bool, image tokens.
        alpha (float): in [0, 1].
        eps (float): added to the sums.

    Returns:
        Tensor: [B, S], 0 for text.
    """
    moved, guided = (one.masked_fill(~vision, 0.0) for one in (moved, guided))
    weight = torch.where((guided > 0).any(-1, keepdim=True), alpha, 1.0)
    parts = [one / (one.sum(-1, keepdim=True) + eps) for one in (moved, guided)]
    return weight * parts[0] + (1.0 - weight) * parts[1]


def spend(count: Tensor, ratio: float) -> Tensor:
    """`n_s = floor(r_s n)` for each row: [B] of the prompt's image tokens [B]."""
    return floor_share(count, ratio)


def scaled(depth: int) -> tuple[int, ...]:
    """The paper's stages, after 7, 9 and 12 of 32 layers, in a decoder of another depth.

    Raises:
        ParameterError: if there are fewer layers than stages.
    """
    require(depth > len(_PRUNE), "prune", f"given for a decoder of {depth} layers", None)
    stages: list[int] = []
    for layer in _PRUNE:
        stages.append(max(round(layer * depth / _DEPTH), stages[-1] + 1 if stages else 1))
    return tuple(stages)


def _rising(layers: tuple[int, ...]) -> bool:
    return bool(layers) and layers[0] >= 1 and all(a < b for a, b in itertools.pairwise(layers))


def _fits(accumulate: tuple[int, ...], prune: tuple[int, ...]) -> None:
    inside = set(prune) <= set(accumulate) and accumulate[-1] == prune[-1]
    require(inside, "accumulate", f"with all of prune {prune} and none behind the last", accumulate)
