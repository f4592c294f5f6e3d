"""The instruction world: tasks with exact answers that a small base model learns by tuning, with noise planted.

The base model (the text world's) has read source code and masters related tasks under other names; it fails these.
A share of the symbols of training answers is replaced at random ("noisy tokens") and a share of the answers belongs
to another question ("noisy samples"). Where the noise is, is known, so that methods which select tokens or samples
can be judged by what they leave out as well as by the accuracy that they reach. The test split is clean.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salience.core.errors import require
from salience.sandbox import scoring
from salience.sandbox.tasks import TUNING_TASKS, Question, Task, alike, questions
from salience.sandbox.text import Size, TextWorld, text_world

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Span = tuple[int, int]

_TASKS: dict[str, tuple[str, ...]] = {"small": tuple(TUNING_TASKS), "tiny": ("lower", "skip", "strip")}
_SAMPLES = {"small": (4800, 240), "tiny": (1600, 90)}


@dataclass(frozen=True)
class InstructionWorld:
    """Noisy training data, clean test data and the base model to tune.

    Both splits have the columns prompt, completion, task, clean (the right answer), noisy (bool: the whole answer
    is wrong) and noise (list of [start, end) in characters of the completion, in order, apart from each other).

    Attributes:
        train (Dataset): with noise, in the order in which it was drawn.
        test (Dataset): clean; no prompt of it is in `train`.
        base (TextWorld): whose model is tuned.
    """

    train: Dataset
    test: Dataset
    base: TextWorld

    def model(self) -> PreTrainedModel:
        """A fresh copy of the base model, in float32 on the CPU, in eval mode."""
        return self.base.model()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A fresh copy of the tokenizer; every symbol of an answer is one token with the space before it."""
        return self.base.tokenizer()

    def encoded(self, rows: Dataset | None = None) -> Dataset:
        """Rows as tokens, prompt and completion joined and closed by the end token.

        Args:
            rows (Dataset | None): with the columns of `train`, which is taken if None.

        Returns:
            Dataset: input_ids, attention_mask, labels (-100 on the prompt) and noise (1 where the token is planted
            noise), as lists of one length, not padded. A `DataCollatorForSeq2Seq` pads all but noise.
        """
        from datasets import Dataset

        tokenizer = self.tokenizer()
        return Dataset.from_list([_encode(row, tokenizer) for row in (self.train if rows is None else rows)])

    def score(self, predictions: Sequence[str]) -> dict[str, float]:
        """How right answers to `test`'s prompts are: exact, characters and exact.<task>, in [0, 1]."""
        return scoring.score(predictions, self.test)


def instruction_world(
    *,
    size: Size = "small",
    seed: int = 0,
    noisy_tokens: float = 0.15,
    noisy_samples: float = 0.1,
    train_samples: int | None = None,
    test_samples: int | None = None,
    progress: bool | None = None,
) -> InstructionWorld:
    """The instruction world. Its base model is made by the first call on a machine, as `text_world` does.

    Args:
        size (str): "small" or "tiny" (for tests: an easier base, fewer tasks).
        seed (int): >= 0; of questions and noise. The base model is always the one of seed 0, so that worlds of
            several seeds differ in data alone and are made at once.
        noisy_tokens (float): probability that a symbol of a training answer is replaced by another random one, in
            answers that are not noisy as a whole; in [0, 1].
        noisy_samples (float): share of training samples whose answer is that of another question of the same task.
        train_samples (int | None): how many; None takes 4800 (small) or 1600 (tiny).
        test_samples (int | None): how many; None takes 240 (small) or 90 (tiny).
        progress (bool | None): as for `text_world`.

    Returns:
        InstructionWorld: the same for the same arguments. Global random states stay as they were.
    """
    require(size in _TASKS, "size", f"one of {', '.join(_TASKS)}", size)
    require(seed >= 0, "seed", ">= 0", seed)
    require(0 <= noisy_tokens <= 1, "noisy_tokens", "in [0, 1]", noisy_tokens)
    require(0 <= noisy_samples <= 1, "noisy_samples", "in [0, 1]", noisy_samples)
    default_train, default_test = _SAMPLES[size]
    train_count = default_train if train_samples is None else train_samples
    test_count = default_test if test_samples is None else test_samples
    require(train_count >= 1, "train_samples", ">= 1", train_count)
    require(test_count >= 1, "test_samples", ">= 1", test_count)
    tasks = {name: TUNING_TASKS[name] for name in _TASKS[size]}
    test = questions(tasks, test_count, random.Random(f"test {seed}"))
    train = _apart(questions(tasks, train_count + test_count, random.Random(f"train {seed}")), test)[
        :train_count
    ]
    draw = random.Random(f"noise {seed}")
    wrong = set(draw.sample(range(len(train)), round(noisy_samples * len(train))))
    noisy = [
        _wrong(one, tasks[one.task], draw) if index in wrong else _disturbed(one, noisy_tokens, draw)
        for index, one in enumerate(train)
    ]
    return InstructionWorld(
        train=_dataset(train, noisy, wrong),
        test=_dataset(test, [(one.answer, []) for one in test], set()),
        base=text_world(size=size, progress=progress),
    )


def _apart(train: Iterable[Question], test: Iterable[Question]) -> list[Question]:
    prompts = {one.prompt for one in test}
    return [one for one in train if one.prompt not in prompts]


def _wrong(one: Question, task: Task, draw: random.Random) -> tuple[str, list[Span]]:
    """The answer to another question of the same task, of the same length so that only its content tells."""
    answer = one.answer
    while answer == one.answer or len(answer) != len(one.answer):
        answer = questions({one.task: task}, 1, draw)[0].answer
    return answer, [(0, len(answer))]


def _disturbed(one: Question, share: float, draw: random.Random) -> tuple[str, list[Span]]:
    """Some symbols replaced, each by another one of its kind; a span is the symbol with the space before it."""
    answer, noise = one.answer, []
    for match in re.finditer(r" \S", one.answer):
        if draw.random() < share:
            symbol = match.group()[1]
            replaced = draw.choice([other for other in alike(symbol) if other != symbol])
            answer = f"{answer[: match.start()]} {replaced}{answer[match.end() :]}"
            noise.append(match.span())
    return answer, noise


def _dataset(
    asked: Sequence[Question], answered: Sequence[tuple[str, list[Span]]], wrong: set[int]
) -> Dataset:
    from datasets import Dataset, Features, List, Value

    features = Features(
        {
            **dict.fromkeys(("prompt", "completion", "task", "clean"), Value("string")),
            "noisy": Value("bool"),
            "noise": List(List(Value("int32"))),
        }
    )
    columns = {
        "prompt": [one.prompt for one in asked],
        "completion": [answer for answer, _ in answered],
        "task": [one.task for one in asked],
        "clean": [one.answer for one in asked],
        "noisy": [index in wrong for index in range(len(asked))],
        "noise": [[list(span) for span in spans] for _, spans in answered],
    }
    return Dataset.from_dict(columns, features=features)


def _encode(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    prompt = tokenizer(row["prompt"])["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False, return_offsets_mapping=True)
    labels = [*answer["input_ids"], tokenizer.eos_token_id]
    noise = [
        int(any(start < last and first < end for first, last in row["noise"]))
        for start, end in answer["offset_mapping"]
    ]
    return {
        "input_ids": prompt + labels,
        "attention_mask": [1] * (len(prompt) + len(labels)),
        "labels": [-100] * len(prompt) + labels,
        "noise": [0] * len(prompt) + noise + [0],
    }
