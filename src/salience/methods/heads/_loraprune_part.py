"""LoRAPrune in a training loop: scores before each optimizer step, masks on their schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from salience.core import distributed, selection
from salience.core.attach import Attachment
from salience.core.errors import ConflictError
from salience.core.loop import Loop
from salience.core.part import Part, State, gradient_bytes
from salience.core.scores import History
from salience.hosts._cutting_lora import LoRA, frozen_weights, lora_of
from salience.hosts.cutting import Group, Kind, Side, dense_gradient, dense_weight, hang_masks
from salience.methods.heads._loraprune_plan import Plan
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

if TYPE_CHECKING:
    from salience.methods.heads.loraprune import LoRAPrune


class Pruning(Part):
    """Scores and masks.

    Args:
        method (LoRAPrune): its settings.
        planned (Plan): what is pruned, in the model that trains, with LoRA on it.
        record (Attachment): takes the masks off.
        total (int | None): T; None takes the loop's.
        seed (int): of random scores.
    """

    def __init__(
        self, method: LoRAPrune, planned: Plan, record: Attachment, total: int | None, seed: int
    ) -> None:
        super().__init__()
        self.method, self.plan = method, planned
        self.removed: tuple[int, int] | None = None  # parameters before and after, once it is cut
        self.finisher: Callable[[], None] | None = None
        self._total = total
        self._loras: dict[str, LoRA] = {}
        for units in planned.units.values():
            for group in units.groups:
                for side in group.sides:
                    self._loras.setdefault(side.place.path, lora_of(*side.place))
        device = next(iter(self._loras.values())).A.device
        self.masks: dict[Kind, Tensor] = {
            kind: mask.to(device) for kind, mask in planned.full_masks().items()
        }
        self._averages = {kind: torch.zeros(mask.shape) for kind, mask in self.masks.items()}
        self._true: dict[Kind, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._updates = self._skipped = self._bytes = 0
        self._handle: Any = None
        self._random = {kind: torch.rand(mask.shape, generator=selection.generator(seed + place))
                        for place, (kind, mask) in enumerate(self.masks.items())}  # fmt: skip
        for kind, units in planned.units.items():
            hang_masks(units, list(self.masks[kind]), record)
        if method.metric == "wanda":
            self._watch_inputs(record)
        record.on_undo(self._unhook)
        if "heads" in self.masks:
            self.histories = {"importance of each head": History()}

    # --- the loop ----------------------------------------------------------------------------------------------

    def begin(self, loop: Loop) -> None:
        if loop.optimizer is None:
            raise ConflictError("optimizer must be given: scores are taken right before its steps, got None")
        if self._total is None:
            self._total = loop.total_steps
        if self._total is None:
            raise ConflictError(
                "steps must be given for a loop that does not know how many there will be, got None"
            )
        self._unhook()
        # after accumulation, un-scaling and clipping; a step that a gradient scaler leaves out is not scored either
        self._handle = loop.optimizer.register_step_pre_hook(lambda *_: self._before_update(loop.step))
        self._want_true_gradients(self.method.metric == "grad")

    def transform_gradients(self, loop: Loop) -> None:
        self._bytes = max(self._bytes, gradient_bytes(loop.model))
        if self.method.metric == "grad":
            # before clipping, whose norm these gradients are not to enter; the norm of z takes any factor out
            self._true = self._scores()
            self._drop_true_gradients()

    def end(self, loop: Loop) -> None:
        self._want_true_gradients(False)
        self._drop_true_gradients()
        self._unhook()

    def finish(self) -> None:
        if self.finisher is not None:
            if not self._updates and any(
                self.plan.counts[kind] < row.shape[1] for kind, row in self.masks.items()
            ):
                raise ConflictError(
                    "finish must come after training: no unit has a score yet, got 0 scored steps"
                )
            self.set_masks(self.method.keep, final=True)
            self.finisher()
            self.finisher = None

    # --- scores ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_update(self, step: int) -> None:
        scores = self._true if self.method.metric == "grad" else self._scores()
        self._squares = {}
        if all(bool(score.isfinite().all()) for score in scores.values()):
            self._updates += 1
            for kind, score in scores.items():
                self._averages[kind] = moved(self._averages[kind], score, self.method.decay)
        else:
            self._skipped += 1
        assert self._total is not None
        method, last = self.method, step == self._total
        ratio = ratio_at(
            step, self._total, start=method.start, target=1 - method.keep, warmup=method.warmup,
            cooldown=method.cooldown,
        )  # fmt: skip
        if last or (step % method.prune_every == 0 and ratio > method.start):
            self.set_masks(1 - ratio, final=last)
            if "heads" in self.masks:
                self.histories["importance of each head"].add(step, self._averages["heads"].flatten())

    def set_masks(self, keep: float, *, final: bool = False) -> None:
        """Mask the least important units of every pruned layer until a share is left, at most as many as planned."""
        for kind, masks in self.masks.items():
            most = masks.shape[1] - self.plan.counts[kind]
            count = most if final else min(masked_count(masks.shape[1], 1 - keep), most)
            averages, now = self._averages[kind], masks.cpu()
            for layer, pruned in enumerate(self.plan.pruned):
                if pruned:
                    now[layer] = lowest_masked(averages[layer], now[layer], count)
            masks.copy_(distributed.broadcast(now))

    def _scores(self) -> dict[Kind, Tensor]:
        """[L, U] for each kind: the sum over a group's projections of their normalised scores, of this step."""
        if self.method.metric == "random":
            return self._random
        return {
            kind: torch.stack([self._group(group) for group in units.groups]).cpu()
            for kind, units in self.plan.units.items()
        }

    def _group(self, group: Group) -> Tensor:
        """[U] the sum of the normalised scores of one group's projections."""
        scores: list[Tensor] = []
        held: tuple[str, Tensor] | None = None
        for side in group.sides:
            # entries of one projection at a time: those of all layers would be as large as the model
            if held is None or held[0] != side.place.path:
                held = None
                held = side.place.path, self._entries(side)
            scores.append(normalised(unit_scores(held[1], side.index, out=side.out)))
        return torch.stack(scores).sum(0)

    @torch.no_grad()
    def _entries(self, side: Side) -> Tensor:
        """[out, in] importance of a projection's entries."""
        lora, module = self._loras[side.place.path], side.place.module
        weight = _wide(dense_weight(module))
        merged = weight + lora.scaling * (_wide(lora.B) @ _wide(lora.A))
        metric = self.method.metric
        if metric == "magnitude":
            return importance(merged)
        if metric == "wanda":
            squares = distributed.all_reduce_sum(self._squares[side.place.path])
            return importance(merged, squares.sqrt())
        if metric == "grad":
            true = dense_gradient(module)
            if true is None:
                raise ConflictError(f"{side.place.path} must get a gradient in every step, got none")
            return importance(merged, distributed.all_reduce_mean(_wide(true)))
        if lora.A.grad is None or lora.B.grad is None:
            raise ConflictError(f"LoRA of {side.place.path} must get a gradient in every step, got none")
        return importance(merged, lora_gradient(*map(_wide, (lora.A, lora.B, lora.A.grad, lora.B.grad))))

    # --- the true gradient and the inputs, for baselines ---------------------------------------------------------

    def _want_true_gradients(self, wanted: bool) -> None:
        if self.method.metric == "grad":
            for _, weight in frozen_weights(list(self.plan.units.values())):
                weight.requires_grad_(wanted)

    def _drop_true_gradients(self) -> None:
        if self.method.metric == "grad":
            for _, weight in frozen_weights(list(self.plan.units.values())):
                weight.grad = None

    def _watch_inputs(self, record: Attachment) -> None:
        places = {
            side.place for units in self.plan.units.values() for group in units.groups for side in group.sides
        }
        for path, module in places:
            record.hook(module.register_forward_pre_hook(self._squared(path)))

    def _squared(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if module.training:
                squares = _wide(args[0].detach()).flatten(0, -2).square().sum(0)
                self._squares[path] = self._squares.get(path, 0.0) + squares

        return hook

    def _unhook(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    # --- what is told and kept -----------------------------------------------------------------------------------

    def kept(self) -> dict[Kind, list[Tensor]]:
        """For each kind and layer the rising indices of the units that stay."""
        return {kind: [row.nonzero().flatten() for row in masks.cpu()] for kind, masks in self.masks.items()}

    def scores(self) -> dict[str, Tensor]:
        return {kind: average.clone() for kind, average in self._averages.items()} if self._updates else {}

    def spent(self) -> dict[str, Any]:
        told: dict[str, Any] = {"units": " and ".join(self.masks)}
        if self.plan.left_out:
            told["left out"] = self.plan.left_out
        for kind, masks in self.masks.items():
            units = self.plan.units[kind]
            each = f" of {units.heads} query heads" if units.heads > 1 else ""
            left = sorted(set(masks.sum(1).tolist()))
            told[f"{kind}{each} kept in a layer"] = f"{' or '.join(map(str, left))} of {units.total}"
        if self.removed is not None:
            before, after = self.removed
            told |= {
                "parameters before": before,
                "parameters": after,
                "share removed": round(1 - after / before, 4),
            }
        told |= {"gradient bytes": self._bytes, "steps scored": self._updates}
        return told | {"steps skipped (score not finite)": self._skipped}

    def draw(self) -> Any:
        from salience.methods.heads._loraprune_picture import draw

        return (
            draw(self._averages, {kind: masks.cpu() for kind, masks in self.masks.items()})
            if self._updates
            else None
        )

    def state(self) -> State:
        tensors = {f"average/{kind}": average for kind, average in self._averages.items()}
        tensors |= {f"mask/{kind}": masks.cpu() for kind, masks in self.masks.items()}
        return {**tensors, "updates": self._updates, "skipped": self._skipped, "bytes": self._bytes}

    def load_state(self, state: State) -> None:
        for kind, masks in self.masks.items():
            average, mask = state[f"average/{kind}"], state[f"mask/{kind}"]
            assert isinstance(average, Tensor) and isinstance(mask, Tensor)
            self._averages[kind] = average.clone()
            masks.copy_(mask)
        self._updates, self._skipped = int(state["updates"]), int(state["skipped"])
        self._bytes = int(state["bytes"])


def _wide(tensor: Tensor) -> Tensor:
    """Without graph, in float32 at least."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
