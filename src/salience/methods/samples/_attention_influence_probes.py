"""The task that shows which heads copy from the context: find the sentence of a key among many keys.

A probe is a JSON object of random keys and sentences, some worked questions, and a last key whose sentence is the
answer. It is put together from tokens, so that passage and answer are the same tokens and the place of the passage is
known exactly.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Any

from salience.core.errors import ParameterError

_KEY = 32  # characters
_FEWEST = 4  # pairs of a probe, those of the worked questions included

# fmt: off
_WHO = (
    "the baker", "a sailor", "our teacher", "the judge", "my neighbour", "an old painter", "the youngest nurse",
    "a farmer", "the guard", "one chemist", "the pilot", "a tailor", "the mayor", "her cousin", "the diver",
    "a shepherd",
)
_DID = (
    "repaired", "sold", "found", "painted", "hid", "carried", "lost", "borrowed", "washed", "measured", "opened",
    "dropped", "counted", "drew", "buried", "polished",
)
_WHAT = (
    "a wooden boat", "seven candles", "the broken clock", "his green coat", "two silver keys", "an empty bottle",
    "the longest rope", "a basket of plums", "her red umbrella", "some old letters", "the copper lamp",
    "a bag of salt", "the stone lion", "three maps", "a small drum", "the torn flag",
)
_WHERE = (
    "near the harbour", "behind the mill", "under a bridge", "in the cold cellar", "at the station", "by the river",
    "on the roof", "inside the tower", "beyond the hills", "before the storm", "after lunch", "on Thursday",
    "in late autumn", "without a word", "for her brother", "during the fair",
)
# fmt: on


@dataclass(frozen=True)
class Probe:
    """One question.

    Attributes:
        ids (list[int]): tokens, the answer at their end.
        passage (tuple[int, int]): where in them the sentence stands that the answer repeats, [start, end).
        answer (int): where the answer begins.
    """

    ids: list[int]
    passage: tuple[int, int]
    answer: int


def probes(tokenizer: Any, count: int, max_length: int, *, shots: int = 3, seed: int = 0) -> list[Probe]:
    """Questions of at most `max_length` tokens, the same for the same seed.

    Raises:
        ParameterError: if not even four pairs fit into so many tokens.
    """
    draw = random.Random(f"probes {seed}")
    return [_probe(tokenizer, max_length, shots, draw) for _ in range(count)]


def _probe(tokenizer: Any, max_length: int, shots: int, draw: random.Random) -> Probe:
    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    begin = tokenizer("a")["input_ids"]
    plain = tokens("a")
    begin = begin[: len(begin) - len(plain)] if begin[-len(plain) :] == plain else []
    opened, between, closed = tokens('{"'), tokens('": "'), tokens('",\n"')
    asked, answered = tokens('"}\nThe value of "'), tokens('" is "')
    again = tokens('"\nThe value of "')
    pairs: list[tuple[list[int], list[int]]] = []
    used = len(begin) + len(opened) + len(asked)
    while True:
        key, sentence = tokens("".join(draw.choices(string.hexdigits[:16], k=_KEY))), tokens(_sentence(draw))
        fixed = len(key) + len(between) + len(sentence) + len(closed)
        # the first pairs are asked for again, behind the object
        asks = len(key) + len(answered) + len(sentence) + len(again) if len(pairs) <= shots else 0
        if used + fixed + asks > max_length:
            break
        used += fixed + asks
        pairs.append((key, sentence))
    if len(pairs) < max(_FEWEST, shots + 1):
        raise ParameterError(
            f"probe_length must be enough for {max(_FEWEST, shots + 1)} pairs of keys and sentences, got "
            f"{max_length} tokens for {len(pairs)}: raise it, lower shots, or name the heads yourself"
        )
    order = draw.sample(range(len(pairs)), len(pairs))
    ids, places = begin + opened, [0] * len(pairs)
    for position, number in enumerate(order):
        key, sentence = pairs[number]
        ids = ids + (closed if position else []) + key + between
        places[number] = len(ids)
        ids += sentence
    # the worked questions, then the one that counts: pair number `shots`
    for number in range(shots + 1):
        key, sentence = pairs[number]
        ids = ids + (again if number else asked) + key + answered
        answer = len(ids)
        ids += sentence
    start = places[shots]
    return Probe(ids, (start, start + len(pairs[shots][1])), answer)


def _sentence(draw: random.Random) -> str:
    text = " ".join(draw.choice(words) for words in (_WHO, _DID, _WHAT, _WHERE))
    return text[0].upper() + text[1:] + "."
