"""Reads rows from a file, a folder of `save_to_disk` or the hub, without a look at what they hold."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from salience.core.errors import ParameterError, first_line

READ = (".jsonl", ".json", ".txt", ".parquet")
# endings that are a file's and never a datasets name's, such as the .5 of "teknium/OpenHermes-2.5"
_FILE_ENDINGS = {*READ, ".csv", ".tsv", ".gz", ".zst", ".zip", ".tar", ".arrow", ".xlsx", ".md", ".pkl"}


@dataclass(frozen=True)
class Table:
    """What was read.

    Attributes:
        columns (Mapping): the source's column names -> a value for each row.
        lines (Sequence[int] | None): the line of each row in its file; None for rows without lines.
        classes (Mapping): the names of the classes of those columns that have some.
    """

    columns: Mapping[str, Sequence[Any]]
    lines: Sequence[int] | None = None
    classes: Mapping[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return max(map(len, self.columns.values()), default=0)

    def place(self, index: int) -> str:
        """Where a row is, for a message: "line 3"."""
        return f"row {index + 1}" if self.lines is None else f"line {self.lines[index]}"


def read(source: str | Path, split: str, limit: int | None, name: str) -> Table:
    """All rows of a source as they are there: arguments as for `load_rows`.

    Raises:
        ParameterError: if the source cannot be read; the text says where.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, split, limit, name)
    if not path.exists():
        if isinstance(source, Path) or is_path(source):
            raise ParameterError(f"{name} must be an existing file or a datasets name, got {source}")
        return _read_hub(source, split, limit, name)
    ending = path.suffix.lower()
    if ending not in READ:
        raise ParameterError(f"{name} must be a {', '.join(READ)} file, got {source}")
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


def is_path(source: str) -> bool:
    looks = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source
    return looks or Path(source).suffix.lower() in _FILE_ENDINGS


def _read_json(path: Path, limit: int | None, name: str) -> Table:
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
    return Table(_by_column(rows), lines)


def _read_json_list(path: Path, limit: int | None, name: str) -> Table:
    text = "\n".join(text for _, text in _lines(path, name, blank=True))
    rows = _parse(text, str(path), name)[:limit]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise ParameterError(
                f"{name} must be a list of JSON objects, got {kind} at row {index + 1} of {path}"
            )
    return Table(_by_column(rows))


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


def _read_text(path: Path, limit: int | None, name: str) -> Table:
    found = list(islice(_lines(path, name), limit))
    return Table({"text": [text for _, text in found]}, [line for line, _ in found])


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


def _read_parquet(path: Path, limit: int | None, name: str) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    try:
        return _from_dataset(Dataset(pq.read_table(path)), limit)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ParameterError(
            f"{name} must be a readable parquet file, got {path} ({first_line(error)})"
        ) from error


def _read_folder(path: Path, split: str, limit: int | None, name: str) -> Table:
    from salience.hosts.corpus_files import selection_files

    picked = selection_files(path)
    if picked is not None:
        return _joined_tables([read(file, split, limit, name) for file in picked], limit)
    return _from_dataset(_folder(path, split, name), limit)


def _joined_tables(tables: Sequence[Table], limit: int | None) -> Table:
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
    return Table(columns, classes={key: found for table in tables for key, found in table.classes.items()})


def _folder(path: Path, split: str, name: str) -> Any:
    from datasets import DatasetDict, load_from_disk

    if not any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        raise ParameterError(
            f"{name} must be a {', '.join(READ)} file, a folder written by save_to_disk or salience select, or a "
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


def _read_hub(source: str, split: str, limit: int | None, name: str) -> Table:
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


def _from_dataset(rows: Any, limit: int | None) -> Table:
    from datasets import ClassLabel

    rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
    classes = {key: kind.names for key, kind in rows.features.items() if isinstance(kind, ClassLabel)}
    return Table({key: rows[key] for key in rows.column_names}, classes=classes)
