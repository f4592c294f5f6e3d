"""A regression on short series as satellites give them: a noisy signal, steps that clouds took, other lengths.

Each series is a slow signal z (a constant, a trend and a season, drawn anew) seen through noise in its first feature,
`z^2` through noise in the second, and a third feature that is noise alone. The target is a number that depends on the
whole signal, its mean plus half of its range, plus noise of its own. Clouds come in runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from salience.core.errors import require

FEATURES = 3
_RUNS = 0.4


@dataclass(frozen=True)
class Series:
    """Series [N, T, 3] float32, standardised by the training half, with what was seen.

    Steps that are missing or behind the end of a series hold 0.

    Attributes:
        train (Tensor): [N, T, 3].
        train_observed (Tensor): [N, T] bool.
        train_target (Tensor): [N] float32.
        valid, valid_observed, valid_target (Tensor): to choose by, as many as `test`.
        test, test_observed, test_target (Tensor): the same, held out.
    """

    train: Tensor
    train_observed: Tensor
    train_target: Tensor
    valid: Tensor
    valid_observed: Tensor
    valid_target: Tensor
    test: Tensor
    test_observed: Tensor
    test_target: Tensor


def series(
    *,
    train: int = 600,
    test: int = 1000,
    steps: int = 24,
    shortest: int | None = None,
    missing: float = 0.0,
    missing_test: float | None = None,
    noise: float = 0.1,
    seed: int = 0,
) -> Series:
    """Make the series.

    Args:
        train (int): series to train on, >= 2.
        test (int): series to test on (and as many to choose by), >= 1.
        steps (int): T, >= 2.
        shortest (int | None): series have random lengths from this to T, padded behind; None: all have T.
        missing (float): expected share of steps under clouds, in [0, 0.9]; at least one step is always seen.
        missing_test (float | None): another share for `valid` and `test`.
        noise (float): standard deviation of the target's own noise, >= 0.
        seed (int): >= 0.

    Returns:
        Series: the same for the same arguments. Global random states stay as they were.
    """
    require(train >= 2, "train", ">= 2", train)
    require(test >= 1, "test", ">= 1", test)
    require(steps >= 2, "steps", ">= 2", steps)
    require(shortest is None or 1 <= shortest <= steps, "shortest", f"None or in [1, {steps}]", shortest)
    later = missing if missing_test is None else missing_test
    for name, share in (("missing", missing), ("missing_test", later)):
        require(0 <= share <= 0.9, name, "in [0, 0.9]", share)
    require(noise >= 0, "noise", ">= 0", noise)
    require(seed >= 0, "seed", ">= 0", seed)
    random = torch.Generator().manual_seed(seed)
    count = train + 2 * test
    time = torch.linspace(0, 1, steps)
    base, trend, height, phase = torch.randn(4, count, 1, generator=random)
    signal = 0.7 * base + 0.7 * trend * (time - 0.5) + 0.7 * height * (2 * math.pi * time + 3 * phase).sin()
    seen = signal + 0.3 * torch.randn(count, steps, generator=random)
    squared = signal.square() + 0.3 * torch.randn(count, steps, generator=random)
    values = torch.stack((seen, squared, torch.randn(count, steps, generator=random)), -1)  # [N, T, 3]
    target = signal.mean(1) + 0.5 * (signal.amax(1) - signal.amin(1))
    target = target + noise * torch.randn(count, generator=random)
    shares = torch.full((count,), missing)
    shares[train:] = later
    observed = ~_clouds(shares, steps, random)
    if shortest is not None:
        lengths = torch.randint(shortest, steps + 1, (count, 1), generator=random)
        observed &= torch.arange(steps) < lengths
    observed[~observed.any(1), 0] = True
    known = values[:train][observed[:train]]
    values = (values - known.mean(0)) / known.std(0)
    values = torch.where(observed.unsqueeze(-1), values, torch.zeros(()))
    target = (target - target[:train].mean()) / target[:train].std()
    parts = []
    for rows in (slice(train), slice(train, train + test), slice(train + test, count)):
        parts += [values[rows].contiguous(), observed[rows].contiguous(), target[rows].contiguous()]
    return Series(*parts)


def _clouds(shares: Tensor, steps: int, random: torch.Generator) -> Tensor:
    """[N, T] bool: runs of cloud that cover the share [N] of the steps; neighbours correlate by `_RUNS`."""
    draws = torch.rand(steps, len(shares), generator=random)
    covered = [draws[0] < shares]
    for step in range(1, steps):
        covered.append(
            draws[step] < torch.where(covered[-1], shares + _RUNS * (1 - shares), (1 - _RUNS) * shares)
        )
    return torch.stack(covered, 1)


class SeriesNet(nn.Module):
    """A GRU that says a mean and a log variance for each series.

    Args:
        width (int): of the GRU.
        gaps (nn.Module | None): called with (series, observed) in front; None does nothing.
        dropout (float): on the last hidden state.
        features (int): of a step.
        seed (int): of the initial weights; global random states stay as they were.

    Shape:
        series [B, T, features], observed [B, T] bool or None -> two tensors [B].
    """

    def __init__(
        self,
        width: int = 32,
        *,
        gaps: nn.Module | None = None,
        dropout: float = 0.0,
        features: int = FEATURES,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(width >= 1, "width", ">= 1", width)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.reader = nn.GRU(features, width, batch_first=True)
            self.head = nn.Linear(width, 2)
        self.gaps = gaps
        self.drop = nn.Dropout(dropout)

    def forward(self, series: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean [B] and log variance [B], read at the last observed step: padding behind it changes nothing."""
        if self.gaps is not None:
            series = self.gaps(series, observed)
        elif observed is not None:
            series = torch.where(observed.unsqueeze(-1), series, torch.zeros_like(series))
        hidden = self.reader(series)[0]
        last = hidden[:, -1]
        if observed is not None:
            order = torch.arange(series.shape[1], device=series.device)
            ends = (observed * order).amax(1)
            last = hidden[torch.arange(len(hidden), device=hidden.device), ends]
        mean, spread = self.head(self.drop(last)).unbind(-1)
        # a variance between e^-8 and e^4: the targets are standardised
        return mean, spread.clamp(-8, 4)
