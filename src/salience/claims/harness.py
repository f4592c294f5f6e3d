"""Runs what a paper claims as a fair experiment on this machine, and judges it.

An experiment has arms (baselines and the method) and statements about them. Every arm runs on the same seeds with
the same data, order, steps and initial weights; a learning rate is searched for every arm alike, on a seed that is
not counted. A statement compares two arms on one metric by paired differences over seeds and a 95 % t interval:

    holds            the whole interval is on the claimed side of the stated size
    does not hold    the whole interval is on the other side
    undecided        the interval contains the stated size
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from salience.core.errors import ParameterError, require
from salience.core.evidence import about, measured, saved_for_backward

__all__ = [
    "Evidence", "Experiment", "Judged", "Statement", "Values", "interval", "judge", "load_evidence",
    "load_experiment", "measured", "run_experiment", "saved_for_backward",
]  # fmt: skip

Verdict = Literal["holds", "does not hold", "undecided"]
Values = dict[str, float]
# run(arm, seed, rate, device) -> metric -> value
Runner = Callable[[str, int, float, str], Values]

# two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_SEARCH_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One comparison that the evidence decides.

    Attributes:
        says (str): the claim in a sentence, as a reader of the table sees it.
        metric (str): which number is compared.
        arm (str): the method's arm.
        against (str): the baseline's arm; "" compares `arm` with the constant `size` itself.
        direction (str): "higher" or "lower": where `arm` is claimed to be.
        size (float): by how much at least; a negative size states "not worse than by |size|".
        ratio (bool): compare `arm / against` with `size` (a ratio: 0.5 and "lower" means at most half).
        headline (bool): the statement that the table of methods shows.
    """

    says: str
    metric: str
    arm: str
    against: str
    direction: Literal["higher", "lower"] = "higher"
    size: float = 0.0
    ratio: bool = False
    headline: bool = False


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A method's claim, made small.

    Attributes:
        slug (str): the method.
        question (str): what is asked, in one sentence.
        setting (str): model, data, steps: what runs here.
        paper (str): what the paper reports, with its figure and source.
        arms (tuple[str, ...]): baselines first.
        metrics (dict[str, str]): name -> unit and meaning.
        statements (tuple[Statement, ...]): what is judged.
        run (Runner): one arm with one seed and one learning rate on one device.
        rates (tuple[float, ...]): learning rates searched for every arm; one rate means no search.
        tuned_on (str): metric by which the best rate is chosen.
        tuned_higher (bool): whether higher is better there.
        seeds (int): how many by default.
        notes (str): what a sober reader should know.
    """

    slug: str
    question: str
    setting: str
    paper: str
    arms: tuple[str, ...]
    metrics: dict[str, str]
    statements: tuple[Statement, ...]
    run: Runner
    rates: tuple[float, ...] = (0.0,)
    tuned_on: str = ""
    tuned_higher: bool = True
    seeds: int = 5
    notes: str = ""


@dataclass
class Judged:
    """A statement with its numbers."""

    statement: dict[str, Any]
    mean: float
    low: float
    high: float
    verdict: Verdict


@dataclass
class Evidence:
    """What an experiment measured here."""

    slug: str
    question: str
    setting: str
    paper: str
    notes: str
    metrics: dict[str, str]
    rates: dict[str, float]
    values: dict[str, list[Values]]
    judged: list[Judged]
    seconds: float
    about: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


def load_evidence(path: Path) -> Evidence:
    """Read what `Evidence.save` wrote."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["judged"] = [Judged(**one) for one in raw["judged"]]
    return Evidence(**raw)


