"""Maestro: train every weight as a sum of rank-1 components that come out ordered by use, and drop the last ones.

Scored: component b of a layer `W = U V` (U [m, r], V [r, n]) by what it and all later ones still contribute,
`||U_{b:}||_F * ||V_{b:}||_F`, which never grows with b, so that what is kept is always a prefix.
Spent: parameters and multiply-adds; the rank of each layer is found while training.

In each step one pair of a layer i and a rank b is drawn from all pairs; that layer runs with its first b components,
all others in full, and the step minimises (algorithm 1)

    loss + weight * sum_i sum_{b=1..r_i} ( ||U^i_{b:}||_F + ||V^i_{b:}||_F ).

After each epoch a layer is cut before its first component whose importance is below eps. On any torch module, in a
loop of one's own:

    layers = sal.decompose(model, ignore_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  # after decompose: it trains the factors
    draws = sal.OrderedRanks(layers.ranks)
    for step, (x, y) in enumerate(batches):
        layers.cut(draws.at(step))
        loss = F.cross_entropy(model(x), y) + 1e-4 * layers.penalty()
        loss.backward(); optimizer.step(); optimizer.zero_grad()
        if (step + 1) % steps_in_epoch == 0:
            sal.shrink(layers, 1e-7, optimizer=optimizer)
            draws = sal.OrderedRanks(layers.ranks, start=step + 1)
    sal.recalibrate(model, images); sal.to_factors(model)  # or sal.to_dense(model)

Paper: arXiv 2308.14929. Official code: SamuelHorvath/Maestro-LoD (0003014), maestro/.

Differs from the official code in:
- ranks are whole numbers; the code goes through b / r and back by ceil, which for 3.6 % of all pairs with r <= 2048
  gives b + 1 (first at r = 25, b = 7);
- the gradient of a tail that is exactly zero is zero (the code's is not a number), the penalty acts on what is kept
  only, and what is dropped is zeroed together with its optimizer state, so that momentum does not go on moving it;
- at least one component stays: with none the code's convolution returns a wrong shape and its sampler fails;
- the threshold is the paper's 1e-7 (the code: 1e-5), and `relative` frees it from the scale of the weights;
- recalibrating batch norms gives them their momentum back, and runs all else in eval mode;
- with the plain group lasso too a prefix is kept, as the paper's text says; the code keeps any subset;
- no `pufferfish` sampler: `sampler="none"` with `keep` trains plain factors and cuts them at the end, and
  `decompose(model, rank=...)` starts low; no random initialisation: factor a layer that was just initialised.
An unknown option is an error here; the code's LeNet script passes two that do not exist and trains without sampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.hosts.factored import refuse_fixed_weights
from salience.methods.ranks._maestro_accounting import multiply_adds, ranks_for_budget, search_ranks
from salience.methods.ranks._maestro_decomposition import (
    Factors,
    Output,
    decompose,
    recalibrate,
    shrink,
    to_dense,
    to_factors,
)
from salience.methods.ranks._maestro_lasso import (
    component_norms,
    group_lasso,
    hierarchical_lasso,
    importance,
    keep_mask,
)
from salience.methods.ranks._maestro_layers import FactoredConv2d, FactoredLinear, split
from salience.methods.ranks._maestro_sampler import OrderedRanks
from salience.methods.ranks._maestro_training import OrderedTraining, match_loss

Sampler = Literal["pair", "independent", "none"]
__all__ = [
    "FactoredConv2d",
    "FactoredLinear",
    "Factors",
    "OrderedRanks",
    "component_norms",
    "decompose",
    "group_lasso",
    "hierarchical_lasso",
    "importance",
    "keep_mask",
    "match_loss",
    "multiply_adds",
    "ranks_for_budget",
    "recalibrate",
    "search_ranks",
    "shrink",
    "split",
    "to_dense",
    "to_factors",
]


@dataclass(frozen=True, kw_only=True)
class Maestro(Method):
    """Train weights as ordered rank-1 components and keep, in each layer, only as many as it needs.

    Undo before `finish` puts the dense layers back: as they were if no step was taken, else with the product of the
    factors that were trained.

    Attributes:
        weight (float): lambda of the group lasso, >= 0. It depends on model and loss: start large and halve.
        eps (float): threshold of the importance, >= 0.
        relative (bool): multiply `eps` by the largest importance of the layer.
        shrink_every (int | None): optimizer steps between two shrinkings, >= 1; None: each epoch of a Trainer, in a
            loop of one's own only at the end.
        progressive (bool): False shrinks only when training ends.
        sampler (str): "pair" draws one layer and its rank; "independent" a rank for every layer; "none" nothing:
            plain factors with the penalty.
        hierarchical (bool): False takes the plain group lasso.
        full_pass (bool): train the full model on the labels and the cut one to match its output, in two passes.
        keep (float | None): in (0, 1]: when finished, the least important components go until the factored layers
            hold so much of their dense weights; None leaves what the threshold left.
        ignore_first (int): so many layers at the front stay dense, >= 0.
        ignore_last (bool): the last layer, a model's head, stays dense.
        warm_up_steps (int): first steps at full rank without penalty, >= 0; after them the factors are split anew
            by a singular value decomposition and their optimizer state is dropped. A pretrained model is warm.
        output (str): what finishing leaves: "dense" layers, which every `from_pretrained` loads and which are no
            smaller, or "factors", two stock torch layers each, smaller, which need a loader of a few lines.
        calibration_batches (int): training batches on which batch norms are estimated anew when finished, >= 0.
        seed (int | None): of the draws, >= 0; None takes the run's.
    """

    unit: ClassVar[str] = "rank"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "shrink"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2308.14929"
    title: ClassVar[str] = "Maestro: Uncovering Low-Rank Structures via Trainable Decomposition"
    cuts: ClassVar[bool] = True

    weight: float = 1e-6
    eps: float = 1e-7
    relative: bool = False
    shrink_every: int | None = None
    progressive: bool = True
    sampler: Sampler = "pair"
    hierarchical: bool = True
    full_pass: bool = False
    keep: float | None = None
    ignore_first: int = 0
    ignore_last: bool = True
    warm_up_steps: int = 0
    output: Output = "dense"
    calibration_batches: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        require(math.isfinite(self.weight) and self.weight >= 0, "weight", ">= 0 and finite", self.weight)
        require(math.isfinite(self.eps) and self.eps >= 0, "eps", ">= 0 and finite", self.eps)
        every = self.shrink_every
        require(every is None or every >= 1, "shrink_every", "a whole number >= 1 or None", every)
        samplers = get_args(Sampler)
        require(self.sampler in samplers, "sampler", f"one of {', '.join(samplers)}", self.sampler)
        cuts = not (self.full_pass and self.sampler == "none")
        require(cuts, "full_pass", "False with sampler 'none', which cuts nothing", self.full_pass)
        require(self.keep is None or 0 < self.keep <= 1, "keep", "in (0, 1] or None", self.keep)
        for name in ("ignore_first", "warm_up_steps", "calibration_batches"):
            require(getattr(self, name) >= 0, name, "a whole number >= 0", getattr(self, name))
        require(self.output in get_args(Output), "output", "one of dense, factors", self.output)
        require(self.seed is None or self.seed >= 0, "seed", ">= 0 or None", self.seed)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Factors the model at once, before the Trainer builds its optimizer; draws and shrinks while it trains."""
        refuse_fixed_weights(site.model, site.trainer, full_pass=self.full_pass)
        return OrderedTraining(self, site, record)
