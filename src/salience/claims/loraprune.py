"""LoRAPrune: does the gradient that LoRA gives find as good heads and channels as the true one, for less memory?

A small Llama that was trained on Python's own library loses half of the heads and channels of each layer while LoRA
tunes it further on the same kind of text. Every arm has the same batches in the same order, the same schedule and
the same size at the end; LLM-Pruner's rule spends the first ten batches on its score, cuts at once, and recovers
for the rest.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from salience.claims.harness import Experiment, Statement, Values
from salience.methods.heads.loraprune import LoRAPrune
from salience.sandbox.scoring import text_loss
from salience.sandbox.text import TextWorld, text_world
from salience.verb import focus

_STEPS, _ROWS, _WINDOW, _KEEP = 100, 8, 64, 0.5
_FILES = 100
_ONE_SHOT = 10
_METRICS = ("random", "magnitude", "wanda", "grad", "lora")


@lru_cache(maxsize=1)
def _stream(world: TextWorld) -> Tensor:
    """Some hundred training texts as one row of tokens."""
    tokenizer = world.tokenizer()
    ids = tokenizer(world.train_texts[:: len(world.train_texts) // _FILES], verbose=False)["input_ids"]
    return torch.tensor(list(chain.from_iterable([*one, tokenizer.eos_token_id] for one in ids)))


def _batches(world: TextWorld, seed: int) -> list[dict[str, Tensor]]:
    stream, random = _stream(world), torch.Generator().manual_seed(seed)
    starts = torch.randint(len(stream) - _WINDOW, (_STEPS, _ROWS), generator=random)
    rows = stream[starts[..., None] + torch.arange(_WINDOW)]
    return [{"input_ids": few, "labels": few} for few in rows]


def pruned(arm: str, seed: int, rate: float, device: str, keep: float = _KEEP) -> Values:
    """One arm of the experiment at any share of heads and channels kept."""
    world = text_world(size="tiny", seed=seed)
    model: Any = world.model().to(device)
    data = _batches(world, seed)
    shared: dict[str, Any] = {"learning_rate": rate, "seed": seed, "dropout": 0.0, "prune_every": 5}
    if arm == "one shot":
        # all steps are warm-up: the masks change once, at the last of them, and nothing is learnt before
        score = LoRAPrune(
            keep=keep,
            metric="grad",
            steps=_ONE_SHOT,
            warmup=0.95,
            cooldown=0.0,
            learning_rate=1e-12,
            seed=seed,
        )
        spent = focus(model, score, data=data[:_ONE_SHOT]).finish().spent["loraprune"]
        focus(model, LoRAPrune(keep=1.0, steps=_STEPS - _ONE_SHOT, **shared), data=data[_ONE_SHOT:]).finish()
    else:
        keep, shared["metric"] = (1.0, "lora") if arm == "not pruned" else (keep, arm)
        method = LoRAPrune(keep=keep, steps=_STEPS, **shared)
        spent = focus(model, method, data=data).finish().spent["loraprune"]
    loss = text_loss(model, world.tokenizer(), world.held_out_texts, windows=96)
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "gradient bytes": spent["gradient bytes"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


EXPERIMENT = Experiment(
    slug="loraprune",
    question="Does LoRA's gradient find heads and channels to prune as well as the true gradient, in less memory?",
    setting="4-layer Llama of width 64 trained on Python's library (a model for each seed), half of the heads and "
    "channels of each layer pruned in 100 steps of 8 x 64 tokens, LoRA r=8 everywhere, rate 0.003",
    paper="LLaMA-7B at 50 %: perplexity 11.60 on WikiText2 and 17.39 on PTB against 16.41 and 20.85 of LLM-Pruner, "
    "52.6 % less memory (final version; the first one said more)",
    arms=("not pruned", *_METRICS[:3], "one shot", *_METRICS[3:]),
    metrics={
        "perplexity": "on held-out source files, per token",
        "loss": "its logarithm, nats per token",
        "gradient bytes": "bytes of gradients before the optimizer step, the most there were",
        "parameters": "of the model at the end",
    },
    statements=(
        Statement(
            says="at half the heads and channels, LoRAPrune has a lower loss than pruning at random", metric="loss",
            arm="lora", against="random", direction="lower", headline=True,
        ),
        Statement(
            says="LoRAPrune has a lower loss than magnitude", metric="loss", arm="lora", against="magnitude",
            direction="lower",
        ),
        Statement(
            says="LoRAPrune has a lower loss than weight times norm of the input (Wanda's rule, by unit)",
            metric="loss", arm="lora", against="wanda", direction="lower",
        ),
        Statement(
            says="LoRAPrune has a lower loss than LLM-Pruner's rule (true gradient, all at once, then recovery)",
            metric="loss", arm="lora", against="one shot", direction="lower",
        ),
        Statement(
            says="LoRAPrune's loss is at most 0.01 nats above that with the true gradient", metric="loss", arm="grad",
            against="lora", direction="higher", size=-0.01,
        ),
        Statement(
            says="LoRAPrune's gradients take at most half of the bytes that the true gradient needs",
            metric="gradient bytes", arm="lora", against="grad", direction="lower", size=0.5, ratio=True,
        ),
    ),
    run=pruned,
    rates=(3e-3,),
    seeds=5,
    notes="Two key/value groups and 128 channels a layer leave little to choose from, and 100 steps of LoRA repair "
    "much of a bad choice: rules that look at the weights at all differ by hundredths of a nat. The gradual schedule "
    "reaches its target with a tenth of the steps left to recover in, the cut at once with nine tenths, and no arm "
    "tells that apart from its better score. LoRA of rank 8 is a large share of matrices of width 64; in a model of "
    "billions of parameters its gradients are under a hundredth of the true ones.",
)  # fmt: skip
