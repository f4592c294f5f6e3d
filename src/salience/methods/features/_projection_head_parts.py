"""Heads that are there only for the loss, and the contrastive loss on what they give."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from salience.core import distributed
from salience.core.errors import require

Kind = Literal["none", "linear", "mlp", "fixed"]
KINDS = ("none", "linear", "mlp", "fixed")


def check_kappa(kappa: float) -> None:
    """Refuse what is not >= 1 and finite."""
    require(math.isfinite(kappa) and kappa >= 1, "kappa", ">= 1 and finite", kappa)


def fixed_weights(features: int, kappa: float) -> Tensor:
    """`kappa^-i` for i = 0..N-1: [N] fp32, computed in float64 as exp(-i log kappa), which cannot overflow.

    Args:
        features (int): N, >= 1.
        kappa (float): >= 1; 1 is no head.
    """
    require(features >= 1, "features", ">= 1", features)
    check_kappa(kappa)
    return (-math.log(kappa) * torch.arange(features, dtype=torch.float64)).exp().float()


def symmetric_relu(v: Tensor, b: Tensor | float) -> Tensor:
    """`relu(v - b) - relu(-v - b)`: the identity for b = 0, a dead zone of half-width b above; any shape."""
    return F.relu(v - b) - F.relu(-v - b)


class FixedHead(nn.Module):
    """Multiplies feature i by `kappa^-i`: the first few carry the loss, the others keep what it does not need.

    Nothing is learnt, and nothing is in the state dict: a checkpoint cannot change kappa.

    Args:
        features (int): N.
        kappa (float): >= 1. At 1.05 about 20 features carry the loss, however many there are.

    Shape:
        [..., N] -> [..., N], computed in at least fp32.

    Example:
        >>> import torch, salience as sal
        >>> sal.FixedHead(3, kappa=2.0)(torch.ones(1, 3)).tolist()
        [[1.0, 0.5, 0.25]]
    """

    weights: Tensor

    def __init__(self, features: int, kappa: float = 1.05) -> None:
        super().__init__()
        self.kappa = kappa
        self.register_buffer("weights", fixed_weights(features, kappa), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Reweight."""
        with torch.autocast(features.device.type, enabled=False):
            return _wide(features) * self.weights.to(_wide(features).dtype)

    def effective(self) -> float:
        """About how many features carry the loss: `(sum w^2)^2 / sum w^4`."""
        squares = self.weights.double().square()
        return float(squares.sum().square() / squares.square().sum())

    def extra_repr(self) -> str:
        return f"{len(self.weights)}, kappa={self.kappa:g}"


class _SymmetricReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, v: Tensor) -> Tensor:
        return symmetric_relu(v, self.b)


