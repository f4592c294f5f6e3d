"""PRIOR: in vision-language pre-training, weight the caption tokens that the words before them do not give away.

Scored: the tokens of a caption, by `w = (1 - P_r)^alpha`. `P_r` is a token's probability under a reference that is
shown the text alone: what the preceding words make likely can be written without looking at the picture.
Spent: the loss weight. `wn = k w / sum w` over the k tokens of one caption, so that its mean is 1 and the scale of
the loss stays that of plain next-token prediction (NTP). Weights are constants of the data; no gradient runs through
them.

    L(caption) = - sum_i wn_i log p(t_i | image, t_<i),    loss of a step = sum over captions / all their tokens

The loop divides by the sum of the weights of the step, over micro-batches and ranks; with weights of mean 1 in every
caption that sum is the number of tokens, so this is the paper's loss.

Paper: arXiv 2505.08971. Official code: Yangyi-Chen/PRIOR (bd40c6dd3c8b) holds no code, only a figure with the formula
and two worked captions, which the tests reproduce.

Left open by the paper, and decided here:
- a caption is a run of labelled tokens: turns and packed samples that -100 (or `position_ids` that start again at 0)
  separates are normalised one by one, whatever row they are in;
- the reference reads the row's words up to its last label, prompts included, without the places of images and what
  opens and closes them, numbered anew; where nothing is left before a caption's first token, the reference is given
  its own beginning-of-text token, and without one the token counts as unpredictable, P_r = 0;
- a caption whose tokens are all certain (`sum w <= eps`) is weighted evenly; one token has weight 1 whatever P_r is;
- `1 - P_r` is `-expm1(log P_r)` in fp32: close to 1, P_r itself would round to 1 in bf16 and beyond it by errors.

Kept as it is: a token that nobody could predict, such as a name or a house number, looks image-related and gets the
largest weight, up to k times the mean; there is no clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from salience.core.attach import Attachment
from salience.core.errors import StructureError, TrainingError, require
from salience.core.loop import Loop
from salience.core.losses import IGNORE
from salience.core.method import Method
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History
from salience.methods.tokens._history_sources import HistorySource
from salience.methods.tokens._reference_sources import reference_losses, reference_source
from salience.methods.tokens._reference_text import documents

__all__ = ["reference_losses"]
Normalise = Literal["caption", "batch"]
_NORMALISE = ("caption", "batch")
_RECORD_EVERY, _HEAT_SAMPLES, _TENTHS = 25, 4, 10


@dataclass(frozen=True, kw_only=True)
class PRIOR(Method):
    """Pre-train a vision-language model with more weight on caption tokens that text alone cannot predict.

    Attributes:
        alpha (float): exponent of 1 - P_r, finite and >= 0; 0 is plain next-token prediction and needs no reference.
        reference (str): the text-only model. "base": the language part of the model as training starts; if it is
            frozen or under LoRA it is run beside each batch (adapters off), otherwise the training set is measured
            once before the first step. Else the folder of a causal language model with the same tokenizer, run beside
            each batch, or what `reference_losses` wrote.
        normalise (str): over which tokens the weights have mean 1: those of a "caption" (the paper), or of all
            captions in a micro-"batch", which also moves weight between captions.
        eps (float): > 0: weights whose sum is not above it are taken for equal.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "weight"
    job: ClassVar[str] = "pretrain"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "peft", "torch")
    arxiv: ClassVar[str] = "2505.08971"
    title: ClassVar[str] = "Prioritizing Image-Related Tokens Enhances Vision-Language Pre-Training"

    alpha: float = 1.0
    reference: str = "base"
    normalise: Normalise = "caption"
    eps: float = 1e-12

    def __post_init__(self) -> None:
        require(math.isfinite(self.alpha) and self.alpha >= 0, "alpha", "finite and >= 0", self.alpha)
        named = isinstance(self.reference, str) and bool(self.reference)
        wanted = "'base', a checkpoint folder, or a file or folder of reference losses"
        require(named, "reference", wanted, self.reference)
        require(self.normalise in _NORMALISE, "normalise", f"one of {', '.join(_NORMALISE)}", self.normalise)
        require(math.isfinite(self.eps) and self.eps > 0, "eps", "finite and > 0", self.eps)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Weights the labelled tokens of every training step."""
        if not site.shifted:
            raise StructureError(
                f"model must predict each token from those before it, got {type(site.model).__name__}: captions of "
                "encoder-decoders and labels of classifiers have no words before them"
            )
        return _Weights(self, reference_source(self.reference, site) if self.alpha > 0 else None)


def score(ref_logprob: Tensor, active: Tensor, alpha: float = 1.0) -> Tensor:
    """`w = (1 - P_r)^alpha`, how little the words before a token tell of it.

    Args:
        ref_logprob (Tensor): [B, T] log P_r of token t in column t; computed in at least fp32.
        active (Tensor): [B, T] bool, the tokens that have a loss.
        alpha (float): exponent >= 0.

    Returns:
        Tensor: [B, T] in [0, 1], 0 where inactive.
    """
    if ref_logprob.dtype in (torch.float16, torch.bfloat16):
        ref_logprob = ref_logprob.float()
    # rounding may put log P_r above 0
    return torch.where(active, (-torch.expm1(ref_logprob)).clamp_min(0) ** alpha, 0.0)


def segments(active: Tensor, document: Tensor | None = None) -> Tensor:
    """The number of the caption that each active token belongs to, [B, T] int64, -1 where inactive.

    Args:
        active (Tensor): [B, T] bool; a caption is a run of active tokens.
        document (Tensor | None): [B, T] int; a caption also ends where this changes.
    """
    starts = active & ~F.pad(active, (1, 0))[:, :-1]
    if document is not None:
        starts |= active & (document != F.pad(document, (1, 0), value=-1)[:, :-1])
    numbers = starts.flatten().long().cumsum(0).view(active.shape) - 1
    return numbers.masked_fill(~active, -1)


def spend(weights: Tensor, segment: Tensor, eps: float = 1e-12) -> Tensor:
    """`wn = k w / sum w` over the k tokens of each segment; 1 where `sum w <= eps`.

    Args:
        weights (Tensor): [B, T] from `score`.
        segment (Tensor): [B, T] from `segments`: numbered from 0 in reading order, without gaps.
        eps (float): see above.

    Returns:
        Tensor: [B, T] of mean 1 over each segment, 0 where `segment` is -1.
    """
    active = segment >= 0
    normalised = torch.zeros_like(weights)
    if not bool(active.any()):
        return normalised
    owner = segment[active]
    counts = owner.bincount()
    # summed segment by segment: the same bits whatever else is in the batch
    sums = torch.segment_reduce(weights[active], "sum", lengths=counts)
    factors = torch.where(sums > eps, counts / sums, 0.0)
    even = (sums <= eps) | (counts == 1)
    normalised[active] = torch.where(even[owner], 1.0, weights[active] * factors[owner])
    return normalised


class _Weights(Part):
    def __init__(self, method: PRIOR, source: HistorySource | None) -> None:
        super().__init__()
        self.weights_tokens = True
        self.heat: list[dict[str, Any]] = []
        self._method = method
        self._source = source
        self._losses: Tensor | None = None
        self._newest: dict[str, Tensor] = {}
        self._tokens = self._captions = 0
        self._largest = 0.0
        self._tenths = torch.zeros(2, _TENTHS, dtype=torch.float64)
        self._means = History()
        self.histories = {"mean weight of each tenth of the caption": self._means}

    def begin(self, loop: Loop) -> None:
        if self._source is not None:
            self._source.begin(loop)

    def before_step(self, loop: Loop) -> None:
        if self._source is not None:
            self._source.before_step(loop)

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        labels = inputs.get("labels")
        if labels is None or labels.dim() != 2:
            got = "none" if labels is None else list(labels.shape)
            raise StructureError(f"labels must be [B, T], one for each token that is weighted, got {got}")
        self._losses = self._source.losses(loop, inputs) if self._source is not None else None

    def token_weights(self, batch: Batch, loop: Loop) -> Tensor:
        losses = self._losses if self._losses is not None else torch.zeros_like(batch.weights)
        if not bool(losses[batch.active].isfinite().all()):
            raise TrainingError(f"reference losses must be finite, got inf or nan at step {loop.step}")
        segment = segments(batch.active, documents(batch.inputs))
        captions = int(segment.max()) + 1 if segment.numel() else 0
        weights = score(-losses, batch.active, self._method.alpha)
        if self._method.normalise == "batch":
            weights = spend(weights, segment.clamp_max(0), self._method.eps)
        else:
            weights = spend(weights, segment, self._method.eps)
        self._newest = {"weight": weights}
        if self._losses is not None:
            self._newest["reference_probability"] = torch.where(batch.active, (-losses).exp(), 0.0)
        self._count(weights, segment, captions)
        if loop.step % _RECORD_EVERY == 0 and not (self.heat and self.heat[0]["step"] == loop.step):
            self.heat = _heat(batch, weights, loop.step)
        return weights.to(batch.weights.dtype)

    def _count(self, weights: Tensor, segment: Tensor, captions: int) -> None:
        active = segment >= 0
        if not captions:
            return
        self._tokens += int(active.sum())
        self._captions += captions
        self._largest = max(self._largest, float(weights.max()))
        owner = segment[active]
        lengths = owner.bincount()
        within = torch.arange(len(owner), device=owner.device) - (lengths.cumsum(0) - lengths)[owner]
        tenth = (within * _TENTHS // lengths[owner]).cpu()
        self._tenths[0] += tenth.bincount(weights[active].cpu().double(), minlength=_TENTHS)
        self._tenths[1] += tenth.bincount(minlength=_TENTHS)

    def transform_gradients(self, loop: Loop) -> None:
        if loop.step % _RECORD_EVERY == 0:
            self._means.add(loop.step, self._tenths[0] / self._tenths[1].clamp_min(1))
            self._tenths.zero_()

    def scores(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._newest.items()}

    def spent(self) -> dict[str, float | int]:
        if not self._tokens:
            return {}
        passes = self._source.passes if self._source is not None else 0
        counts = {"caption tokens": self._tokens, "captions": self._captions, "reference passes": passes}
        return {**counts, "largest weight": round(self._largest, 3)}

    def state(self) -> State:
        source = self._source
        state: State = {"tokens": self._tokens, "captions": self._captions, "largest": self._largest}
        state |= {"tenths": self._tenths.clone(), "passes": source.passes if source is not None else 0}
        if source is not None:
            state |= {f"source.{name}": value for name, value in source.state().items()}
        return state

    def load_state(self, state: State) -> None:
        values: dict[str, Any] = dict(state)
        self._tokens, self._captions, self._largest = values["tokens"], values["captions"], values["largest"]
        self._tenths = values["tenths"].clone()
        if self._source is not None:
            self._source.passes = values["passes"]
            prefix = "source."
            self._source.load_state(
                {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
            )


def _heat(batch: Batch, weights: Tensor, step: int) -> list[dict[str, Any]]:
    """The first samples of a batch as plain lists, one entry for each token up to the last label, to draw."""
    ids, labels = batch.inputs.get("input_ids"), batch.labels
    if ids is None:
        return []
    rows = []
    for row in range(min(len(ids), _HEAT_SAMPLES)):
        wanted = (labels[row] != IGNORE).flip(0).cumsum(0).flip(0) > 0
        mask = batch.inputs.get("attention_mask")
        wanted = wanted & mask[row].bool() if mask is not None and mask.shape == ids.shape else wanted
        active = batch.active[row][wanted]
        columns = {
            "tokens": ids[row][wanted],
            "scores": weights[row][wanted],
            "kept": active,
            "response": active,
        }
        rows.append(
            {"step": step, **{n: v.tolist() for n, v in columns.items()}, "prompt": (~active).tolist()}
        )
    return rows
