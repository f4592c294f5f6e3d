"""VisionDrop: image tokens judged by image tokens, with and without merging, the encoder's stage, a causal mask."""

from salience.claims._vision import BASELINES, LAYERS, METRICS, PAPER_LIMITS, SETTING, Make, runner, staged
from salience.claims.harness import Experiment, Statement
from salience.methods.tokens.visiondrop import VisionDrop, split

_TOKENS = 144
_ENCODER = -2  # the layer whose class token knows what the picture holds


def _counts(share: float) -> list[int]:
    return [max(2, int(ratio * _TOKENS)) for ratio in staged(share)]


def _full(merge: bool) -> Make:
    def make(share: float) -> VisionDrop:
        pairs = [split(count) if merge else (count, 0) for count in _counts(share)]
        return VisionDrop(
            encoder=pairs[0],
            stages=tuple(pairs[1:]),
            layers=LAYERS[1:],
            encoder_layer=_ENCODER,
            positions="keep",
        )

    return make


def _decoder(merge: bool, causal: bool) -> Make:
    def make(share: float) -> VisionDrop:
        pairs = tuple(split(count) if merge else (count, 0) for count in _counts(share))
        return VisionDrop(encoder=None, stages=pairs, layers=LAYERS, causal_scores=causal, positions="keep")

    return make


def _encoder(share: float) -> VisionDrop:
    return VisionDrop(
        encoder=split(max(2, int(share * _TOKENS))),
        stages=(),
        layers=(),
        encoder_layer=_ENCODER,
        positions="keep",
    )


_ARMS: dict[str, Make | None] = {
    "unpruned": None,
    **BASELINES,
    "VisionDrop": _full(True),
    "without merging": _full(False),
    "encoder alone": _encoder,
    "decoder alone": _decoder(True, False),
    "decoder, causal": _decoder(True, True),
    "decoder, not merged": _decoder(False, False),
    "decoder, causal, not merged": _decoder(False, True),
}

EXPERIMENT = Experiment(
    slug="visiondrop",
    question="Do image tokens alone, without the question, tell which of them are needed?",
    setting=SETTING
    + "; the vision tower's second-last layer scores in front of the decoder, and that stage saves in the first two "
    "layers as well",
    paper="LLaVA-1.5-7B with 192 of 576 tokens on average keeps 98.76 % of 9 benchmarks (PyramidDrop 96.11 %, FastV "
    "88.45 %); LLaVA-NeXT-7B at 320 of 2,880: 95.7 %, 2.7 times faster, 6 times fewer FLOPs",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="VisionDrop keeps at least 98 % of the accuracy with a quarter of the image tokens",
            metric="accuracy at 1/4", arm="VisionDrop", against="unpruned", size=0.98, ratio=True, headline=True,
        ),
        Statement(
            says="it is above text-guided PyramidDrop at the same schedule (1/4)", metric="accuracy at 1/4",
            arm="VisionDrop", against="PyramidDrop",
        ),
        Statement(
            says="it is above FastV in front of the first reading layer (1/4)", metric="accuracy at 1/4",
            arm="VisionDrop", against="FastV",
        ),
        Statement(
            says="it is above random choice in the same stages (1/4)", metric="accuracy at 1/4", arm="VisionDrop",
            against="random in stages",
        ),
        Statement(
            says="merging is not worse than dropping (1/8)", metric="accuracy at 1/8", arm="VisionDrop",
            against="without merging", size=-0.01,
        ),
        Statement(
            says="scores without the causal mask are above the official causal ones (decoder, not merged, 1/4)",
            metric="accuracy at 1/4", arm="decoder, not merged", against="decoder, causal, not merged",
        ),
        Statement(
            says="causal scores prefer early places: the mean place of what they keep is below .4 (1/8)",
            metric="place at 1/8", arm="decoder, causal, not merged", against="", direction="lower", size=0.4,
        ),
        Statement(
            says="scores without the mask do not: within .05 of the middle (1/8)",
            metric="place off centre at 1/8", arm="decoder, not merged", against="", direction="lower", size=0.05,
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=PAPER_LIMITS + " A picture holds eight to thirteen tokens that some question could be about; whoever does "
    "not know the question has to keep them all.",
)  # fmt: skip