def run_experiment(
    experiment: Experiment,
    *,
    seeds: int | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> Evidence:
    """Run every arm on every seed and judge the statements.

    Args:
        experiment (Experiment): what to run.
        seeds (int | None): how many; None takes the experiment's own number.
        device (str): "cpu" or "cuda".
        progress (Callable | None): called with (what runs, done, total) before each run.

    Returns:
        Evidence: with the values of every seed.

    Raises:
        ParameterError: if `seeds` < 2 (no interval), or if an arm gives a metric that is not declared.
    """
    count = experiment.seeds if seeds is None else seeds
    require(count >= 2, "seeds", ">= 2 (an interval needs two)", count)
    searches = len(experiment.rates) if len(experiment.rates) > 1 else 0
    total, done = len(experiment.arms) * (searches + count), 0
    started = time.perf_counter()

    def step(label: str) -> None:
        nonlocal done
        if progress is not None:
            progress(label, done, total)
        done += 1

    rates: dict[str, float] = {}
    for arm in experiment.arms:
        tried: dict[float, float] = {}
        for rate in experiment.rates if searches else ():
            step(f"{arm}: rate {rate:g}")
            tried[rate] = experiment.run(arm, _SEARCH_SEED, rate, device)[experiment.tuned_on]
        rates[arm] = _best(tried, experiment.tuned_higher) if tried else experiment.rates[0]
    values: dict[str, list[Values]] = {arm: [] for arm in experiment.arms}
    for seed in range(count):
        for arm in experiment.arms:
            step(f"{arm}: seed {seed}")
            measured = experiment.run(arm, seed, rates[arm], device)
            unknown = sorted(set(measured) - set(experiment.metrics))
            require(
                not unknown, "metrics", f"declared in the experiment {sorted(experiment.metrics)}", unknown
            )
            values[arm].append({name: float(value) for name, value in measured.items()})
    if progress is not None:
        progress("done", total, total)
    return Evidence(
        slug=experiment.slug,
        question=experiment.question,
        setting=experiment.setting,
        paper=experiment.paper,
        notes=experiment.notes,
        metrics=experiment.metrics,
        rates=rates,
        values=values,
        judged=[judge(statement, values) for statement in experiment.statements],
        seconds=time.perf_counter() - started,
        about=about(device),
    )


def judge(statement: Statement, values: dict[str, list[Values]]) -> Judged:
    """Decide one statement from the values of each arm and seed."""
    ours = [row[statement.metric] for row in values[statement.arm]]
    if statement.against:
        theirs = [row[statement.metric] for row in values[statement.against]]
        pairs = zip(ours, theirs, strict=True)
        gains = [_ratio(a, b) if statement.ratio else a - b for a, b in pairs]
    else:
        gains = ours
    mean, low, high = interval(gains)
    size = statement.size
    if statement.direction == "lower" and not statement.ratio and statement.against:
        # "lower by at least size": the difference has to be below -size
        size = -size
    above, below = low > size, high < size
    if low == high == size:
        # no spread and exactly at the bound: "at least" and "at most" are met
        above = below = True
    claimed, other = (above, below) if statement.direction == "higher" else (below, above)
    verdict: Verdict = "holds" if claimed else "does not hold" if other else "undecided"
    return Judged(asdict(statement), mean, low, high, verdict)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % t interval of the mean.

    Args:
        values (Sequence[float]): at least two numbers.

    Returns:
        tuple[float, float, float]: mean, lower and upper bound; all NaN if a value is not finite.
    """
    require(len(values) >= 2, "values", "at least two numbers", list(values))
    if not all(math.isfinite(value) for value in values):
        return math.nan, math.nan, math.nan
    mean = fmean(values)
    quantile = _T95[len(values) - 2] if len(values) <= len(_T95) + 1 else 1.96
    half = quantile * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def load_experiment(slug: str) -> Experiment:
    """The experiment of a method, from `claims/<slug>.py`.

    Raises:
        ParameterError: if the method has none.
    """
    import importlib

    name = f"salience.claims.{slug.replace('-', '_')}"
    if not (Path(__file__).parent / f"{slug.replace('-', '_')}.py").is_file():
        raise ParameterError(f"method must have an experiment to bench, got {slug!r} without one")
    experiment: Experiment = importlib.import_module(name).EXPERIMENT
    return experiment


def _best(tried: dict[float, float], higher: bool) -> float:
    finite = {rate: value for rate, value in tried.items() if math.isfinite(value)}
    if not finite:
        return min(tried)
    return (max if higher else min)(finite, key=lambda rate: finite[rate])


def _ratio(a: float, b: float) -> float:
    return a / b if b != 0 else math.inf
