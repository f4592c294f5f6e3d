"""HiP: whether halving intervals finds the key that holds the answer, and how its cost grows."""

from salience.claims._needles import BASELINES, LIMITS, METRICS, SETTING, Make, runner
from salience.claims.harness import Experiment, Statement
from salience.methods.keys.hip import HiP


def hip(representative: str = "center", k_block: int = 2) -> Make:
    """Half of the budget for the window, at most 128 keys; the first 16 keys are among those found."""

    def make(seed: int, budget: int, tokens: int) -> HiP:
        window = min(128, budget // 2)
        return HiP(
            mask_k=budget - window,
            window=window,
            k_block=k_block,
            representative=representative,
            dense_layers=0,
        )

    return make


_ARMS: dict[str, Make | None] = {
    **BASELINES,
    "HiP": hip(),
    "HiP, first": hip("first"),
    "HiP, blocks of 16": hip(k_block=16),
}

EXPERIMENT = Experiment(
    slug="hip",
    question="Does a search through halved intervals keep the keys that an answer needs, and at what growth of cost?",
    setting=SETTING + "; no dense layers",
    paper="O(T log T) time, O(T) memory; Llama-3.1-8B keeps 96 % of its LongBench score with k = 512 (ICLR 2025 "
    "text and a public review of it)",
    arms=tuple(_ARMS),
    metrics=METRICS,
    statements=(
        Statement(
            says="HiP keeps 96 % of the dense model's answers at 4K tokens, each query seeing an eighth of them",
            metric="accuracy at 4K, 1/8", arm="HiP", against="dense", size=0.96, ratio=True, headline=True,
        ),
        Statement(
            says="it answers more than attention sinks and a window do (4K, 1/8)", metric="accuracy at 4K, 1/8",
            arm="HiP", against="StreamingLLM", size=0.05,
        ),
        Statement(
            says="it answers more than the best block means do (4K, 1/8)", metric="accuracy at 4K, 1/8", arm="HiP",
            against="block means",
        ),
        Statement(
            says="the middle of an interval speaks for it better than its first block (recall, 4K, 1/8)",
            metric="recall at 4K, 1/8", arm="HiP", against="HiP, first",
        ),
        Statement(
            says="with a fixed number of keys its time grows with an exponent of at most 1.4 from 4K to 16K tokens",
            metric="growth", arm="HiP", against="", direction="lower", size=1.4,
        ),
    ),
    run=runner(_ARMS),
    seeds=3,
    notes=LIMITS,
)  # fmt: skip
