"""IST, importance-aware sparse tuning: in each step the adapters of a few blocks train, important ones more often.

Scored: the transformer blocks that hold PEFT adapters, by `importance = -I`. I rises for a block whose adapters can
be suppressed without harm: every T_s steps K random halves S_k of the blocks get their adapter output multiplied by
beta, the loss l_k of one probe batch is measured without gradient, and with p = sigmoid(I), once for the update,

    I_i += mu (r_k - mean_j r_j) p_i (1 - p_i)   for each k and each i in S_k,   r_k = exp(-l_k).

Spent: gradients and the activations kept for them. In every step N_u blocks are drawn without replacement with
weights sigmoid(-I); only their adapters train. Inference uses all adapters at full scale.

Paper: arXiv 2410.11772. Official code: antgroup/importance-aware-sparse-tuning-IST-paper (53ab149), ist.py.

Differs from the official code in:
- only PEFT tuner layers are scaled; the official one writes to everything that has `.scaling`, so also to the
  softmax scale of today's attention modules, and gives all modules one scale (wrong under rank_pattern);
- scales, train/eval modes and `requires_grad` come back also when a probe raises or training ends;
- a probe loss that is not finite skips the update instead of ruining the scores; scores stay within +-15;
- N_u is at least 1 (the official int(L / 4) is 0 for fewer than 4 blocks); K candidate sets that do not exist are
  refused, and those that hardly ever come (scores far apart) are drawn uniformly, instead of redrawing for ever;
- probe batches may be held out (`focus(..., data=batches)`); the official ones are training batches, which the score
  can have memorised. Without `data` each update draws its own samples, so that a resumed run probes the same ones;
- score, generator and histories are part of a checkpoint;
- an own generator, the same on every rank; probe losses are averaged over ranks;
- random sparse tuning (`mode="random"`), imported there but not published, is written from its description.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from salience.core import selection
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, TargetError, require
from salience.core.loop import Loop
from salience.core.method import Method
from salience.core.part import Part, Site, State
from salience.core.scores import History
from salience.hosts.freezing import refuse_fixed_training
from salience.hosts.transformers import adapter_layers, structure

Reward = Literal["exp", "neg_loss"]
# a block's adapters: (path, tuner layer), by the block's position
Adapters = Mapping[int, Sequence[tuple[str, nn.Module]]]
_BOUND = 15.0
_TRIES = 100


@dataclass(frozen=True, kw_only=True)
class IST(Method):
    """Train the adapters of only a few blocks in each step, important blocks more often.

    Attributes:
        active_layers (int | None): N_u, blocks whose adapters train in a step; None is a quarter of them, at least 1.
        suppressed_layers (int | None): N_s, blocks suppressed in a probe; None is half of them.
        candidates (int): K, sets of suppressed blocks that are compared in an update, >= 2.
        suppression (float): beta, what a suppressed adapter's output is multiplied by, in [0, 1).
        score_lr (float): mu, step size of the score, > 0.
        score_every (int): T_s, optimizer steps between two updates of the score, >= 1.
        probe_batch_size (int): samples of a probe batch, >= 1.
        mode (str): "importance", or "random" for the ablation without score (RST).
        reward (str): "exp" is exp(-loss); "neg_loss" is -loss, which still moves the score when losses are large.
        layers (str | None): dotted path of the list of blocks, where it is not found by itself.
        seed (int | None): of all draws, >= 0; None takes the run's.
    """

    unit: ClassVar[str] = "layer"
    spends: ClassVar[str] = "train"
    job: ClassVar[str] = "tune"
    hosts: ClassVar[tuple[str, ...]] = ("peft", "transformers", "torch")
    needs: ClassVar[tuple[str, ...]] = ("peft",)
    arxiv: ClassVar[str] = "2410.11772"
    title: ClassVar[str] = (
        "Layer-wise Importance Matters: Less Memory for Better Performance in Parameter-efficient Fine-tuning of "
        "Large Language Models"
    )
    conflicts: ClassVar[dict[str, str]] = {
        "lisa": "both choose the layers that train; LISA does for all weights what IST does for adapters"
    }

    active_layers: int | None = None
    suppressed_layers: int | None = None
    candidates: int = 3
    suppression: float = 0.25
    score_lr: float = 10.0
    score_every: int = 10
    probe_batch_size: int = 16
    mode: Literal["importance", "random"] = "importance"
    reward: Reward = "exp"
    layers: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("candidates", 2), ("score_every", 1), ("probe_batch_size", 1)):
            value = getattr(self, name)
            require(isinstance(value, int) and value >= least, name, f"a whole number >= {least}", value)
        for name in ("active_layers", "suppressed_layers"):
            value = getattr(self, name)
            valid = value is None or (isinstance(value, int) and value >= 1)
            require(valid, name, "a whole number >= 1 or None", value)
        require(0 <= self.suppression < 1, "suppression", "in [0, 1)", self.suppression)
        require(math.isfinite(self.score_lr) and self.score_lr > 0, "score_lr", "> 0", self.score_lr)
        require(self.mode in ("importance", "random"), "mode", "one of importance, random", self.mode)
        require(self.reward in ("exp", "neg_loss"), "reward", "one of exp, neg_loss", self.reward)
        require(self.seed is None or self.seed >= 0, "seed", ">= 0 or None", self.seed)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Scores and freezes adapters at the start of optimizer steps."""
        try:
            adapters = adapter_layers(site.model, layers=self.layers)
        except StructureError as error:
            kinds = [config.peft_type for config in getattr(site.model, "peft_config", {}).values()]
            found = ", ".join(str(getattr(kind, "value", kind)) for kind in kinds) or "no PEFT adapters"
            raise TargetError(
                "target of IST must be a model whose blocks hold PEFT adapters with a scale (LoRA, DoRA, LoHa ...; "
                f"prefix and prompt tuning have none), got {found} in a {type(site.model).__name__}: {error}"
            ) from error
        refuse_fixed_training(site.trainer, "IST")
        dataset = getattr(site.trainer, "train_dataset", None)
        if self.mode == "importance" and site.data is None and not hasattr(dataset, "__len__"):
            raise ConflictError(
                "data must be a sequence of batches to probe with, for a loop of one's own or a streamed training "
                "set, got None"
            )
        return _Importance(self, adapters, site)


