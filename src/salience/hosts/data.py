"""Reads rows from a file or from the hub, makes tokens of them, and pads them to batches.

A row is in one of five forms, looked for in this order: prompt and completion, question and answer, messages, text
and label (a class), text. Only responses are learned: the labels of a prompt are -100, and prompt and response are
tokenised apart, so that the boundary between them is the one that generation will see.
"""

from __future__ import annotations

import codecs
import difflib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from salience.core.errors import ParameterError, first_line, require

if TYPE_CHECKING:
    from datasets import Dataset

# what becomes of a question and an answer; the space belongs to the answer, as in most tokenizers' words
QUESTION_TEMPLATE = ("Question: {question}\nAnswer:", " {answer}")

_FORMS = (("prompt", "completion"), ("question", "answer"), ("messages",), ("text", "label"), ("text",))
# as load_rows leaves them
_ENCODED = tuple(form for form in _FORMS if "question" not in form)
_FORMS_TEXT = "prompt and completion, question and answer, messages, text and label, or text"
_OURS = ("prompt", "completion", "question", "answer", "messages", "text", "label")
_READ = (".jsonl", ".json", ".txt", ".parquet")
# endings that are a file's and never a datasets name's, such as the .5 of "teknium/OpenHermes-2.5"
_FILE_ENDINGS = {*_READ, ".csv", ".tsv", ".gz", ".zst", ".zip", ".tar", ".arrow", ".xlsx", ".md", ".pkl"}
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_IGNORED = -100
_CHUNK = 1000  # rows that are tokenised together

# a stretch of a row, as text or already as tokens, and whether it is learned
Piece = tuple[str | list[int], bool]
# input ids and labels of a row, int32 [T]
Encoded = tuple[np.ndarray, np.ndarray]

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
    table = _read(source, split, limit, name)
    if not len(table):
        raise ParameterError(f"{name} must be at least one row, got none in {source}")
    chosen = _choose(list(table.columns), columns or {}, name)
    values = {ours: _checked(table, ours, theirs, name) for ours, theirs in chosen.items()}
    if "question" in values:
        values = _fill(values, template)
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
    encoder = _Encoder(tokenizer, chat=chat and bool(tokenizer.chat_template), name=name)
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
            batch["labels"] = torch.tensor(labels) if one_each else self._padded(labels, length, _IGNORED)
        return batch

    def _padded(self, lists: Sequence[Sequence[int]], length: int, filler: int) -> Tensor:
        padded = torch.full((len(lists), length), filler)
        for row, values in zip(padded, lists):
            place = slice(0, len(values)) if self.side == "right" else slice(length - len(values), length)
            row[place] = torch.as_tensor(values, dtype=torch.long)
        return padded


@dataclass(frozen=True)
class _Table:
    """What was read: values by the source's column names, where its rows stand, and the names of its classes."""

    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    classes: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def place(self, index: int) -> str:
        return f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}"


def _read(source: str | Path, split: str, limit: int | None, name: str) -> _Table:
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, limit, name)
    if not path.exists():
        if isinstance(source, Path) or _is_path(source):
            raise ParameterError(f"{name} must be an existing file or a datasets name, got {source}")
        return _read_hub(source, split, limit, name)
    ending = path.suffix.lower()
    if ending not in _READ:
        raise ParameterError(f"{name} must be a {', '.join(_READ)} file, got {source}")
    try:
        if not path.stat().st_size:
            raise ParameterError(f"{name} must be a file with rows, got the empty file {source}")
        if ending == ".parquet":
            return _read_parquet(path, limit, name)
        if ending == ".txt":
            return _read_text(path, limit, name)
        return _read_json(path, limit, name)
    except OSError as error:
        raise ParameterError(f"{name} must be a readable file, got {source} ({error.strerror})") from error


def _is_path(source: str) -> bool:
    looks = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    return looks or Path(source).suffix.lower() in _FILE_ENDINGS


