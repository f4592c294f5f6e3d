"""The arrivals world: instruction sets that arrive one after another, with common skills, rare ones and repetitions.

A skill is a secret table of 16 letters: `kilo: a b c d e ->` is answered by what the table of kilo makes of each
letter. Common skills fill most of every set; each set brings one rare skill that no other has. A share of every
set repeats prompts that came before, and a share of the answers is wrong. The model that it is meant for is made in
place: it has learnt other tables in the same form, so that what is left to learn is the tables.

`pictured_arrivals` is the same in small for the vision world: questions about scenes, one kind of question a skill.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salience.core.errors import require
from salience.sandbox.cache import cached

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnop"
SYMBOLS = 5  # of a prompt
_VERSION = 1
_BASE_SKILLS = tuple(f"base{number}" for number in range(6))
_NAMES = (
    "kilo",
    "lima",
    "mike",
    "nova",
    "oscar",
    "papa",
    "quota",
    "romeo",
    "sierra",
    "tango",
    "union",
    "victor",
)


@dataclass(frozen=True)
class _Recipe:
    """The base model and its training."""

    layers: int = 2
    width: int = 48
    steps: int = 500
    batch: int = 32
    rate: float = 5e-3


@dataclass(frozen=True)
class ArrivalWorld:
    """Sets in the order in which they arrive, a test split of all skills and the model that they are meant for.

    Sets have the columns id, prompt, completion, skill, source, copy_of (id of the row that this one repeats, or
    empty) and wrong (bool: the answer is that of another table).

    Attributes:
        sets (tuple[Dataset, ...]): what arrives.
        test (Dataset): prompt, completion and skill; all answers are right.
        common (tuple[str, ...]): skills of several sets.
        rare (tuple[str, ...]): skills of one set each, in the order of the sets.
        folder (Path): an ordinary checkpoint; to be read only.
    """

    sets: tuple[Dataset, ...]
    test: Dataset
    common: tuple[str, ...]
    rare: tuple[str, ...]
    folder: Path

    def model(self) -> PreTrainedModel:
        """A fresh copy of the base model, in float32 on the CPU, in eval mode."""
        from transformers import LlamaForCausalLM

        model: PreTrainedModel = LlamaForCausalLM.from_pretrained(self.folder)
        return model

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A fresh copy of the tokenizer: one token for each letter and each name of a skill."""
        from transformers import PreTrainedTokenizerFast

        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(self.folder)
        return tokenizer


def arrival_world(
    *,
    sets: int = 5,
    common: int = 5,
    common_samples: int = 250,
    rare_samples: int = 60,
    repeated: float = 0.3,
    wrong: float = 0.1,
    test_samples: int = 40,
    seed: int = 0,
) -> ArrivalWorld:
    """The arrivals world.

    Args:
        sets (int): how many arrive, >= 1; each brings a rare skill of its own.
        common (int): skills in common, >= 1; each set holds all but one of them (all, if there are fewer than 3).
        common_samples (int): samples of each common skill in each set, >= 1.
        rare_samples (int): samples of a rare skill, all in one set, >= 1.
        repeated (float): share of a set that repeats earlier rows, in [0, 1).
        wrong (float): share of rows whose answer is that of another table, in [0, 1].
        test_samples (int): of each skill, >= 1.
        seed (int): >= 0; of the sets. Tables and the base model are always the same.

    Returns:
        ArrivalWorld: the same for the same arguments. Its model is trained by the first call on a machine.
    """
    for name, value in (("sets", sets), ("common", common), ("common_samples", common_samples)):
        require(value >= 1, name, ">= 1", value)
    require(rare_samples >= 1, "rare_samples", ">= 1", rare_samples)
    require(test_samples >= 1, "test_samples", ">= 1", test_samples)
    require(common + sets <= len(_NAMES), "sets", f"at most {len(_NAMES)} with the common skills", sets)
    require(0 <= repeated < 1, "repeated", "in [0, 1)", repeated)
    require(0 <= wrong <= 1, "wrong", "in [0, 1]", wrong)
    require(seed >= 0, "seed", ">= 0", seed)
    usual, rare = _NAMES[:common], _NAMES[common : common + sets]
    draw = random.Random(f"arrivals {seed}")
    earlier: list[dict[str, Any]] = []
    arriving = []
    for number in range(sets):
        left_out = usual[number % common] if common > 2 else None
        wanted = [name for name in usual if name != left_out for _ in range(common_samples)]
        wanted += [rare[number]] * rare_samples
        draw.shuffle(wanted)
        rows = [_row(skill, number, place, wrong, draw) for place, skill in enumerate(wanted)]
        _repeat(rows, earlier, repeated, draw)
        earlier += rows
        arriving.append(_dataset(rows))
    from datasets import Dataset

    asked = random.Random(f"arrivals test {seed}")
    test = [_question(skill, asked) for skill in (*usual, *rare) for _ in range(test_samples)]
    return ArrivalWorld(tuple(arriving), Dataset.from_list(test), usual, rare, _base())


def accuracy(model: Any, tokenizer: Any, rows: Any) -> dict[str, float]:
    """The share of right letters in the answers, each predicted from the right ones before it.

    Args:
        model (Any): causal, on any device.
        tokenizer (Any): of the world.
        rows (Dataset): prompt, completion and skill.

    Returns:
        dict[str, float]: of each skill, in [0, 1].
    """
    import torch

    ids = _ids(tokenizer, rows["prompt"], rows["completion"]).to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            said = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    finally:
        model.train(training)
    right = (said[:, -SYMBOLS - 2 : -2] == ids[:, -SYMBOLS - 1 : -1]).double().mean(1).tolist()
    found: dict[str, list[float]] = {}
    for skill, share in zip(rows["skill"], right):
        found.setdefault(skill, []).append(share)
    return {skill: sum(shares) / len(shares) for skill, shares in found.items()}


