"""Texts of the needles world: readable filler on drifting topics, notes hidden in it, and questions about the notes.

A note is five tokens, `note otter = 47 .`, and a question is the beginning of a line that the model completes. Every
word is one token, so that texts can be drawn to an exact number of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("single", "several", "by key", "tracking")
NOTE = 5  # tokens of a note
VALUE = 3  # where in a note its value stands
ASKED = 3  # notes that a question of the kind "several" asks for
CHAIN = 3  # notes of a chain: each holds the key of the next, the last a number
# notes that stand alone and chains, for each kind of text
_HIDDEN = {"single": (1, 0), "several": (6, 0), "by key": (16, 0), "tracking": (0, 2)}

# fmt: off
KEYS = (
    "adder", "badger", "bear", "beaver", "bison", "buffalo", "camel", "cobra", "condor", "cougar", "coyote",
    "crane", "cricket", "dingo", "dolphin", "donkey", "eagle", "egret", "falcon", "ferret", "finch", "gecko",
    "gibbon", "goose", "gorilla", "hamster", "hare", "hawk", "heron", "hornet", "hyena", "ibex", "iguana",
    "jackal", "jaguar", "koala", "lemur", "leopard", "lion", "lizard", "llama", "lobster", "lynx", "magpie",
    "marten", "mole", "moose", "newt", "ocelot", "octopus", "osprey", "otter", "owl", "panda", "panther",
    "parrot", "pelican", "puma", "python", "rabbit", "raven", "salmon", "tiger", "walrus",
)
VALUES = tuple(str(number) for number in range(10, 100))
# what a stretch of text is about: who acts in it, and where
_TOPICS = (
    (("baker", "grocer", "cook", "waiter", "butcher", "farmer", "buyer", "guest"),
     ("market", "kitchen", "bakery", "cellar", "stall", "pantry")),
    (("sailor", "captain", "fisher", "pilot", "diver", "rower", "trader", "pirate"),
     ("harbour", "island", "beach", "lighthouse", "deck", "reef")),
    (("teacher", "student", "writer", "reader", "scholar", "clerk", "printer", "poet"),
     ("school", "library", "desk", "hall", "archive", "bookshop")),
    (("ranger", "hunter", "climber", "guide", "shepherd", "miller", "walker", "logger"),
     ("forest", "valley", "river", "meadow", "ridge", "cabin")),
    (("mayor", "judge", "guard", "banker", "tailor", "barber", "driver", "builder"),
     ("square", "bridge", "court", "station", "street", "tower")),
    (("doctor", "nurse", "chemist", "painter", "singer", "dancer", "actor", "piper"),
     ("clinic", "garden", "theatre", "studio", "park", "gallery")),
)
_ADJECTIVES = (
    "old", "young", "quiet", "happy", "tired", "clever", "tall", "gentle", "busy", "careful", "famous", "honest",
    "lonely", "merry", "patient", "proud", "quick", "rich", "shy", "strange", "strong", "warm", "wise", "cold",
)
_VERBS = (
    "waits", "works", "sings", "sleeps", "reads", "walks", "rests", "talks", "smiles", "listens", "eats", "drinks",
    "hums", "jokes", "laughs", "paints", "prays", "runs", "shouts", "sits", "stands", "stops", "thinks", "writes",
)
_ADVERBS = (
    "again", "alone", "early", "late", "often", "slowly", "softly", "today", "together", "twice", "well", "yet",
)
# fmt: on
_PREPOSITIONS = ("near", "behind", "outside", "inside")
_SENTENCE = (4, 10)  # fewest and most tokens
_STRETCH = (4, 12)  # sentences on one topic

WORDS = tuple(
    dict.fromkeys(
        [
            *("note", "what", "is", "are", "the", "=", ",", "?", "."),
            *(*KEYS, *VALUES, *_ADJECTIVES, *_VERBS, *_ADVERBS, *_PREPOSITIONS),
            *(word for topic in _TOPICS for words in topic for word in words),
        ]
    )
)


class Question(NamedTuple):
    """Words of a question and of its answer, and the numbers of the notes that it is about, in the answer's order."""

    words: list[str]
    answer: list[str]
    notes: tuple[int, ...]


