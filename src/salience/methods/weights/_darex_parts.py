"""What DAREx leaves attached: on a model nothing but numbers, on a Trainer AdamR's pull towards the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError
from salience.core.loop import Loop
from salience.core.part import Part
from salience.core.scores import History
from salience.methods.weights._darex_adamr import pull_back, refuse_other_optimizers

if TYPE_CHECKING:
    from salience.methods.weights.darex import DAREx

_RECORD_EVERY = 10


class Sparsified(Part):
    """A model whose delta was pruned."""

    def __init__(self, kept: int, total: int, tensors: int, q: float) -> None:
        super().__init__()
        self._spent = {
            "tensors": tensors,
            "delta entries": total,
            "entries kept": kept,
            "share kept": round(kept / max(total, 1), 4),
            "divided by": q,
        }

    def spent(self) -> dict[str, Any]:
        return dict(self._spent)


class Pull(Part):
    """AdamR on the optimizer of a training run."""

    def __init__(self, method: DAREx, model: nn.Module, record: Attachment) -> None:
        super().__init__()
        self._method, self._record = method, record
        # now and not when training begins: a resumed run starts from weights that are no longer the base's
        self._base = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self._named: dict[str, Tensor] = {}
        self._handle: Any = None
        self._vbar = 1.0
        self._distances = History()
        self.histories = {"distance from the base": self._distances}

    def begin(self, loop: Loop) -> None:
        optimizer = loop.optimizer
        if optimizer is None:
            raise ConflictError("optimizer must be given for the decay of DAREx, got None")
        refuse_other_optimizers(optimizer)
        self._named = {n: p for n, p in loop.model.named_parameters() if n in self._base}
        self._base = {name: self._base[name].to(p.device) for name, p in self._named.items()}
        anchors = {p: self._base[name] for name, p in self._named.items()}

        def pull(*_: Any) -> None:
            self._vbar = pull_back(optimizer, anchors, self._method.decay, self._method.norm)

        self._handle = optimizer.register_step_pre_hook(pull)
        self._record.hook(self._handle)

    def before_step(self, loop: Loop) -> None:
        if loop.step % _RECORD_EVERY == 0:
            self._distances.add(loop.step, self._distance())

    def end(self, loop: Loop) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def scores(self) -> dict[str, Tensor]:
        return {"distance from the base": self._distance()} if self._named else {}

    def spent(self) -> dict[str, Any]:
        told: dict[str, Any] = {"tensors": len(self._base), "decay": self._method.decay}
        if self._named:
            sums = sum(float((p.detach() - self._base[n]).abs().sum()) for n, p in self._named.items())
            told["mean |delta|"] = round(sums / max(sum(p.numel() for p in self._named.values()), 1), 6)
            told["root mean second moment"] = float(f"{self._vbar:.4g}")
        return told

    def _distance(self) -> Tensor:
        """[tensors] mean |p - base|."""
        means = [(p.detach() - self._base[n]).abs().float().mean().cpu() for n, p in self._named.items()]
        return torch.stack(means)
