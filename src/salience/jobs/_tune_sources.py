"""Where `salience tune` takes its model and its data from: the user's, or the sandbox's instructions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salience.core.errors import ParameterError
from salience.hosts import checkpoints, data
from salience.hosts.arms import Score
from salience.jobs.recipe import TuneRecipe

_HELD_OUT_SHARE = 0.05


@dataclass
class Source:
    """A model and data, ready to tune.

    Attributes:
        make (Callable): () -> (model, tokenizer), fresh and equal each time.
        train (Any): tokenised rows.
        test (Any): tokenised held-out rows.
        score (Score | None): as in `Task`; None: the held-out loss is the quality.
        model (dict[str, Any]): name, parameters, layers, source.
        data (dict[str, Any]): name, train, test, description.
        quality (dict[str, Any]): name, higher_is_better and unit.
        tokenizer (Any): the model's.
        task_type (str | None): "SEQ_CLS" for a classifier.
    """

    make: Callable[[], tuple[Any, Any]]
    train: Any
    test: Any
    score: Score | None
    model: dict[str, Any]
    data: dict[str, Any]
    quality: dict[str, Any]
    tokenizer: Any
    task_type: str | None = None


def sandbox(recipe: TuneRecipe, say: Callable[[str], None]) -> Source:
    """The sandbox's instructions and the model that learns them, made in place by the first call on a machine."""
    from salience.sandbox.instructions import instruction_world
    from salience.sandbox.scoring import exact_match

    say("making the sandbox model (once on this machine)")
    world = instruction_world(size="tiny" if recipe.quick else "small", seed=recipe.seed)
    test = world.test.select(range(min(recipe.eval_samples, len(world.test))))

    def score(model: Any, tokenizer: Any) -> dict[str, float]:
        matched = exact_match(model, tokenizer, test)
        return {"overall" if name == "all" else name: 100.0 * value for name, value in matched.items()}

    model = world.model()
    return Source(
        make=lambda: (world.model(), world.tokenizer()),
        train=_columns(world.encoded()),
        test=_columns(world.encoded(test)),
        score=score,
        model=about_model(
            model, "the sandbox model", "trained in place on Python's own sources and simple tasks"
        ),
        data={
            "name": "the sandbox's instructions",
            "train": len(world.train),
            "test": len(test),
            "description": "string and number tasks; noise is planted in a part of the training answers",
        },
        quality={"name": "exact match", "higher_is_better": True, "unit": "%"},
        tokenizer=world.tokenizer(),
    )


def given(recipe: TuneRecipe, device: Any, say: Callable[[str], None]) -> Source:
    """A user's model, data, or both; everything is checked before the first step."""
    if recipe.data is None:
        raise ParameterError("data must be given together with model, got none: --data FILE_OR_DATASET")
    rows = data.load_rows(recipe.data, columns=recipe.columns)
    if recipe.model is None:
        from salience.sandbox.text import text_world

        say("making the sandbox model (once on this machine)")
        world = text_world(size="tiny" if recipe.quick else "small")
        make, name = (lambda: (world.model(), world.tokenizer())), "the sandbox model"
    else:
        source, name = recipe.model, Path(recipe.model).name
        kind: dict[str, Any] = {}
        if "label" in rows.column_names:
            kind = {"kind": "sequence", "num_labels": rows.features["label"].num_classes}
        say(f"loading {name}")

        def make() -> tuple[Any, Any]:
            return checkpoints.load_model(source, dtype=recipe.dtype, device=device, **kind)

    model, tokenizer = make()
    checkpoints.check_tokenizer(model, tokenizer)
    length = checkpoints.check_positions(model, recipe.max_length)
    settings: dict[str, Any] = {"max_length": length, "truncate": recipe.truncate}
    say(f"reading {len(rows)} samples")
    train = data.tokenize(rows, tokenizer, **settings)
    if recipe.test_data:
        held_out = data.load_rows(recipe.test_data, columns=recipe.columns, name="test_data")
        test = data.tokenize(held_out, tokenizer, name="test_data", **settings)
        test = test.select(range(min(recipe.eval_samples, len(test))))
    else:
        train, test = _split(train, recipe)
    classifies = "label" in rows.column_names
    test = _columns(test)
    return Source(
        make=make,
        train=_columns(train),
        test=test,
        score=(lambda model, _: _accuracy(model, test, data.Collator(tokenizer))) if classifies else None,
        model=about_model(model, name, recipe.model or ""),
        data={
            "name": Path(recipe.data).name,
            "train": len(train),
            "test": len(test),
            "description": recipe.data,
        },
        quality={"name": "accuracy", "higher_is_better": True, "unit": "%"}
        if classifies
        else {"name": "held-out loss", "higher_is_better": False, "unit": "nats/token"},
        tokenizer=tokenizer,
        task_type="SEQ_CLS" if classifies else None,
    )


def _accuracy(model: Any, rows: Any, collate: Any) -> dict[str, float]:
    import torch

    right = 0
    for start in range(0, len(rows), 64):
        batch = collate([rows[index] for index in range(start, min(start + 64, len(rows)))])
        batch = {name: value.to(model.device) for name, value in batch.items()}
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return {"overall": 100.0 * right / len(rows)}


def _split(rows: Any, recipe: TuneRecipe) -> tuple[Any, Any]:
    if len(rows) < 2:
        raise ParameterError(f"data must be at least two samples (one is held out), got {len(rows)}")
    share = max(1, min(recipe.eval_samples, round(_HELD_OUT_SHARE * len(rows))))
    split = rows.train_test_split(test_size=share, seed=recipe.seed)
    return split["train"], split["test"]


def _columns(rows: Any) -> Any:
    return rows.select_columns(["input_ids", "attention_mask", "labels"])


def about_model(model: Any, name: str, source: str) -> dict[str, Any]:
    """What a page says of a model: name, parameters, layers and where it is from."""
    from salience.hosts.transformers import structure

    parameters = sum(p.numel() for p in model.parameters())
    return {"name": name, "parameters": parameters, "layers": len(structure(model).layers), "source": source}
