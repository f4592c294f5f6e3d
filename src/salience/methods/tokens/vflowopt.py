"""VFlowOpt: one map of the vision tower prunes image tokens three times; how much and by which map is searched for.

Scored: the patches of each encoder view, once, by the attention that a few much attended patches pay them and by the
entropy of their grey values: with A the attention averaged over heads, `K = {j : r_j > t mean r}, r_j = mean_i A_ij`,
`I_i = mean_{k in K} A_ki + alpha softmax(H)_i`. The map reaches the image tokens the way the features do.
Spent: in front of the decoder `round(n (1 - R1))` of the n tokens of a prompt leave, and what they held is recycled:
`int(n / a^2)` more are taken, and the taken tokens of each cell of a x a tokens become one, `sum I x / sum I`, in the
place of the best of them. In front of later layers a share 1 - R2, then 1 - R3, of what is left leaves for good, by
the same map. The settings come from `search_vflowopt`, which wants the last prompt token to end where it would end
without pruning.

Paper: arXiv 2508.05211. Official code: sihany077/VFlowOpt (129eeefb97d0).

Differs from the official code in:
- any transformers model with pictures or videos of any size, any number of prompts and padding; the official one runs
  LLaVA-OneVision with one prompt at a time. Pictures of a prompt have a map each and are ranked together;
- survivors keep their positions at every stage, as the paper says; the official code numbers the prompt anew after
  the first one;
- the entropy is taken from the grey values of the picture; the official code feeds it normalised pixels, whose
  negative values wrap around when they become bytes. No released setting uses it (alpha = 0);
- an empty K, from which the official code gets NaN, stands for all patches;
- a class token neither votes nor is voted for;
- negative scores, possible with alpha < 0, weigh nothing in a merge;
- newline tokens, which stand for no place, are never dropped or merged, and where R1 drops nothing, nothing merges.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.core.spec import describe_method
from salience.hosts.choices import Choice, Decide, View, keep_best
from salience.hosts.pruning import Pruning, prune
from salience.methods.tokens._vflowopt_map import PatchMap, grid_cells
from salience.methods.tokens._vflowopt_search import Plan, bounds, run_search

__all__ = ["search_vflowopt"]
_OVER = ("mean", "sum")
_SLOTS = ("own", "sum")


@dataclass(frozen=True, kw_only=True)
class VFlowOpt(Method):
    """Drop image tokens in front of the decoder and inside of it by one map, recycle them, and search the settings.

    Attributes:
        ratios (tuple[float, ...]): share of the image tokens present that goes on, in (0, 1], in front of the decoder
            and then at each later stage. The default was released for a quarter of all token-layers.
        layers (tuple[int, ...] | None): the first layer of each later stage, rising, in [1, L - 1]; None cuts the
            decoder into equal stages (9, 18 of 28).
        t (float): a patch asks if it receives more than t times the mean attention, >= 0.
        alpha (float): weight of the entropy.
        cell (float): side of a cell in tokens, > 0.
        recycle (bool): merge what leaves in front of the decoder.
        over (str): of the asking patches' attention, "mean" (the official code) or "sum" (the paper).
        slot_score (str): a merged token's score at later stages: its place's "own" (the official code; such tokens
            are the first to leave) or the "sum" of what it stands for.
        encoder_layer (int | None): of the vision tower, negative from the end; None takes the one that gives the
            features.
        pixel_mean, pixel_std (tuple[float, ...] | None): of the image processor, three numbers each, for the entropy;
            without them the range of each picture's values is taken for [0, 255].
        search (int): evaluations of a search in front of everything else, with the prompts given as `data`; 0 takes
            the settings as they are.
        budget (float): share of token-layers that the search may keep, in (0, 1].
        folder (str | None): of the search, see `search_vflowopt`.
        seed (int): of the search, >= 0.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "merge"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2508.05211"
    title: ClassVar[str] = (
        "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization"
    )

    ratios: tuple[float, ...] = (0.2651, 0.9833, 0.8773)
    layers: tuple[int, ...] | None = None
    t: float = 34.76
    alpha: float = 0.0
    cell: float = 15.58
    recycle: bool = True
    over: str = "mean"
    slot_score: str = "own"
    encoder_layer: int | None = None
    pixel_mean: tuple[float, ...] | None = None
    pixel_std: tuple[float, ...] | None = None
    search: int = 0
    budget: float = 0.25
    folder: str | None = None
    seed: int = 42

    def __post_init__(self) -> None:
        inside = bool(self.ratios) and all(0.0 < ratio <= 1.0 for ratio in self.ratios)
        require(inside, "ratios", "in (0, 1]", self.ratios)
        if self.layers is not None:
            rising = all(a < b for a, b in itertools.pairwise(self.layers))
            require(rising and min(self.layers, default=1) >= 1, "layers", "rising and >= 1", self.layers)
            later = len(self.ratios) - 1
            require(len(self.layers) == later, "layers", f"one for each of {later} later ratios", self.layers)
        require(0.0 <= self.t < math.inf, "t", "finite and >= 0", self.t)
        require(math.isfinite(self.alpha), "alpha", "finite", self.alpha)
        require(0.0 < self.cell < math.inf, "cell", "finite and > 0", self.cell)
        require(self.over in _OVER, "over", f"one of {', '.join(_OVER)}", self.over)
        require(self.slot_score in _SLOTS, "slot_score", f"one of {', '.join(_SLOTS)}", self.slot_score)
        both = (self.pixel_mean is None) == (self.pixel_std is None)
        require(both, "pixel_mean and pixel_std", "given together", (self.pixel_mean, self.pixel_std))
        for name in ("pixel_mean", "pixel_std"):
            value = getattr(self, name)
            require(value is None or len(value) == 3, name, "three numbers", value)
        require(self.search >= 0, "search", ">= 0 evaluations", self.search)
        require(0.0 < self.budget <= 1.0, "budget", "in (0, 1]", self.budget)
        require(self.seed >= 0, "seed", ">= 0", self.seed)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens leave in front of the decoder and of `layers` whenever the model reads a prompt.

        With `search` > 0 and `data`, a list of prompts, the settings are searched for first.
        """
        found = self
        if self.search:
            base = replace(self, search=0)
            options: dict[str, Any] = {"budget": self.budget, "evaluations": self.search, "seed": self.seed}
            found = search_vflowopt(model, data, base=base, folder=self.folder, **options)
        part = prune(model, record, functools.partial(found._stages, record), positions="keep")
        if found is not self:
            part.notes["found"] = describe_method(found)
        return part

    def stage_layers(self, depth: int) -> tuple[int, ...]:
        """The first layer of each later stage in a decoder of `depth` layers.

        Raises:
            ParameterError: if there are fewer layers than stages.
        """
        if self.layers is not None:
            return self.layers
        stages = len(self.ratios)
        require(depth >= stages, "ratios", f"at most as many as the decoder's {depth} layers", self.ratios)
        return tuple(depth * (stage + 1) // stages for stage in range(stages - 1))

    def _stages(self, record: Attachment, part: Pruning) -> dict[int, Decide]:
        plan = dict(zip((0, *self.stage_layers(len(part.found.layers))), self.ratios, strict=True))
        if self.ratios[0] == 1.0 and len(plan) > 1:
            del plan[0]  # models that allow nothing in front of their first layers can be pruned later
        run = _Run(self, PatchMap(part, record, self), min(plan))
        return {layer: functools.partial(run.decide, ratio) for layer, ratio in plan.items()}


class _Run:
    """What the stages of one attached method share: the scores of the prompt that is read."""

    def __init__(self, method: VFlowOpt, maps: PatchMap, first: int) -> None:
        self._method, self._maps, self._first = method, maps, first
        self._scores = torch.empty(0)

    def decide(self, ratio: float, view: View) -> Choice:
        if view.layer == self._first:
            scores, grid = self._maps.at_tokens(view)
            # by place in the prompt: nothing has left yet
            self._scores = scores
            if view.layer == 0 and self._method.recycle:
                return self._recycled(ratio, view, scores, grid)
        kept = [spend(count, ratio) for count in view.vision.sum(-1).tolist()]
        counts = torch.tensor(kept, device=view.vision.device)
        return keep_best(view, self._scores.gather(1, view.source), counts)

    def _recycled(self, ratio: float, view: View, scores: Tensor, grid: Tensor) -> Choice:
        keep, merged, hidden = view.vision.clone(), torch.zeros_like(view.vision), view.hidden.clone()
        self._scores = scores.clone()
        for row, vision in enumerate(view.vision):
            (places,) = vision.nonzero(as_tuple=True)
            own = scores[row, places]
            cells = grid_cells(grid[row, places], self._method.cell)
            low = taken(own, ratio, self._method.cell) & (cells >= 0)
            features, slots, mass = recycle(hidden[row, places], own, low, cells)
            keep[row, places] = ~low | slots
            merged[row, places] = slots
            hidden[row, places] = features.to(hidden.dtype)
            if self._method.slot_score == "sum":
                self._scores[row, places] = torch.where(slots, mass, own)
        return Choice(keep, scores, hidden, merged) if bool((view.vision & ~keep).any()) else Choice(keep)


def spend(count: int, ratio: float) -> int:
    """`n - round(n (1 - R))`, the tokens that go on."""
    return count - round(count * (1.0 - ratio))


def taken(scores: Tensor, ratio: float, cell: float) -> Tensor:
    """[n] bool: the `round(n (1 - R)) + int(n / a^2)` lowest of n scores, none where R drops none.

    Of equal scores the token to the right is taken first.
    """
    count = len(scores)
    dropped = count - spend(count, ratio)
    low = torch.zeros_like(scores, dtype=torch.bool)
    if dropped:
        order = torch.sort(scores, descending=True, stable=True).indices
        low[order[max(0, count - dropped - int(count / cell**2)) :]] = True
    return low


def recycle(features: Tensor, scores: Tensor, low: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the low tokens of each cell, `sum I x / sum I`, into the place of the best of them.

    Args:
        features (Tensor): [n, C].
        scores (Tensor): [n], I; negative ones weigh 0, and cells without any weight become plain means.
        low (Tensor): [n] bool.
        cells (Tensor): [n] int64, from `grid_cells`.

    Returns:
        tuple: features [n, C] with the merged rows, at least fp32; their places, [n] bool, one for each cell with a
        low token; and the scores of their members together, [n], 0 at other places.
    """
    precise = features.to(torch.promote_types(features.dtype, torch.float32), copy=True)
    slots, sums = torch.zeros_like(low), torch.zeros_like(scores)
    (members,) = low.nonzero(as_tuple=True)
    if not len(members):
        return precise, slots, sums
    numbers, of = cells[members].unique(return_inverse=True)
    of_cell = of == torch.arange(len(numbers), device=of.device)[:, None]  # [cells, members]
    weight = of_cell * scores[members].to(precise.dtype).clamp_min(0)
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, of_cell.to(weight.dtype))
    with torch.autocast(precise.device.type, enabled=False):
        rows = weight @ precise[members] / weight.sum(-1, keepdim=True)
    # members by falling score, of equal ones the left first: the first of each cell is its slot
    ranked = torch.sort(scores[members], descending=True, stable=True).indices
    rank = torch.empty_like(ranked)
    rank[ranked] = torch.arange(len(ranked), device=ranked.device)
    place = members[ranked[rank.masked_fill(~of_cell, len(ranked)).amin(-1)]]
    slots[place] = True
    precise[place] = rows
    sums[place] = (of_cell * scores[members]).sum(-1)
    return precise, slots, sums


