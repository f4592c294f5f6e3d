"""The vision world: a small LLaVA that is trained in place on the scenes of `shapes.py`, with its processor.

The checkpoint is an ordinary one: stock classes, loaded by `from_pretrained`, used through `generate`. Image features
are local (the patch embeddings), and the first two decoder layers cannot read the image: in large models, too,
the answer is read off the image tokens late, and only then it matters which of them are left. That lies in the
weights alone. Image features carry a flag in a channel of the hidden states that text never has; keys of the first
two layers turn the flag into a large negative value in one dimension of every head, where all queries are a constant.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from salience.core.errors import require
from salience.sandbox._llava import Recipe, new_model, new_processor
from salience.sandbox._llava_training import train_reader, train_tower
from salience.sandbox.cache import cached
from salience.sandbox.shapes import KINDS, Scene, drawn

_VERSION = 1  # of the model, its training and the scenes: all that decides what the checkpoint holds
_RECIPES = {
    "full": Recipe(layers=6, scenes=3000, tower_steps=160, steps=700, batch=32, first_steps=560),
    "quick": Recipe(
        layers=4,
        scenes=600,
        tower_steps=50,
        steps=225,
        batch=16,
        first_steps=195,
        first_patches=(14, 18),
        tower_layers=2,
        matrix_rate=0.014,
        vector_rate=0.006,
    ),
}


def folder(seed: int = 0, quick: bool = False, *, progress: bool | None = None) -> Path:
    """The checkpoint; trained at the first call on a machine and found in the cache afterwards.

    Args:
        seed (int): >= 0; initial weights and the scenes to train on.
        quick (bool): a smaller model after a short training, for tests: it answers some questions.
        progress (bool | None): show a bar while training; None shows it where standard error is a terminal.

    Returns:
        Path: config, weights, processor and about.json (the recipe and what it cost); to be read only. The same for
        the same arguments. Global random states stay as they were.

    Raises:
        SalienceError: if the cache cannot be written.
    """
    require(seed >= 0, "seed", ">= 0", seed)
    name = "quick" if quick else "full"
    recipe = _RECIPES[name]
    key = {"version": _VERSION, "recipe": asdict(recipe), "seed": seed}
    return cached(f"vision-{name}", key, lambda empty: _make(empty, recipe, seed, progress))


def load(seed: int = 0, quick: bool = False) -> tuple[Any, Any]:
    """A fresh copy of the model of `folder`, in float32 on the CPU in eval mode, and its processor."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    place = folder(seed, quick)
    return LlavaForConditionalGeneration.from_pretrained(place), AutoProcessor.from_pretrained(place)


def batch(processor: Any, scenes: Sequence[Scene], which: str | Sequence[str]) -> dict[str, Any]:
    """Questions about scenes as inputs of `generate`.

    Args:
        processor (Any): as `load` gives it.
        scenes (Sequence[Scene]): at least one.
        which (str | Sequence[str]): of `KINDS`; one for all scenes or one for each.

    Returns:
        dict[str, Any]: input_ids and attention_mask [B, S], padded on the left, pixel_values [B, 3, 96, 96], and
        answers (list[str]), which is to be taken out before the rest is handed to `generate`.
    """
    require(len(scenes) > 0, "scenes", "at least one", scenes)
    kinds = [which] * len(scenes) if isinstance(which, str) else list(which)
    require(len(kinds) == len(scenes), "which", f"one kind for each of {len(scenes)} scenes", which)
    for kind in kinds:
        require(kind in KINDS, "which", f"of {', '.join(KINDS)}", kind)
    asked = [scene.questions[KINDS.index(kind)] for scene, kind in zip(scenes, kinds)]
    inputs = processor(
        images=[scene.image for scene in scenes],
        text=[question.prompt for question in asked],
        padding=True,
        return_tensors="pt",
    )
    return {**inputs, "answers": [question.answer for question in asked]}


def accuracy(model: Any, processor: Any, scenes: Sequence[Scene], batch_size: int = 50) -> dict[str, float]:
    """The share of questions answered without any error, decoding greedily with the cache.

    Args:
        model (Any): as `load` gives it, or changed; on any device.
        processor (Any): as `load` gives it.
        scenes (Sequence[Scene]): every kind of question is asked about each.
        batch_size (int): questions at a time, >= 1.

    Returns:
        dict[str, float]: "all", then each of `KINDS`, in [0, 1].
    """
    import torch

    require(len(scenes) > 0, "scenes", "at least one", scenes)
    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for kind in KINDS:
                for start in range(0, len(scenes), batch_size):
                    inputs = batch(processor, scenes[start : start + batch_size], kind)
                    answers = inputs.pop("answers")
                    made = model.generate(**{name: value.to(device) for name, value in inputs.items()})
                    said = processor.batch_decode(
                        made[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                    )
                    right[kind] += [ours.strip() == answer for ours, answer in zip(said, answers)]
    finally:
        model.train(training)
    each = {kind: sum(marks) / len(marks) for kind, marks in right.items()}
    return {"all": sum(each.values()) / len(each), **each}


@contextmanager
def _training() -> Iterator[None]:
    """With gradients, wherever the model is asked for, and on one thread: two are slower for such small matrices."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _make(place: Path, recipe: Recipe, seed: int, progress: bool | None) -> None:
    from salience.core.progress import bar

    started, processors_started = time.perf_counter(), time.process_time()
    with _training():
        processor = new_processor()
        model = new_model(recipe, processor.tokenizer, seed)
        scenes = drawn(recipe.scenes, f"train {seed}")
        with bar(
            "training a vision-language model in place", recipe.tower_steps + recipe.steps, progress
        ) as advance:
            pixels = processor.image_processor([scene.image for scene in scenes], return_tensors="pt")[
                "pixel_values"
            ]
            train_tower(model, scenes, pixels, recipe, seed, advance)
            train_reader(model, processor.tokenizer, scenes, pixels, recipe, seed, advance)
    about = {
        **asdict(recipe),
        "seed": seed,
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - processors_started, 1),
    }
    processor.save_pretrained(place)
    model.save_pretrained(place)
    (place / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
