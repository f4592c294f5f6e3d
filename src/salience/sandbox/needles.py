"""The needles world: long texts with hidden notes, questions about them, and a small Llama trained to answer.

The kinds of text are those of RULER (arXiv:2404.06654): one note; several notes asked for at a time; one by its key
among others; and a chain, where each note names the next and the last holds a number. An answer to a chain names
every note on the way, as RULER's does. Notes stand in any order, so that nothing can be worked out before the
question. The checkpoint is an ordinary one: stock classes, loaded by `from_pretrained`, used through `generate`. The
first layer looks at the last few tokens; the second finds the note by its key, over any distance, so that a method
which hides the note's block from the question loses the answer.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salience.core.errors import require
from salience.sandbox._needles_texts import KINDS, NOTE, Body, Question, body, fewest, hidden_for
from salience.sandbox.cache import cached

if TYPE_CHECKING:
    from salience.sandbox._needles_training import Recipe

_VERSION = 2  # of the model, its training and the texts: all that decides what the checkpoint holds
_LONGEST = 32_000  # tokens of a text; the answer needs positions as well


def _recipe(quick: bool) -> Recipe:
    from salience.sandbox._needles_training import Recipe, Stage

    if quick:
        return Recipe(stages=(Stage(60, 24, 64, 10, 1), Stage(60, 12, 128, 16, 8), Stage(20, 6, 256, 20, 8)))
    return Recipe(
        stages=(
            Stage(40, 24, 64, 10, 1),
            Stage(120, 12, 128, 16, 100),
            Stage(70, 8, 256, 20, 80),
            Stage(30, 4, 512, 24, 40),
        )
    )


@dataclass(frozen=True)
class Text:
    """A text that ends in a question, and what is known about it.

    Attributes:
        prompt (str): the text, then the question, to be completed by the answer.
        answer (str): as the tokenizer writes it, without the end.
        kind (str): of `KINDS`.
        places (tuple[int, ...]): first token, in the tokenized prompt, of each note that the answer needs, in the
            order of the answer; a note is 5 tokens.
        tokens (int): of the tokenized prompt, the token for its beginning included.
    """

    prompt: str
    answer: str
    kind: str
    places: tuple[int, ...]
    tokens: int

    @property
    def depths(self) -> tuple[float, ...]:
        """How far down the text each of those notes begins, in [0, 1)."""
        return tuple(place / self.tokens for place in self.places)

    def hides(self, block: int) -> tuple[int, ...]:
        """Numbers, in rising order, of the blocks of `block` tokens in which those notes are."""
        require(block >= 1, "block", ">= 1", block)
        held = {token // block for place in self.places for token in range(place, place + NOTE)}
        return tuple(sorted(held))


class LongText(NamedTuple):
    """A long text, a question about it, and the answer."""

    text: str
    question: str
    answer: str


def folder(seed: int = 0, quick: bool = False, *, progress: bool | None = None) -> Path:
    """The checkpoint; trained at the first call on a machine and found in the cache afterwards.

    Args:
        seed (int): >= 0; initial weights and the texts to train on.
        quick (bool): a shorter training, for tests: it answers at 512 tokens.
        progress (bool | None): show a bar while training; None shows it where standard error is a terminal.

    Returns:
        Path: config, weights, tokenizer and about.json (the recipe and what it cost); to be read only. The same for
        the same arguments. Global random states stay as they were.

    Raises:
        SalienceError: if the cache cannot be written.
    """
    require(seed >= 0, "seed", ">= 0", seed)
    recipe = _recipe(quick)
    key = {"version": _VERSION, "recipe": asdict(recipe), "seed": seed}
    name = "quick" if quick else "full"
    return cached(f"needles-{name}", key, lambda empty: _make(empty, recipe, seed, progress))


def load(seed: int = 0, quick: bool = False) -> tuple[Any, Any]:
    """A fresh copy of the model of `folder`, in float32 on the CPU in eval mode, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    place = folder(seed, quick)
    return LlamaForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)


