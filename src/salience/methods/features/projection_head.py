"""A projection head for training only: the loss acts behind it, and the representation in front of it is kept.

Scored: the features of a representation f(x) [.., N], by their place. Spent: a head h between them and the loss,
thrown away afterwards. What the loss (or its augmentation, or coarse labels) wants gone goes mostly behind the head;
in front of it features stay more even, which serves other tasks. Heads: an MLP (`mlp`), one layer (`linear`), or the
fixed one without parameters, `z_i = kappa^-i h_i` (`fixed`): a few first features carry the loss, the rest is free.
The loss is the supervised contrastive one, `log sum_{b != a} exp(s_ab) - mean_{b in P_a} s_ab` with
`s = cos / temperature`.

Paper: arXiv 2403.11391. Official code: jiayini1119/projection-head-experiments (a145e06; of a co-author).

Differs from the official code in:
- the weights are `exp(-i log kappa)` in float64, then fp32 (`1 / kappa**i` overflows from kappa 1.42 on at N = 2048),
  and a buffer that no state dict holds: there they are a frozen parameter, so that a checkpoint overrides kappa;
- head, similarities and loss are fp32 under autocast (in fp16 most weights are 0 at N = 2048);
- a sample without another one of its label is left out, where the code stops with "supcon_loss is nan"; the logarithm
  of the sum is taken stably; rows of zeros give finite gradients;
- each kind of head works (there an MLP without kappa raises in its forward, and the MLP variant is commented out);
- over ranks the loss can compare all samples (`gather`), with the gradient of one process;
- on a Trainer the head is no part of the model: a saved model is an ordinary one without it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, require
from salience.core.loop import Loop
from salience.core.losses import IGNORE
from salience.core.method import Method
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History
from salience.hosts.classifier import find_classifier
from salience.hosts.transformers import unwrap
from salience.methods.features._projection_head_parts import (
    KINDS,
    FixedHead,
    check_kappa,
    fixed_weights,
    make_head,
    supervised_contrastive,
    symmetric_relu,
)

__all__ = [
    "FixedHead", "TrainOnlyHead", "fixed_weights", "make_head", "supervised_contrastive", "symmetric_relu",
]  # fmt: skip
_RECORD_EVERY = 10


@dataclass(frozen=True, kw_only=True)
class ProjectionHead(Method):
    """Train a representation through a head that is dropped afterwards, with a supervised contrastive loss.

    On a Trainer the loss is added to the model's own, on what its classifier reads. `wrap` is for loops of one's own.

    Attributes:
        kind (str): "mlp", "linear", "fixed" or "none".
        kappa (float): of "fixed", >= 1; 1 is no head.
        hidden (int | None): width inside of "mlp"; None is that of the features.
        out (int | None): width behind "mlp" and "linear"; None is that of the features.
        identity (bool): "mlp" and "linear" start as the identity.
        temperature (float): of the loss, > 0.
        weight (float): of the loss on a Trainer, > 0.
        probe (bool): on a Trainer: the model's own loss trains the classifier alone, so that only the contrastive
            loss shapes the features.
        gather (bool): compare with the samples of all ranks.
        classifier (str | None): path of the linear layer that reads the features; None finds it.

    Example:
        >>> import torch, salience as sal
        >>> from salience.sandbox.views import coarse_digits, two_views
        >>> data, random = coarse_digits(), torch.Generator().manual_seed(0)
        >>> model = sal.ProjectionHead(kind="fixed", kappa=1.2).wrap(torch.nn.Linear(64, 32), features=32)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for rows in torch.arange(1024).split(128):
        ...     z = model(two_views(data.train_images[rows], random))
        ...     loss = sal.supervised_contrastive(z, data.coarse_labels[rows])
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> model.representation(data.probe_images).shape
        torch.Size([400, 32])
    """

    unit: ClassVar[str] = "feature"
    spends: ClassVar[str] = "weight"
    job: ClassVar[str] = "pretrain"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2403.11391"
    title: ClassVar[str] = "Investigating the Benefits of Projection Head for Representation Learning"

    kind: Literal["none", "linear", "mlp", "fixed"] = "mlp"
    kappa: float = 1.05
    hidden: int | None = None
    out: int | None = None
    identity: bool = False
    temperature: float = 0.5
    weight: float = 1.0
    probe: bool = False
    gather: bool = True
    classifier: str | None = None

    def __post_init__(self) -> None:
        require(self.kind in KINDS, "kind", f"one of {', '.join(KINDS)}", self.kind)
        check_kappa(self.kappa)
        for name in ("hidden", "out"):
            width = getattr(self, name)
            require(width is None or width >= 1, name, "None or >= 1", width)
        for name in ("temperature", "weight"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, name, "> 0 and finite", value)

    def head(self, features: int, *, seed: int = 0) -> nn.Module:
        """The head [..., N] -> [..., out]."""
        return make_head(
            self.kind, features, kappa=self.kappa, hidden=self.hidden, out=self.out, identity=self.identity, seed=seed
        )  # fmt: skip

    def wrap(self, encoder: nn.Module, features: int, *, seed: int = 0) -> TrainOnlyHead:
        """An encoder whose result has N features, with the head behind it."""
        return TrainOnlyHead(encoder, self.head(features, seed=seed))

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Adds the loss to every training step; the head trains with an AdamW of its own at the model's rate."""
        return _Contrast(self, site, record)


