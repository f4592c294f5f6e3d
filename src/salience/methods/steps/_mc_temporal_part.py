"""The parts of `MCTemporalDropout`: what drops steps of a module's input, in training or in every pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError
from salience.core.loop import Loop
from salience.core.part import Part, State
from salience.core.scores import History
from salience.hosts.transformers import unwrap
from salience.methods.steps._mc_temporal_layer import check_series, concrete_penalty

_RECORD_EVERY = 10
_BETAS, _EPS = (0.9, 0.999), 1e-8


class Dropping(Part):
    """Drops steps of what a module is called with."""

    def __init__(self, method: Any, model: nn.Module, record: Attachment, seed: int) -> None:
        super().__init__()
        self.method = method
        self.layer = method.layer(seed)
        self.layer.to(next((p.device for p in model.parameters()), torch.device("cpu")))
        core = unwrap(model)
        known = dict(core.named_modules())
        if method.at is not None and method.at not in known:
            raise StructureError(f"at must be the path of a submodule, got {method.at!r}")
        self._root = core
        self._calls = 0
        self._shares: list[Tensor] = []
        # the root counts and the submodule drops: gradient checkpointing runs only the second one again
        record.hook(core.register_forward_pre_hook(self._count))
        target = known[method.at or ""]
        record.hook(target.register_forward_pre_hook(self._drop, with_kwargs=True))

    def wants(self) -> bool:
        """Whether this forward pass is to lose steps."""
        return True

    def scores(self) -> dict[str, Tensor]:
        return {"rate": self.layer.alpha.detach().cpu()}

    def spent(self) -> dict[str, Any]:
        found: dict[str, Any] = {"rate": round(float(self.layer.alpha.detach()), 4), "passes": self._calls}
        if self._shares:
            found["share dropped in the last pass"] = round(float(self._shares[-1]), 4)
        return found

    def _count(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.wants():
            self._calls += 1

    def _drop(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.wants():
            return None
        place, series = self._series(args, kwargs)
        mask = kwargs.get(self.method.observed)
        seen = None
        if mask is not None:
            seen = mask.bool().any(2) if mask.dim() == 3 else mask.bool()
        self._check(series, seen)
        rows = torch.arange(len(series), device=series.device) + distributed.rank() * len(series)
        drop = self.layer.drop(series, seen, rows=rows, call=self._calls)
        self._shares = [drop.detach().mean()]
        kept = self.layer.mixed(series, seen, drop)
        if isinstance(place, str):
            kwargs = {**kwargs, place: kept}
        else:
            args = (*args[:place], kept, *args[place + 1 :])
        if mask is not None and self.method.mask_axis == "time":
            # a model that is told what is missing is told of the dropped steps too
            gone = drop > 0.5
            gone = gone.unsqueeze(2) if mask.dim() == 3 else gone
            kwargs = {**kwargs, self.method.observed: mask.masked_fill(gone, 0)}
        return args, kwargs

    def _check(self, series: Tensor, seen: Tensor | None) -> None:
        check_series(series, seen)

    def _series(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | str, Tensor]:
        given: dict[int | str, Any] = dict(enumerate(args))
        given.update(kwargs)
        if self.method.series is not None:
            if self.method.series not in given:
                raise StructureError(
                    f"series must be a keyword of the call, one of {', '.join(map(str, kwargs))}, "
                    f"got {self.method.series!r}"
                )
            return self.method.series, given[self.method.series]
        found = [
            (place, value)
            for place, value in given.items()
            if place != self.method.observed and isinstance(value, Tensor)
            and value.dim() == 3 and value.is_floating_point()
        ]  # fmt: skip
        if len(found) != 1:
            raise StructureError(
                "the model must be called with one float tensor [batch, steps, features] or series=... must name "
                f"it, got {len(found)} in {', '.join(map(str, given))}"
            )
        return found[0]


class Training(Dropping):
    """In training only; and the learnt rate's own steps."""

    def __init__(self, method: Any, model: nn.Module, record: Attachment, seed: int) -> None:
        self._in_step = False
        super().__init__(method, model, record, seed)
        self._size = 0
        self._moments = torch.zeros(3)  # Adam: first, second, number of steps
        self._rates = History()
        if method.learn:
            self.histories = {"rate": self._rates}

    def wants(self) -> bool:
        return self._in_step and self._root.training and torch.is_grad_enabled()

    def before_step(self, loop: Loop) -> None:
        self._in_step = True

    def transform_gradients(self, loop: Loop) -> None:
        self._in_step = False
        logit = self.layer.logit
        if logit is None:
            return
        if logit.grad is None:
            raise ConflictError(
                "the loss must depend on the series for a learnt rate, got no gradient for it"
            )
        grad = distributed.all_reduce_mean(logit.grad.detach())
        held = logit.detach().clone().requires_grad_()
        penalty = concrete_penalty(held, weight=self.method.reg, size=self._size)
        with torch.enable_grad():
            grad = grad + torch.autograd.grad(penalty, held)[0]
        logit.grad = None
        self._step(logit, grad)
        if loop.step % _RECORD_EVERY == 0:
            self._rates.add(loop.step, self.layer.alpha.detach().reshape(1))

    def state(self) -> State:
        found: State = {"calls": self._calls, "moments": self._moments.clone()}
        return (
            found if self.layer.logit is None else found | {"logit": self.layer.logit.detach().cpu().clone()}
        )

    def load_state(self, state: State) -> None:
        self._calls = int(state["calls"])
        self._moments = torch.as_tensor(state["moments"]).clone()
        if self.layer.logit is not None:
            with torch.no_grad():
                self.layer.logit.copy_(torch.as_tensor(state["logit"]))

    def _check(self, series: Tensor, seen: Tensor | None) -> None:
        super()._check(series, seen)
        self._size = series.shape[1] * series.shape[2]

    def _step(self, logit: nn.Parameter, grad: Tensor) -> None:
        """Adam without weight decay, which would pull the rate to 0.5; gradients that are not finite are skipped."""
        if not bool(grad.isfinite()):
            return
        value = grad.float().cpu()
        first, second, count = self._moments.unbind()
        first, second = torch.lerp(value, first, _BETAS[0]), torch.lerp(value.square(), second, _BETAS[1])
        count = count + 1
        self._moments = torch.stack((first, second, count))
        mean, spread = first / (1 - _BETAS[0] ** count), second / (1 - _BETAS[1] ** count)
        with torch.no_grad():
            logit.sub_((self.method.rate * mean / (spread.sqrt() + _EPS)).to(logit.device))
