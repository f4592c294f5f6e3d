"""What the claims of methods on image tokens share: the sandbox's vision model asked about scenes, on a budget.

One model is trained for each seed (cached); every arm prunes that same model without further training and is asked
the same questions about the same unseen scenes. The model has seen pictures with background patches left out. The
budget is the mean number of image tokens in the layers that can read the image (all but the first two), as a share
of all 144: methods with several stages are given more tokens at first and fewer at last, so that all arms spend
alike. Beside the right answers it is counted how much of what the question is about was kept, and where in the
picture kept tokens lie.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch

from salience import focus
from salience.claims.harness import Runner, Values
from salience.core.method import Method
from salience.hosts.pruning import Pruning
from salience.methods.tokens.fastv import FastV
from salience.methods.tokens.pyramiddrop import PyramidDrop
from salience.methods.tokens.random_tokens import RandomTokens
from salience.sandbox import shapes, vision

DEPTH, READING = 6, 2  # decoder layers, and the first of them that reads the image
SHARES = {"1/4": 0.25, "1/8": 0.125, "1/16": 0.0625}
LAYERS = (2, 3, 4)
_SCENES, _SCENE_SEED = 75, 100
_BATCH, _RANDOM_BATCH = 75, 15  # random choices are drawn once for each batch
Make = Callable[[float], Method]

SETTING = (
    "LLaVA of 6 layers and 144 image tokens trained here on generated scenes with textured distractors; in "
    "training background patches were left out at random, never those asked about, and no method pruned; "
    "budget: mean image tokens in the four layers that read the image"
)
PAPER_LIMITS = (
    "One sandbox model of 6 layers and 144 image tokens, which reads the image from its third layer on by "
    "construction; what is asked fills one to four tokens, so small budgets are enough once the question is "
    "known. FastV scores by the layer in front of the drop, which in front of the first reading layer has not "
    "read; a layer later it has, and one more layer sees the whole image (a mean of 1/4 more). Survivors keep "
    "their positions in all arms but one: this model tells where something is by its rotary position, and "
    "counting survivors anew, as several papers do, takes that away. At first all arms but FastV counted "
    "anew, and where-questions fell to chance."
)


def staged(share: float) -> tuple[float, float, float]:
    """Ratios before layers 2, 3 and 4 that halve twice and whose mean over layers 2 to 5 is `share`."""
    # layers 2, 3 and 4-5 see r, r/2 and r/4
    first = share * (DEPTH - READING) / (1 + 0.5 + 0.25 * (DEPTH - 4))
    return min(1.0, first), min(1.0, first / 2), min(1.0, first / 4)


BASELINES: dict[str, Make] = {
    "random": lambda share: RandomTokens(ratios=(share,), layers=(READING,), positions="keep"),
    "random in stages": lambda share: RandomTokens(ratios=staged(share), layers=LAYERS, positions="keep"),
    "FastV": lambda share: FastV(keep=share, layer=READING),
    "FastV a layer later": lambda share: FastV(keep=share, layer=READING + 1),
    "PyramidDrop": lambda share: PyramidDrop(ratios=staged(share), layers=LAYERS, positions="keep"),
    "PyramidDrop, renumbered": lambda share: PyramidDrop(ratios=staged(share), layers=LAYERS),
}
METRICS = {
    f"{what} at {name}": f"{text}, with a mean of {name} of the image tokens in the layers that read them"
    for name in SHARES
    for what, text in {
        "accuracy": "questions answered exactly (300: 75 new scenes, 4 kinds)",
        "foreground": "share of the tokens that the question is about which were left at the end",
        "place": "mean place of the tokens left at the end, 0 the first in the picture, 1 the last (no bias: .5)",
        "place off centre": "how far that is from .5",
    }.items()
}


@lru_cache(maxsize=2)
def model_of(seed: int, device: str) -> tuple[Any, Any]:
    """The sandbox's vision model of a seed and its processor; trained at the first call on a machine."""
    model, processor = vision.load(seed)
    return model.to(device), processor


@lru_cache(maxsize=1)
def _asked() -> list[Any]:
    return shapes.scenes(_SCENES, _SCENE_SEED)


def runner(arms: Mapping[str, Make | None], shares: Mapping[str, float] = SHARES) -> Runner:
    """`Experiment.run`: an arm at every budget; None is the model as it is, the same at every budget."""

    def run(arm: str, seed: int, rate: float, device: str) -> Values:
        make = arms[arm]
        values: Values = {}
        for name, share in shares.items():
            if make is not None or not values:
                measured = measure(seed, device, None if make is None else make(share))
            values |= {f"{what} at {name}": value for what, value in measured.items()}
        return values

    return run


@lru_cache(maxsize=1024)
@torch.no_grad()
def measure(seed: int, device: str, method: Method | None) -> Values:
    """Accuracy, kept foreground and mean place of one method on one model.

    Args:
        seed (int): of the model.
        device (str): where it runs.
        method (Method | None): None is the model as it is.

    Returns:
        Values: "accuracy", and of a method "foreground" and "place" as well (1 and .5 without one).
    """
    model, processor = model_of(seed, device)
    right, kept_share, places = [], [], []
    size = _RANDOM_BATCH if isinstance(method, RandomTokens) else _BATCH
    with contextlib.nullcontext() if method is None else focus(model, method) as handle:
        for kind in shapes.KINDS:
            for start in range(0, _SCENES, size):
                asked = _asked()[start : start + size]
                batch = vision.batch(processor, asked, kind)
                answers = batch.pop("answers")
                batch = {name: value.to(device) for name, value in batch.items()}
                made = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
                said = processor.batch_decode(made, skip_special_tokens=True)
                right += [ours.strip() == answer for ours, answer in zip(said, answers, strict=True)]
                if handle is not None and handle.parts[0].stages:
                    left = _left(handle.parts[0], batch["input_ids"])
                    about = torch.stack([scene.foreground(kind) for scene in asked])
                    kept_share += ((left & about).sum(-1) / about.sum(-1)).tolist()
                    spread = torch.linspace(0, 1, left.shape[1]).expand_as(left)
                    places += spread[left].tolist()
    values = {"accuracy": sum(right) / len(right), "foreground": 1.0, "place": 0.5}
    if kept_share:
        values["foreground"] = sum(kept_share) / len(kept_share)
        values["place"] = sum(places) / len(places) if places else 0.5
    return values | {"place off centre": abs(values["place"] - 0.5)}


def _left(part: Pruning, ids: torch.Tensor) -> torch.Tensor:
    """Which of the image's tokens were left behind the last decision, [B, 144] bool."""
    vision_tokens = part.found.image_tokens(ids)
    return part.stages[-1].kept[vision_tokens].view(len(ids), -1).cpu()
