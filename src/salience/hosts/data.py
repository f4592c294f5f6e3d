"""Reads rows from a file or from the hub, makes tokens of them, and pads them to batches.

A row is in one of five forms, looked for in this order: prompt and completion, question and answer, messages, text
and label (a class), text. Only responses are learned: the labels of a prompt are -100, and prompt and response are
tokenised apart, so that the boundary between them is the one that generation will see.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from salience.core.errors import ParameterError, require
from salience.hosts._data_encoding import IGNORED, Encoded, Encoder
from salience.hosts._data_reading import Table, read

if TYPE_CHECKING:
    from datasets import Dataset

# what becomes of a question and an answer; the space belongs to the answer, as in most tokenizers' words
QUESTION_TEMPLATE = ("Question: {question}\nAnswer:", " {answer}")

_FORMS = (("prompt", "completion"), ("question", "answer"), ("messages",), ("text", "label"), ("text",))
# as load_rows leaves them
_ENCODED = tuple(form for form in _FORMS if "question" not in form)
_FORMS_TEXT = "prompt and completion, question and answer, messages, text and label, or text"
_OURS = ("prompt", "completion", "question", "answer", "messages", "text", "label")
_CHUNK = 1000  # rows that are tokenised together

_log = logging.getLogger(__name__)


def load_rows(
    source: str | Path,
    *,
    split: str = "train",
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    template: tuple[str, str] = QUESTION_TEMPLATE,
    name: str = "data",
) -> Dataset:
    """Rows in one of the recognised forms, in memory; every value has been looked at.

    Args:
        source (str | Path): a .jsonl file (one object a line), a .json file (lines, or one list), a .txt file (one
            text a line), a .parquet file, a folder written by `save_to_disk`, or a datasets name, with its
            configuration after a colon: "openai/gsm8k:main".
        split (str): of a datasets name or a saved DatasetDict.
        columns (Mapping[str, str] | None): our name -> the source's: {"prompt": "instruction"}.
        limit (int | None): only so many rows from the start.
        template (tuple[str, str]): what becomes of {question} and {answer}.
        name (str): the parameter as the user writes it.

    Returns:
        Dataset: with the columns prompt and completion (also for questions and answers), messages (list of role and
        content), text and label (a ClassLabel), or text; no others.

    Raises:
        ParameterError: if the source cannot be read or a row is not in its form; the text says where.

    Example:
        >>> load_rows("train.jsonl", columns={"prompt": "instruction", "completion": "output"})  # doctest: +SKIP
    """
    require(limit is None or limit >= 1, "limit", ">= 1", limit)
    table = read(source, split, limit, name)
    if not len(table):
        raise ParameterError(f"{name} must be at least one row, got none in {source}")
    chosen = choose_columns(list(table.columns), columns or {}, name)
    values = {ours: _checked(table, ours, theirs, name) for ours, theirs in chosen.items()}
    if "question" in values:
        values = fill_template(values, template)
    return _dataset(values, table.classes.get(chosen.get("label", "")))


def tokenize(
    rows: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    chat: bool = True,
    truncate: bool = False,
    name: str = "data",
) -> Dataset:
    """Rows as tokens, not padded.

    With a chat template, prompt and completion become a user's and an assistant's turn, and of a conversation the
    assistant's turns are learned, with what closes them. Without one the parts are joined as they are, between what
    the tokenizer puts around a text; if it puts nothing behind, its end token closes each response.

    Args:
        rows (Dataset): as from `load_rows`.
        tokenizer (PreTrainedTokenizerBase): the model's.
        max_length (int | None): most tokens of a row; None is no limit.
        chat (bool): use the tokenizer's chat template if it has one.
        truncate (bool): cut longer rows at their end instead of refusing them.
        name (str): the parameter as the user writes it.

    Returns:
        Dataset: input_ids, attention_mask and labels: lists [T], labels not shifted, -100 where nothing is learned;
        for text and label, labels is the class. Rows with nothing to learn are left out, and a log message counts
        them.

    Raises:
        ParameterError: if a row is too long, the template refuses a row, or no row has anything to learn.
    """
    require(max_length is None or max_length >= 2, "max_length", ">= 2", max_length)
    encoder = Encoder(tokenizer, chat=chat and bool(tokenizer.chat_template), name=name)
    form = next((form for form in _ENCODED if {*form} <= {*rows.column_names}), None)
    if form is None:
        wanted = "prompt and completion, messages, or text"
        raise ParameterError(f"{name} must be rows with {wanted}, got columns {', '.join(rows.column_names)}")
    rows = rows.select_columns(list(form))
    encoded: list[Encoded] = []
    classes: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        encoded += encoder.encode(chunk, start)
        classes += chunk["label"] if "label" in form else []
    _refuse_long([len(ids) for ids, _ in encoded], max_length, truncate, name)
    encoded = [(ids[:max_length], labels[:max_length]) for ids, labels in encoded]
    return _packed(encoded, classes, name)


@dataclass
class Collator:
    """Pads rows to one batch: `Collator(tokenizer)(rows)`. Columns other than the three are left out.

    Attributes:
        tokenizer (PreTrainedTokenizerBase): whose pad token, or end token if it has none, fills input_ids.
        side (str): "right" or "left", where the padding goes.
        multiple_of (int): the padded length is a multiple of this.
    """

    tokenizer: Any
    side: Literal["right", "left"] = "right"
    multiple_of: int = 1
    _pad: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.side in ("right", "left"), "side", "right or left", self.side)
        require(self.multiple_of >= 1, "multiple_of", ">= 1", self.multiple_of)
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        if pad is None:
            raise ParameterError("tokenizer must be one with a pad or an end token, got neither")
        self._pad = pad

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """One batch.

        Args:
            rows (Sequence[Mapping]): with input_ids, and attention_mask and labels if there are any.

        Returns:
            dict[str, Tensor]: input_ids, attention_mask (0 on padding) and labels (-100 on padding), int64 [B, T];
            labels are [B] if they are classes.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.multiple_of) * self.multiple_of
        masks = [row.get("attention_mask", [1] * len(row["input_ids"])) for row in rows]
        batch = {
            "input_ids": self._padded([row["input_ids"] for row in rows], length, self._pad),
            "attention_mask": self._padded(masks, length, 0),
        }
        if "labels" in rows[0]:
            labels = [row["labels"] for row in rows]
            one_each = np.ndim(labels[0]) == 0
            batch["labels"] = torch.tensor(labels) if one_each else self._padded(labels, length, IGNORED)
        return batch

    def _padded(self, lists: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
        padded = torch.full((len(lists), length), filler)
        for row, values in zip(padded, lists):
            place = slice(0, len(values)) if self.side == "right" else slice(length - len(values), length)
            row[place] = torch.as_tensor(values, dtype=torch.long)
        return padded


def choose_columns(found: Sequence[str], columns: Mapping[str, str], name: str) -> dict[str, str]:
    """Our names -> the source's, of the first form that is there and holds every mapped name."""
    for ours, theirs in columns.items():
        if ours not in _OURS:
            raise ParameterError(
                f"column must be one of {', '.join(_OURS)}, got {ours!r}{_nearest(ours, _OURS)}"
            )
        if theirs not in found:
            raise ParameterError(
                f"column {ours} must be one of {', '.join(found)}, got {theirs!r}{_nearest(theirs, found)}"
            )
    taken = {*columns.values()}
    available = {ours: ours for ours in _OURS if ours in found and ours not in taken} | dict(columns)
    for form in _FORMS:
        if {*columns} <= {*form} <= {*available}:
            return {ours: available[ours] for ours in form}
    mapped = f" with {', '.join(f'{ours}={theirs}' for ours, theirs in columns.items())}" if columns else ""
    raise ParameterError(
        f"{name} must be rows with {_FORMS_TEXT}, got columns {', '.join(found)}{mapped}: "
        "map yours with columns (--column OURS=THEIRS)"
    )


def _nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def _checked(table: Table, ours: str, theirs: str, name: str) -> list[Any]:
    """The values of a column, each of the kind that its name asks for."""
    wanted, fits = {"messages": (_MESSAGES, is_messages), "label": (_LABELS, _is_label)}.get(
        ours, ("strings", is_text)
    )
    values = list(table.columns[theirs])
    for index, value in enumerate(values):
        if not fits(value):
            shown = "nothing" if value is None else repr(value)[:80]
            raise ParameterError(
                f"{name} must be {wanted} in column {theirs}, got {shown} at {table.place(index)}"
            )
    return values


_MESSAGES = "lists of {role, content} with strings"
_LABELS = "whole numbers >= 0 or strings"


def is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        # JSON can spell half a character ("\ud800"), which is no text and which Arrow cannot hold
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) for turn in value)
        and all(is_text(turn.get("role")) and is_text(turn.get("content")) for turn in value)
    )


