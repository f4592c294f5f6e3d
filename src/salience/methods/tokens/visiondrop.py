"""VisionDrop: image tokens are judged by image tokens alone, in stages; what is dropped is merged along its keys.

Scored: the image tokens of each prompt, by the attention that they receive from image tokens and never from text:
in the vision tower from its class token (from all patches where it has none), in front of later decoder layers from
all image tokens, `s_j = mean_i mean_h softmax_j(q_i k_j / sqrt(d))`.
Spent: a stage keeps the D best ("dominant") and forms C "contextual" tokens of the others: every (m / C)-th of the m
others is a target, the rest join the target whose head-mean key is most similar, and a target becomes itself plus
the mean of those that joined it. Counts are those of a prompt; its pictures share them in proportion to their tokens.

Paper: arXiv 2506.22283. Official code: Ruixxxx/VisionDrop (f7a944497d58).

Differs from the official code in:
- image tokens see each other in both directions when they are scored. The causal mask of the official code
  (`causal_scores=True`) lets only later tokens vote, spread over more and more tokens, and so favours early ones:
  the position bias that the paper finds in text-guided scores;
- any transformers model with any number of pictures and any padding; the encoder's part merges the features in front
  of the projector where that makes one token of each, and what the decoder reads where features are rearranged on
  the way (shuffled pixels, merged patches, any-resolution tiles);
- the class token is the first dominant token as in the official code where it is left out just in front of such a
  projector, or is an image token; elsewhere all D are patches;
- no contextual tokens are allowed, and prompts with fewer tokens than a stage's count, which go on whole;
- positions of models with several position axes (M-RoPE) are kept, a merged token has that of its target.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.attention import AttentionCall, received
from salience.hosts.choices import Choice, Decide, View, equal_stages
from salience.hosts.encoder import EncoderMaps
from salience.hosts.projection import Projection, feature_layer, pictures_of
from salience.hosts.pruning import Pruning, prune
from salience.methods.tokens._merging import choose

Counts = tuple[int, int]
_POSITIONS = ("auto", "renumber", "keep")
_LAYOUTS = ("append", "in_place")
_ROWS = ("class", "image")
_CHUNK = 256
_STAGES = 3


@dataclass(frozen=True, kw_only=True)
class VisionDrop(Method):
    """Keep the image tokens that other image tokens attend to and merge the rest into a few, in stages.

    For answering: gradients do not pass the first stage.

    Attributes:
        tokens (int): image tokens of a prompt in an average decoder layer, >= 1; counts that are not given follow
            from it: half more at the first stage, then falling by a constant factor, an eighth of each contextual.
        encoder (tuple[int, int] | str | None): dominant and contextual tokens that enter the decoder; "auto" takes
            them from `tokens`, None leaves that stage out.
        stages (tuple[tuple[int, int], ...] | None): the same for later stages, sums not rising; None takes them from
            `tokens`; () leaves the encoder's alone.
        layers (tuple[int, ...] | None): the first decoder layer of each later stage, rising, in [1, L - 1]; None cuts
            the decoder into equal stages (8, 16, 24 of 32).
        causal_scores (bool): score in the decoder with its causal mask, as the official code does.
        score_rows (str): who is asked in the vision tower, "class" (its class token; all patches where it has none)
            or "image" (all patches, and the class token stays out).
        encoder_layer (int | None): of the vision tower, whose attention scores; None takes the one that gives the
            features.
        layout (str): "append" puts merged tokens behind the dominant ones of their picture, "in_place" leaves them
            where their targets are.
        positions (str): of the survivors: "renumber" counts them anew, "keep" leaves them, "auto" renumbers unless
            positions have several axes.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "merge"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2506.22283"
    title: ClassVar[str] = (
        "VisionDrop: Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment"
    )

    tokens: int = 192
    encoder: Counts | str | None = "auto"
    stages: tuple[Counts, ...] | None = None
    layers: tuple[int, ...] | None = None
    causal_scores: bool = False
    score_rows: str = "class"
    encoder_layer: int | None = None
    layout: str = "append"
    positions: str = "auto"

    def __post_init__(self) -> None:
        require(type(self.tokens) is int and self.tokens >= 1, "tokens", "a count >= 1", self.tokens)
        if self.encoder not in ("auto", None):
            wanted = "two counts, >= 1 and >= 0, or 'auto' or None"
            require(_is_counts(self.encoder), "encoder", wanted, self.encoder)
        if self.layers is not None:
            rising = all(a < b for a, b in itertools.pairwise(self.layers))
            require(rising and min(self.layers, default=1) >= 1, "layers", "rising and >= 1", self.layers)
        if self.stages is not None:
            pairs = all(_is_counts(pair) for pair in self.stages)
            require(pairs, "stages", "pairs of counts, >= 1 and >= 0", self.stages)
            if self.layers is not None:
                same = len(self.layers) == len(self.stages)
                require(same, "layers", f"one for each of the {len(self.stages)} stages", self.layers)
        plan = [sum(pair) for pair in self.plan()]
        require(bool(plan), "stages", "at least one where encoder is None", self.stages)
        falling = all(a >= b for a, b in itertools.pairwise(plan))
        require(falling, "stages", "of sums that never rise, from the encoder's on", plan)
        require(isinstance(self.causal_scores, bool), "causal_scores", "True or False", self.causal_scores)
        require(self.score_rows in _ROWS, "score_rows", f"one of {', '.join(_ROWS)}", self.score_rows)
        require(self.layout in _LAYOUTS, "layout", f"one of {', '.join(_LAYOUTS)}", self.layout)
        require(self.positions in _POSITIONS, "positions", f"one of {', '.join(_POSITIONS)}", self.positions)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens are merged away in front of the decoder and of `layers` whenever the model reads a prompt."""
        return prune(model, record, functools.partial(self._stages, record), positions=self.positions)

    def plan(self) -> tuple[Counts, ...]:
        """Dominant and contextual tokens of every stage, the encoder's first where it is not left out."""
        given = self.layers if self.stages is None else self.stages
        later = _STAGES if given is None else len(given)
        front = self.encoder is not None
        auto = [split(total) for total in schedule(self.tokens, later + front)]
        behind = auto[front:] if self.stages is None else self.stages
        if self.encoder is None:
            return tuple(behind)
        return (auto[0] if isinstance(self.encoder, str) else self.encoder, *behind)

    def _stages(self, record: Attachment, part: Pruning) -> dict[int, Decide]:
        plan = self.plan()
        later = len(plan) - (self.encoder is not None)
        layers: tuple[int, ...]
        layers = (
            self.layers
            if self.layers is not None
            else equal_stages(len(part.found.layers), later, name="stages")
        )
        if self.encoder is not None:
            layers = (0, *layers)
        run = _Run(self, part, record)
        return {
            layer: functools.partial(run.decide, counts, layer == layers[0])
            for layer, counts in zip(layers, plan, strict=True)
        }


