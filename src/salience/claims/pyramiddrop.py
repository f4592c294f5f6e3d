"""PyramidDrop: what is left of the answers when image tokens leave in stages, against FastV and random choice."""

from salience.claims._vision import BASELINES, METRICS, PAPER_LIMITS, SETTING, Make, runner
from salience.claims.harness import Experiment, Statement

_ARMS: dict[str, Make | None] = {"unpruned": None, **BASELINES}

EXPERIMENT = Experiment(
    slug="pyramiddrop",
    question="How many answers survive when image tokens leave the decoder in stages, ranked by the question's "
    "attention?",
    setting=SETTING,
    paper="LLaVA-1.5-7B without training keeps 98.8 % of 8 benchmarks at 46.6 % of the image tokens' FLOPs, FastV "
    "97.8 % at 52.6 % (as measured in TransPrune's tables); trained with it, 40 % fewer GPU hours",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="PyramidDrop keeps at least 98.8 % of the accuracy with a quarter of the image tokens",
            metric="accuracy at 1/4", arm="PyramidDrop", against="unpruned", size=0.988, ratio=True, headline=True,
        ),
        Statement(
            says="the same with an eighth", metric="accuracy at 1/8", arm="PyramidDrop", against="unpruned",
            size=0.988, ratio=True,
        ),
        Statement(
            says="the same with a sixteenth", metric="accuracy at 1/16", arm="PyramidDrop", against="unpruned",
            size=0.988, ratio=True,
        ),
        Statement(
            says="it is at least 20 points above random choice in the same stages (1/8)", metric="accuracy at 1/8",
            arm="PyramidDrop", against="random in stages", size=0.2,
        ),
        Statement(
            says="it is above FastV at the same budget (1/8)", metric="accuracy at 1/8", arm="PyramidDrop",
            against="FastV",
        ),
        Statement(
            says="it is above FastV at the same budget (1/16)", metric="accuracy at 1/16", arm="PyramidDrop",
            against="FastV",
        ),
        Statement(
            says="counting survivors anew, as in the paper, costs at most a point (1/4)", metric="accuracy at 1/4",
            arm="PyramidDrop, renumbered", against="PyramidDrop", size=-0.01,
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=PAPER_LIMITS + " Each seed is another trained model: the first run on a machine trains three, some minutes "
    "each.",
)  # fmt: skip
