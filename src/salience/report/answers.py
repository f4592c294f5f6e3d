"""What pages with answers side by side have in common: the cards, the cells of their tables, facts on the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from salience.report import words


def card(
    name: str, colour: str, answer: str, plain: str | None, everything: str, cost: str
) -> dict[str, Any]:
    """What `answers.html` shows of one way of reading.

    Args:
        name (str): of the way.
        colour (str): of its chip, as CSS has it.
        answer (str): its answer.
        plain (str | None): the plain way's answer, against which new words are marked; None for the plain way.
        everything (str): note of the plain way: "all keys".
        cost (str): of any other way, in a line.
    """
    first, same = plain is None, answer == plain
    return {
        "name": name,
        "colour": colour,
        "parts": [(answer, False)] if plain is None or same else _marked(plain, answer),
        "note": everything if first else "the same answer" if same else "another answer",
        "sign": "" if first else "=" if same else "≠",
        "cost": "" if first else words.tied(cost),
    }


def cell(text: str, ratio: float | None = None) -> dict[str, str]:
    """A figure and under it how many times the plain one it is."""
    small = "" if ratio is None else times(ratio)
    tone = "" if ratio is None or abs(ratio - 1) < 0.005 else "less" if ratio < 1 else "more"
    return {"text": words.tied(text), "small": small, "tone": tone}


def times(value: float | None) -> str:
    """A ratio: 0.52×."""
    return words.NONE if value is None else f"{value:.2f}×"


def model_facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and text of what a result's "model" says: class, size, and where it comes from if the name hides it."""
    about = [
        model["class"],
        f"{words.count_text(model['parameters'])} parameters",
        f"{model['layers']} layers",
    ]
    facts = [("Model", f"{model['name']} ({'; '.join([*about, model['dtype']])})")]
    if model["source"] not in ("", model["name"]):
        facts.append(("Source", model["source"]))
    return facts


def _marked(before: str, now: str) -> list[tuple[str, bool]]:
    """The new text in pieces, each with whether it is not in the old one at this place; word by word."""
    old, new = (re.findall(r"\s+|\S+", text) for text in (before, now))
    pieces = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if end > start:
            pieces.append(("".join(new[start:end]), kind != "equal"))
    return pieces