def make_head(
    kind: Kind,
    features: int,
    *,
    kappa: float = 1.05,
    hidden: int | None = None,
    out: int | None = None,
    identity: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A head from [..., N] to what the loss sees.

    Args:
        kind (str): "mlp" is linear, ReLU, linear; "linear" one layer; "fixed" is `FixedHead`; "none" passes through.
        features (int): N, >= 1.
        kappa (float): of "fixed", >= 1.
        hidden (int | None): width inside of "mlp"; None is N.
        out (int | None): width of the result of "linear" and "mlp"; None is N.
        identity (bool): "linear" and "mlp" start as the identity (no width may differ then); "mlp" has a symmetric
            ReLU with a learnt dead zone, 0 at the start.
        seed (int): of the initial weights; global random states stay as they were.

    Returns:
        nn.Module: [..., N] -> [..., out].
    """
    require(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
    require(features >= 1, "features", ">= 1", features)
    check_kappa(kappa)
    for name, width in (("hidden", hidden), ("out", out)):
        require(width is None or width >= 1, name, "None or >= 1", width)
        require(not identity or width in (None, features), name, f"None or {features} for an identity", width)
    if kind == "none":
        return nn.Identity()
    if kind == "fixed":
        return FixedHead(features, kappa)
    inner, last = hidden or features, out or features
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "linear":
            head: nn.Module = nn.Linear(features, last)
        else:
            act = _SymmetricReLU() if identity else nn.ReLU()
            head = nn.Sequential(nn.Linear(features, inner), act, nn.Linear(inner, last))
    if identity:
        for layer in head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.eye_(layer.weight)
                nn.init.zeros_(layer.bias)
    return head


def supervised_contrastive(
    z: Tensor, labels: Tensor, *, temperature: float = 0.5, gather: bool = False
) -> Tensor:
    """The supervised contrastive loss: samples of one label are drawn together, all others pushed apart.

    With `s_ab = cos(z_a, z_b) / temperature`, the mean over a of `log sum_{b != a} exp(s_ab) - mean_{b in P_a} s_ab`,
    P_a the other samples with the label of a. A sample without any is left out; if all are, the loss is 0. With the
    samples' own numbers as labels, each given to both views, it is the self-supervised loss of SimCLR.

    Args:
        z (Tensor): [N, D] float, N >= 2; computed in at least fp32 whatever autocast says. For two views: all first
            views, then all second ones.
        labels (Tensor): [N] int64, or [N / 2] for two views, each for both. Negative ones take no part.
        temperature (float): > 0.
        gather (bool): compare with the samples of all ranks (equally many on each); the gradient, averaged over ranks
            as DDP does, is that of one process with the whole batch.

    Returns:
        Tensor: [] with graph.

    Raises:
        ParameterError: for shapes that do not belong together, or labels that are not int64.

    Example:
        >>> import torch, salience as sal
        >>> z = torch.tensor([[1., 0.], [1., 0.], [0., 1.], [0., 1.]])
        >>> round(float(sal.supervised_contrastive(z, torch.tensor([0, 0, 1, 1]))), 6)
        0.239545
    """
    require(math.isfinite(temperature) and temperature > 0, "temperature", "> 0 and finite", temperature)
    good = z.dim() == 2 and len(z) >= 2 and z.is_floating_point()
    require(good, "z", "float [samples, features] with two samples at least", f"{z.dtype} {list(z.shape)}")
    fits = labels.dim() == 1 and len(labels) in (len(z), len(z) / 2) and labels.dtype == torch.int64
    wanted = f"int64 [{len(z)}], or half of it for two views"
    require(fits, "labels", wanted, f"{labels.dtype} {list(labels.shape)}")
    if len(labels) < len(z):
        labels = torch.cat((labels, labels))
    ranks = distributed.size() if gather else 1
    if ranks > 1:
        z, labels = _of_all_ranks(z), distributed.all_gather(labels)
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(_wide(z), dim=1)
        logits = unit @ unit.T / temperature
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        there = labels >= 0
        alike = (labels.unsqueeze(0) == labels.unsqueeze(1)) & ~itself & there
        others = ~itself & there.unsqueeze(0)
        counts = alike.sum(1)
        anchors = (counts > 0) & there
        # a row without others would be -inf: such rows are not anchors, and get 0 here
        spread = logits.masked_fill(~others & anchors.unsqueeze(1), -torch.inf).logsumexp(1)
        drawn = logits.masked_fill(~alike, 0).sum(1) / counts.clamp_min(1)
        total = torch.where(
            anchors, spread - drawn, torch.zeros_like(spread)
        ).sum() / anchors.sum().clamp_min(1)
    # each rank's graph reaches its own rows only, and the ranks' gradients are going to be averaged
    return total if ranks == 1 else total.detach() + ranks * (total - total.detach())


def _of_all_ranks(z: Tensor) -> Tensor:
    """[W N, D]: the rows of all ranks, with graph for this rank's own."""
    rows = list(distributed.all_gather(z.detach()).split(len(z)))
    rows[dist.get_rank()] = z
    return torch.cat(rows)


def _wide(value: Any) -> Tensor:
    wide: Tensor = value if value.dtype == torch.float64 else value.float()
    return wide
