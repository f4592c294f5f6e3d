"""ToMe: what is left of the answers when alike image tokens are merged, whatever is asked."""

from salience.claims._vision import BASELINES, METRICS, PAPER_LIMITS, READING, SETTING, Make, runner
from salience.claims.harness import Experiment, Statement
from salience.methods.tokens.tome import ToMe

_ARMS: dict[str, Make | None] = {
    "unpruned": None,
    "random": BASELINES["random"],
    "PyramidDrop": BASELINES["PyramidDrop"],
    "ToMe": lambda share: ToMe(keep=share, layer=READING, positions="keep"),
}

EXPERIMENT = Experiment(
    slug="tome",
    question="How many answers survive when alike image tokens are merged instead of dropped?",
    setting=SETTING
    + "; merged in front of the first of them",
    paper="ViT-L without training at twice the throughput with 0.2-0.3 % less accuracy "
    "(abstract); not made for decoders",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="merging keeps 98 % of the accuracy with a quarter of the tokens", metric="accuracy at 1/4",
            arm="ToMe", against="unpruned", size=0.98, ratio=True, headline=True,
        ),
        Statement(
            says="merging is above dropping at random (1/8)", metric="accuracy at 1/8", arm="ToMe", against="random",
        ),
        Statement(
            says="merging without the question is within two points of dropping by it (1/8)",
            metric="accuracy at 1/8", arm="ToMe", against="PyramidDrop", size=-0.02,
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=PAPER_LIMITS,
)  # fmt: skip
