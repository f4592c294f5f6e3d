"""Where `salience shrink` takes its model and its data from: the user's, or one of the sandbox's worlds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.core.errors import ParameterError
from salience.hosts import checkpoints, data
from salience.jobs import _tune_sources as tuned
from salience.jobs.recipe import TuneRecipe
from salience.jobs.shrink_recipe import ShrinkRecipe

_WINDOW = 128  # tokens of a piece of text
_PIECES = {"train": 4800, "test": 96}
_MOST_OF_ONE = 60  # characters of one text for each token of a piece
_BATCH = 16


@dataclass
class Source:
    """A model to shrink, and what its quality is measured on.

    Attributes:
        make (Callable): () -> (model, tokenizer), fresh and equal each time.
        folder (Path): the untouched checkpoint.
        model (dict[str, Any]): name, parameters, layers, source.
        quality (dict[str, Any] | None): name, higher_is_better and unit of the first number; None without data.
        data (dict[str, Any]): name, train, test, description.
        train (Any): tokenised rows, or None.
        test (Any): tokenised rows, or None.
        score (Callable | None): (model, tokenizer) -> {"overall": ..., "loss": ..., "task.NAME": ...}.
        demonstrations (list): batches for methods that do not train.
        tokenizer (Any): the model's.
        task_type (str | None): "SEQ_CLS" for a classifier.
    """

    make: Callable[[], tuple[Any, Any]]
    folder: Path
    model: dict[str, Any]
    quality: dict[str, Any] | None
    data: dict[str, Any]
    train: Any = None
    test: Any = None
    score: Callable[[Any, Any], dict[str, float]] | None = None
    demonstrations: list[dict[str, Tensor]] = field(default_factory=list)
    tokenizer: Any = None
    task_type: str | None = None


def given(recipe: ShrinkRecipe, device: Any, say: Callable[[str], None]) -> Source:
    """The user's model on the user's data; everything is checked before the first step."""
    if recipe.data is None:
        return _without_data(recipe, device, say)
    shared = recipe.model_dump(include=set(TuneRecipe.model_fields) - {"methods", "baseline"})
    found = tuned.given(TuneRecipe(**shared), device, say)
    return _source(found, recipe, _folder(recipe.model, found))


def sandbox(recipe: ShrinkRecipe, world: str, say: Callable[[str], None]) -> Source:
    """One of the sandbox's worlds, made in place by the first call on a machine."""
    say("making the sandbox model (once on this machine)")
    if world == "instructions":
        from salience.sandbox.text import text_world

        shared = recipe.model_dump(include=set(TuneRecipe.model_fields) - {"methods", "baseline"})
        found = tuned.sandbox(TuneRecipe(**shared), lambda _: None)
        return _source(found, recipe, text_world(size="tiny" if recipe.quick else "small").folder)
    return _mixture(recipe) if world == "mixture" else _text(recipe)


