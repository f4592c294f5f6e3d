"""What `MCTemporalDropout` samples give: a mean, its variance in two parts, and whether the variance is honest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salience.core.errors import require
from salience.core.loop import evaluating
from salience.methods.steps._mc_temporal_layer import TemporalDropout, check_series, mc_mode

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
Spread = Literal["variance", "official"]


@dataclass(frozen=True)
class Prediction:
    """A prediction with its uncertainty.

    Attributes:
        mean (Tensor): [B] or [B, O] fp32 (float64 for float64), mean over samples.
        aleatoric (Tensor): mean over samples of the variance that the model states: noise in the target.
        epistemic (Tensor): unbiased variance over samples of the mean: what missing steps leave open; 0 for one.
        total (Tensor): their sum.
        samples (int): S.
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor
    total: Tensor
    samples: int

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds of the central interval that is to cover a share `level` in (0, 1) of the targets."""
        half = _quantile(level) * self.total.sqrt()
        return self.mean - half, self.mean + half


def summarise(means: Tensor, log_variances: Tensor | None = None) -> Prediction:
    """Samples to a prediction.

    Args:
        means (Tensor): [S, B] or [S, B, O], any float dtype.
        log_variances (Tensor | None): same shape; None for a model that states no variance (aleatoric 0).

    Returns:
        Prediction: computed in at least fp32.
    """
    wide = means if means.dtype == torch.float64 else means.float()
    samples = len(wide)
    # one sample has no variance: 0 and not NaN
    epistemic = wide.var(0) if samples > 1 else torch.zeros_like(wide[0])
    stated = torch.zeros_like(wide) if log_variances is None else log_variances.to(wide.dtype).exp()
    aleatoric = stated.mean(0)
    return Prediction(wide.mean(0), aleatoric, epistemic, aleatoric + epistemic, samples)


def mc_predict(
    model: Callable[..., Any],
    series: Tensor,
    observed: Tensor | None = None,
    *,
    samples: int = 20,
    layer: TemporalDropout | None = None,
    at_once: int | None = None,
    seed: int | None = None,
) -> Prediction:
    """Mean and variances from S random patterns of missing steps, in one batch of S x B series.

    Every other dropout is off and batch normalisation uses its running statistics; nothing in the model changes.

    Args:
        model (Callable): called with series [S B, T, C] (and observed [S B, T] if given); returns (mean, log
            variance), something with `mean` and `log_variance`, or the mean alone, each [S B] or [S B, O].
        series (Tensor): [B, T, C] float; may hold anything (NaN) where it is not observed.
        observed (Tensor | None): [B, T] bool, False where a step is missing or padding.
        samples (int): S, >= 1.
        layer (TemporalDropout | None): applied in front of the model; None uses the layers inside of it.
        at_once (int | None): samples in one pass, >= 1; None is all of them. The result is the same.
        seed (int | None): of the patterns, >= 0; None goes on from the last call, so that two calls differ.

    Returns:
        Prediction: without graph.

    Raises:
        ParameterError: for a wrong shape or number, or a series without any observed step.
        StructureError: if there is no TemporalDropout layer.
    """
    check_series(series, observed)
    require(samples >= 1, "samples", ">= 1", samples)
    require(at_once is None or at_once >= 1, "at_once", "None or >= 1", at_once)
    require(seed is None or seed >= 0, "seed", "None or >= 0", seed)
    batch, step = len(series), at_once or samples
    means, spreads = [], []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if isinstance(model, nn.Module):
            stack.enter_context(evaluating(model))
        if layer is not None:
            stack.enter_context(evaluating(layer))
        owner: Any = layer if layer is not None else model
        layers = stack.enter_context(mc_mode(owner))
        calls = [int(one.sampled) for one in layers]
        try:
            for one in layers:
                one.hold = True
                one.sampled.fill_(seed if seed is not None else int(one.sampled))
            for start in range(0, samples, step):
                count = min(step, samples - start)
                for one in layers:
                    one.first_row.fill_(start * batch)
                rows = series.repeat(count, 1, 1)
                seen = None if observed is None else observed.repeat(count, 1)
                inner = rows if layer is None else layer(rows, seen)
                mean, spread = read(model(inner) if seen is None else model(inner, seen))
                means.append(mean.reshape(count, batch, *mean.shape[1:]))
                if spread is not None:
                    spreads.append(spread.reshape(means[-1].shape))
        finally:
            for one, call in zip(layers, calls):
                one.hold = False
                one.first_row.zero_()
                one.sampled.fill_(call if seed is not None else call + 1)
    return summarise(torch.cat(means), torch.cat(spreads) if spreads else None)


def read(outputs: Any) -> tuple[Tensor, Tensor | None]:
    """Mean and log variance (None if the model states none) of what a model returned."""
    if isinstance(outputs, Tensor):
        return outputs, None
    if isinstance(outputs, tuple | list):
        return outputs[0], outputs[1] if len(outputs) > 1 else None
    named: Any = outputs if isinstance(outputs, Mapping) else vars(outputs)
    mean: Any = named.get("mean", named.get("logits"))
    require(isinstance(mean, Tensor), "model", "a function that returns a mean", type(outputs).__name__)
    return mean, named.get("log_variance")


def gaussian_loss(mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
    """`mean(log v + (m - y)^2 / v)`, twice the Gaussian negative log likelihood without its constant (equation 1).

    Args:
        mean (Tensor): [B] or [B, O].
        log_variance (Tensor): same shape.
        target (Tensor): same shape.

    Returns:
        Tensor: [] at least fp32, with graph.
    """
    shapes = f"{list(mean.shape)}, {list(log_variance.shape)}, {list(target.shape)}"
    same = mean.shape == log_variance.shape == target.shape
    require(same, "mean, log_variance and target", "of one shape", shapes)
    wide = mean.dtype if mean.dtype == torch.float64 else torch.float32
    spread = log_variance.to(wide)
    return (spread + (mean.to(wide) - target.to(wide)).square() * (-spread).exp()).mean()


def coverage(mean: Tensor, std: Tensor, target: Tensor, levels: Sequence[float] = LEVELS) -> Tensor:
    """The share of targets inside of the central interval `mean +- z_q std`, for each level q.

    Args:
        mean (Tensor): [...] prediction.
        std (Tensor): same shape, >= 0: the root of the total variance.
        target (Tensor): same shape.
        levels (Sequence[float]): each in [0, 1).

    Returns:
        Tensor: [len(levels)] float64.
    """
    halves = torch.tensor([_quantile(q) for q in levels], dtype=torch.float64, device=mean.device)
    off = (target - mean).abs().double().flatten()
    return (off <= halves[:, None] * std.double().flatten()).double().mean(1)


def calibration_error(
    covered: Tensor, levels: Sequence[float] = LEVELS, *, weighting: str = "plain"
) -> Tensor:
    """Mean over the levels of `|coverage - level|`: covering too little costs what covering too much does.

    Args:
        covered (Tensor): [L] from `coverage`.
        levels (Sequence[float]): the L levels.
        weighting (str): "plain"; "official" is the published `sum of coverage * |coverage - level|`, by which a model
            that covers nothing is perfect. It is there to compare with published numbers only.

    Returns:
        Tensor: [] float64; 0 is perfect, a model that covers nothing gets the mean level.
    """
    require(weighting in ("plain", "official"), "weighting", "one of plain, official", weighting)
    off = (covered.double() - torch.tensor(levels, dtype=torch.float64, device=covered.device)).abs()
    return off.mean() if weighting == "plain" else (covered.double() * off).sum()


def negative_log_likelihood(mean: Tensor, variance: Tensor, target: Tensor) -> Tensor:
    """[] float64: mean Gaussian negative log likelihood in nats, with its constant; `variance` > 0."""
    v = variance.double()
    return (0.5 * (2 * torch.pi * v).log() + (target - mean).double().square() / (2 * v)).mean()


def official_std(means: Tensor, log_variances: Tensor) -> Tensor:
    """The published code's predictive uncertainty: standard deviations added, not variances.

    Args:
        means (Tensor): [S, ...].
        log_variances (Tensor): same shape.

    Returns:
        Tensor: [...] biased standard deviation over samples plus the mean of exp(log variance / 2).
    """
    return means.std(0, correction=0) + (log_variances / 2).exp().mean(0)


def _quantile(level: float) -> float:
    require(0 <= level < 1, "level", "in [0, 1)", level)
    return NormalDist().inv_cdf((1 + level) / 2)