def suppress_weights(score: Tensor) -> Tensor:
    """Unnormalised weights of being suppressed in a probe, sigmoid(I): [L] of [L]."""
    return score.sigmoid()


def train_weights(score: Tensor) -> Tensor:
    """Unnormalised weights of being trained in a step, sigmoid(-I): [L] of [L]."""
    return (-score).sigmoid()


def draw_sets(weights: Tensor, size: int, count: int, random: torch.Generator) -> Tensor:
    """Draw `count` different sets of `size` distinct blocks; a set that was drawn already is drawn again.

    When that fails `_TRIES` times, because the weights leave next to no other set, the draws become uniform.

    Args:
        weights (Tensor): [L] unnormalised, positive.
        size (int): N_s, in [1, L - 1].
        count (int): K, at most the number of such sets.
        random (torch.Generator): on the CPU.

    Returns:
        Tensor: [K, N_s] int64, each row rising.
    """
    sets: list[list[int]] = []
    failed = 0
    while len(sets) < count:
        drawn = selection.draw(weights, size, random).tolist()
        if drawn not in sets:
            sets.append(drawn)
            continue
        failed += 1
        if failed == _TRIES:
            weights = torch.ones_like(weights)
    return torch.tensor(sets)


def updated_scores(
    score: Tensor, sets: Tensor, losses: Sequence[float], *, score_lr: float = 10.0, reward: Reward = "exp"
) -> Tensor:
    """One update of the score; the rule is at the top of this file.

    Args:
        score (Tensor): [L] I, float.
        sets (Tensor): [K, N_s] int64, the blocks suppressed in each probe.
        losses (Sequence[float]): K finite probe losses.
        score_lr (float): mu.
        reward (str): how a loss becomes a reward.

    Returns:
        Tensor: [L] the new score, within +-15; as it was when the losses are equal.
    """
    rewards = [math.exp(-loss) if reward == "exp" else -loss for loss in losses]
    mean = sum(rewards) / len(rewards)
    slope = suppress_weights(score) * (1 - suppress_weights(score))
    moved = score.clone()
    for one, worth in zip(sets, rewards, strict=True):
        moved[one] += score_lr * (worth - mean) * slope[one]
    return moved.clamp(-_BOUND, _BOUND)