def _is_label(value: Any) -> bool:
    return is_text(value) or (isinstance(value, int) and value >= 0)


def fill_template(values: Mapping[str, list[str]], template: tuple[str, str]) -> dict[str, list[str]]:
    asked, answered = template
    require(
        "{question}" in asked and "{answer}" in answered, "template", "of {question} and {answer}", template
    )
    return {
        # replaced, not formatted: braces in the data or the template are ordinary
        "prompt": [asked.replace("{question}", question) for question in values["question"]],
        "completion": [answered.replace("{answer}", answer) for answer in values["answer"]],
    }


def _dataset(values: dict[str, list[Any]], classes: list[str] | None) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    if "messages" in values:
        turns = [
            [{key: turn[key] for key in ("role", "content")} for turn in row] for row in values["messages"]
        ]
        return Dataset.from_dict({"messages": turns})
    features: dict[str, Any] = {ours: Value("string") for ours in values}
    if "label" in values:
        values["label"], classes = _numbered(values["label"], classes)
        features["label"] = ClassLabel(names=classes)
    return Dataset.from_dict(values, features=Features(features))


def _numbered(labels: Sequence[int | str], classes: list[str] | None) -> tuple[list[int], list[str]]:
    """Labels as numbers, and the names of the classes: their own, the sorted strings, or the numbers as text."""
    if all(isinstance(label, int) for label in labels):
        numbers = [int(label) for label in labels]
        return numbers, classes or [str(number) for number in range(max(numbers) + 1)]
    names = sorted({str(label) for label in labels})
    numbered = {label: number for number, label in enumerate(names)}
    return [numbered[str(label)] for label in labels], names