class TrainOnlyHead(nn.Module):
    """An encoder with a head that only the loss sees.

    Args:
        encoder (nn.Module): whatever it is called with, returns [..., N].
        head (nn.Module): [..., N] -> [..., out].

    Shape:
        forward: the head's [..., out]; `representation`: the encoder's [..., N]; `both`: the two, from one pass.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the loss sees."""
        z: Tensor = self.head(self.encoder(*args, **kwargs))
        return z

    def representation(self, *args: Any, **kwargs: Any) -> Tensor:
        """What is kept."""
        h: Tensor = self.encoder(*args, **kwargs)
        return h

    def both(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Representation and projection."""
        h = self.encoder(*args, **kwargs)
        return h, self.head(h)

    def save_pretrained(self, folder: Any, **settings: Any) -> Any:
        """Write the encoder alone, if it can be written."""
        encoder: Any = self.encoder
        return encoder.save_pretrained(folder, **settings)


class _Contrast(Part):
    def __init__(self, method: ProjectionHead, site: Site, record: Attachment) -> None:
        super().__init__()
        self.penalizes = True
        self._method, self._shifted = method, site.shifted
        _, layer = find_classifier(site.model, method.classifier)
        weight: Any = layer.weight
        self._root, self._in_step = unwrap(site.model), False
        self._features: list[Tensor] = []
        self._labels: Tensor | None = None
        self._head = method.head(weight.shape[1], seed=site.seed).to(weight.device)
        trained = list(self._head.parameters())
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0) if trained else None
        self._loss = torch.zeros(())
        self._losses = History()
        self.histories = {"contrastive loss": self._losses}
        record.hook(layer.register_forward_pre_hook(self._see))

    def begin(self, loop: Loop) -> None:
        loop.adopt({f"projection_head.{name}": p for name, p in self._head.named_parameters()})

    def before_step(self, loop: Loop) -> None:
        self._in_step = True

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        # from the batch: the model itself is not given labels where other methods weight its loss
        self._features, self._labels = [], inputs.get("labels")

    def penalty(self, batch: Batch | None, loop: Loop) -> Tensor:
        """[] weight times the loss of the micro-batch."""
        features, labels, self._features, self._labels = self._features, self._labels, [], None
        if len(features) != 1 or labels is None:
            seen = f"{len(features)} passes, labels {'given' if labels is not None else 'missing'}"
            raise ConflictError(f"the classifier must be run once on a batch with labels, got {seen}")
        rows, classes = self._rows(features[0], labels)
        loss = supervised_contrastive(
            self._project(rows), classes, temperature=self._method.temperature, gather=self._method.gather
        )
        self._loss = loss.detach()
        return self._method.weight * loss

    def transform_gradients(self, loop: Loop) -> None:
        self._in_step = False
        if loop.step % _RECORD_EVERY == 0:
            self._losses.add(loop.step, self._loss.reshape(1))
        if self._optimizer is None or loop.optimizer is None:
            return
        self._optimizer.param_groups[0]["lr"] = float(loop.optimizer.param_groups[0]["lr"])
        for parameter in self._head.parameters():
            if parameter.grad is not None:
                # the head is no part of the model, so nobody else averages it over ranks
                parameter.grad = distributed.all_reduce_mean(parameter.grad)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def spent(self) -> dict[str, Any]:
        return {
            "parameters of the head": sum(p.numel() for p in self._head.parameters()),
            "last loss": self._loss,
        }

    def state(self) -> State:
        found: State = {
            f"head.{name}": value.detach().clone() for name, value in self._head.state_dict().items()
        }
        if self._optimizer is not None:
            for index, entry in self._optimizer.state_dict()["state"].items():
                found |= {
                    f"optimizer.{index}.{name}": torch.as_tensor(value).clone()
                    for name, value in entry.items()
                }
        return found

    def load_state(self, state: State) -> None:
        tensors = {name: torch.as_tensor(value) for name, value in state.items()}
        self._head.load_state_dict(
            {k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")}
        )
        if self._optimizer is None:
            return
        held: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                held.setdefault(int(index), {})[name] = value
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": held})

    def _see(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self._active():
            return None
        self._features.append(args[0])
        return (args[0].detach(), *args[1:]) if self._method.probe else None

    def _active(self) -> bool:
        return self._in_step and self._root.training and torch.is_grad_enabled()

    def _project(self, rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            z: Tensor = self._head(rows.float())
        return z

    def _rows(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Features [R, N] and labels [R]: of samples, or of tokens one by one; ignored tokens get label -1."""
        if features.dim() == 3 and labels.dim() == 2:
            if self._shifted:
                features, labels = features[:, :-1], labels[:, 1:]
            features, labels = features.flatten(0, 1), labels.flatten()
        good = features.dim() == 2 and labels.dim() == 1 and len(features) == len(labels)
        shapes = f"{list(features.shape)} and {list(labels.shape)}"
        require(good, "features and labels", "[B, N] and [B], or [B, T, N] and [B, T]", shapes)
        return features, torch.where(labels == IGNORE, -1, labels)
