"""The layer of `MCTemporalDropout`: whole time steps of a series go, at a fixed rate or at one that is learnt."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.errors import StructureError, require
from salience.core.noise import uniform

Axis = Literal["time", "channel"]
_EPS = 1e-7
_BOUND = 10.0
_TRAINING, _SAMPLING = 0, 1


def check_rate(alpha: float) -> None:
    """Refuse a rate outside of [0, 1)."""
    good = isinstance(alpha, int | float) and 0 <= alpha < 1
    require(good, "alpha", "a rate in [0, 1)", alpha)


def hard_drop(noise: Tensor, alpha: Tensor | float) -> Tensor:
    """1 where a step is dropped, with probability `alpha`: where `noise > 1 - alpha`; shape of `noise` in (0, 1)."""
    return (noise > 1 - alpha).to(noise.dtype)


def concrete_drop(noise: Tensor, logit: Tensor, *, tau: float = 0.1, eps: float = _EPS) -> Tensor:
    """How far each step is dropped, in (0, 1), differentiable in the rate (the Concrete relaxation).

    `sigmoid((log a - log(1 - a) + log u - log(1 - u)) / tau)` with `a = sigmoid(logit)`, each logarithm of its
    argument plus eps. As tau goes to 0 it becomes `u > 1 - a`.

    Args:
        noise (Tensor): u in [0, 1], any shape, fp32 or float64 (in half precision eps would vanish).
        logit (Tensor): [] or [1], log odds of the rate; held within +-10.
        tau (float): temperature, > 0.
        eps (float): > 0.

    Returns:
        Tensor: shape and dtype of `noise`, with graph to `logit`.
    """
    a = logit.to(noise.dtype).clamp(-_BOUND, _BOUND).sigmoid()
    u = noise.clamp(eps, 1 - eps)
    odds = (a + eps).log() - (1 - a + eps).log() + (u + eps).log() - (1 - u + eps).log()
    return (odds / tau).sigmoid()


def concrete_penalty(logit: Tensor, *, weight: float, size: int) -> Tensor:
    """`weight * size * (a ln a + (1 - a) ln(1 - a))`: minus the entropy of the rate, which keeps it off 0 and 1.

    Args:
        logit (Tensor): [] or [1], log odds of the rate a.
        weight (float): >= 0.
        size (int): numbers in one series: steps times features.

    Returns:
        Tensor: shape of `logit`, with graph.
    """
    held = logit.clamp(-_BOUND, _BOUND)
    a = held.sigmoid()
    return weight * size * (a * nn.functional.logsigmoid(held) + (1 - a) * nn.functional.logsigmoid(-held))


def drop_steps(
    series: Tensor,
    drop: Tensor,
    *,
    fill: float = 0.0,
    rescale: Tensor | float | None = None,
    axis: Axis = "time",
    fill_zeros: bool = False,
) -> Tensor:
    """`x (1 - d) + fill d`; where d is exactly 0 or 1 the result is bit for bit x or fill (x may be NaN there).

    Args:
        series (Tensor): [B, T, C].
        drop (Tensor): [B, T] in [0, 1], shared by all features of a step; for axis "channel" [B, C], shared by all
            steps of a feature (what the official layer does).
        fill (float): what a dropped step becomes.
        rescale (Tensor | float | None): the rate a, to divide the result by 1 - a; None does not.
        axis (str): "time" or "channel".
        fill_zeros (bool): the fault of the official layer: every exact zero becomes `fill`, dropped or not.

    Returns:
        Tensor: [B, T, C], dtype of `series`, with graph to `series` and `drop`.
    """
    d = drop.unsqueeze(-1 if axis == "time" else 1)
    mixed = series * (1 - d) + fill * d
    if rescale is not None:
        mixed = mixed / (1 - rescale)
    kept = series if rescale is None else mixed
    out = torch.where(d == 0, kept, torch.where(d == 1, torch.full_like(mixed, fill), mixed))
    if fill_zeros:
        out = torch.where(out == 0, torch.full_like(out, fill), out)
    return out.to(series.dtype)


class TemporalDropout(nn.Module):
    """Drops whole time steps of a series [B, T, C]: while training, and in `mc_mode` also in eval mode.

    Masks are a function of seed, call, row and step: padding a batch further, cutting it into slices or giving half
    of it to a second rank does not change what happens to a series. A forward pass that is run again by gradient
    checkpointing is another call: leave this layer out of the checkpointed part.

    Args:
        alpha (float): the rate, in [0, 1); where a learnt one starts, in (0, 1).
        learn (bool): whether the rate is learnt, by the Concrete relaxation (then masks are soft).
        tau (float): temperature of the relaxation, > 0.
        hard (bool): for a learnt rate: hard masks outside of training.
        fill (float): what a dropped step becomes: 0 for series that are standardised.
        rescale (bool): divide what is kept by 1 - alpha; observed steps keep their scale without it.
        keep_at_least (int): observed steps that stay in each series, >= 0 (those with the smallest draw); only where
            masks are hard.
        axis (str): "time"; "channel" drops features instead, as the official Concrete layer does.
        seed (int): >= 0.

    Attributes:
        sampling (bool): whether it drops in eval mode, see `mc_mode`.
        hold (bool): whether a pass in `mc_mode` leaves the number of the call as it is.
        logit (nn.Parameter): [] log odds of the learnt rate; None if it is fixed. Leave it out of weight decay, which
            would pull the rate to 0.5.

    Shape:
        series [B, T, C] float, observed [B, T] bool or None -> [B, T, C].

    Example:
        >>> import torch, salience as sal
        >>> layer = sal.TemporalDropout(alpha=0.3)
        >>> layer(torch.ones(2, 5, 3)).shape
        torch.Size([2, 5, 3])
    """

    calls: Tensor
    sampled: Tensor
    first_row: Tensor

    def __init__(
        self,
        alpha: float = 0.3,
        *,
        learn: bool = False,
        tau: float = 0.1,
        hard: bool = False,
        fill: float = 0.0,
        rescale: bool = False,
        keep_at_least: int = 0,
        axis: Axis = "time",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_rate(alpha)
        require(not learn or alpha > 0, "alpha", "in (0, 1) where it is learnt", alpha)
        require(math.isfinite(tau) and tau > 0, "tau", "> 0 and finite", tau)
        require(math.isfinite(fill), "fill", "finite", fill)
        require(axis in ("time", "channel"), "axis", "one of time, channel", axis)
        require(keep_at_least >= 0, "keep_at_least", ">= 0", keep_at_least)
        require(not (learn and keep_at_least), "keep_at_least", "0 where the rate is learnt", keep_at_least)
        require(seed >= 0, "seed", ">= 0", seed)
        self.learn, self.tau, self.hard, self.fill, self.rescale = learn, tau, hard, fill, rescale
        self.keep_at_least, self.axis, self.seed = keep_at_least, axis, seed
        self._alpha = float(alpha)
        self.logit = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha)))) if learn else None
        self.sampling = self.hold = False
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("sampled", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("first_row", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def alpha(self) -> Tensor:
        """[] the rate, with graph if it is learnt."""
        if self.logit is None:
            return self.calls.new_tensor(self._alpha, dtype=torch.float32)
        return self.logit.float().clamp(-_BOUND, _BOUND).sigmoid()

    def forward(self, series: Tensor, observed: Tensor | None = None) -> Tensor:
        """Drop steps of [B, T, C]; steps that are not observed (missing, padding) become `fill` in every mode."""
        check_series(series, observed)
        if not (self.training or self.sampling):
            return series if observed is None else _missing(series, observed, self.fill)
        rows = torch.arange(len(series), device=series.device)
        if self.training:
            call, kind, rows = self.calls, _TRAINING, rows + distributed.rank() * len(series)
        else:
            call, kind, rows = self.sampled, _SAMPLING, rows + self.first_row
        out = self.mixed(series, observed, self.drop(series, observed, rows=rows, call=call, kind=kind))
        if self.training:
            self.calls.add_(1)
        elif not self.hold:
            self.sampled.add_(1)
        return out

    def mixed(self, series: Tensor, observed: Tensor | None, drop: Tensor) -> Tensor:
        """The series [B, T, C] after what `drop` gave, whatever the mode."""
        if observed is not None:
            series = _missing(series, observed, self.fill)
        rate = self.alpha if self.rescale else None
        return drop_steps(series, drop, fill=self.fill, rescale=rate, axis=self.axis)

    def drop(
        self,
        series: Tensor,
        observed: Tensor | None,
        *,
        rows: Tensor,
        call: Tensor | int,
        kind: int = _TRAINING,
    ) -> Tensor:
        """[B, T] fp32 in [0, 1]: how far each step goes (for axis "channel" [B, C])."""
        size = series.shape[1 if self.axis == "time" else 2]
        index = torch.arange(size, device=series.device)
        noise = uniform(index, seed=self.seed, counter=(kind, call, rows.unsqueeze(1)))
        # autocast leaves these alone: they are elementwise in fp32
        if self.logit is None:
            drop = hard_drop(noise, self._alpha)
            return self._spared(drop, noise, observed) if self.keep_at_least else drop
        drop = concrete_drop(noise, self.logit, tau=self.tau)
        return drop.gt(0.5).to(drop.dtype) if self.hard and not self.training else drop

    def extra_repr(self) -> str:
        return f"alpha={float(self.alpha.detach()):.3g}, learn={self.learn}, axis={self.axis!r}"

    def _spared(self, drop: Tensor, noise: Tensor, observed: Tensor | None) -> Tensor:
        order = noise if observed is None or self.axis != "time" else noise.masked_fill(~observed, 2.0)
        ranks = order.argsort(1).argsort(1)
        return torch.where(ranks < self.keep_at_least, torch.zeros_like(drop), drop)


@contextmanager
def mc_mode(model: nn.Module, on: bool = True) -> Iterator[list[TemporalDropout]]:
    """Inside the block the temporal dropout of `model` also drops in eval mode (or not: `on=False`).

    Nothing else changes: other dropout and batch normalisation keep the mode that they have.

    Yields:
        list[TemporalDropout]: the layers.

    Raises:
        StructureError: if the model has no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, TemporalDropout)]
    if not layers:
        raise StructureError(
            f"model must hold a TemporalDropout layer, got {type(model).__name__} without: give layer=..."
        )
    before = [layer.sampling for layer in layers]
    for layer in layers:
        layer.sampling = on
    try:
        yield layers
    finally:
        for layer, was in zip(layers, before):
            layer.sampling = was


def check_series(series: Tensor, observed: Tensor | None) -> None:
    """Refuse what is not a float series [B, T, C] with at least one observed step in each row.

    Raises:
        ParameterError: that names what is wrong; inside torch.compile nothing is looked at.
    """
    if torch.compiler.is_compiling():
        return
    require(
        series.dim() == 3 and series.is_floating_point(),
        "series",
        "float [batch, steps, features]",
        f"{series.dtype} {list(series.shape)}",
    )
    if observed is None:
        return
    good = observed.dtype == torch.bool and observed.shape == series.shape[:2]
    wanted = f"bool {list(series.shape[:2])}"
    require(good, "observed", wanted, f"{observed.dtype} {list(observed.shape)}")
    empty = (~observed.any(1)).nonzero().flatten().tolist()
    require(not empty, "observed", "True at one step of every series at least", f"none in rows {empty[:8]}")


def _missing(series: Tensor, observed: Tensor, fill: float) -> Tensor:
    return torch.where(observed.unsqueeze(-1), series, torch.full_like(series, fill))
