"""By what the surviving entries are divided: the law of the error, and three ways to choose q.

For one output unit with contributions `c_j = delta_j x_j`, `S = sum c_j` and `Q = sum c_j^2`, entries kept with
probability k and divided by q leave the error `H = sum c_j (1 - m_j / q)` with

    E[H] = (1 - k / q) S,   Var[H] = k (1 - k) Q / q^2.

DARE takes q = k: no bias, and a variance that grows like (1 - k) / k. A q between k and 1 trades some for the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor


def error_moments(c: Tensor, keep: float, q: float) -> tuple[Tensor, Tensor]:
    """Mean and mean square of the error of each unit.

    Args:
        c (Tensor): [..., n] contributions.
        keep (float): k, in (0, 1].
        q (float): divisor, in [k, 1].

    Returns:
        tuple: E[H] and E[H^2], each [...] float64.
    """
    c = c.double()
    mean = (1 - keep / q) * c.sum(-1)
    return mean, mean.square() + keep * (1 - keep) * c.square().sum(-1) / q**2


def error_bound(c: Tensor, keep: float, gamma: float) -> Tensor:
    """What |H| of DARE (q = k) stays below with probability `gamma`: `sqrt(Phi Q log(2 / (1 - gamma))) / k`.

    Args:
        c (Tensor): [..., n].
        keep (float): k, in (0, 1).
        gamma (float): probability, in (0, 1).

    Returns:
        Tensor: [...] float64.
    """
    spread = phi(1 - keep) * c.double().square().sum(-1)
    return (spread * math.log(2 / (1 - gamma))).sqrt() / keep


def best_divisor(c: Tensor, keep: float) -> float:
    """The q in [k, 1] with the smallest mean square error over all units: `k + (1 - k) sum Q / sum S^2`.

    Args:
        c (Tensor): [..., n] contributions, one row for each unit and sample.
        keep (float): k.
    """
    c = c.double()
    squares, sums = float(c.square().sum()), float(c.sum(-1).square().sum())
    return 1.0 if sums == 0 else min(1.0, keep + (1 - keep) * squares / sums)


def phi(p: float) -> float:
    """`(1 - 2p) / log((1 - p) / p)`, the sub-Gaussian factor of a Bernoulli; 1/2 at p = 1/2, 0 at 0 and 1."""
    if p in (0.0, 1.0):
        return 0.0
    # both ends of the fraction vanish at 1/2, and close to it nothing but rounding is left of them
    if abs(p - 0.5) < 1e-6:
        return 0.5
    return (1 - 2 * p) / math.log((1 - p) / p)


def row_divisors(
    sums: Tensor,
    squares: Tensor,
    keep: float,
    *,
    eta: float = 0.45,
    gamma: float = 0.95,
    stop_share: float = 0.8,
    bias_sign: Literal["abs", "official"] = "abs",
) -> Tensor:
    """A q for each output row by the analytic rule.

    Scans `q = 0.001, 0.002, ...` from k to 0.998 and keeps for each row the q with the smallest

        | eta (1 - k / q) S + eta^2 Phi(1 - k) Q / (4 q^2) + log(2 / (1 - gamma)) |,

    ties to the larger q. The scan ends when a share `stop_share` of the rows have met a q that is no better: a guard
    against a few outlier features.

    Args:
        sums (Tensor): [rows] S, with each entry of the delta times the mean input, and the bias's delta added. Its
            dtype is that of the scan: float64, or float16 to repeat the official rounding.
        squares (Tensor): [rows] Q.
        keep (float): k, in (0, 1).
        eta (float): tuned factor, > 0.
        gamma (float): in (0, 1).
        stop_share (float): > 0; above 1 the whole grid is scanned.
        bias_sign (str): "abs" takes |S|: a bound has no sign. "official" takes S, and so looks for a zero crossing
            where it is negative.

    Returns:
        Tensor: [rows] float64, in [k, 1].
    """
    if bias_sign == "abs":
        sums = sums.abs()
    chosen = torch.full(sums.shape, keep, dtype=torch.float64)
    best = torch.full_like(sums, math.inf)
    worse = torch.zeros(sums.shape, dtype=torch.bool)
    constant = math.log(2 / (1 - gamma))
    for number in range(math.ceil(keep * 1000 - 1e-6), 999):
        q = number * 0.001
        spread = eta**2 * phi(1 - keep) * squares / (4 * q**2) + constant
        residual = (eta * ((1 - keep / q) * sums) + spread).abs()
        better, no_better = residual <= best, residual >= best
        best = torch.where(better, residual, best)
        chosen[better] = q
        worse |= no_better
        if worse.double().mean() >= stop_share:
            break
    return chosen


def geometric_search(
    score: Callable[[float], float], low: float, points: int = 16
) -> tuple[float, dict[float, float]]:
    """The best of `points` values of q from `low` to 1, each the same factor above the last; the later of equals.

    The optimum usually lies at 1.5 to 2 times k, which a linear grid steps over.
    """
    grid = [low ** (1 - index / (points - 1)) for index in range(points)] if low < 1 else [1.0]
    seen = {point: score(point) for point in grid}
    return max(seen, key=lambda point: (seen[point], point)), seen


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the one value that lies farthest from it; of one or two values, the plain mean."""
    mean = sum(values) / len(values)
    if len(values) < 3:
        return mean
    kept = sorted(values, key=lambda value: abs(value - mean))[:-1]
    return sum(kept) / len(kept)