def _read_json(path: Path, limit: int | None, name: str) -> _Table:
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    # only a file named .json is also read as one list; a .jsonl line that is a list is an error
    if path.suffix.lower() == ".json" and start.startswith(b"["):
        return _read_json_list(path, limit, name)
    rows, lines = [], []
    for line, text in islice(_lines(path, name), limit):
        row = _parse(text, f"line {line} of {path}", name)
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ParameterError(
                f"{name} must be one JSON object a line, got {kind} {text.strip()[:40]!r} at line {line} of {path}"
            )
        rows.append(row)
        lines.append(line)
    return _Table(_by_column(rows), lines)


def _read_json_list(path: Path, limit: int | None, name: str) -> _Table:
    text = "\n".join(text for _, text in _lines(path, name, blank=True))
    rows = _parse(text, str(path), name)[:limit]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ParameterError(
                f"{name} must be a list of JSON objects, got {kind} at row {index + 1} of {path}"
            )
    return _Table(_by_column(rows))


def _parse(text: str, where: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ParameterError(
            f"{name} must be one JSON object a line, got {where}: {error.msg} (column {error.colno})"
        ) from error
    except RecursionError as error:
        raise ParameterError(
            f"{name} must be one JSON object a line, got {where}: nested too deep"
        ) from error


def _by_column(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(key for row in rows for key in row)
    return {key: [row.get(key) for row in rows] for key in names}


def _read_text(path: Path, limit: int | None, name: str) -> _Table:
    found = list(islice(_lines(path, name), limit))
    return _Table({"text": [text for _, text in found]}, [line for line, _ in found])


def _lines(path: Path, name: str, *, blank: bool = False) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends; blank ones on request."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"0x{error.object[error.start]:02x}"
                raise ParameterError(
                    f"{name} must be UTF-8 text, got byte {byte} at line {number} of {path}"
                ) from error
            if blank or text.strip():
                yield number, text.rstrip("\r\n")


def _read_parquet(path: Path, limit: int | None, name: str) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        return _from_dataset(Dataset(pq.read_table(path)), limit)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ParameterError(
            f"{name} must be a readable parquet file, got {path} ({first_line(error)})"
        ) from error


def _read_folder(path: Path, split: str, limit: int | None, name: str) -> _Table:
    from salience.hosts.corpus_files import selection_files

    picked = selection_files(path)
    if picked is not None:
        return _joined_tables([_read(file, split, limit, name) for file in picked], limit)
    return _from_dataset(_folder(path, split, name), limit)


def _joined_tables(tables: Sequence[_Table], limit: int | None) -> _Table:
    """Files of a selection one after another."""
    names = dict.fromkeys(key for table in tables for key in table.columns)
    columns = {
        key: [
            value
            for table in tables
            for value in (table.columns[key] if key in table.columns else [None] * len(table))
        ][:limit]
        for key in names
    }
    return _Table(columns, classes={key: found for table in tables for key, found in table.classes.items()})


def _folder(path: Path, split: str, name: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    if not any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        raise ParameterError(
            f"{name} must be a {', '.join(_READ)} file, a folder written by save_to_disk or salience select, or a "
            f"datasets name, got the folder {path}"
        )
    try:
        loaded = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ParameterError(
            f"{name} must be a whole folder of save_to_disk, got {path} ({first_line(error)})"
        ) from error
    if isinstance(loaded, DatasetDict):
        if split not in loaded:
            raise ParameterError(f"split must be one of {', '.join(loaded)}, got {split!r}")
        loaded = loaded[split]
    return loaded


def load_table(source: str, split: str = "train", name: str = "data") -> Any:
    """A datasets name or a folder of `save_to_disk` as a Dataset, with all its columns.

    Raises:
        ParameterError: if it cannot be read.
    """
    return _folder(Path(source), split, name) if Path(source).is_dir() else _hub(source, split, name)


def _read_hub(source: str, split: str, limit: int | None, name: str) -> _Table:
    return _from_dataset(_hub(source, split, name), limit)


def _hub(source: str, split: str, name: str) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repository, _, configuration = source.partition(":")
    try:
        loaded = load_dataset(repository, configuration or None, split=split)
    # a loading script, which datasets refuses to run, is a RuntimeError
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ParameterError(
            f"{name} must be an existing file or a datasets name that can be reached, got {source} "
            f"({first_line(error)})"
        ) from error
    return loaded


def _from_dataset(rows: Any, limit: int | None) -> _Table:
    from datasets import ClassLabel

    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    classes = {key: kind.names for key, kind in rows.features.items() if isinstance(kind, ClassLabel)}
    return _Table({key: rows[key] for key in rows.column_names}, classes=classes)


def _choose(found: Sequence[str], columns: Mapping[str, str], name: str) -> dict[str, str]:
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


def _checked(table: _Table, ours: str, theirs: str, name: str) -> list[Any]:
    """The values of a column, each of the kind that its name asks for."""
    wanted, fits = {"messages": (_MESSAGES, _is_messages), "label": (_LABELS, _is_label)}.get(
        ours, ("strings", _is_text)
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


def _is_text(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        # JSON can spell half a character ("\ud800"), which is no text and which Arrow cannot hold
        return value.isascii() or bool(value.encode())
    except UnicodeEncodeError:
        return False


def _is_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(turn, dict) for turn in value)
        and all(_is_text(turn.get("role")) and _is_text(turn.get("content")) for turn in value)
    )


def _is_label(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, int) and value >= 0)


def _fill(values: Mapping[str, list[str]], template: tuple[str, str]) -> dict[str, list[str]]:
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


class _Encoder:
    """Rows to tokens and labels, for one tokenizer."""

    def __init__(self, tokenizer: Any, *, chat: bool, name: str) -> None:
        self.tokenizer, self.chat, self.name = tokenizer, chat, name
        self.marked = chat and bool(_GENERATION_MARK.search(tokenizer.get_chat_template()))
        self.before, self.after = _surroundings(tokenizer)
        self.anchor, self.anchor_length = _anchor(tokenizer)
        end = tokenizer.eos_token_id
        self.end = self.after or ([end] if end is not None else [])

    def encode(self, rows: Mapping[str, Sequence[Any]], start: int) -> list[Encoded]:
        """Each row's tokens; `start` is the number of the first."""
        pieces = [self._pieces(row, start + index) for index, row in enumerate(_each(rows))]
        found = iter(self._tokens(pieces))
        return [
            _joined([(next(found) if isinstance(part, str) else part, learned) for part, learned in row])
            for row in pieces
        ]

    def _tokens(self, rows: Sequence[Sequence[Piece]]) -> list[list[int]]:
        """Tokens of all stretches of text, in order."""
        texts, cuts = [], []
        for row in rows:
            first = True
            for part in (part for part, _ in row if isinstance(part, str)):
                texts.append(part if first else self.anchor + part)
                cuts.append(0 if first else self.anchor_length)
                first = first and not part
        # one call for all: a fast tokenizer works on a list in parallel
        found = _plain(self.tokenizer, texts) if texts else []
        return [tokens[cut:] for tokens, cut in zip(found, cuts)]

    def _pieces(self, row: Mapping[str, Any], index: int) -> list[Piece]:
        if "text" in row:
            end = self.after if "label" in row else self.end
            return [(self.before, True), (row["text"], True), (end, True)]
        messages = row.get("messages")
        if self.chat:
            return self._chat(messages or _turns(row["prompt"], row["completion"]), index)
        if messages:
            return self._plain_chat(messages)
        return [(self.before, False), (row["prompt"], False), (row["completion"], True), (self.end, True)]

    def _plain_chat(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """A conversation without a template: `User: ...` and `Assistant: ...`, a line each."""
        pieces: list[Piece] = [(self.before, False)]
        for index, turn in enumerate(messages):
            header = ("\n" if index else "") + turn["role"].capitalize() + ":"
            if turn["role"] == "assistant":
                pieces += [(header, False), (f" {turn['content']}", True), (self.end, True)]
            else:
                pieces.append((f"{header} {turn['content']}", False))
        return pieces

    def _chat(self, messages: Sequence[Mapping[str, str]], index: int) -> list[Piece]:
        from jinja2.exceptions import TemplateError

        try:
            return self._marked(messages) if self.marked else _cut(*self._spans(messages))
        except (TemplateError, ValueError) as error:
            raise ParameterError(
                f"{self.name} must be conversations that the chat template takes (or pass chat=False), "
                f"got row {index + 1}: {first_line(error)}"
            ) from error

    def _marked(self, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
        """The template itself says what the assistant generates."""
        found = self.tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = zip(found["input_ids"], found["assistant_masks"])
        return [
            ([one for one, _ in run], bool(mark)) for mark, run in groupby(learned, key=lambda pair: pair[1])
        ]

    def _spans(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and [start, end) of the assistant's turns: each begins where the conversation
        so far, with the prompt for an answer, ends, and goes on to where it ends with the answer."""
        whole, spans = self._render(messages), []
        for index, turn in enumerate(messages):
            if turn["role"] == "assistant":
                start = self._start(messages, index, whole)
                spans.append((start, self._end(messages, index, whole, start)))
        return whole, spans

    def _start(self, messages: Sequence[Mapping[str, str]], index: int, whole: str) -> int:
        if index == 0:
            # many templates refuse to render a conversation of no turns
            return max(whole.find(messages[0]["content"].strip()), 0)
        for prompt in (True, False):
            before = self._render(messages[:index], prompt=prompt)
            if whole.startswith(before):
                return len(before)
        raise ValueError("what comes before an answer is rendered differently without the answer")

    def _end(self, messages: Sequence[Mapping[str, str]], index: int, whole: str, start: int) -> int:
        if index + 1 == len(messages):
            return len(whole)
        upto = self._render(messages[: index + 1])
        if whole.startswith(upto):
            return len(upto)
        # a template may show a last answer differently from earlier ones (an empty thought before it, in Qwen3's):
        # then the answer is found by its text, and what closed it as the last one closes it here too
        content = messages[index]["content"].strip()
        place = whole.find(content, start)
        close = upto[upto.rfind(content) + len(content) :]
        if place < 0 or not whole.startswith(close, place + len(content)):
            raise ValueError("an earlier answer is not shown as it is, so its end cannot be found")
        return place + len(content) + len(close)

    def _render(self, messages: Sequence[Mapping[str, str]], *, prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompt
        )
        return text


def _each(rows: Mapping[str, Sequence[Any]]) -> Iterable[dict[str, Any]]:
    return [dict(zip(rows, values)) for values in zip(*rows.values())]


def _turns(prompt: str, completion: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def _surroundings(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text of its own accord: for BERT's, [CLS] and [SEP]."""
    whole, plain = tokenizer("a")["input_ids"], _plain(tokenizer, ["a"])[0]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []


def _anchor(tokenizer: Any) -> tuple[str, int]:
    """What to put before a text that goes on from another one, and how many tokens of it to cut off again.

    Llama 2's kind of tokenizer begins every text with a space; behind a prompt that would be a second one.
    """
    plain, alone, behind = _plain(tokenizer, ["a", "\n", "\na"])
    spaced = bool(alone) and behind[: len(alone)] == alone and behind[len(alone) :] != plain
    return ("\n", len(alone)) if spaced else ("", 0)


def _plain(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Piece]:
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        pieces += [(text[done:start], False), (text[start:end], True)]
        done = end
    return [*pieces, (text[done:], False)]


def _joined(parts: Sequence[tuple[list[int], bool]]) -> Encoded:
    ids = np.array([token for tokens, _ in parts for token in tokens], np.int32)
    learned = np.repeat([mark for _, mark in parts], [len(tokens) for tokens, _ in parts])
    return ids, np.where(learned, ids, np.int32(_IGNORED))


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
        if len(ids) and (classes or bool((labels[1:] != _IGNORED).any()))
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
