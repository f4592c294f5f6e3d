"""The mixture world: a small mixture of experts, trained in place on domains that tell apart, so that experts part.

Nothing is downloaded: `code` is the source of Python's own library, `prose` the manual that `pydoc` shows, `tasks`
questions on letters and digits with their answers. Every row of a batch is of one domain, and all domains have
equally many rows. The model is a Qwen2-MoE of transformers: a router, routed experts and one shared expert in each
layer, trained with the loss that balances experts.
"""

from __future__ import annotations

import hashlib
import itertools
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
)
from salience.sandbox.cache import cached
from salience.sandbox.tasks import BASE_TASKS, questions

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DOMAINS = ("code", "prose", "tasks")

_VERSION = 1  # of everything below and in `_language` that decides what the checkpoint holds
_TASK_LINES = 40  # in one text
_TASK_TEXTS = {False: 600, True: 40}  # for training, held out
_SHORTEST = 200  # characters of a topic
_FILES: dict[Size, int] = {"small": 160, "tiny": 25}  # of source code, evenly spaced over the library


@dataclass(frozen=True)
class _Recipe:
    """What is trained and how; `rows` are of each domain in each step."""

    layers: int
    width: int
    inner: int
    experts: int
    top_k: int
    vocabulary: int
    steps: int
    rows: int
    window: int = 128
    rate: float = 3e-3
    balance: float = 0.01


_RECIPES: dict[str, _Recipe] = {
    "small": _Recipe(
        layers=3, width=96, inner=64, experts=16, top_k=2, vocabulary=768, steps=360, rows=3
    ),
    "tiny": _Recipe(layers=2, width=48, inner=32, experts=8, top_k=2, vocabulary=384, steps=60, rows=2),
}  # fmt: skip


@dataclass(frozen=True)
class MixtureWorld(LanguageWorld):
    """A trained mixture of experts with its tokenizer and texts."""

    def model(self) -> PreTrainedModel:
        """A fresh copy of the trained model, in float32 on the CPU, in eval mode."""
        from transformers import Qwen2MoeForCausalLM

        model: PreTrainedModel = Qwen2MoeForCausalLM.from_pretrained(self.folder)
        return model

    def texts(self, domain: str, *, held_out: bool = False) -> list[str]:
        """Texts of one of `DOMAINS`: those that the model was trained on, or others.

        Raises:
            ParameterError: if there is no such domain.
        """
        require(domain in DOMAINS, "domain", f"one of {', '.join(DOMAINS)}", domain)
        return _texts(domain, _FILES[self.size], held_out=held_out)

    def stream(self, domain: str, *, held_out: bool = False) -> Tensor:
        """The tokens of a domain's texts with an end token after each: [N] int64, made once."""
        key = (domain, held_out)
        if key not in self._streams:
            self._streams[key] = stream(self.tokenizer(), self.texts(domain, held_out=held_out))
        return self._streams[key]

    @cached_property
    def _streams(self) -> dict[tuple[str, bool], Tensor]:
        return {}

    def batches(self, domain: str, rows: int, *, seed: int = 0, window: int = 128) -> list[dict[str, Tensor]]:
        """Demonstrations: `rows` pieces of training texts, of `window` tokens each, in batches of up to 16.

        Args:
            domain (str): one of `DOMAINS`.
            rows (int): >= 1.
            seed (int): where the pieces start.
            window (int): tokens of a piece.

        Returns:
            list[dict[str, Tensor]]: with `input_ids` and `attention_mask`, [B, window] int64 each.
        """
        import torch

        require(rows >= 1, "rows", ">= 1", rows)
        tokens = self.stream(domain)
        starts = torch.randint(len(tokens) - window, (rows,), generator=torch.Generator().manual_seed(seed))
        pieces = tokens[starts[:, None] + torch.arange(window)]
        return [{"input_ids": few, "attention_mask": torch.ones_like(few)} for few in pieces.split(16)]