def batch(tokenizer: Any, rows: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Rows with prompt and completion as a batch to train on: input_ids, attention_mask and labels [B, T]."""
    import torch

    ids = _ids(tokenizer, rows["prompt"], rows["completion"])
    labels = ids.clone()
    labels[:, : -SYMBOLS - 1] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def pictured_arrivals(*, scenes: int = 40, seed: int = 0) -> tuple[Dataset, ...]:
    """Two sets of questions about scenes of the vision world, with their pictures.

    Args:
        scenes (int): new scenes of a set, >= 1. The first set asks for colours and positions, the second for counts
            and words, and a quarter of it repeats the first.
        seed (int): >= 0.

    Returns:
        tuple[Dataset, ...]: id, prompt, completion, skill, source, copy_of and image; always the same.
    """
    from datasets import Dataset, Image

    from salience.sandbox.shapes import KINDS
    from salience.sandbox.shapes import scenes as drawn

    require(scenes >= 1, "scenes", ">= 1", scenes)
    every = drawn(2 * scenes, seed)
    rows: list[list[dict[str, Any]]] = []
    for number, kinds in enumerate((("colour", "position"), ("count", "word"))):
        rows.append([])
        for scene in every[number * scenes : (number + 1) * scenes]:
            for kind in kinds:
                question = scene.questions[KINDS.index(kind)]
                about = {"prompt": question.prompt, "completion": question.answer, "skill": kind}
                identity = f"set{number + 1}-{len(rows[number]):04d}"
                rows[number].append(
                    {
                        "id": identity,
                        **about,
                        "source": f"set {number + 1}",
                        "copy_of": "",
                        "image": scene.image,
                    }
                )
    for place, row in enumerate(rows[0][: len(rows[1]) // 4]):
        rows[1].append({**row, "id": f"set2-c{place:03d}", "source": "set 2", "copy_of": row["id"]})
    return tuple(Dataset.from_list(part).cast_column("image", Image()) for part in rows)


def _table(skill: str) -> dict[str, str]:
    letters = list(LETTERS)
    random.Random(f"table {skill}").shuffle(letters)
    return dict(zip(LETTERS, letters))


_TABLES = {skill: _table(skill) for skill in (*_BASE_SKILLS, *_NAMES)}


def _question(skill: str, draw: random.Random) -> dict[str, str]:
    letters = [draw.choice(LETTERS) for _ in range(SYMBOLS)]
    return {
        "prompt": f"{skill}: {' '.join(letters)} ->",
        "completion": "".join(f" {_TABLES[skill][letter]}" for letter in letters),
        "skill": skill,
    }


def _row(skill: str, number: int, place: int, wrong: float, draw: random.Random) -> dict[str, Any]:
    row: dict[str, Any] = _question(skill, draw)
    row |= {"id": f"set{number + 1}-{place:04d}", "source": f"set {number + 1}", "copy_of": ""}
    row["wrong"] = draw.random() < wrong
    if row["wrong"]:
        letters = row["prompt"].split()[1:-1]
        other = _TABLES[draw.choice([name for name in _NAMES if name != skill])]
        row["completion"] = "".join(f" {other[letter]}" for letter in letters)
    return row


def _repeat(
    rows: list[dict[str, Any]], earlier: list[dict[str, Any]], share: float, draw: random.Random
) -> None:
    """Some rows become copies of rows of the same skill that came before them, in this set or an earlier one."""
    before: dict[str, list[dict[str, Any]]] = {}
    for row in earlier:
        before.setdefault(row["skill"], []).append(row)
    for row in rows:
        known = before.setdefault(row["skill"], [])
        if known and draw.random() < share:
            model = draw.choice(known)
            row |= {name: model[name] for name in ("prompt", "completion", "wrong")}
            row["copy_of"] = model["copy_of"] or model["id"]
        known.append(row)


def _dataset(rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    columns = ("id", "prompt", "completion", "skill", "source", "copy_of", "wrong")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


def _base() -> Path:
    recipe = _Recipe()
    key = {"version": _VERSION, "recipe": asdict(recipe)}
    return cached("arrivals", key, lambda folder: _make(folder, recipe))


def _make(folder: Path, recipe: _Recipe) -> None:
    import torch

    started = time.perf_counter()
    tokenizer = _tokenizer()
    model = _model(recipe, tokenizer)
    draw = random.Random("arrivals base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.0)
    model.train()
    with torch.enable_grad():
        for step in range(recipe.steps):
            # a linear start, a plateau, a linear end
            part = min(1.0, (step + 1) / 20, 2 * (recipe.steps - step) / recipe.steps)
            optimizer.param_groups[0]["lr"] = recipe.rate * part
            asked = [_question(draw.choice(_BASE_SKILLS), draw) for _ in range(recipe.batch)]
            rows = {name: [one[name] for one in asked] for name in ("prompt", "completion")}
            loss = model(**batch(tokenizer, rows), use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    about = {
        **asdict(recipe),
        "loss": float(loss.detach()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    (folder / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, "->", *LETTERS, *(f"{name}:" for name in (*_BASE_SKILLS, *_NAMES))]
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )


def _model(recipe: _Recipe, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LlamaForCausalLM(config)


def _ids(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str]) -> Any:
    """Whole rows with the end token, [B, T]: all have the same length."""
    import torch

    rows = tokenizer([prompt + answer for prompt, answer in zip(prompts, completions)])["input_ids"]
    return torch.tensor([[*row, tokenizer.eos_token_id] for row in rows])
