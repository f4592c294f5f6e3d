"""DAREx: a fine-tuned model as its base and a few percent of its delta, rescaled with less variance than DARE.

Scored: each entry of `delta = tuned - base`: at random (DARE), by its size, or by its size times the norm of its
input (Wanda). Spent: all but a share k of them is dropped, and the survivors are divided by q:

    weight = base + mask * delta / q.

DARE's q = k keeps the mean, and its error grows like sqrt((1 - k) / k). DAREx-q takes a q in [k, 1]: one for all
weights by the change of the model's output or by its loss, or one for each layer by an analytic rule. DAREx-L2
fine-tunes with AdamR, which pulls towards the base, so that there is less to drop; on a Trainer this is what is done.

Papers: arXiv 2410.09344, equations in its sections 3 and 4; DARE itself is 2311.03099. Official code:
vengdeng/DAREx (0873fc2) and yule-BUAA/MergeLM (6d49ad9).

Differs from the official code in:
- deltas are taken in fp32 and masks drawn by a generator of each tensor's own, by name;
- the analytic rule runs in float64 with |S| (theirs: float16 and the signed S; `bias_sign="official"`), its grid
  does not begin below k, Phi(1/2) is 1/2 and not NaN, and input means are weighted by their number of tokens;
- AdamR keeps the pre-trained weights by parameter, outside the optimizer's groups: theirs pairs a second group with
  the first group's tensors, copies all of them each step and writes them into the optimizer's state;
- `keep` is the share kept everywhere; their scripts' `--p` is that in two places and the share dropped in a third;
- magnitude drops nothing where int(numel p) is 0, instead of an error;
- an encoder is compared by its last hidden states, RoBERTa too (theirs go through its `classifier.dense` first);
- q for all weights is searched on a geometric grid, which has points where the optimum lies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, TargetError, require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.weights._darex_adamr import AdamR, Norm
from salience.methods.weights._darex_masks import Score, rows_of
from salience.methods.weights._darex_parts import Pull, Sparsified
from salience.methods.weights._darex_tensors import divided, in_scope, kept_blocks, layer_divisor, sparsified

Divisor = Literal["auto", "layer", "output", "loss", "gradient"]
__all__ = ["AdamR", "DAREx", "divided", "in_scope", "kept_blocks", "layer_divisor", "rows_of", "sparsified"]


@dataclass(frozen=True, kw_only=True)
class DAREx(Method):
    """Drop all but a share of a fine-tuned delta and rescale the rest with less variance than DARE does.

    Attributes:
        keep (float): k, the share of the delta's entries that stays, in (0, 1].
        score (str): "random" (DARE), "magnitude", or "wanda": magnitude times the norm of the input, row by row.
        q (float | str): what survivors are divided by, in [keep, 1]. "auto" is `keep` (plain DARE) for random
            dropping and 1 for the others; "layer" is the analytic rule, one q for each layer; "output" the q that
            changes the last layer's output least; "loss" the q with the lowest loss; "gradient" trains one q for
            each layer of a decoder. All but "auto" need inputs.
        columns (float): share of the input columns that may hold entries, in [keep, 1]; below 1 whole columns are
            dropped first, at random.
        scope (str): "auto": in decoders attention and MLP layers, elsewhere everything but heads. "all": everything
            but heads. What is outside is copied from the fine-tuned model.
        heads (tuple[str, ...]): parts of names that are never pruned.
        extra_rows (bool): let the fine-tuned model have more rows (a grown vocabulary); they are kept as they are.
        eta (float | None): of the analytic rule, > 0; the paper's tasks took 0.27 to 1.01. None: the one that changes
            the output least.
        gamma (float): probability of its bound, in (0, 1).
        stop_share (float): share of rows at which its scan ends, > 0; above 1 it never does.
        bias_sign (str): "abs", or "official" for the signed sum.
        seed (int): of the masks, >= 0.
        decay (float): on a Trainer: lambda of AdamR, >= 0.
        norm (str): on a Trainer: "l2" (DAREx-L2) or "l1".
    """

    unit: ClassVar[str] = "weight"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "shrink"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "peft", "torch")
    needs: ClassVar[tuple[str, ...]] = ("data",)
    arxiv: ClassVar[str] = "2410.09344"
    title: ClassVar[str] = "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Models"

    keep: float = 0.1
    score: Score = "random"
    q: float | Divisor = "auto"
    columns: float = 1.0
    scope: Literal["auto", "all"] = "auto"
    heads: tuple[str, ...] = ("classifier", "lm_head")
    extra_rows: bool = False
    eta: float | None = None
    gamma: float = 0.95
    stop_share: float = 0.8
    bias_sign: Literal["abs", "official"] = "abs"
    seed: int = 0
    decay: float = 0.05
    norm: Norm = "l2"

    def __post_init__(self) -> None:
        require(_number(self.keep) and 0 < self.keep <= 1, "keep", "a share in (0, 1]", self.keep)
        for name, kinds in (
            ("score", get_args(Score)), ("scope", ("auto", "all")), ("bias_sign", ("abs", "official")),
            ("norm", get_args(Norm)),
        ):  # fmt: skip
            value = getattr(self, name)
            require(value in kinds, name, f"one of {', '.join(kinds)}", value)
        wanted = f"in [keep, 1] = [{self.keep:g}, 1] or one of {', '.join(get_args(Divisor))}"
        fits = self.q in get_args(Divisor) if isinstance(self.q, str) else self._in_range(self.q)
        require(fits, "q", wanted, self.q)
        require(self._in_range(self.columns), "columns", f"in [keep, 1] = [{self.keep:g}, 1]", self.columns)
        random = self.score == "random" or self.columns == 1
        require(random, "columns", f"1 with score {self.score!r}", self.columns)
        layered = self.q != "layer" or self.score == "random"
        require(layered, "q", f"a number, auto, output, loss or gradient with score {self.score!r}", self.q)
        eta = self.eta is None or (math.isfinite(self.eta) and self.eta > 0)
        require(eta, "eta", "> 0 and finite or None", self.eta)
        stops = math.isfinite(self.stop_share) and self.stop_share > 0
        require(stops, "stop_share", "> 0 and finite", self.stop_share)
        require(0 < self.gamma < 1, "gamma", "in (0, 1)", self.gamma)
        require(isinstance(self.seed, int) and self.seed >= 0, "seed", "a whole number >= 0", self.seed)
        require(math.isfinite(self.decay) and self.decay >= 0, "decay", ">= 0 and finite", self.decay)

    def _in_range(self, value: Any) -> bool:
        # one more bit of room: 0.1 as a share dropped is 0.9, and 1 - 0.9 is not 0.1
        return _number(value) and self.keep * (1 - 1e-9) <= value <= 1

    @property
    def divisor(self) -> float:
        """The q that needs no inputs: the given number, else what "auto" stands for."""
        if not isinstance(self.q, str):
            return float(self.q)
        return self.keep if self.score == "random" else 1.0

    @property
    def needs_inputs(self) -> bool:
        """Whether q or the score is found by running the model."""
        return self.score == "wanda" or (isinstance(self.q, str) and self.q != "auto")

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """DAREx-L2: the Trainer's Adam pulls towards the weights that the model has now."""
        trainer = site.trainer
        if trainer is not None and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
            raise ConflictError(
                "DeepSpeed and FSDP must be off for DAREx (it holds whole weights), got one on"
            )
        return Pull(self, site.model, record)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any) -> Part:
        """Replaces the weights by base plus sparse delta; `data` is the base: its state dict or its module."""
        base = data.state_dict() if isinstance(data, nn.Module) else data
        if not isinstance(base, Mapping):
            raise TargetError(
                "data must be the base of the fine-tuned model (its module or state dict) for DAREx, "
                f"got {type(data).__name__}"
            )
        if self.needs_inputs:
            raise ConflictError(
                "q must be a number or 'auto', and score random or magnitude, for a model in memory (salience delta "
                f"runs models to choose), got q={self.q!r} and score={self.score!r}"
            )
        named = dict(model.named_parameters())
        chosen = in_scope(named, self)
        for name in chosen:
            if name not in base or base[name].shape != named[name].shape:
                found = list(base[name].shape) if name in base else "none"
                raise ConflictError(
                    f"data must be of the model's architecture, got {name} of shape {found} "
                    f"instead of {list(named[name].shape)}"
                )
        record.values(named[name] for name in chosen)
        counts = [0, 0]
        with torch.no_grad():
            for name in chosen:
                merged, kept = sparsified(name, base[name], named[name], self)
                named[name].copy_(merged)
                counts = [counts[0] + kept, counts[1] + merged.numel()]
        return Sparsified(counts[0], counts[1], len(chosen), self.divisor)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