def mixture_world(*, size: Size = "small", seed: int = 0, progress: bool | None = None) -> MixtureWorld:
    """The mixture world; its model is trained at the first call on a machine and found in the cache afterwards.

    Args:
        size (str): "small" (3 layers of 16 experts, minutes on one core) or "tiny" (2 of 8, seconds, for tests).
        seed (int): >= 0; initial weights and order of the data.
        progress (bool | None): show a bar while training; None shows it where standard error is a terminal.

    Returns:
        MixtureWorld: the same for the same arguments. Global random states stay as they were.

    Raises:
        SalienceError: if the cache cannot be written, or if this Python came without the sources of its library.
    """
    require(size in _RECIPES, "size", f"one of {', '.join(_RECIPES)}", size)
    require(seed >= 0, "seed", ">= 0", seed)
    recipe = _RECIPES[size]
    key = {"version": _VERSION, "recipe": asdict(recipe), "seed": seed}
    folder = cached(f"mixture-{size}", key, lambda empty: _make(empty, recipe, _FILES[size], seed, progress))
    return MixtureWorld(folder, size, seed)


def _make(folder: Path, recipe: _Recipe, files: int, seed: int, progress: bool | None) -> None:
    from salience.sandbox.scoring import text_loss

    started = time.perf_counter()
    texts = {domain: _texts(domain, files, held_out=False) for domain in DOMAINS}
    # all domains are read by one vocabulary, learnt from equally many characters of each
    least = min(sum(map(len, few)) for few in texts.values())
    tokenizer = train_tokenizer(
        list(itertools.chain.from_iterable(_first(few, least) for few in texts.values())), recipe.vocabulary
    )
    model = _new_model(recipe, tokenizer, seed)
    _train(model, [stream(tokenizer, few) for few in texts.values()], recipe, seed, progress)
    about = {
        **asdict(recipe),
        "seed": seed,
        "parameters": model.num_parameters(),
        "held_out_loss": {
            domain: text_loss(model, tokenizer, _texts(domain, files, held_out=True)) for domain in DOMAINS
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _texts(domain: str, files: int, *, held_out: bool) -> list[str]:
    if domain == "code":
        every = library_texts(held_out=held_out)
        return every if held_out else every[:: max(len(every) // files, 1)]
    if domain == "prose":
        return _topics(held_out)
    draw = random.Random(held_out)
    many = _TASK_TEXTS[held_out]
    asked = questions(BASE_TASKS, many * _TASK_LINES, draw)
    lines = [one.prompt + one.answer for one in asked]
    return ["\n".join(lines[i : i + _TASK_LINES]) for i in range(0, len(lines), _TASK_LINES)]


def _topics(held_out: bool) -> list[str]:
    """The manual's topics, each without the paragraphs of the other side."""
    from pydoc_data.topics import topics

    found = []
    for _, topic in sorted(topics.items()):
        # by content: paragraphs that stand in several topics have to stay on one side
        chosen = [
            paragraph
            for paragraph in topic.split("\n\n")
            if (hashlib.sha256(paragraph.strip().encode()).digest()[0] < 256 // 12) is held_out
        ]
        whole = "\n\n".join(chosen)
        if len(whole) >= _SHORTEST:
            found.append(whole)
    return found


def _first(texts: Sequence[str], characters: int) -> list[str]:
    """Texts from the start up to about so many characters."""
    ends = itertools.accumulate(map(len, texts))
    return [one for one, end in zip(texts, ends) if end - len(one) < characters]


def _new_model(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        moe_intermediate_size=recipe.inner,
        shared_expert_intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.balance,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with seeded(seed):
        return Qwen2MoeForCausalLM(config)


def _train(
    model: PreTrainedModel, streams: Sequence[Tensor], recipe: _Recipe, seed: int, progress: bool | None
) -> None:
    import torch

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.01)
    places = torch.arange(recipe.window)
    model.train()
    with bar(f"training a {recipe.layers}-layer mixture in place", recipe.steps, progress) as advance:
        for step in range(recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate * rate_factor(step, recipe.steps)
            rows = torch.cat(
                [
                    tokens[
                        torch.randint(len(tokens) - recipe.window, (recipe.rows, 1), generator=generator)
                        + places
                    ]
                    for tokens in streams
                ]
            )
            model(input_ids=rows, labels=rows, use_cache=False, output_router_logits=True).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            advance()
    model.eval()
