"""FastV: what is left of the answers when image tokens are dropped once and early, against random choice."""

from salience.claims._vision import BASELINES, METRICS, PAPER_LIMITS, SETTING, Make, runner
from salience.claims.harness import Experiment, Statement

_ARMS: dict[str, Make | None] = {"unpruned": None, **BASELINES}

EXPERIMENT = Experiment(
    slug="fastv",
    question="How many answers survive when image tokens are dropped once, by the attention of the "
    "layer before?",
    setting=SETTING
    + " (FastV a layer later: a quarter more)",
    paper="LLaVA-1.5-7B without half of the image tokens after layer 2: 45 % fewer FLOPs without loss (abstract)",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="after a layer that reads the image, FastV keeps 98 % of the accuracy with a quarter of the tokens",
            metric="accuracy at 1/4", arm="FastV a layer later", against="unpruned", size=0.98, ratio=True,
            headline=True,
        ),
        Statement(
            says="in front of the first layer that reads the image it is no better than random choice (1/4)",
            metric="accuracy at 1/4", arm="FastV", against="random", direction="lower", size=-0.05,
        ),
        Statement(
            says="a layer later it is above PyramidDrop, which spends less (1/8)", metric="accuracy at 1/8",
            arm="FastV a layer later", against="PyramidDrop",
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=PAPER_LIMITS,
)  # fmt: skip
