"""PLD: does one list-wise loss beat cross-entropy, KD and DKD, each with its own best setting, on 100 classes?

See `_distillation.py` for the world. KD, DKD and PLD get four settings each: temperatures 1, 2, 4, 8 (for DKD the
weight of its second term). The defaults are shown as well. With a fifth of the labels wrong the teacher is mostly
right against them; with a teacher that is always sure of a wrong class, PLD shows its own weakness.
"""

from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F

import salience as sal
from salience.claims import _distillation as shared
from salience.claims.harness import Experiment, Statement, Values

_GRID = (1.0, 2.0, 4.0, 8.0)
_LOSSES = {
    "KD": shared.knowledge_distillation,
    "DKD": shared.decoupled,
    "PLD": sal.PlackettLuceLoss,
    "ListMLE": lambda _: sal.PlackettLuceLoss(weights="uniform"),
    "CE": lambda _: lambda student, _, labels: F.cross_entropy(student, labels),
}
# arm -> loss, its setting (None: its own best of four), what is wrong: nothing, labels, or the teacher
_ARMS: dict[str, tuple[str, float | None, str]] = {
    "CE": ("CE", 1.0, ""),
    "KD, T 4": ("KD", 4.0, ""),
    "KD, best T": ("KD", None, ""),
    "DKD, best beta": ("DKD", None, ""),
    "ListMLE": ("ListMLE", 1.0, ""),
    "PLD, tau 1": ("PLD", 1.0, ""),
    "PLD, best tau": ("PLD", None, ""),
    "wrong labels: CE": ("CE", 1.0, "labels"),
    "wrong labels: KD, best T": ("KD", None, "labels"),
    "wrong labels: PLD, best tau": ("PLD", None, "labels"),
    "wrong teacher: CE": ("CE", 1.0, ""),
    "wrong teacher: PLD, tau 1": ("PLD", 1.0, "teacher"),
}


def _world(seed: int, wrong: str) -> shared.World:
    data = shared.world(seed, shared.WRONG if wrong == "labels" else 0.0)
    if wrong != "teacher":
        return data
    # sure of the next class, always
    rows, labels, logits = data.train
    return replace(data, train=(rows, labels, torch.roll(logits, 1, -1)))


@lru_cache(maxsize=512)
def _trained(loss: str, setting: float, wrong: str, seed: int, device: str) -> tuple[float, Values]:
    data = _world(seed, wrong)
    student = shared.with_loss(_LOSSES[loss](setting), data, seed, device)
    return shared.measure(student, data, device)


def _run(arm: str, seed: int, rate: float, device: str) -> Values:
    loss, setting, wrong = _ARMS[arm]
    settings = _GRID if setting is None else (setting,)
    tried = {one: _trained(loss, one, wrong, seed, device) for one in settings}
    best = max(tried, key=lambda one: tried[one][0])
    return tried[best][1] | {"setting": best}


EXPERIMENT = Experiment(
    slug="pld",
    question="Does the list-wise loss of PLD make a better student than KD and DKD, each at its best setting?",
    setting=shared.SETTING,
    paper="ImageNet-1k top-1 on average 0.42 points above DIST and 1.04 above KD; ResNet-152 to ResNet-50: CE 71.35, "
    "KD 76.80, PLD 77.30 (section 5, tables 5 and 6)",
    arms=tuple(_ARMS),
    metrics={
        "accuracy": "share of right classes on 2000 test pairs",
        "order": "Kendall's tau between student's and teacher's order of the 100 classes, on 200 test pairs",
        "teacher's accuracy": "of the teacher on the same test pairs",
        "setting": "the temperature (DKD: beta) that was used",
    },
    statements=(
        Statement(
            says="PLD is better than KD, each at its best temperature",
            metric="accuracy", arm="PLD, best tau", against="KD, best T", headline=True,
        ),
        Statement(
            says="PLD at tau 1 is better than KD at T 4 (both defaults)",
            metric="accuracy", arm="PLD, tau 1", against="KD, T 4",
        ),
        Statement(
            says="PLD is better than DKD, each at its best setting",
            metric="accuracy", arm="PLD, best tau", against="DKD, best beta",
        ),
        Statement(
            says="PLD at tau 1 is better than cross-entropy alone",
            metric="accuracy", arm="PLD, tau 1", against="CE",
        ),
        Statement(
            says="the teacher's weights matter: PLD is better than ListMLE",
            metric="accuracy", arm="PLD, best tau", against="ListMLE",
        ),
        Statement(
            says="PLD's student orders the classes more like the teacher than KD's",
            metric="order", arm="PLD, best tau", against="KD, best T",
        ),
        Statement(
            says="with a fifth of the labels wrong, PLD is better than cross-entropy",
            metric="accuracy", arm="wrong labels: PLD, best tau", against="wrong labels: CE",
        ),
        Statement(
            says="with a fifth of the labels wrong, PLD is better than KD",
            metric="accuracy", arm="wrong labels: PLD, best tau", against="wrong labels: KD, best T",
        ),
        Statement(
            says="a teacher that is always wrong makes PLD worse than cross-entropy",
            metric="accuracy", arm="wrong teacher: PLD, tau 1", against="wrong teacher: CE", direction="lower",
        ),
    ),
    run=_run,
    notes="Settings are chosen for every arm and seed on 1000 pairs of their own. The paper's gains are half a point "
    "to a point on a thousand classes; here the test set resolves about a point.",
)  # fmt: skip