class _Run:
    """What the stages of one attached method share: the maps of the tower and which picture a token belongs to."""

    def __init__(self, method: VisionDrop, part: Pruning, record: Attachment) -> None:
        self._method, self._encoder = method, part.encoder
        self._pictures = torch.empty(0)
        if method.encoder is None:
            return
        layer = feature_layer(part.found) if method.encoder_layer is None else method.encoder_layer
        self._projection = Projection(part.encoder, record)
        classed, asked = self._projection.classed, method.score_rows == "class"
        self._maps = EncoderMaps(part.encoder, layer, record, lambda call: measure(call, classed, asked))

    def decide(self, counts: Counts, first: bool, view: View) -> Choice:
        method = self._method
        if first:
            self._pictures = pictures_of(self._encoder, view)
        if not bool((view.vision.sum(-1) > sum(counts)).any()):
            return Choice(view.vision)
        pictures = self._pictures.gather(1, view.source)
        if view.layer == 0:
            return self._in_front(counts, view, pictures)
        call = view.attention()
        # without the question the choice is the same for all questions about a picture
        scores = score(call, view.vision, view.valid & ~view.behind(), causal=method.causal_scores)
        return choose(view, pictures, scores, head_keys(call), counts, layout=method.layout)

    def _in_front(self, counts: Counts, view: View, pictures: Tensor) -> Choice:
        """In front of the decoder, by the maps of the vision tower."""
        maps = self._maps.at_tokens(view)
        scores, keys = maps[..., 0], maps[..., 1:]
        layout, rows = self._method.layout, self._projection.at_tokens(view)
        if rows is None:
            return choose(view, pictures, scores, keys, counts, layout=layout)
        leading = self._projection.class_rows() if self._method.score_rows == "class" else None
        choice = choose(view, pictures, scores, keys, counts, layout=layout, rows=rows, leading=leading)
        assert choice.hidden is not None and choice.merged is not None  # some prompt is too long
        hidden = view.hidden.clone()
        hidden[choice.merged] = self._projection.project(choice.hidden[choice.merged]).to(hidden)
        return replace(choice, hidden=hidden)