def _refuse_long(lengths: Sequence[int], max_length: int | None, truncate: bool, name: str) -> None:
    long = [index for index, length in enumerate(lengths) if max_length is not None and length > max_length]
    if long and not truncate:
        raise ParameterError(
            f"{name} must be rows of at most max_length={max_length} tokens, got {lengths[long[0]]} in row "
            f"{long[0] + 1} ({len(long)} of {len(lengths)} rows are longer, the longest has {max(lengths)}): "
            "raise max_length, or set truncate to cut them"
        )


def _packed(encoded: Sequence[Encoded], classes: Sequence[int], name: str) -> Dataset:
    """The dataset of the rows that have something to learn."""
    import pyarrow as pa
    from datasets import Dataset

    # a causal model never predicts the first token, so a label there teaches nothing
    kept = [
        index
        for index, (ids, labels) in enumerate(encoded)
        if len(ids) and (classes or bool((labels[1:] != IGNORED).any()))
    ]
    left_out = len(encoded) - len(kept)
    if not kept:
        raise ParameterError(
            f"{name} must be rows with a response to learn, got none in {left_out} rows: all labels are masked"
        )
    if left_out:
        _log.warning("%d of %d rows have no response to learn and are left out", left_out, len(encoded))
    ids = [encoded[index][0] for index in kept]
    labels = [classes[index] for index in kept] if classes else [encoded[index][1] for index in kept]
    columns = {
        "input_ids": pa.array(ids),
        "attention_mask": pa.array([np.ones(len(row), np.int8) for row in ids]),
        "labels": pa.array(labels),
    }
    return Dataset(pa.table(columns))
