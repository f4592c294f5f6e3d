"""Small tasks on letters and digits whose answers are exact: the base model knows some, tuning teaches others.

Every symbol stands alone between spaces, so that it is one token: `rotate: k r a m ->` is answered ` r a m k`.
The base tasks teach how to read, move and map symbols under one set of names; the tuning tasks need the same skills
recombined under names that the base model has never been asked.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Symbols = list[str]

_LETTERS = string.ascii_lowercase
_VOWELS = "aeiou"


@dataclass(frozen=True)
class Task:
    """One kind of question.

    Attributes:
        answer (Callable): the symbols of the question -> those of the answer.
        alphabet (str): what questions are drawn from.
        shortest (int): fewest symbols of a question.
        longest (int): most symbols of a question.
    """

    answer: Callable[[Symbols], Symbols]
    alphabet: str = _LETTERS
    shortest: int = 4
    longest: int = 7


def _moved(symbols: Symbols, by: int) -> Symbols:
    return [_LETTERS[(_LETTERS.index(symbol) + by) % len(_LETTERS)] for symbol in symbols]


BASE_TASKS: Mapping[str, Task] = {
    "copy": Task(list),
    "upper": Task(lambda s: [symbol.upper() for symbol in s]),
    "next": Task(lambda s: _moved(s, 1)),
    "before": Task(lambda s: _moved(s, -1)),
    "first": Task(lambda s: s[:2]),
    "last": Task(lambda s: s[-2:]),
    "twice": Task(lambda s: [symbol for symbol in s for _ in range(2)], shortest=3, longest=4),
    "flip": Task(lambda s: s[::-1], alphabet=string.digits),
    "turn": Task(lambda s: s[1:] + s[:1], alphabet=string.digits),
}

TUNING_TASKS: Mapping[str, Task] = {
    "reverse": Task(lambda s: s[::-1]),
    "rotate": Task(lambda s: s[1:] + s[:1]),
    "swap": Task(lambda s: [s[-1], *s[1:-1], s[0]]),
    "skip": Task(lambda s: s[::2], shortest=5, longest=8),
    "strip": Task(lambda s: s[1:-1]),
    "lower": Task(lambda s: [symbol.lower() for symbol in s], alphabet=string.ascii_uppercase),
    "vowels": Task(lambda s: ["*" if symbol in _VOWELS else symbol for symbol in s]),
}


@dataclass(frozen=True)
class Question:
    """A question with its right answer.

    Attributes:
        task (str): name of its task.
        prompt (str): ends without a space.
        answer (str): every symbol with one space before it: prompt + answer is cut into tokens where they meet.
    """

    task: str
    prompt: str
    answer: str


def questions(tasks: Mapping[str, Task], count: int, draw: random.Random) -> list[Question]:
    """`count` questions in random order, equally many of each task (to within one)."""
    every = list(tasks)
    names = [every[index % len(every)] for index in range(count)]
    draw.shuffle(names)
    return [_question(name, tasks[name], draw) for name in names]


def alike(symbol: str) -> str:
    """The alphabet that a symbol could have been drawn from."""
    alphabets = (string.ascii_uppercase, string.digits)
    return next((alphabet for alphabet in alphabets if symbol in alphabet), _LETTERS)


def written(symbols: Symbols) -> str:
    """Symbols as text: each with one space before it."""
    return "".join(f" {symbol}" for symbol in symbols)


def _question(name: str, task: Task, draw: random.Random) -> Question:
    length = draw.randint(task.shortest, task.longest)
    symbols = [draw.choice(task.alphabet) for _ in range(length)]
    return Question(name, f"{name}:{written(symbols)} ->", written(task.answer(symbols)))