def texts(count: int, length: int, kind: str, seed: int = 0) -> list[Text]:
    """Texts that no model of the sandbox was trained on.

    Args:
        count (int): how many, >= 1.
        length (int): tokens of each, exactly, question and beginning included.
        kind (str): of `KINDS`.
        seed (int): >= 0; the first texts of a seed are the same for every count.

    Returns:
        list[Text]: the same for the same arguments. Global random states stay as they were.
    """
    require(count >= 1, "count", ">= 1", count)
    require(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
    least = 1 + fewest(kind)
    require(least <= length <= _LONGEST, "length", f"in [{least}, {_LONGEST}] for {kind!r}", length)
    require(seed >= 0, "seed", ">= 0", seed)
    draw = random.Random(f"held out {seed} {kind} {length}")
    found = []
    for _ in range(count):
        text, question, places = _drawn(length, kind, draw)
        prompt = _written([*text.words, *question.words])
        found.append(Text(prompt, _written(question.answer), kind, places, length))
    return found


def long_text(tokens: int, seed: int = 0, kind: str = "by key") -> LongText:
    """A text in lines for a file, and apart from it a question, which together are `tokens` tokens.

    Args:
        tokens (int): of text and question, the token for the beginning included.
        seed (int): >= 0.
        kind (str): of `KINDS`.

    Returns:
        LongText: text, question and answer; a space or the end of a line belongs between the first two.
    """
    require(kind in KINDS, "kind", f"one of {', '.join(KINDS)}", kind)
    least = 1 + fewest(kind)
    require(least <= tokens <= _LONGEST, "tokens", f"in [{least}, {_LONGEST}] for {kind!r}", tokens)
    require(seed >= 0, "seed", ">= 0", seed)
    text, question, _ = _drawn(tokens, kind, random.Random(f"long {seed} {kind} {tokens}"))
    sentences = _written(text.words).split(". ")
    lines = [". ".join(sentences[start : start + 12]) for start in range(0, len(sentences), 12)]
    return LongText(".\n".join(lines) + "\n", _written(question.words), _written(question.answer))


def accuracy(model: Any, tokenizer: Any, texts: Sequence[Text], batch_size: int = 1) -> dict[str, float]:
    """The share of texts answered without any error, decoding greedily with the cache.

    Args:
        model (Any): as `load` gives it, or focused; on any device.
        tokenizer (Any): as `load` gives it.
        texts (Sequence[Text]): at least one; those of a batch are padded on the left.
        batch_size (int): texts at a time, >= 1.

    Returns:
        dict[str, float]: "all", the share of all texts, then each kind that is there, in [0, 1].
    """
    import torch

    require(len(texts) > 0, "texts", "at least one", texts)
    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(texts), batch_size):
                some = texts[start : start + batch_size]
                inputs = tokenizer([text.prompt for text in some], padding=True, return_tensors="pt").to(
                    device
                )
                made = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
                said = tokenizer.batch_decode(made, skip_special_tokens=True)
                for text, ours in zip(some, said):
                    right[text.kind].append(ours.strip() == text.answer)
    finally:
        model.train(training)
    shares = {kind: sum(marks) / len(marks) for kind, marks in right.items() if marks}
    return {"all": sum(map(sum, right.values())) / len(texts), **shares}


def _drawn(length: int, kind: str, draw: random.Random) -> tuple[Body, Question, tuple[int, ...]]:
    """A text, the question about it, and where in the tokens of both the notes begin that the answer needs."""
    found = hidden_for(kind, draw)
    question = found.asked(kind)
    text = body(length - 1 - len(question.words), found.notes, draw)
    return text, question, tuple(1 + text.starts[number] for number in question.notes)


def _written(words: Sequence[str]) -> str:
    """Words with spaces between them and none before marks, as the tokenizer writes them."""
    text = " ".join(words)
    for mark in ".,?":
        text = text.replace(f" {mark}", mark)
    return text


@contextmanager
def _training() -> Iterator[None]:
    """With gradients, wherever the model is asked for, and on one thread: two are slower for such small matrices."""
    import torch

    threads, state = torch.get_num_threads(), random.getstate()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        # rich, which draws the bar, takes a number from the global state when it is imported
        random.setstate(state)


def _make(place: Path, recipe: Recipe, seed: int, progress: bool | None) -> None:
    from salience.core.progress import bar
    from salience.sandbox._needles_training import new_model, new_tokenizer, train

    started, processors_started = time.perf_counter(), time.process_time()
    with _training(), bar("training a model to find notes in place", recipe.steps, progress) as advance:
        model = new_model(recipe, seed)
        train(model, recipe, seed, advance)
    about = {
        **asdict(recipe),
        "seed": seed,
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - processors_started, 1),
    }
    new_tokenizer().save_pretrained(place)
    model.save_pretrained(place)
    (place / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
