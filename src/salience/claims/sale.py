"""SALE: whether 4-bit estimates keep the keys that an answer needs, beside exact scores and block means."""

import math
from functools import lru_cache

import torch

from salience import focus
from salience.claims._needles import BASELINES, LIMITS, METRICS, SETTING, Make, model_of, runner
from salience.claims.harness import Experiment, Statement
from salience.methods.keys.sale import SALE
from salience.sandbox import needles

_STEPS, _PILOT_SEED = 7, 200


@lru_cache(maxsize=256)
@torch.no_grad()
def tau_of(seed: int, budget: int, tokens: int) -> float:
    """The threshold with which 4 bits keep as many pairs of two other texts as `budget` keys a query are.

    The papers' calibration bounds the error of the output instead; here all arms have to spend alike.
    """
    model, tokenizer = model_of(seed, "cpu")
    pilots = [
        tokenizer(needles.texts(1, tokens, kind, _PILOT_SEED)[0].prompt, return_tensors="pt")
        for kind in ("several", "tracking")
    ]
    wanted = (budget * tokens - budget * budget / 2) / (tokens * tokens / 2)
    low, high = -12.0, 8.0  # logarithms
    for _ in range(_STEPS):
        middle = (low + high) / 2
        with focus(model, _sale(math.exp(middle), 4)) as handle:
            kept = 0.0
            for pilot in pilots:
                model(**pilot, logits_to_keep=1)
                kept += handle.spent["sale"]["kept share"] / len(pilots)
        low, high = (middle, high) if kept > wanted else (low, middle)
    return math.exp((low + high) / 2)


def _sale(tau: float, bits: int | None) -> SALE:
    # what is always seen is made as small as the blocks allow: 96 to 127 newest keys and the first 32
    return SALE(tau=tau, bits=bits, local_window=96, segment=32, dense_below=0)


def sale(bits: int | None = 4) -> Make:
    """One threshold for all heads, so that the sharp heads get what the blunt ones do not need."""

    def make(seed: int, budget: int, tokens: int) -> SALE | None:
        return _sale(tau_of(seed, budget, tokens), bits) if budget >= 192 else None

    return make


_ARMS: dict[str, Make | None] = {
    **BASELINES,
    "SALE": sale(),
    "SALE, 8 bits": sale(8),
    "SALE, exact scores": sale(None),
}

EXPERIMENT = Experiment(
    slug="sale",
    question="Do 4-bit estimates of every pair keep the keys that an answer needs, at the same number of pairs?",
    setting=SETTING + "; SALE's one threshold for all heads keeps as many pairs of "
    "two other texts as the budget, and serves the arms with more bits too",
    paper="needle at 128K 96.0 against 96.1 of full attention, LongBench 48.39 against 48.77 (Llama-3.1-8B; notes on "
    "the full text), at least 3.36x faster attention from 64K on (abstract)",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="SALE answers as many as dense attention, less 1 point, each query seeing an eighth of 4K tokens",
            metric="accuracy at 4K, 1/8", arm="SALE", against="dense", size=-0.01, headline=True,
        ),
        Statement(
            says="it answers more than block means do at the same share (4K, 1/8)",
            metric="accuracy at 4K, 1/8", arm="SALE", against="block means", size=0.05,
        ),
        Statement(
            says="four bits answer as many as exact scores do, less 2 points (4K, 1/16)",
            metric="accuracy at 4K, 1/16", arm="SALE", against="SALE, exact scores", size=-0.02,
        ),
        Statement(
            says="it catches more attention than block means do (4K, 1/8)",
            metric="recall at 4K, 1/8", arm="SALE", against="block means",
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=LIMITS + " Every pair is estimated, so the time grows as dense attention's does; what it saves is a "
    "factor, and on a CPU without 4-bit products there is none.",
)  # fmt: skip
