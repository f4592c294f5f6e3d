"""The text world: a small Llama that is trained in place on Python's own library, and its tokenizer and texts.

Nothing is downloaded: the corpus is the standard library of the Python that runs. The model reads source code in
batches mixed with the base tasks of `tasks.py`, so that one model serves for text and as the base for tuning: like
the models that papers tune, it knows its language and how to follow a format before tuning starts.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from salience.core.errors import require
from salience.core.progress import bar
from salience.sandbox._language import (
    LanguageWorld,
    Size,
    library_texts,
    rate_factor,
    seeded,
    stream,
    train_tokenizer,
    with_end,
)
from salience.sandbox.cache import cached
from salience.sandbox.tasks import BASE_TASKS, Question, questions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

_VERSION = 1  # of everything below and in `_language` that decides what the checkpoint holds


@dataclass(frozen=True)
class _Recipe:
    """What is trained and how. Text and questions are counted in rows for each step of the first and second part."""

    layers: int
    width: int
    inner: int
    vocabulary: int
    files: int
    steps: int
    text_rows: tuple[int, int]
    question_rows: tuple[int, int]
    tasks: tuple[str, ...]
    window: int = 128
    matrix_rate: float = 0.02
    vector_rate: float = 0.02


_RECIPES: dict[str, _Recipe] = {
    "small": _Recipe(
        layers=8, width=128, inner=256, vocabulary=1024, files=250, steps=340,
        text_rows=(4, 5), question_rows=(48, 40), tasks=tuple(BASE_TASKS),
    ),
    "tiny": _Recipe(
        layers=4, width=64, inner=128, vocabulary=512, files=40, steps=160,
        text_rows=(2, 2), question_rows=(32, 32), tasks=("copy", "upper", "first", "last"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class TextWorld(LanguageWorld):
    """A trained model with its tokenizer and texts."""

    def model(self) -> PreTrainedModel:
        """A fresh copy of the trained model, in float32 on the CPU, in eval mode."""
        from transformers import LlamaForCausalLM

        model: PreTrainedModel = LlamaForCausalLM.from_pretrained(self.folder)
        return model

    @cached_property
    def train_texts(self) -> list[str]:
        """Source files, in order of their path."""
        return library_texts(held_out=False)

    @cached_property
    def held_out_texts(self) -> list[str]:
        """Source files that the model has not seen: about one in twenty, chosen by a hash of their path."""
        return library_texts(held_out=True)

    @property
    def held_out_loss(self) -> float:
        """Loss on held-out source code, nats per token, as reached by training."""
        return float(self.about["held_out_loss"])


def text_world(*, size: Size = "small", seed: int = 0, progress: bool | None = None) -> TextWorld:
    """The text world; its model is trained at the first call on a machine and found in the cache afterwards.

    Args:
        size (str): "small" (8 layers of width 128, about a minute on two cores) or "tiny" (seconds, for tests).
        seed (int): >= 0; initial weights and order of the data.
        progress (bool | None): show a bar while training; None shows it where standard error is a terminal.

    Returns:
        TextWorld: the same for the same arguments. Global random states stay as they were.

    Raises:
        SalienceError: if the cache cannot be written, or if this Python came without the sources of its library.
    """
    require(size in _RECIPES, "size", f"one of {', '.join(_RECIPES)}", size)
    require(seed >= 0, "seed", ">= 0", seed)
    recipe = _RECIPES[size]
    key = {"version": _VERSION, "recipe": asdict(recipe), "seed": seed}
    folder = cached(f"text-{size}", key, lambda empty: _make(empty, recipe, seed, progress))
    return TextWorld(folder, size, seed)


def _make(folder: Path, recipe: _Recipe, seed: int, progress: bool | None) -> None:
    from salience.sandbox.scoring import text_loss

    started = time.perf_counter()
    texts = library_texts(held_out=False)
    texts = random.Random(seed).sample(texts, min(recipe.files, len(texts)))
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    model = _new_model(recipe, tokenizer, seed)
    _train(model, tokenizer, texts, recipe, seed, progress)
    held_out = library_texts(held_out=True)
    about = {
        **asdict(recipe),
        "seed": seed,
        "parameters": model.num_parameters(),
        "held_out_loss": text_loss(model, tokenizer, held_out),
        "bytes_per_token": sum(map(len, held_out))
        / sum(map(len, tokenizer(held_out, verbose=False)["input_ids"])),
        "seconds": round(time.perf_counter() - started, 1),
    }
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _new_model(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        return LlamaForCausalLM(config)


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    recipe: _Recipe,
    seed: int,
    progress: bool | None,
) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    tokens = stream(tokenizer, texts)
    tasks = {name: BASE_TASKS[name] for name in recipe.tasks}
    asked = questions(tasks, max(recipe.question_rows) * recipe.steps, random.Random(seed))
    optimizers = _optimizers(model, recipe)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    model.train()
    with bar(f"training a {recipe.layers}-layer model in place", recipe.steps, progress) as advance:
        for step in range(recipe.steps):
            factor = rate_factor(step, recipe.steps)
            for optimizer, own in zip(optimizers, rates):
                for group, rate in zip(optimizer.param_groups, own):
                    group["lr"] = rate * factor
            part = 2 * step // recipe.steps
            starts = torch.randint(
                len(tokens) - recipe.window, (recipe.text_rows[part],), generator=generator
            )
            rows = tokens[starts[:, None] + torch.arange(recipe.window)]
            model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
            batch, asked = asked[: recipe.question_rows[part]], asked[recipe.question_rows[part] :]
            model(**_question_batch(tokenizer, batch), use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            advance()
    model.eval()


def _optimizers(model: PreTrainedModel, recipe: _Recipe) -> list[torch.optim.Optimizer]:
    import torch

    # AdamW needs several times the steps before the model starts to copy; Muon is for matrices between layers only
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, weight_decay=0.01, ns_steps=3),
        torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def _question_batch(tokenizer: PreTrainedTokenizerFast, batch: Sequence[Question]) -> dict[str, Tensor]:
    import torch

    prompts = tokenizer([one.prompt for one in batch])["input_ids"]
    whole = with_end(tokenizer, [one.prompt + one.answer for one in batch])
    longest = max(map(len, whole))
    ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
    labels = torch.full((len(batch), longest), -100)
    for row, (prompt, tokens) in enumerate(zip(prompts, whole)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, len(prompt) : len(tokens)] = torch.tensor(tokens[len(prompt) :])
    return {"input_ids": ids, "attention_mask": (ids != tokenizer.pad_token_id).long(), "labels": labels}
