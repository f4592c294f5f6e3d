"""LISA: full fine-tuning of a few blocks at a time, drawn again every few steps.

Scored: nothing. Despite the name the blocks are drawn uniformly: the motive (under LoRA the weight norms of the
embedding and the head dwarf those of the blocks between) argues for always training those two, not for a score.
Spent: training. At optimizer step t with t mod K = 0, gamma of the N_L blocks are drawn without replacement; only
they, and what lies outside of the blocks, get gradients and optimizer state until the next draw. The learning-rate
schedule runs on. A saved model is an ordinary full model.

Paper: arXiv 2403.17919 (section 3). Official code: OptimalScale/LMFlow (f3597db), pipeline/utils/lisa_trainer.py.

Differs from the official code in:
- optimizer state of blocks that are frozen again is dropped, so that its memory is really free; the official code
  keeps it, and after N_L / gamma periods holds as much as full fine-tuning (`state="keep"` is that behaviour);
- nothing is frozen before the optimizer exists: a block that is frozen then is missing in it and never trains;
- parameters that the user froze stay frozen when their block is drawn;
- the active set and the generator are part of a checkpoint; the official run trains all blocks after a resume, until
  the next draw;
- an own generator, the same on every rank, instead of numpy's global one;
- embedding and head may take part in the draw (`sample_embeddings`): with a large vocabulary they are most of what
  LISA trains;
- blocks are found in any model, not by a table of class names.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from salience.core import selection
from salience.core.attach import Attachment
from salience.core.errors import ParameterError, TargetError, require
from salience.core.loop import Loop
from salience.core.method import Method
from salience.core.part import Part, Site, State, gradient_bytes, optimizer_bytes, parameter_bytes
from salience.core.scores import History
from salience.hosts.freezing import refuse_fixed_training
from salience.hosts.transformers import structure


@dataclass(frozen=True, kw_only=True)
class LISA(Method):
    """Fine-tune all weights, but only a few randomly chosen blocks at a time.

    What lies outside of the blocks (embedding, head, final norm) always trains.

    Attributes:
        active_layers (int): gamma, the blocks that train at a time, >= 0. The paper: 2 for 1-7B models, 4 for 70B.
        interval (int): K, optimizer steps between two draws, >= 1.
        state (str): optimizer state of blocks that are frozen again: "drop" deletes it, "keep" leaves it in memory
            (the official code), "reset" clears the whole optimizer at every draw (the paper's own runs).
        sample_embeddings (bool): the embedding and the head (one unit if they are tied) are drawn as two more units
            beside the blocks, so that `active_layers` units of all train, and only the rest is always on.
        probabilities (tuple[float, ...] | None): unnormalised weights of the draw, one for each block (then for
            embedding and head), at least `active_layers` of them positive. None is uniform.
        layers (str | None): dotted path of the list of blocks, where it is not found by itself.
        seed (int | None): of the draws, >= 0; None takes the run's.
    """

    unit: ClassVar[str] = "layer"
    spends: ClassVar[str] = "train"
    job: ClassVar[str] = "tune"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2403.17919"
    title: ClassVar[str] = (
        "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning"
    )
    conflicts: ClassVar[dict[str, str]] = {
        "ist": "both choose the layers that train; IST does for adapters what LISA does for all weights"
    }

    active_layers: int = 2
    interval: int = 20
    state: Literal["drop", "keep", "reset"] = "drop"
    sample_embeddings: bool = False
    probabilities: tuple[float, ...] | None = None
    layers: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        gamma, interval = self.active_layers, self.interval
        require(isinstance(gamma, int) and gamma >= 0, "active_layers", "a whole number >= 0", gamma)
        require(isinstance(interval, int) and interval >= 1, "interval", "a whole number >= 1", interval)
        require(self.state in ("drop", "keep", "reset"), "state", "one of drop, keep, reset", self.state)
        require(self.seed is None or self.seed >= 0, "seed", ">= 0 or None", self.seed)
        if self.probabilities is not None:
            valid = all(math.isfinite(weight) and weight >= 0 for weight in self.probabilities)
            require(valid, "probabilities", "finite and >= 0", self.probabilities)
            positive = sum(weight > 0 for weight in self.probabilities)
            wanted = f"positive in at least active_layers = {gamma} places"
            require(positive >= gamma, "probabilities", wanted, self.probabilities)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Freezes and trains blocks in every optimizer step."""
        if hasattr(site.model, "peft_config"):
            raise TargetError(
                "target of LISA must be a model without PEFT adapters (IST is that method for adapters), got a "
                f"{type(site.model).__name__}"
            )
        refuse_fixed_training(site.trainer, "LISA")
        found = units(site.model, layers=self.layers, sample_embeddings=self.sample_embeddings)
        return Sampling(self, found, site.model, site.seed if self.seed is None else self.seed)


def units(
    model: nn.Module, *, layers: str | None = None, sample_embeddings: bool = False
) -> dict[str, frozenset[str]]:
    """What is drawn from: path of each block -> names of its parameters; then embedding and head, if they take part.

    A parameter that is shared belongs to the first that holds it; an embedding and a head that share a weight are
    one unit.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = structure(model, layers=layers)
    parts = [*found.layers]
    held: dict[str, frozenset[str]] = {}
    for part in parts:
        held[part.path] = frozenset(names[id(p)] for p in part.module.parameters())
    if sample_embeddings:
        ends = [part for part in (found.embeddings, found.head) if part is not None]
        for end in ends[:1] if found.tied else ends:
            held[end.path] = frozenset(names[id(p)] for p in end.module.parameters())
    taken: set[str] = set()
    for path, mine in held.items():
        held[path] = mine - taken
        taken |= mine
    return held


def needed_bytes(
    frozen: int, trained: int, *, weight: int = 2, gradient: int = 2, moments: int = 8, master: int = 0
) -> int:
    """Bytes of weights, gradients and AdamW state, by numbers of parameters; the paper's setting by default.

    Args:
        frozen (int): parameters that do not train now and hold no state.
        trained (int): parameters that train now.
        weight (int): bytes of a weight.
        gradient (int): bytes of a gradient.
        moments (int): bytes of both moments.
        master (int): bytes of an fp32 copy of the weight, where there is one.
    """
    return frozen * weight + trained * (weight + gradient + moments + master)


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Exact bytes that are allocated now, on this rank: {"weights", "gradients", "optimizer"}."""
    return {
        "weights": parameter_bytes(model),
        "gradients": gradient_bytes(model),
        "optimizer": optimizer_bytes(optimizer),
    }


class Sampling(Part):
    """The units that train now, drawn again every `interval` optimizer steps."""

    def __init__(self, method: LISA, found: dict[str, frozenset[str]], model: nn.Module, seed: int) -> None:
        super().__init__()
        self._method = method
        self._units = tuple(found.values())
        self._counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
        self._outside = set(self._counts).difference(*self._units)
        self._weights = self._checked_weights()
        self._random = selection.generator(seed)
        self._active: Tensor | None = None
        self._forced: Iterator[Sequence[int]] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self.histories = {"trained": History()}

    def _checked_weights(self) -> Tensor:
        given, gamma = self._method.probabilities, self._method.active_layers
        total = len(self._units)
        require(gamma <= total, "active_layers", f"at most the model's {total} layers", gamma)
        if given is not None and len(given) != total:
            raise ParameterError(
                f"probabilities must be {total} numbers, one for each unit, got {len(given)}"
            )
        weights = torch.ones(total) if given is None else torch.tensor(given)
        # a block that the user froze as a whole has nothing to train
        usable = torch.tensor([not unit.isdisjoint(self._counts) for unit in self._units])
        weights = weights * usable
        left = int((weights > 0).sum())
        require(gamma <= left, "active_layers", f"at most the {left} layers that may train", gamma)
        return weights

    def force(self, sets: Iterable[Sequence[int]]) -> None:
        """Take the next active sets from here instead of drawing them, to repeat a known run."""
        self._forced = iter(sets)

    def begin(self, loop: Loop) -> None:
        self._optimizer = loop.optimizer

    def before_step(self, loop: Loop) -> None:
        if self._active is None or loop.step % self._method.interval == 0:
            self._switch(loop)

    def _switch(self, loop: Loop) -> None:
        if self._forced is not None:
            self._active = torch.tensor(sorted(next(self._forced)), dtype=torch.int64)
        else:
            self._active = selection.draw(self._weights, self._method.active_layers, self._random)
        if self._method.state == "reset":
            loop.drop_optimizer_state(self._counts)
        elif self._method.state == "drop":
            loop.drop_optimizer_state(self._counts.keys() - self.trainable())
        self.histories["trained"].add(
            loop.step, torch.zeros(len(self._units)).index_fill(0, self._active, 1.0)
        )

    def trainable(self) -> set[str]:
        active = [] if self._active is None else self._active.tolist()
        return self._outside.union(*(self._units[index] for index in active))

    def scores(self) -> dict[str, Tensor]:
        return {"probability": self._weights / self._weights.sum().clamp_min(torch.finfo(torch.float32).tiny)}

    def spent(self) -> dict[str, Any]:
        trained = sum(self._counts.get(name, 0) for name in self.trainable())
        return {
            "layers": len(self._units),
            "trained now": [] if self._active is None else self._active.tolist(),
            "parameters trained now": trained,
            "share of parameters": round(trained / sum(self._counts.values()), 4),
            "optimizer bytes": optimizer_bytes(self._optimizer),
        }

    def state(self) -> State:
        active = torch.empty(0, dtype=torch.int64) if self._active is None else self._active
        return {
            "drawn": self._active is not None,
            "active": active,
            "generator": self._random.get_state(),
        }

    def load_state(self, state: State) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._active = tensors["active"] if state["drawn"] else None
        self._random.set_state(tensors["generator"])
