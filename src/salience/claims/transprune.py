"""TransPrune: token transitions and guidance by the question, together and alone, at one schedule."""

from salience.claims._vision import BASELINES, LAYERS, METRICS, PAPER_LIMITS, SETTING, Make, runner, staged
from salience.claims.harness import Experiment, Statement
from salience.methods.tokens.transprune import TransPrune


def _arm(**settings: object) -> Make:
    return lambda share: TransPrune(ratios=staged(share), prune=LAYERS, positions="keep", **settings)  # type: ignore[arg-type]


_ARMS: dict[str, Make | None] = {
    "unpruned": None,
    **BASELINES,
    "both": _arm(),
    "both, signed turn": _arm(direction="signed"),
    "guidance alone": _arm(alpha=0.0),
    "transition alone": _arm(alpha=1.0),
    "length alone": _arm(alpha=1.0, transition="length"),
    "turn alone": _arm(alpha=1.0, transition="turn"),
}

EXPERIMENT = Experiment(
    slug="transprune",
    question="Do the changes that decoder layers make to image tokens tell which of them are needed?",
    setting=SETTING
    + "; pruned after 2, 3 and 4 layers",
    paper="LLaVA-1.5-7B at 1.56 of 3.82 TFLOPs keeps 100.0 % of 8 benchmarks (PyramidDrop 98.8 % at 1.78); "
    "transition alone is comparable to attention (abstract), though its table 7 has 58.4 of 61.9 on GQA",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="TransPrune keeps at least 99 % of the accuracy with a quarter of the image tokens",
            metric="accuracy at 1/4", arm="both", against="unpruned", size=0.99, ratio=True, headline=True,
        ),
        Statement(
            says="it is above PyramidDrop at the same schedule (1/8)", metric="accuracy at 1/8", arm="both",
            against="PyramidDrop",
        ),
        Statement(
            says="both together are not below guidance alone by more than a point (1/8)", metric="accuracy at 1/8",
            arm="both", against="guidance alone", size=-0.01,
        ),
        Statement(
            says="transition alone is above random choice (1/8)", metric="accuracy at 1/8", arm="transition alone",
            against="random in stages",
        ),
        Statement(
            says="transition alone is within 5 points of guidance alone (1/8)", metric="accuracy at 1/8",
            arm="transition alone", against="guidance alone", size=-0.05,
        ),
        Statement(
            says="the length ratio carries more than the turn (1/8)", metric="accuracy at 1/8", arm="length alone",
            against="turn alone",
        ),
        Statement(
            says="transition has no bias of place: the mean place of what it keeps is within .05 of the middle (1/8)",
            metric="place off centre at 1/8", arm="transition alone", against="", direction="lower", size=0.05,
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=PAPER_LIMITS,
)  # fmt: skip
