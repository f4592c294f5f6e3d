"""What the claims of methods on key blocks share: the sandbox's needles model asked about long texts, on a budget.

One model is trained for each seed (cached); every arm reads the same texts with that same model and answers the same
questions. A budget is a number of keys for each query, everything counted that a method always sees (first keys,
newest keys), as a share of the prompt's length; what was kept is measured and stated, since lists differ in what they
can express. A question stands at the end of its text and is itself read with the chosen keys, so an answer is lost if
the note's keys are not among them. New tokens see the whole cache.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, lru_cache
from statistics import fmean
from typing import Any

import torch

from salience import focus
from salience.claims.harness import Runner, Values
from salience.core.method import Method
from salience.hosts.prefill import Prompt
from salience.kernels import attend
from salience.methods.keys.block_top_k import BlockTopK
from salience.methods.keys.streaming_llm import StreamingLLM
from salience.sandbox import needles

# where -> tokens of a text, share of them that each query may see, texts of each kind
PLACES = {
    "4K, 1/4": (4096, 1 / 4, 4),
    "4K, 1/8": (4096, 1 / 8, 4),
    "4K, 1/16": (4096, 1 / 16, 4),
    "2K, 1/8": (2048, 1 / 8, 4),
    "8K, 1/16": (8192, 1 / 16, 1),
    "16K, 1/16": (16384, 1 / 16, 1),
}
_TEXT_SEED, _GROWTH = 100, (4096, 8192, 16384)
# a seed of the model and tokens a query may see, of tokens of a prompt -> method; None cannot be so small
Make = Callable[[int, int, int], Method | None]

SETTING = (
    "a stock Llama of 2 layers (4 heads of 64 on 2 key heads) trained here to look up notes in readable filler, on "
    "at most 512 tokens; the kinds of text of RULER (one note, several asked at a time, one among 16, a chain of "
    "three); a budget of keys for each query as a share of the text's length, first and newest keys counted"
)
LIMITS = (
    "One sandbox model: its first layer looks a few tokens back, its second finds notes by their keys with sharp "
    "heads, so that a note is one key among thousands; real models spread the same look-up over many heads. New "
    "tokens see all keys: of an answer of several words the first depends on what was kept. Budgets are shares of "
    "4,096 tokens and less, where the papers read 32K to 128K."
)


def streaming(seed: int, budget: int, tokens: int) -> Method:
    return StreamingLLM(sinks=32, window=budget - 32)


def block_means(seed: int, budget: int, tokens: int) -> Method:
    # the first block and those around the diagonal, on average three of 32 keys, are seen besides
    return BlockTopK(keep=max(1, (budget - 96) // 32), q_block=64, k_block=32)


BASELINES: dict[str, Make | None] = {
    "dense": None,
    "StreamingLLM": streaming,
    "block means": block_means,
}
METRICS = {
    f"{what} at {name}": f"{text}, texts of {tokens:,} tokens, each query sees {share:.3g} of them at most"
    for name, (tokens, share, _) in PLACES.items()
    for what, text in {
        "accuracy": "share of questions answered exactly, four kinds alike",
        "recall": "share of the true attention that fell on kept keys, sampled rows of both layers",
        "kept": "share of the (query, key) pairs that were kept",
    }.items()
} | {
    "growth": "exponent of the time of choosing and attending from 4K to 16K with 512 keys a query, one thread "
    "(dense: of torch's attention)"
}


@lru_cache(maxsize=1)
def model_of(seed: int, device: str) -> tuple[Any, Any]:
    """The sandbox's needles model of a seed and its tokenizer; trained at the first call on a machine."""
    model, tokenizer = needles.load(seed)
    return model.to(device).eval(), tokenizer


def runner(arms: Mapping[str, Make | None]) -> Runner:
    """`Experiment.run`: an arm at every place; None is the model as it is."""

    def run(arm: str, seed: int, rate: float, device: str) -> Values:
        make, values = arms[arm], Values()
        for name, (tokens, share, count) in PLACES.items():
            budget = int(share * tokens)
            method = None if make is None else make(seed, budget, tokens)
            if make is not None and method is None:
                continue
            measured = measure(seed, device, method, tokens, count)
            values |= {f"{what} at {name}": value for what, value in measured.items()}
        return values | {"growth": growth(seed, None if make is None else make(seed, 512, 8192))}

    return run


# several claims in one process ask for the same baselines
@cache
@torch.no_grad()
def measure(seed: int, device: str, method: Method | None, tokens: int, count: int) -> dict[str, float]:
    """Accuracy, recall and kept share of one method on one model.

    Args:
        seed (int): of the model.
        device (str): where it runs.
        method (Method | None): None is the model as it is.
        tokens (int): of each text.
        count (int): texts of each kind.
    """
    model, tokenizer = model_of(seed, device)
    right, recall, kept = [], [], []
    with contextlib.nullcontext() if method is None else focus(model, method) as handle:
        for kind in needles.KINDS:
            for text in needles.texts(count, tokens, kind, _TEXT_SEED):
                right.append(needles.accuracy(model, tokenizer, [text])["all"])
                if handle is not None:
                    layers = handle.parts[0].layers.values()
                    recall += [float(layer.recall.mean()) for layer in layers]
                    kept += [float(layer.share.mean()) for layer in layers]
    if method is None:
        recall = kept = [1.0]
    return {"accuracy": fmean(right), "recall": fmean(recall), "kept": fmean(kept)}


@torch.no_grad()
def prompt_of(seed: int, tokens: int, device: str = "cpu") -> Prompt:
    """What the second layer, which looks notes up, asks while it reads a text."""
    from salience.core.attach import Attachment
    from salience.hosts.attention import observe

    model, tokenizer = model_of(seed, device)
    (text,) = needles.texts(1, tokens, "by key", _TEXT_SEED + 1)
    seen: list[Prompt] = []
    record = Attachment()
    try:
        observe(
            model.model.layers[1].self_attn,
            record,
            lambda call: seen.append(
                Prompt(call.query, call.key, call.value, call.scaling, None, 1, 2, {}, {})
            ),
        )
        model(**tokenizer(text.prompt, return_tensors="pt").to(device), logits_to_keep=1)
    finally:
        record.undo()
    return seen[0]


@cache
@torch.no_grad()
def growth(seed: int, method: Method | None) -> float:
    """The slope of log time over log length; the better of two runs, in processor time of one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        prompts = {tokens: prompt_of(seed, tokens) for tokens in _GROWTH}
        with (
            contextlib.nullcontext() if method is None else focus(model_of(seed, "cpu")[0], method) as handle
        ):
            choose = None if handle is None else handle.parts[0].choose
            points = [(math.log(t), math.log(_seconds(prompt, choose))) for t, prompt in prompts.items()]
    finally:
        torch.set_num_threads(threads)
    mean_x, mean_y = (fmean(axis) for axis in zip(*points))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def _seconds(prompt: Prompt, choose: Any) -> float:
    from salience.kernels import dense

    took = []
    inputs = prompt.query, prompt.key, prompt.value
    for _ in range(2):
        anew = replace(prompt, shared={}, state={})
        started = time.process_time()
        blocks = None if choose is None else choose(anew)
        if blocks is None:
            dense.attend(*inputs, scaling=prompt.scaling)
        else:
            attend(*inputs, blocks, scaling=prompt.scaling)
        took.append(time.process_time() - started)
    return min(took)