def held_out_loss(model: Any, rows: Any, collate: Callable[[Any], dict[str, Tensor]]) -> float:
    """Mean loss over all learned tokens of the rows (over rows, for a classifier), in nats."""
    total, count = 0.0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            batch = collate([rows[index] for index in range(start, min(start + _BATCH, len(rows)))])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch["labels"]
            # a causal model predicts all but the first label
            learned = labels[:, 1:] if labels.ndim == 2 and model.can_generate() else labels
            seen = int((learned != -100).sum())
            if seen:
                total += float(model(**batch).loss) * seen
                count += seen
    model.train(training)
    return total / max(count, 1)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinity where that is too large a number."""
    return math.exp(loss) if loss < 700 else math.inf


def _source(found: Any, recipe: ShrinkRecipe, folder: Path) -> Source:
    """What `salience tune` reads, with a score that also tells the loss."""
    collate = data.Collator(found.tokenizer)
    classifies = found.task_type == "SEQ_CLS"

    def score(model: Any, tokenizer: Any) -> dict[str, float]:
        loss = held_out_loss(model, found.test, collate)
        told = found.score(model, tokenizer) if found.score is not None else {"overall": loss}
        tasks = {f"task.{name}": value for name, value in told.items() if name != "overall"}
        return {"overall": told["overall"], **_loss(loss, classifies), **tasks}

    return Source(
        make=found.make,
        folder=folder,
        model=found.model,
        quality=found.quality,
        data=found.data,
        train=found.train,
        test=found.test,
        score=score,
        demonstrations=_demonstrations(found.train, collate, recipe),
        tokenizer=found.tokenizer,
        task_type=found.task_type,
    )


def _loss(loss: float, classifies: bool = False) -> dict[str, float]:
    return {"loss": loss} if classifies else {"loss": loss, "perplexity": perplexity(loss)}


def _demonstrations(rows: Any, collate: Any, recipe: ShrinkRecipe) -> list[dict[str, Tensor]]:
    """The first training rows, in batches, without labels."""
    count, size = min(recipe.samples, len(rows)), recipe.batch_size
    batches = []
    for start in range(0, count, size):
        batch = collate([rows[index] for index in range(start, min(start + size, count))])
        batches.append({name: value for name, value in batch.items() if name != "labels"})
    return batches


def _folder(source: str | None, found: Any) -> Path:
    """Where the untouched weights lie."""
    if source is None:
        return Path(found.make()[0].name_or_path)
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    from transformers.utils import cached_file

    # it has just been loaded, so it is in the hub's cache
    config = cached_file(source, "config.json")
    assert config is not None
    return Path(config).parent


def _without_data(recipe: ShrinkRecipe, device: Any, say: Callable[[str], None]) -> Source:
    """A model alone, for methods that need no data; its quality is not known."""
    source = recipe.model or ""
    say(f"loading {Path(source).name}")

    def make() -> tuple[Any, Any]:
        return checkpoints.load_model(source, dtype=recipe.dtype, device=device)

    model, tokenizer = make()
    return Source(
        make=make,
        folder=_folder(source, None),
        model=tuned.about_model(model, Path(source).name, source),
        quality=None,
        data={},
        tokenizer=tokenizer,
    )


def _text(recipe: ShrinkRecipe) -> Source:
    from salience.sandbox.text import text_world

    world = text_world(size="tiny" if recipe.quick else "small")
    tokenizer = world.tokenizer()
    train = _windows(tokenizer, world.train_texts, _PIECES["train"], recipe.seed)
    tests = {"": _windows(tokenizer, world.held_out_texts, min(recipe.eval_samples, _PIECES["test"]), 0)}
    model = tuned.about_model(world.model(), "the sandbox model", "trained in place on Python's own sources")
    about = {
        "name": "Python's own sources",
        "description": f"pieces of {_WINDOW} tokens of files it has not seen",
    }
    return _texts(recipe, world, tokenizer, train, tests, model, about)


def _mixture(recipe: ShrinkRecipe) -> Source:
    from salience.sandbox.mixture import DOMAINS, mixture_world

    world = mixture_world(size="tiny" if recipe.quick else "small", seed=0)
    tokenizer = world.tokenizer()
    train = _windows(tokenizer, world.texts(DOMAINS[0]), _PIECES["train"], recipe.seed)
    count = min(recipe.eval_samples, _PIECES["test"])
    tests = {name: _windows(tokenizer, world.texts(name, held_out=True), count, 0) for name in DOMAINS}
    model = tuned.about_model(
        world.model(), "the sandbox's mixture of experts", f"trained in place on {', '.join(DOMAINS)}"
    )
    about = {
        "name": f"the domain {DOMAINS[0]}",
        "description": f"demonstrations and held-out texts are of it; losses on {' and '.join(DOMAINS[1:])} are "
        "what keeping its experts costs elsewhere",
    }
    return _texts(recipe, world, tokenizer, train, tests, model, about)


def _texts(
    recipe: ShrinkRecipe,
    world: Any,
    tokenizer: Any,
    train: Any,
    tests: Mapping[str, Any],
    model: dict[str, Any],
    about: dict[str, Any],
) -> Source:
    collate = data.Collator(tokenizer)
    first = next(iter(tests))

    def score(model: Any, _: Any) -> dict[str, float]:
        losses = {name: held_out_loss(model, rows, collate) for name, rows in tests.items()}
        by_domain = {f"task.{name}": loss for name, loss in losses.items() if len(losses) > 1}
        return {"overall": losses[first], **_loss(losses[first]), **by_domain}

    return Source(
        make=lambda: (world.model(), world.tokenizer()),
        folder=world.folder,
        model=model,
        quality={"name": "held-out loss", "higher_is_better": False, "unit": "nats/token"},
        data={**about, "train": len(train), "test": len(tests[first])},
        train=train,
        test=tests[first],
        score=score,
        demonstrations=_demonstrations(train, collate, recipe),
        tokenizer=tokenizer,
    )


def _windows(tokenizer: Any, texts: Sequence[str], count: int, seed: int) -> Any:
    """Up to `count` pieces of texts, each text closed by the end token; a seed chooses which texts come first."""
    from datasets import Dataset

    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    pieces: list[list[int]] = []
    stream: list[int] = []
    for index in order:
        # the start of a long text, of which one would else be most of the pieces
        few = texts[index][: _MOST_OF_ONE * _WINDOW]
        stream += [*tokenizer(few, verbose=False)["input_ids"], tokenizer.eos_token_id]
        while len(stream) >= _WINDOW and len(pieces) < count:
            pieces.append(stream[:_WINDOW])
            stream = stream[_WINDOW:]
        if len(pieces) == count:
            break
    if not pieces:
        raise ParameterError(f"texts must be at least {_WINDOW} tokens long, got {len(stream)}")
    whole = [1] * _WINDOW
    return Dataset.from_dict({"input_ids": pieces, "attention_mask": [whole] * len(pieces), "labels": pieces})
