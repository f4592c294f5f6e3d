"""The corpus world: documents of five kinds, the kind of each known, and a small Llama that has read such documents.

- "reasoning": facts about made-up names, and further down conclusions that repeat them; names are new in every
  document, so that nothing but the document itself tells what belongs to whom;
- "narration": sentences on topics that drift; words of a topic come again, but nothing has to be remembered;
- "code": stretches of the standard library of the Python that runs;
- "boiler-plate": notices and menus, nearly the same everywhere;
- "noise": words in random order, some cut to pieces.

The model is an ordinary checkpoint, trained in place once on documents of another seed. It starts near a circuit that
copies (a head of the second layer finds what followed the newest token when it last stood in the text), which large
models come to by themselves and small ones not within a minute; training is free to change it.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from salience.core.errors import require
from salience.sandbox._needles_texts import _TOPICS
from salience.sandbox.cache import cached

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_VERSION = 1
KINDS = ("reasoning", "narration", "code", "boiler-plate", "noise")
# of every twenty documents
_SHARES = {"reasoning": 4, "narration": 6, "code": 4, "boiler-plate": 3, "noise": 3}
_SYLLABLES = tuple(a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u"))
POSITIONS = 384
_TRAINED_ON, _TRAINING_SEED = 3000, 10_000


class Text(NamedTuple):
    """A document and what kind it is of."""

    text: str
    kind: str


@dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Attributes:
        steps (int): of training.
        rows (int): documents of a step.
        tokens (int): of a document that are read.
        layers (int): of the model.
        width (int): of its hidden states.
        vocabulary (int): tokens of the tokenizer.
        matrix_rate (float): of matrices between layers, by Muon.
        vector_rate (float): of the rest, by AdamW.
    """

    steps: int
    rows: int = 8
    tokens: int = 192
    layers: int = 2
    width: int = 64
    vocabulary: int = 768
    matrix_rate: float = 0.01
    vector_rate: float = 0.004


_RECIPES = {"full": Recipe(steps=200), "quick": Recipe(steps=100)}


def documents(count: int, seed: int = 0) -> list[Text]:
    """Documents in an order by chance, the kinds in fixed shares (4 reasoning, 6 narration, 4 code, 3 and 3 of 20).

    Args:
        count (int): >= 1.
        seed (int): >= 0; other seeds have other names, topics and places in the library.

    Returns:
        list[Text]: the same for the same arguments on the same Python. Global random states stay as they were.
    """
    require(count >= 1, "count", ">= 1", count)
    require(seed >= 0, "seed", ">= 0", seed)
    draw = random.Random(f"corpus {seed}")
    kinds = [kind for kind, share in _SHARES.items() for _ in range(share)]
    sources = _sources()
    found: list[Text] = []
    while len(found) < count:
        for kind in draw.sample(kinds, len(kinds)):
            found.append(Text(_MAKERS[kind](draw, sources), kind))
    return found[:count]


