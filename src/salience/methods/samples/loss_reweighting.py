"""Loss-based sample reweighting: each step's gradient goes to the sequences whose loss says that they matter.

Scored: the samples of one batch, by their loss relative to the batch's own range, `h` in [-delta, delta].
Spent: the gradient of the step, shared out by `w = softmax(f(h) / r)` over all ranks; nothing is stored.
Shapes: LinUpper `f = min(h + delta, delta)` (the paper's best: only what is learnt already is weighted down),
Quadratic `f = 1 - h^2 / delta^2`, Extremes `f = |h|`, uniform `f = 0`.

Paper: arXiv 2502.06733 (Algorithm 1). Official code: sowmaster/Sample-Level-Loss-Reweighting-ICLR-2025 (edd6f15)
and foundation-model-stack/fms-fsdp, branch reweighted-train (2ca346a).

Differs from the official code in:
- "uniform" is `f = 0`; the official one feeds the scaled losses to the softmax and so favours high losses;
- ranks are numbered over the whole job, not over one node, so that two nodes never share weights;
- rows without a label get weight 0 and stay out of the range instead of poisoning it with 0/0;
- the temperature is a float (0.4 could not be given) and defaults to 1, not to 100, which switches it off.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import TrainingError, require
from salience.core.loop import Loop
from salience.core.losses import sample_losses
from salience.core.method import Method
from salience.core.part import Batch, Part, Site
from salience.core.scores import History

Strategy = Literal["linupper", "quadratic", "extremes", "uniform"]


@dataclass(frozen=True, kw_only=True)
class LossReweighting(Method):
    """Weight the samples of each batch by their loss: what is learnt already counts less.

    Attributes:
        strategy (str): which losses matter: "linupper" (all but the low ones, the paper's best), "quadratic"
            (the middle), "extremes" (both ends), "uniform" (the baseline).
        temperature (float): r > 0; small sharpens, large tends to uniform. The paper's runs use 1.0 and 0.4.
        delta (float): half-width of the scaled losses, > 0.
        warmup_steps (int): optimizer steps with uniform weights first, >= 0 (the paper's 20k-step runs: 1000).
        range_floor (float): smallest range of losses that is divided by, > 0.
        scope (str): "global" takes the batch of all ranks, "local" only this rank's.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "weight"
    job: ClassVar[str] = "tune"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2502.06733"
    title: ClassVar[str] = (
        "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining"
    )

    strategy: Strategy = "linupper"
    temperature: float = 1.0
    delta: float = 1.0
    warmup_steps: int = 0
    range_floor: float = 1e-6
    scope: Literal["global", "local"] = "global"

    def __post_init__(self) -> None:
        strategies = get_args(Strategy)
        require(self.strategy in strategies, "strategy", f"one of {', '.join(strategies)}", self.strategy)
        finite = math.isfinite(self.temperature)
        require(finite and self.temperature > 0, "temperature", "> 0 and finite", self.temperature)
        require(math.isfinite(self.delta) and self.delta > 0, "delta", "> 0 and finite", self.delta)
        require(self.warmup_steps >= 0, "warmup_steps", ">= 0", self.warmup_steps)
        require(self.range_floor > 0, "range_floor", "> 0", self.range_floor)
        require(self.scope in ("global", "local"), "scope", "one of global, local", self.scope)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Weights samples in every training step."""
        return _Reweighting(self)


def scaled_losses(
    losses: Tensor, present: Tensor, *, delta: float = 1.0, range_floor: float = 1e-6
) -> Tensor:
    """Losses mapped to [-delta, delta] by the smallest and largest of those present (Algorithm 1, line 4).

    Args:
        losses (Tensor): [N] mean loss of each sample.
        present (Tensor): [N] bool; samples without a label are absent.
        delta (float): half-width.
        range_floor (float): the range is at least this.

    Returns:
        Tensor: [N]; absent samples give 0.
    """
    low = losses.masked_fill(~present, torch.inf).min()
    high = losses.masked_fill(~present, -torch.inf).max()
    scaled = (2 * losses - (high + low)) * delta / (high - low).clamp_min(range_floor)
    return torch.where(present, scaled, torch.zeros_like(scaled))


def score(scaled: Tensor, strategy: Strategy, *, delta: float = 1.0) -> Tensor:
    """The shape function f: how much a sample matters by its scaled loss `h` [N] in [-delta, delta]."""
    if strategy == "linupper":
        return (scaled + delta).clamp_max(delta)
    if strategy == "quadratic":
        return 1 - scaled.square() / delta**2
    if strategy == "extremes":
        return scaled.abs()
    return torch.zeros_like(scaled)


def spend(scores: Tensor, present: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Weights `softmax(f / r)` [N] over the samples present, sum 1; absent ones get 0 (all absent: all 0)."""
    shifted = (scores / temperature).masked_fill(~present, -torch.inf)
    return shifted.softmax(0) if bool(present.any()) else torch.zeros_like(scores)


def rank_loss(
    weights: Tensor,
    losses: Tensor,
    counts: Tensor,
    ranks: int,
    *,
    per: Literal["sequence", "token"] = "sequence",
) -> Tensor:
    """The loss that one of several ranks backpropagates when gradients are averaged over ranks.

    `W sum_b w_b l_b` (per sequence), or `W B sum_b w_b (n_b / sum n) l_b` (per token, the official GPT-2 code:
    equal to the first only when all sequences of the rank are equally long).

    Args:
        weights (Tensor): [B] this rank's slice of the global weights.
        losses (Tensor): [B] mean loss of each sample, with graph.
        counts (Tensor): [B] number of labels of each sample.
        ranks (int): W.
        per (str): the normaliser.

    Returns:
        Tensor: [] with graph.
    """
    if per == "token":
        weights = weights * len(weights) * counts / counts.sum()
    return ranks * (weights * losses).sum()


class _Reweighting(Part):
    def __init__(self, method: LossReweighting) -> None:
        super().__init__()
        self.weights_samples = True
        self._method = method
        self._newest = torch.empty(0)
        self._largest = History()
        self.histories = {"share of the largest, middle and smallest weight": self._largest}

    def sample_weights(self, batch: Batch, loop: Loop) -> Tensor:
        means, counts = sample_losses(batch.losses.detach(), batch.weights)
        if not bool(means.isfinite().all()):
            raise TrainingError(f"sample losses must be finite, got {means.tolist()} at step {loop.step}")
        shared = self._method.scope == "global"
        rows = torch.stack((means, counts))
        every = distributed.all_gather(rows.T.contiguous()).T if shared else rows
        weights = self._weigh(every[0], every[1] > 0, loop.step)
        if shared:
            start = distributed.rank() * len(means)
            weights = weights[start : start + len(means)]
        # a sample's tokens share its weight: numerator sum_b w_b l_b, denominator sum_b w_b
        return weights / counts.clamp_min(torch.finfo(counts.dtype).tiny)

    def _weigh(self, losses: Tensor, present: Tensor, step: int) -> Tensor:
        method = self._method
        scaled = scaled_losses(losses, present, delta=method.delta, range_floor=method.range_floor)
        warming = step < method.warmup_steps
        scores = score(scaled, "uniform" if warming else method.strategy, delta=method.delta)
        weights = spend(scores, present, temperature=method.temperature)
        self._newest = weights.detach().cpu()
        ranked = self._newest.sort(descending=True).values
        self._largest.add(step, ranked[[0, len(ranked) // 2, -1]])
        return weights

    def scores(self) -> dict[str, Tensor]:
        return {"weights": self._newest}

    def spent(self) -> dict[str, float | int]:
        if not len(self._newest):
            return {}
        effective = float(1 / self._newest.square().sum()) if bool(self._newest.any()) else 0.0
        return {"samples in the batch": len(self._newest), "effective samples": round(effective, 2)}