@contextmanager
def suppressed(layers: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Inside the block the active adapters of these tuner layers are scaled by `factor`; then exactly as before."""
    scales: list[dict[str, float]] = [layer.scaling for layer in layers]  # type: ignore[misc]
    before = [dict(one) for one in scales]
    try:
        for layer, one in zip(layers, scales, strict=True):
            for name in layer.active_adapters:  # type: ignore[union-attr]
                if name in one:
                    one[name] *= factor
        yield
    finally:
        for one, old in zip(scales, before, strict=True):
            one.update(old)


def probe_sets(
    loop: Loop, adapters: Adapters, sets: Tensor, batch: Mapping[str, Any], *, suppression: float = 0.25
) -> list[float]:
    """Loss of one batch under each set of suppressed blocks, in eval mode without gradient, averaged over ranks.

    Args:
        loop (Loop): runs the forward passes.
        adapters (Adapters): from `salience.hosts.transformers.adapter_layers`.
        sets (Tensor): [K, N_s] int64; i stands for the i-th block of `adapters`.
        batch (Mapping): what the model is called with, labels included.
        suppression (float): beta.

    Returns:
        list[float]: K losses.
    """
    blocks = [[layer for _, layer in block] for block in adapters.values()]
    losses = []
    for chosen in sets.tolist():
        with suppressed([layer for index in chosen for layer in blocks[index]], suppression):
            losses.append(loop.probe_loss(batch))
    return losses


class _Importance(Part):
    def __init__(self, method: IST, adapters: Adapters, site: Site) -> None:
        super().__init__()
        self._method = method
        self._adapters = adapters
        self._seed = site.seed if method.seed is None else method.seed
        self._random = selection.generator(self._seed)
        self._blocks, self._outside, self._counts = _trained_names(site.model, adapters, method.layers)
        self._sizes = _sizes(method, len(self._blocks))
        self._score = torch.zeros(len(self._blocks))
        self._active = torch.empty(0, dtype=torch.int64)
        self._updates = self._skipped = 0
        if method.mode == "importance":
            self.histories = {"importance": History()}

    def begin(self, loop: Loop) -> None:
        for history in self.histories.values():
            history.add(loop.step, -self._score)

    def before_step(self, loop: Loop) -> None:
        scoring = self._method.mode == "importance"
        if scoring and loop.step > 0 and loop.step % self._method.score_every == 0:
            self._update(loop)
        weights = train_weights(self._score) if scoring else torch.ones_like(self._score)
        self._active = selection.draw(weights, self._sizes[0], self._random)

    def _update(self, loop: Loop) -> None:
        method = self._method
        # samples depend on the step alone, so that a resumed run probes those of an unbroken one
        samples = selection.generator((self._seed % 2**40 << 20) + loop.step)
        batch = next(iter(loop.sampled_batches(method.probe_batch_size, samples)))
        sets = draw_sets(suppress_weights(self._score), self._sizes[1], method.candidates, self._random)
        losses = probe_sets(loop, self._adapters, sets, batch, suppression=method.suppression)
        self._updates += 1
        if all(map(math.isfinite, losses)):
            self._score = updated_scores(
                self._score, sets, losses, score_lr=method.score_lr, reward=method.reward
            )
        else:
            self._skipped += 1
        self.histories["importance"].add(loop.step, -self._score)

    def trainable(self) -> set[str]:
        return self._outside.union(*(self._blocks[index] for index in self._active.tolist()))

    def scores(self) -> dict[str, Tensor]:
        return {"importance": -self._score} if self._method.mode == "importance" else {}

    def spent(self) -> dict[str, Any]:
        active = self._active.tolist()
        inside = [sum(self._counts[name] for name in block) for block in self._blocks]
        return {
            "layers": len(self._blocks),
            "trained now": active,
            "share of adapter parameters": round(
                sum(inside[index] for index in active) / max(sum(inside), 1), 4
            ),
            "probe forward passes": self._updates * self._method.candidates,
            "updates skipped (loss not finite)": self._skipped,
        }

    def state(self) -> State:
        return {
            "score": self._score,
            "active": self._active,
            "generator": self._random.get_state(),
            "updates": self._updates,
            "skipped": self._skipped,
        }

    def load_state(self, state: State) -> None:
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        self._score, self._active = tensors["score"], tensors["active"]
        self._random.set_state(tensors["generator"])
        self._updates, self._skipped = int(state["updates"]), int(state["skipped"])


def _sizes(method: IST, total: int) -> tuple[int, int]:
    """(blocks that train, blocks that are suppressed), checked against the number of blocks with adapters."""
    require(total >= 2, "layers with adapters", "at least 2", total)
    active = max(1, int(0.25 * total)) if method.active_layers is None else method.active_layers
    hidden = int(0.5 * total) if method.suppressed_layers is None else method.suppressed_layers
    require(active <= total, "active_layers", f"at most the model's {total} layers with adapters", active)
    if method.mode == "importance":
        wanted = f"less than the model's {total} layers with adapters"
        require(hidden < total, "suppressed_layers", wanted, hidden)
        sets = math.comb(total, hidden)
        wanted = f"at most {sets}, the ways to suppress {hidden} of {total} layers"
        require(sets >= method.candidates, "candidates", wanted, method.candidates)
    return active, hidden


def _trained_names(
    model: nn.Module, adapters: Adapters, layers: str | None
) -> tuple[list[set[str]], set[str], dict[str, int]]:
    """(trained parameters of each block with adapters, those of no block, sizes), as the user left them.

    What else trains in a block (biases or norms that go with the adapters) goes with its adapters. A block without
    adapters never trains.
    """
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = structure(model, layers=layers).layers
    inside = [{names[id(p)] for p in layer.module.parameters() if id(p) in names} for layer in found]
    counts = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return [inside[index] for index in adapters], set(counts).difference(*inside), counts
