"""DHKD: are two heads better than one for a loss on logits, and better than KD, each with its own best weight?

See `_distillation.py` for the world. Every loss has four weights to choose from. One head with both losses is the
control: the paper says that it is worse than either loss alone, because they pull one classifier in two directions;
the cosine between their gradients is measured on the classifier and on the features. With a fifth of the labels wrong
the main head, which the teacher never talks to, has nothing to hold on to.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import salience as sal
from salience.claims import _distillation as shared
from salience.claims.harness import Experiment, Statement, Values

Way = Literal["one head", "two heads", "aligned"]
_WEIGHTS, _TEMPERATURES, _EVERY = (0.01, 0.1, 1.0, 10.0), (1.0, 2.0, 4.0, 8.0), 50
# arm -> way, form of the loss, share of wrong labels
_ARMS: dict[str, tuple[Way | None, str, float]] = {
    "CE": (None, "ce", 0.0),
    "logit loss alone, one head": (None, "logits", 0.0),
    "KD, best T": (None, "kd", 0.0),
    "one head": ("one head", "binary_kl_norm", 0.0),
    "one head, BinaryKL": ("one head", "binary_kl", 0.0),
    "DHKD": ("two heads", "binary_kl_norm", 0.0),
    "DHKD, BinaryKL": ("two heads", "binary_kl", 0.0),
    "DHKD, aligned": ("aligned", "binary_kl_norm", 0.0),
    "two heads, MSE": ("two heads", "mse", 0.0),
    "wrong labels: CE": (None, "ce", shared.WRONG),
    "wrong labels: KD, best T": (None, "kd", shared.WRONG),
    "wrong labels: DHKD": ("two heads", "binary_kl_norm", shared.WRONG),
}


def _student(
    way: Way, form: str, weight: float, data: shared.World, seed: int, device: str
) -> tuple[shared.Student, Values]:
    student, criterion = shared.Student(seed), sal.BinaryKLLoss(form=form)
    if way != "one head":
        student.head = sal.DualHead(student.head, seed=seed)
    cosines: dict[str, list[float]] = {"cosine on the classifier": [], "cosine on the features": []}

    def step(rows: Tensor, labels: Tensor, logits: Tensor, number: int) -> None:
        given = student(rows)
        main, other = (given, given) if way == "one head" else given
        first, second = F.cross_entropy(main, labels), weight * criterion(other, logits)
        if way == "one head" and number % _EVERY == 0:
            parts = (student.head.weight, student.backbone[0].weight)
            for held, part in zip(cosines.values(), parts, strict=True):
                held.append(_cosine(first, second, part))  # type: ignore[arg-type]
        if way == "aligned":
            sal.aligned_backward(first, second, student.parameters())
        else:
            (first + second).backward()

    shared.train(student, data, step, seed, device)
    if way != "one head":
        student.head = student.head.main  # type: ignore[assignment]
    return student, {name: sum(held) / len(held) for name, held in cosines.items() if held}


def _cosine(first: Tensor, second: Tensor, parameter: Tensor) -> float:
    a, b = (torch.autograd.grad(one, parameter, retain_graph=True)[0].flatten() for one in (first, second))
    return float(F.cosine_similarity(a, b, dim=0))


def _single(form: str) -> dict[float, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Losses on one head by setting."""
    if form == "ce":
        return {0.0: lambda student, _, labels: F.cross_entropy(student, labels)}
    if form == "kd":
        return {one: shared.knowledge_distillation(one) for one in _TEMPERATURES}
    criterion = sal.BinaryKLLoss()

    def weighted(weight: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda student, teacher, _: weight * criterion(student, teacher)

    return {weight: weighted(weight) for weight in _WEIGHTS}


@lru_cache(maxsize=128)
def _tried(way: Way | None, form: str, wrong: float, seed: int, device: str) -> Values:
    data = shared.world(seed, wrong)
    found: dict[float, tuple[float, Values]] = {}
    if way is None:
        for setting, loss in _single(form).items():
            student = shared.with_loss(loss, data, seed, device)
            found[setting] = shared.measure(student, data, device)
    else:
        for weight in _WEIGHTS:
            student, cosines = _student(way, form, weight, data, seed, device)
            reached, values = shared.measure(student, data, device)
            found[weight] = reached, values | cosines
    best = max(found, key=lambda setting: found[setting][0])
    return found[best][1] | {"setting": best}


def _run(arm: str, seed: int, rate: float, device: str) -> Values:
    return _tried(*_ARMS[arm], seed, device)


EXPERIMENT = Experiment(
    slug="dhkd",
    question="Does a second head make a better student than one head or KD, each at its best weight?",
    setting=shared.SETTING,
    paper="cross-entropy with BinaryKL on one head is worse than either alone, two heads are better than both; on "
    "CIFAR-100 and ImageNet about 0.1 to 0.2 points above the next best (tables 1 to 4)",
    arms=tuple(_ARMS),
    metrics={
        "accuracy": "share of right classes on 2000 test pairs, of the main head",
        "order": "Kendall's tau between student's and teacher's order of the 100 classes, on 200 test pairs",
        "teacher's accuracy": "of the teacher on the same test pairs",
        "setting": "the weight alpha (KD: the temperature) that was used",
        "cosine on the classifier": "between the gradients of both losses on one classifier, mean over training",
        "cosine on the features": "the same on the backbone's weights",
    },
    statements=(
        Statement(
            says="DHKD is better than KD, each at its best setting",
            metric="accuracy", arm="DHKD", against="KD, best T", headline=True,
        ),
        Statement(
            says="two heads are better than one head with the same two losses",
            metric="accuracy", arm="DHKD", against="one head",
        ),
        Statement(
            says="two heads are better than one head, with the first form of the loss",
            metric="accuracy", arm="DHKD, BinaryKL", against="one head, BinaryKL",
        ),
        Statement(
            says="one head with both losses is worse than the logit loss alone",
            metric="accuracy", arm="one head", against="logit loss alone, one head", direction="lower",
        ),
        Statement(
            says="one head with both losses is worse than cross-entropy alone",
            metric="accuracy", arm="one head", against="CE", direction="lower",
        ),
        Statement(
            says="DHKD is better than cross-entropy alone",
            metric="accuracy", arm="DHKD", against="CE",
        ),
        Statement(
            says="alignment makes DHKD better",
            metric="accuracy", arm="DHKD, aligned", against="DHKD",
        ),
        Statement(
            says="the loss is better than squared differences of logits",
            metric="accuracy", arm="DHKD", against="two heads, MSE",
        ),
        Statement(
            says="on one classifier the gradients of both losses point in opposite directions",
            metric="cosine on the classifier", arm="one head", against="", direction="lower",
        ),
        Statement(
            says="on the features they do not",
            metric="cosine on the features", arm="one head", against="",
        ),
        Statement(
            says="with a fifth of the labels wrong, DHKD is as good as KD",
            metric="accuracy", arm="wrong labels: DHKD", against="wrong labels: KD, best T",
        ),
    ),
    run=_run,
    notes="Weights are chosen for every arm and seed on 1000 pairs of their own, out of four. That one head "
    "collapses is claimed for long training into neural collapse; 1000 steps are not that.",
)  # fmt: skip
