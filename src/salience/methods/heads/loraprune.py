"""LoRAPrune: heads and feed-forward channels are pruned by scores that LoRA's gradients give, while LoRA tunes.

Scored: coupled structures. A head is its rows of the query, key and value projections and its columns of the output
projection (under grouped queries the unit is a key/value head with all query heads that read it); a channel is its
rows of up and gate and its column of down. The gradient of the frozen weight W is never made. From the factors of
LoRA and their gradients, with s = alpha / r,

    G = gB A + B gA - gB gA,    S = |G (W + s B A)|,    z = sums of S over each unit / their L2 norm,

and a unit's score is the sum of its z over the projections, averaged over steps (0.9 of the old one). Spent: every
few steps the units with the lowest scores are masked, the same share in every layer, on a cubic schedule; LoRA goes
on adapting what is left. At the end LoRA is merged and masked rows and columns are cut out: a smaller dense model.

Paper: arXiv 2305.18403. Official code: aim-uofa/LoRAPrune (4da5272). The paper squares G (W + B A); the code takes
the absolute value and scales B A, and so does this.

The official code and what is different here:
- it stops pruning before the target is reached (`rho < rho1`, then rounds down: 15 of 32 heads for a half); here the
  target itself is reached, and the share of parameters that really went is reported;
- it spares the first tenth of the layers and the last one. A stock config states one number of heads and one width
  for all layers, so such a model is no checkpoint that `from_pretrained` loads: `skip_first` and `skip_last` are 0 by
  default, and a model pruned with others is refused when it is saved;
- 32 heads of width 128 are constants there, and grouped queries break it; here units come from the model;
- it handles neither biases nor inputs that are not 3-D; masks here lie on what the output and down projections read,
  which is the same function and the same gradients with one multiplication, whatever the non-linearity;
- it skips un-scaling under mixed precision, though G is not homogeneous in the gradients, and scores after the step
  under DeepSpeed (refused here); here scores are taken by a hook of the optimizer, after accumulation, un-scaling and
  clipping, and right before the step. Under DDP these gradients are averages, so all ranks get the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.heads._loraprune_scores import (
    importance,
    lora_gradient,
    lowest_masked,
    masked_count,
    moved,
    normalised,
    ratio_at,
    unit_scores,
)

__all__ = [
    "LoRAPrune", "importance", "lora_gradient", "lowest_masked", "masked_count", "moved", "normalised", "ratio_at",
    "unit_scores",
]  # fmt: skip

Metric = Literal["lora", "grad", "magnitude", "wanda", "random"]
_METRICS = ("lora", "grad", "magnitude", "wanda", "random")
_UNITS = ("auto", "heads", "channels", "both")


@dataclass(frozen=True, kw_only=True)
class LoRAPrune(Method):
    """Prune heads and feed-forward channels during LoRA fine-tuning, then merge and cut them out.

    Attributes:
        keep (float): share of the units of each layer that stay, in (0, 1]; 1 only tunes and merges.
        units (str): "heads", "channels", "both", or "auto": those whose number a stock config can state.
        metric (str): "lora"; or a baseline: "grad" (the true gradient, with its memory), "magnitude", "wanda" (weight
            times norm of the input), "random".
        multiple (int | None): channels that stay are a multiple of it, rounded up; None is 8 for networks of at least
            32 channels that 8 divides, else 1.
        start (float): share of units that are pruned before the schedule begins, in [0, 1 - keep].
        warmup (float): share of the steps before pruning begins.
        cooldown (float): share of the steps after it has ended; warmup + cooldown < 1.
        prune_every (int): optimizer steps between two changes of the masks, >= 1.
        decay (float): of the moving average, in [0, 1).
        skip_first (int): layers at the start that are not pruned, >= 0; see the module's text.
        skip_last (int): layers at the end that are not pruned, >= 0.
        steps (int | None): optimizer steps; None takes the Trainer's, or two passes over the data.
        learning_rate (float): of AdamW on a model; a Trainer has its own. Falls linearly to 0.
        rank (int): of LoRA on a model, >= 1.
        alpha (float): of LoRA on a model, > 0.
        dropout (float): of LoRA on a model, in [0, 1).
        seed (int | None): of LoRA's initial weights, dropout and random scores, >= 0; None takes the run's.
    """

    unit: ClassVar[str] = "head"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "shrink"
    hosts: ClassVar[tuple[str, ...]] = ("peft", "transformers")
    needs: ClassVar[tuple[str, ...]] = ("data", "grad", "peft")
    arxiv: ClassVar[str] = "2305.18403"
    title: ClassVar[str] = "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning"
    conflicts: ClassVar[dict[str, str]] = {
        "allora": "it changes the gradients of LoRA that LoRAPrune scores by",
        "ist": "its adapters train in turns, and one without a gradient has no score",
        "lisa": "it trains whole layers, and LoRAPrune scores by the gradients of LoRA",
    }
    cuts: ClassVar[bool] = True

    keep: float = 0.5
    units: Literal["auto", "heads", "channels", "both"] = "auto"
    metric: Metric = "lora"
    multiple: int | None = None
    start: float = 0.0
    warmup: float = 0.1
    cooldown: float = 0.1
    prune_every: int = 10
    decay: float = 0.9
    skip_first: int = 0
    skip_last: int = 0
    steps: int | None = None
    learning_rate: float = 3e-4
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.05
    seed: int | None = None

    def __post_init__(self) -> None:
        require(0 < self.keep <= 1, "keep", "a share in (0, 1]", self.keep)
        require(self.units in _UNITS, "units", f"one of {', '.join(_UNITS)}", self.units)
        require(self.metric in _METRICS, "metric", f"one of {', '.join(_METRICS)}", self.metric)
        require(0 <= self.start <= 1 - self.keep, "start", "in [0, 1 - keep]", self.start)
        require(self.warmup >= 0, "warmup", ">= 0", self.warmup)
        require(self.cooldown >= 0, "cooldown", ">= 0", self.cooldown)
        spread = self.warmup + self.cooldown
        require(spread < 1, "warmup + cooldown", "less than 1", spread)
        for name, least in (("prune_every", 1), ("skip_first", 0), ("skip_last", 0), ("rank", 1)):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, name, f"a whole number >= {least}", value)
        for name in ("multiple", "steps"):
            value = getattr(self, name)
            valid = value is None or (isinstance(value, int) and value >= 1)
            require(valid, name, "a whole number >= 1 or None", value)
        require(0 <= self.decay < 1, "decay", "in [0, 1)", self.decay)
        for name in ("learning_rate", "alpha"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, "> 0", value)
        require(0 <= self.dropout < 1, "dropout", "in [0, 1)", self.dropout)
        require(self.seed is None or self.seed >= 0, "seed", ">= 0 or None", self.seed)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Scores and masks while a Trainer (or a loop of one's own) tunes LoRA; `finish` merges and cuts."""
        from salience.methods.heads._loraprune_tuning import attach

        return attach(self, site, record)

    def attach_model(self, model: nn.Module, record: Attachment, data: Iterable[Any]) -> Part:
        """Puts LoRA on a plain model, tunes and prunes it on the batches of `data`, merges and cuts, in place."""
        from salience.methods.heads._loraprune_tuning import shrink

        return shrink(self, model, record, data)