def write_documents(folder: Path, count: int, seed: int = 0, *, files: int = 4) -> None:
    """Documents as a folder of .jsonl files with the columns id, text and source, which is the kind."""
    made = documents(count, seed)
    folder.mkdir(exist_ok=True)
    for number in range(files):
        lines = [
            json.dumps({"id": f"{seed}-{place}", "text": one.text, "source": one.kind})
            for place, one in enumerate(made)
            if place % files == number
        ]
        (folder / f"documents-{number}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def corpus_folder(count: int, seed: int = 0) -> Path:
    """A folder of documents in the cache, to be read only; see `write_documents`."""
    key = {"version": _VERSION, "count": count, "seed": seed}
    place = cached(f"corpus-{count}", key, lambda empty: write_documents(empty / "documents", count, seed))
    return place / "documents"


def folder(seed: int = 0, quick: bool = False, *, progress: bool | None = None) -> Path:
    """The checkpoint; trained at the first call on a machine and found in the cache afterwards.

    Args:
        seed (int): >= 0; initial weights and the documents to train on.
        quick (bool): a smaller model, for tests.
        progress (bool | None): show a bar while training; None shows it where standard error is a terminal.
    """
    require(seed >= 0, "seed", ">= 0", seed)
    recipe = _RECIPES["quick" if quick else "full"]
    key = {"version": _VERSION, "recipe": asdict(recipe), "seed": seed}
    name = "quick" if quick else "full"
    return cached(f"reader-{name}", key, lambda empty: _make(empty, recipe, seed, progress))


def load(seed: int = 0, quick: bool = False) -> tuple[Any, Any]:
    """A fresh copy of the model of `folder`, in float32 on the CPU in eval mode, and its tokenizer."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    place = folder(seed, quick)
    return LlamaForCausalLM.from_pretrained(place), PreTrainedTokenizerFast.from_pretrained(place)


def new_tokenizer(vocabulary: int = Recipe.vocabulary) -> PreTrainedTokenizerFast:
    """Byte pairs of documents, the same for every seed; <bos> stands before a text."""
    from salience.sandbox._language import train_tokenizer

    tokenizer = train_tokenizer([one.text for one in documents(1500, _TRAINING_SEED)], vocabulary)
    tokenizer.model_max_length = POSITIONS
    return tokenizer


def _name(draw: random.Random) -> str:
    return "".join(draw.choices(_SYLLABLES, k=draw.randint(2, 3)))


def _reasoning(draw: random.Random, sources: Sequence[str]) -> str:
    """Facts in one order, conclusions in another: each repeats the two names of a fact."""
    relation = draw.choice(("follows", "owns", "teaches", "answers", "greets", "carries"))
    number = draw.randint(5, 8)
    pairs = [(_name(draw), _name(draw)) for _ in range(number)]
    lines = [f"given that {first} {relation} {second}." for first, second in pairs]
    lines.append(draw.choice(("therefore", "it follows that", "so we can say:")))
    for first, second in draw.sample(pairs, number):
        lines.append(f"because {first} {relation} {second}, {first} is before {second}.")
    return " ".join(lines)


def _narration(draw: random.Random, sources: Sequence[str]) -> str:
    """Sentences on topics that change after a few of them; nobody has to be remembered."""
    sentences: list[str] = []
    while len(sentences) < 10:
        people, places = draw.choice(_TOPICS)
        sentences += [
            f"the {draw.choice(_HOW)} {draw.choice(people)} {draw.choice(_DOES)} {draw.choice(_WHEN)} near the "
            f"{draw.choice(places)}."
            for _ in range(draw.randint(2, 5))
        ]
    return " ".join(sentences)


def _code(draw: random.Random, sources: Sequence[str]) -> str:
    text = draw.choice(sources)
    start = draw.randrange(max(1, len(text) - 700))
    start = text.rfind("\n", 0, start) + 1
    return text[start : start + draw.randint(350, 700)]


def _boilerplate(draw: random.Random, sources: Sequence[str]) -> str:
    lines = draw.sample(_NOTICES, draw.randint(5, 8))
    return " ".join(lines)


def _noise(draw: random.Random, sources: Sequence[str]) -> str:
    words = []
    for _ in range(draw.randint(60, 120)):
        word = draw.choice((*_HOW, *_DOES, *_WHEN)) if draw.random() < 0.5 else _name(draw)
        words.append(word if draw.random() < 0.7 else word[: draw.randint(1, 3)] + draw.choice("#@%&;/|"))
    return " ".join(words)


_MAKERS = {
    "reasoning": _reasoning,
    "narration": _narration,
    "code": _code,
    "boiler-plate": _boilerplate,
    "noise": _noise,
}

# fmt: off
_HOW = (
    "old", "young", "quiet", "happy", "tired", "clever", "tall", "gentle", "busy", "careful", "famous", "honest",
    "lonely", "merry", "patient", "proud",
)
_DOES = (
    "waits", "works", "sings", "sleeps", "reads", "walks", "rests", "talks", "smiles", "listens", "eats", "paints",
)
_WHEN = ("again", "alone", "early", "late", "often", "slowly", "softly", "today", "twice", "well")
_NOTICES = (
    "all rights reserved.", "click here to subscribe to our newsletter.", "home | products | contact | about us",
    "this site uses cookies to improve your experience.", "terms of service and privacy policy apply.",
    "copyright by the authors and their licensors.", "sign in or create a free account to continue reading.",
    "share this page with your friends.", "previous | next | back to top",
    "the software is provided as is, without warranty of any kind.", "your cart is empty.",
    "please enable scripts in your browser to view this page.", "loading, please wait ...",
)
# fmt: on


@lru_cache(maxsize=1)
def _sources() -> list[str]:
    from salience.sandbox._language import library_texts

    return library_texts(held_out=False)


def _make(place: Path, recipe: Recipe, seed: int, progress: bool | None) -> None:
    from salience.core.progress import bar
    from salience.sandbox._corpus_training import new_model, train
    from salience.sandbox.needles import _training

    started = time.perf_counter()
    texts = [one.text for one in documents(_TRAINED_ON, _TRAINING_SEED + seed)]
    tokenizer = new_tokenizer(recipe.vocabulary)
    with _training(), bar("training a model to read documents in place", recipe.steps, progress) as advance:
        model = new_model(recipe, tokenizer, POSITIONS, seed)
        losses = train(model, tokenizer(texts, verbose=False)["input_ids"], recipe, seed, advance)
    about = {
        **asdict(recipe),
        "seed": seed,
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "parameters": model.num_parameters(),
        "seconds": round(time.perf_counter() - started, 1),
    }
    tokenizer.save_pretrained(place)
    model.save_pretrained(place)
    (place / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