class Hidden(NamedTuple):
    """Notes (key and value) of a text; the first `alone` of them stand alone, each further `CHAIN` are a chain."""

    notes: list[tuple[str, str]]
    alone: int

    def about(self, number: int) -> Question:
        """The question about one note; for the first of a chain the answer is all that follows."""
        last = number + 1 if number < self.alone else number + CHAIN - (number - self.alone) % CHAIN
        values = [value for _, value in self.notes[number:last]]
        return Question(
            ["what", "is", self.notes[number][0], "="], _joined(values, "="), tuple(range(number, last))
        )

    def about_several(self, numbers: Sequence[int]) -> Question:
        """The question about several notes at a time."""
        keys, values = zip(*(self.notes[number] for number in numbers))
        return Question(["what", "are", *_joined(keys, ","), "?"], _joined(values, ","), tuple(numbers))

    def asked(self, kind: str) -> Question:
        """The question of a text of this kind, which is always about the first notes: their places are by chance."""
        return self.about_several(range(ASKED)) if kind == "several" else self.about(0)


class Body(NamedTuple):
    """A text without a question: its words, and where each note begins, in the order of the notes."""

    words: list[str]
    starts: list[int]


def hidden(alone: int, chains: int, draw: random.Random) -> Hidden:
    """Notes to hide, with keys that differ."""
    keys = draw.sample(KEYS, alone + CHAIN * chains)
    notes = [(key, draw.choice(VALUES)) for key in keys]
    for number in range(alone, len(notes)):
        if (number - alone + 1) % CHAIN:
            notes[number] = keys[number], keys[number + 1]
    return Hidden(notes, alone)


def hidden_for(kind: str, draw: random.Random) -> Hidden:
    """Notes of a text of this kind, of `KINDS`."""
    return hidden(*_HIDDEN[kind], draw)


def body(length: int, notes: Sequence[tuple[str, str]], draw: random.Random) -> Body:
    """Text of exactly `length` words with the notes between its sentences, in an order by chance."""
    sentences = _filler(length - NOTE * len(notes), draw)
    # a note stands in front of the sentence of this number, or behind the last
    places = sorted((draw.randrange(len(sentences) + 1) for _ in notes), reverse=True)
    order = draw.sample(range(len(notes)), len(notes))
    words: list[str] = []
    starts = [0] * len(notes)
    for number in range(len(sentences) + 1):
        while places and places[-1] == number:
            places.pop()
            which = order.pop()
            starts[which] = len(words)
            words += ("note", notes[which][0], "=", notes[which][1], ".")
        if number < len(sentences):
            words += sentences[number]
    return Body(words, starts)


def fewest(kind: str) -> int:
    """Words that a text of this kind needs, its question and a sentence of filler included."""
    draw = random.Random(0)
    found = hidden_for(kind, draw)
    return NOTE * len(found.notes) + _SENTENCE[0] + len(found.asked(kind).words)


def _filler(length: int, draw: random.Random) -> list[list[str]]:
    """Sentences of `length` words together, at least as many as the shortest sentence has."""
    fewest, most = _SENTENCE
    sentences: list[list[str]] = []
    stretch, topic = 0, _TOPICS[0]
    while length:
        if not stretch:
            stretch, topic = draw.randint(*_STRETCH), draw.choice(_TOPICS)
        # what is left must be none or enough for a sentence
        size = draw.randint(fewest, min(most, length - fewest)) if length >= 2 * fewest else length
        sentences.append(_sentence(size, topic, draw))
        length -= size
        stretch -= 1
    return sentences


def _sentence(size: int, topic: tuple[tuple[str, ...], ...], draw: random.Random) -> list[str]:
    """A sentence of 4 to 10 words: the shortest, and a place and up to two or three words more to fill it."""
    spare = size - _SENTENCE[0]
    with_place = spare > 2
    if with_place:
        spare -= 3
    extras = [index < spare for index in range(3 if with_place else 2)]
    draw.shuffle(extras)
    words = ["the"]
    if extras[0]:
        words.append(draw.choice(_ADJECTIVES))
    words += [draw.choice(topic[0]), draw.choice(_VERBS)]
    if extras[1]:
        words.append(draw.choice(_ADVERBS))
    if with_place:
        words += [draw.choice(_PREPOSITIONS), "the"]
        if extras[2]:
            words.append(draw.choice(_ADJECTIVES))
        words.append(draw.choice(topic[1]))
    return [*words, "."]


def _joined(words: Sequence[str], mark: str) -> list[str]:
    return [part for word in words for part in (word, mark)][:-1]
