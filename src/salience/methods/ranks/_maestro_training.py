"""What Maestro does in a training loop: draws, penalty, shrinking, and the cut at the end."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ConflictError
from salience.core.loop import Loop
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History
from salience.hosts.factored import write_factors_on_save
from salience.methods.ranks._maestro_accounting import ranks_for_budget, stored
from salience.methods.ranks._maestro_decomposition import (
    Factors,
    Places,
    drop_tail,
    find_layers,
    has_batch_norms,
    put,
    recalibrate,
    shrink,
)
from salience.methods.ranks._maestro_lasso import importance
from salience.methods.ranks._maestro_layers import FactoredLayer, factored, split
from salience.methods.ranks._maestro_picture import Spectrum, draw_spectra
from salience.methods.ranks._maestro_sampler import OrderedRanks

if TYPE_CHECKING:
    from collections.abc import Callable

    from salience.methods.ranks.maestro import Maestro


class OrderedTraining(Part):
    """Maestro's working state on one model."""

    def __init__(self, method: Maestro, site: Site, record: Attachment) -> None:
        super().__init__()
        self._method, self._model, self._trainer = method, site.model, site.trainer
        self.penalizes = True
        self.weights_tokens = method.full_pass  # so that the penalty is given the batch and its logits
        self._places: Places = find_layers(
            site.model, ignore_first=method.ignore_first, ignore_last=method.ignore_last
        )
        self._layers = Factors({path: factored(layer) for path, (layer, _) in self._places.items()})
        self._spectra: dict[str, Spectrum] = {}
        if method.keep is not None:
            self._budget(method.keep)  # refuses a share that no ranks reach, before anything is changed
        for path, (_, owners) in self._places.items():
            put(owners, self._layers[path])
        self._own = Attachment()
        self._own.on_undo(lambda: self._put(lambda layer: layer.dense()))
        record.on_undo(self._own.undo)
        self._seed = site.seed if method.seed is None else method.seed
        self._draws = OrderedRanks(self._layers.ranks, seed=self._seed)
        self._epoch = 0
        self._loop: Loop | None = None
        self._history = History()
        self.histories = {"rank of each layer": self._history}

    # --- training ----------------------------------------------------------------------------------------------

    def begin(self, loop: Loop) -> None:
        if not self._layers:
            return
        self._loop = loop
        if loop.step == 0:
            # a second run, or the first; a resumed one gets its own numbers after this
            self._epoch, self._draws = 0, OrderedRanks(self._layers.ranks, seed=self._seed)
        self._refuse_other_optimizer(loop.optimizer)
        for layer in self._layers.values():
            layer.take_over()
        if not self._history.steps:
            self._note(loop.step)

    def before_step(self, loop: Loop) -> None:
        method, step = self._method, loop.step
        if not self._layers:
            return  # finished: the model is an ordinary one that trains on
        if method.warm_up_steps and step == method.warm_up_steps:
            self._split_again(loop)
        if self._due(step):
            self._shrink(step)
        self._layers.cut(None)
        if not method.full_pass:
            self._cut(step)

    def penalty(self, batch: Batch | None, loop: Loop) -> Tensor:
        method = self._method
        if loop.step < method.warm_up_steps:
            return next(iter(self._layers.values())).U.new_zeros(())
        total = method.weight * self._layers.penalty(hierarchical=method.hierarchical)
        if method.full_pass and batch is not None:
            self._cut(loop.step)
            outputs = loop.model(**batch.inputs)
            self._layers.cut(None)
            cut = outputs["logits"] if isinstance(outputs, dict) else outputs.logits
            total = total + match_loss(cut, batch.logits, batch.active, shifted=loop.shifted).to(total.device)
        return total

    def end(self, loop: Loop) -> None:
        self._layers.cut(None)
        # a run that stopped in its first steps has nothing to shrink by
        if self._layers and loop.step > self._method.warm_up_steps:
            self._shrink(loop.step)

    def state(self) -> State:
        return {
            "ranks": torch.tensor(self._layers.ranks),
            "start": self._draws.start,
            "epoch": self._epoch,
        }

    def load_state(self, state: State) -> None:
        for layer, rank in zip(self._layers.values(), torch.as_tensor(state["ranks"]).tolist(), strict=True):
            layer.rank = rank
        self._draws = OrderedRanks(self._layers.ranks, seed=self._seed, start=int(state["start"]))
        self._epoch = int(state["epoch"])

    def _cut(self, step: int) -> None:
        method = self._method
        if method.sampler == "none" or step < method.warm_up_steps:
            return
        if method.sampler == "pair":
            self._layers.cut(self._draws.at(step))
        else:
            for layer, rank in zip(self._layers.values(), self._draws.independent(step)):
                layer.cut = rank

    def _due(self, step: int) -> bool:
        every = self._method.shrink_every
        if every is None:
            state = getattr(self._trainer, "state", None)
            epoch = int(state.epoch or 0) if state is not None else 0
            passed, self._epoch = epoch > self._epoch, epoch
        else:
            passed = step > 0 and step % every == 0
        return passed and self._method.progressive and step > self._method.warm_up_steps

    def _shrink(self, step: int) -> None:
        method, before = self._method, self._layers.ranks
        optimizer = self._loop.optimizer if self._loop is not None else None
        shrink(
            self._layers, method.eps, relative=method.relative, hierarchical=method.hierarchical,
            optimizer=optimizer,
        )  # fmt: skip
        if self._layers.ranks != before:
            self._draws = OrderedRanks(self._layers.ranks, seed=self._seed, start=step)
        self._note(step)

    def _note(self, step: int) -> None:
        if not self._history.steps or self._history.steps[-1] != step:
            self._history.add(step, torch.tensor(self._layers.ranks))

    @torch.no_grad()
    def _split_again(self, loop: Loop) -> None:
        for layer in self._layers.values():
            U, V = split(layer.U @ layer.V.flatten(1))
            # signs of a decomposition may differ between devices
            layer.U.copy_(distributed.broadcast(U))
            layer.V.copy_(distributed.broadcast(V).reshape(layer.V.shape))
        factors = {id(p) for layer in self._layers.values() for p in (layer.U, layer.V)}
        loop.drop_optimizer_state(name for name, p in loop.model.named_parameters() if id(p) in factors)

    def _refuse_other_optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        if optimizer is None:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [path for path, layer in self._layers.items() if id(layer.U) not in held]
        if missing:
            raise ConflictError(
                "optimizer must be built after Maestro was attached, so that it trains the factors, got one without "
                f"those of {missing[0]}"
            )

    # --- cutting -----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        if not len(self._own):
            return
        method = self._method
        if method.keep is not None:
            for layer, rank in zip(self._layers.values(), self._budget(method.keep)):
                if rank < layer.rank:
                    drop_tail(layer, rank)
            self._note(self._loop.step if self._loop is not None else 0)
        self._recalibrate(self._loop)
        self._spectra = self._now()
        smaller = method.output == "factors"
        self._put(lambda layer: layer.factors() if smaller and layer.smaller else layer.dense())
        self._own.forget()
        self._layers.clear()
        self.penalizes = self.weights_tokens = False
        if smaller:
            write_factors_on_save(self._model)

    def _put(self, make: Callable[[FactoredLayer], nn.Module]) -> None:
        for path, (_, owners) in self._places.items():
            put(owners, make(self._layers[path]))
        if self._trainer is not None and self._loop is not None:
            # it trains the factors, which are no part of the model any more
            self._trainer.optimizer = self._trainer.lr_scheduler = None

    def _budget(self, keep: float) -> list[int]:
        now = self._now().values()
        return ranks_for_budget([one.values[: one.rank] for one in now], [one.shape for one in now], keep)

    def _recalibrate(self, loop: Loop | None) -> None:
        most = self._method.calibration_batches
        if loop is None or not most or not has_batch_norms(self._model):
            return
        if self._trainer is None and loop.data is None:
            return  # the loop's owner has the data, and `recalibrate`
        size = self._trainer.args.train_batch_size if self._trainer is not None else 1
        recalibrate(self._model, (loop.to_device(one) for one in islice(loop.ordered_batches(size), most)))

    # --- what is shown -----------------------------------------------------------------------------------------

    def _now(self) -> dict[str, Spectrum]:
        return self._spectra or {
            path: Spectrum(importance(one.U, one.V).cpu(), one.rank, one.shape, one.positions)
            for path, one in self._layers.items()
        }

    def scores(self) -> dict[str, Tensor]:
        return {f"{path}.importance": one.values for path, one in self._now().items()}

    def spent(self) -> dict[str, Any]:
        now = list(self._now().values())
        dense = sum(one.shape[0] * one.shape[1] for one in now)
        held = sum(stored(one.rank, *one.shape) for one in now)
        work = sum(one.positions * one.shape[0] * one.shape[1] for one in now)
        least = sum(one.positions * stored(one.rank, *one.shape) for one in now)
        return {
            "layers": len(now),
            "components": sum(len(one.values) for one in now),
            "components kept": sum(one.rank for one in now),
            "weights of these layers, dense": dense,
            "weights of these layers, as factors where smaller": held,
            "weights of these layers, as finished": dense if self._method.output == "dense" else held,
            "multiply-adds of a position, dense": work,
            "multiply-adds of a position, as factors where smaller": least,
        }

    def draw(self) -> Any:
        return draw_spectra(self._now())


def match_loss(cut: Tensor, full: Tensor, active: Tensor, *, shifted: bool) -> Tensor:
    """Cross-entropy between what the full model says and what the cut one says, over the tokens that have a loss.

    Args:
        cut (Tensor): [B, T, V] or [B, C] logits, with graph.
        full (Tensor): logits of the same shape; no gradient flows into them.
        active (Tensor): [B, T] bool in the columns of the labels, [B, 1] for classes.
        shifted (bool): whether column t is what position t - 1 predicts.

    Returns:
        Tensor: [] nats, the mean; 0 without any such token.
    """
    losses = -(full.detach().float().softmax(-1) * cut.float().log_softmax(-1)).sum(-1)
    if losses.dim() == 1:
        losses = losses.unsqueeze(-1)
    elif shifted:
        losses, active = losses[:, :-1], active[:, 1:]
    return torch.where(active, losses, 0.0).sum() / active.sum().clamp_min(1)