def measure(call: AttentionCall, classed: bool, asked: bool = True) -> Tensor:
    """Scores and keys of the patches of V views in the vision tower.

    Args:
        call (AttentionCall): of one layer, with its own mask.
        classed (bool): the first of the N rows is a class token.
        asked (bool): score by that row alone; otherwise by the mean of all rows but that.

    Returns:
        Tensor: [V, N, 1 + d] score, in [0, 1], and head-mean key, at least fp32. An asked class token scores 1.
    """
    length = call.query.shape[2]
    if classed and asked:
        scores = call.probabilities(0, 1).mean(1)[:, 0]
        scores[:, 0] = 1.0
    else:
        starts = range(int(classed), length, _CHUNK)
        parts = (call.probabilities(at, min(at + _CHUNK, length)).mean(1).sum(1) for at in starts)
        scores = sum(parts, call.query.new_zeros(())) / (length - int(classed))
    return torch.cat((scores[..., None], head_keys(call).to(scores.dtype)), -1)


def score(call: AttentionCall, rows: Tensor, seen: Tensor, *, causal: bool) -> Tensor:
    """`s_j = mean_i mean_h softmax_j(q_i k_j / sqrt(d))` over the image tokens i.

    Args:
        call (AttentionCall): queries and keys of the decoder layer that runs next.
        rows (Tensor): [B, S] bool, image tokens.
        seen (Tensor): [B, S] bool, the tokens that the softmax runs over.
        causal (bool): a token sees none behind it.

    Returns:
        Tensor: [B, S], at least fp32.
    """
    return received(call, rows, seen, causal=causal)


def head_keys(call: AttentionCall) -> Tensor:
    """[B, K, d] keys averaged over heads, at least fp32."""
    return call.key.to(torch.promote_types(call.key.dtype, torch.float32)).mean(1)


def schedule(tokens: int, stages: int) -> tuple[int, ...]:
    """Counts of so many stages with this mean: 1.5 times the mean first, then falling by a constant factor.

    For 32 tokens and 4 stages these are the official code's 48, 35, 26, 19.
    """
    if stages == 1:
        return (tokens,)
    low, high = 0.0, 1.0
    for _ in range(60):
        factor = (low + high) / 2
        low, high = (low, factor) if 1.5 * sum(factor**i for i in range(stages)) > stages else (factor, high)
    exact = [round(1.5 * tokens * low**i, 6) for i in range(stages)]
    counts = [math.floor(value) for value in exact]
    by_rest = sorted(range(stages), key=lambda i: (counts[i] - exact[i], -i))
    for index in by_rest[: tokens * stages - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def split(total: int) -> Counts:
    """An eighth of a stage's tokens, rounded up, is contextual, but never all: 48 are 42 and 6."""
    contextual = min(math.ceil(total / 8), total - 1)
    return total - contextual, contextual


def _is_counts(pair: Any) -> bool:
    whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(count) is int for count in pair)
    return whole and pair[0] >= 1 and pair[1] >= 0