def search_vflowopt(
    model: nn.Module,
    prompts: Sequence[Mapping[str, Any]],
    *,
    budget: float = 0.25,
    evaluations: int = 50,
    folder: str | Path | None = None,
    base: VFlowOpt | None = None,
    space: Mapping[str, tuple[float, float]] | None = None,
    random: int = 10,
    seed: int = 42,
    progress: bool | None = None,
) -> VFlowOpt:
    """Find the settings with which a model's last prompt token ends nearest to where it ends without pruning.

    Maximises `f = sum over prompts of cos(h_full, h_pruned)`, h the state behind the final norm, in fp32, by Optuna's
    tree-structured Parzen estimator over the first two ratios, t, alpha and cell; the third ratio follows from the
    budget. The sampler needs no package beside Optuna and decides in milliseconds where the paper's Gaussian process
    needs SciPy and takes longer with every evaluation. No labels are needed, and no gradients.

    Args:
        model (nn.Module): a vision-language model.
        prompts (Sequence[Mapping]): keywords of its forward, one prompt (or batch of prompts) with images each; the
            paper takes 30.
        budget (float): share of image token-layers that go on, in (0, 1].
        evaluations (int): settings that are tried, >= 1; each costs one forward pass for each prompt.
        folder (str | Path | None): gets `study.db`, from which a stopped search goes on, and `recipe.json` with the
            settings found. One process at a time.
        base (VFlowOpt | None): everything that is not searched for, and the settings that are tried first where they
            lie in the space. None is `VFlowOpt()`. It has three ratios.
        space (Mapping | None): (low, high) of "r1", "r2", "t", "alpha" or "cell" in place of the usual ones.
        random (int): evaluations at random before the model of the function is used, >= 1.
        seed (int): >= 0; the same seed finds the same, stopped in between or not.
        progress (bool | None): show a bar; None where there is a terminal.

    Returns:
        VFlowOpt: `base` with the best settings seen.

    Raises:
        ParameterError: without prompts or Optuna, for values out of range, or a folder that holds another search.

    Example:
        >>> found = sal.search_vflowopt(model, prompts, budget=0.1, folder="vflowopt")  # doctest: +SKIP
        >>> with sal.focus(model, found):  # doctest: +SKIP
        ...     model.generate(**prompts[0])
    """
    within = bounds(budget, space)
    plan = Plan(base or VFlowOpt(), budget, within, evaluations, random, seed, folder, progress)
    return run_search(model, prompts, plan)
