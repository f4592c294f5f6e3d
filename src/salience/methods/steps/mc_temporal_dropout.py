"""MC temporal dropout: leave out whole time steps, in training and for sampling, to learn what missing ones cost.

Scored: time steps of a series [B, T, C], each by chance: dropped with one rate for all (fixed, or learnt).
Spent: S forward passes for a prediction. A step is dropped for all of its features at once and becomes `fill`. With
S patterns, `mean = mean_s m_s`, `epistemic = 1 / (S - 1) sum_s (m_s - mean)^2`, `aleatoric = mean_s exp(log v_s)`
from a second output of the model, `total = aleatoric + epistemic`. The learnt rate a = sigmoid(logit) comes from the
Concrete relaxation `d = sigmoid((log a - log(1 - a) + log u - log(1 - u)) / tau)`, one u a sample and step.

Paper: arXiv 2504.06915. Official code: mmiranda-l/Temporal-Dropout (c52ca1b, branch Uncertainty-Estimation).

Differs from the official code in:
- the Concrete layer drops time steps; the official one draws noise of shape [B, C] and fades whole features, never a
  step, in all stored versions (`mask_axis="channel"` does that);
- what is kept keeps its scale in both variants; there only the Concrete one divides by 1 - a (`rescale=True`);
- `gaussian_loss` trains the variance: the official class named NLL returns the squared error, so that the variance
  output is never trained and its share of the uncertainty is what an untrained output gives;
- the entropy term of the rate is used (`reg`); there it is computed and thrown away (`reg=0`), and the rate starts at
  a random place in [0.01, 0.5], on which the learnt rate then depends: here it starts at `alpha`;
- variances are added, not standard deviations, and the variance over samples is unbiased (0 for one sample, not NaN);
- calibration is the mean over levels of |coverage - level|. The official one weights each level by its own coverage,
  by which a model that covers nothing is perfect, and sums instead of averaging (`weighting="official"`);
- a dropped step is where the mask says: genuine zeros stay and the input is never written to (both happen there with
  a fill that is not 0, or with a range of features);
- missing and padded steps are known (`observed`): they are always dropped and never sampled, and may hold NaN;
- all S patterns are one batch, with the same masks as a loop over them; dropout layers and batch statistics stay off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.steps._mc_temporal_layer import (
    TemporalDropout,
    check_rate,
    concrete_drop,
    concrete_penalty,
    drop_steps,
    hard_drop,
    mc_mode,
)
from salience.methods.steps._mc_temporal_part import Dropping, Training
from salience.methods.steps._mc_temporal_prediction import (
    Prediction,
    calibration_error,
    coverage,
    gaussian_loss,
    mc_predict,
    negative_log_likelihood,
    official_std,
    summarise,
)

__all__ = [
    "Prediction", "TemporalDropout", "calibration_error", "concrete_drop", "concrete_penalty", "coverage",
    "drop_steps", "gaussian_loss", "hard_drop", "mc_mode", "mc_predict", "negative_log_likelihood", "official_std",
    "summarise",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MCTemporalDropout(Method):
    """Drop whole time steps in training and when predicting, for an uncertainty that knows of missing steps.

    On a Trainer it drops steps of the series in training. On a model it drops them in every forward pass, so that
    repeated calls are samples. `layer` and `predict` are for loops of one's own.

    Attributes:
        alpha (float): share of steps that are dropped, in [0, 1); where a learnt one starts, in (0, 1).
        learn (bool): whether the rate is learnt (the Concrete relaxation, soft masks).
        tau (float): temperature of the relaxation, > 0.
        samples (int): S, patterns of a prediction, >= 1.
        reg (float): weight of the entropy of a learnt rate, times steps x features, >= 0.
        rate (float): learning rate (Adam) of a learnt rate on a Trainer, > 0.
        rescale (bool): divide what is kept by 1 - alpha.
        fill (float): what a dropped step becomes.
        hard (bool): for a learnt rate: hard masks outside of training.
        keep_at_least (int): observed steps that always stay, >= 0 (fixed rate only).
        mask_axis (str): "time"; "channel" drops features as the official code does.
        series (str | None): keyword of the series in the model's call; None is its only float tensor [B, T, C].
        observed (str): keyword of a mask [B, T] or [B, T, C] of what is there, used where the call has one.
        at (str | None): path of a submodule whose input is the series; None is the model itself.

    Example:
        >>> import torch, salience as sal
        >>> from salience.sandbox.series import SeriesNet, series
        >>> data, method = series(train=128, test=8, missing=0.3), sal.MCTemporalDropout(alpha=0.3, samples=8)
        >>> model = SeriesNet(gaps=method.layer())
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> for rows in torch.arange(128).split(32):
        ...     mean, log_variance = model(data.train[rows], data.train_observed[rows])
        ...     loss = sal.gaussian_loss(mean, log_variance, data.train_target[rows])
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step()
        >>> found = method.predict(model, data.test, data.test_observed)
        >>> found.mean.shape, bool((found.total > found.epistemic).all())
        (torch.Size([8]), True)
    """

    unit: ClassVar[str] = "step"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "regularize"
    hosts: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    arxiv: ClassVar[str] = "2504.06915"
    title: ClassVar[str] = (
        "An Analysis of Temporal Dropout in Earth Observation Time Series for Regression Tasks"
    )

    alpha: float = 0.3
    learn: bool = False
    tau: float = 0.1
    samples: int = 20
    reg: float = 1e-5
    rate: float = 1e-2
    rescale: bool = False
    fill: float = 0.0
    hard: bool = False
    keep_at_least: int = 0
    mask_axis: Literal["time", "channel"] = "time"
    series: str | None = None
    observed: str = "past_observed_mask"
    at: str | None = None

    def __post_init__(self) -> None:
        check_rate(self.alpha)
        require(self.samples >= 1, "samples", ">= 1", self.samples)
        require(math.isfinite(self.reg) and self.reg >= 0, "reg", ">= 0 and finite", self.reg)
        require(math.isfinite(self.rate) and self.rate > 0, "rate", "> 0 and finite", self.rate)
        axes = ("time", "channel")
        require(self.mask_axis in axes, "mask_axis", f"one of {', '.join(axes)}", self.mask_axis)
        self.layer()

    def layer(self, seed: int = 0) -> TemporalDropout:
        """The layer with these settings, to be put in front of a model of one's own."""
        return TemporalDropout(
            self.alpha, learn=self.learn, tau=self.tau, hard=self.hard, fill=self.fill, rescale=self.rescale,
            keep_at_least=self.keep_at_least, axis=self.mask_axis, seed=seed,
        )  # fmt: skip

    def predict(
        self,
        model: Callable[..., Any],
        series: Tensor,
        observed: Tensor | None = None,
        *,
        seed: int | None = None,
    ) -> Prediction:
        """`mc_predict` with `samples` patterns; a model without a layer of its own gets one in front, of fixed rate.

        Args:
            model (Callable): see `mc_predict`.
            series (Tensor): [B, T, C].
            observed (Tensor | None): [B, T] bool.
            seed (int | None): of the patterns.
        """
        inside = isinstance(model, nn.Module) and any(isinstance(m, TemporalDropout) for m in model.modules())
        layer = None if inside else self.layer().to(series.device)
        return mc_predict(model, series, observed, samples=self.samples, layer=layer, seed=seed)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Drops steps in every training forward pass; a learnt rate has a small optimizer of its own."""
        return Training(self, site.model, record, site.seed)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any) -> Part:
        """Drops steps in every forward pass, also in eval mode: each call is one sample."""
        return Dropping(self, model, record, 0)
