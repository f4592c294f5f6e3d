"""Documents of a dataset, wherever they lie, in shards that can be read again alone and in any order.

A corpus is a `datasets.Dataset`, an `IterableDataset`, or files (`hosts/corpus_files.py`). Its documents are
numbered in the order in which it holds them; a shard is a stretch of them. How a corpus is cut depends on nothing but
the corpus and the number of documents of a shard, so that every machine cuts it alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from salience.core.documents import NUMBERED, Reading
from salience.core.errors import ParameterError, require
from salience.core.files import file_atomic

_WRITTEN = 1000  # rows that are written together


@dataclass(frozen=True)
class Shard:
    """A stretch of documents.

    Attributes:
        number (int): of the shard, from 0.
        first (int): number of its first document in the corpus.
        count (int): documents.
        file (int): which file it is in; 0 for what is no file.
        place (int): where its first row begins: a row, or a byte.
        rows (int): rows to read from there on, bad ones included.
        line (int): line of its first row, from 1; 0 for what has no lines.
    """

    number: int
    first: int
    count: int
    file: int = 0
    place: int = 0
    rows: int = 0
    line: int = 0


@dataclass(frozen=True)
class Row:
    """A document as the dataset holds it.

    Attributes:
        values (Mapping[str, Any]): its columns.
        where (str): for errors: "row 3", "line 17 of web.jsonl".
        file (str): name of its file; empty for what is no file.
    """

    values: Mapping[str, Any]
    where: str
    file: str = ""


class Corpus(Protocol):
    """What the engine needs of documents."""

    name: str
    columns: Sequence[str]
    bad: list[str]

    def shards(self) -> Iterator[Shard]:
        """Every shard in order; may be read as it goes."""
        ...

    def read(self, shard: Shard) -> Iterator[Row]:
        """Its documents in order."""
        ...

    def fingerprint(self) -> str:
        """The same for the same documents."""
        ...

    def check(self) -> None:
        """Look at everything once, if that costs less than to find out later."""
        ...

    def keep_plan(self, path: Path) -> None:
        """Take the shards from an earlier look at the documents, or look now and write down what was found."""
        ...

    def take(self, kept: np.ndarray) -> Any:
        """The documents that are kept [N], as what `focus` was given; None for files."""
        ...

    def write(self, shards: Sequence[Shard], kept: np.ndarray, folder: Path) -> list[str]:
        """Write the kept documents into a folder with all their columns, each file whole or not at all."""
        ...


def open_corpus(target: Any, reading: Reading) -> Corpus:
    """The corpus of a `datasets.Dataset` or `IterableDataset`.

    Raises:
        ParameterError: for an empty dataset, or a column that it does not have.
    """
    from datasets import Dataset

    corpus: Corpus = _Rows(target, reading) if isinstance(target, Dataset) else _Stream(target, reading)
    check_columns(corpus.columns, reading)
    return corpus


def check_columns(columns: Sequence[str], reading: Reading) -> None:
    """Refuse columns of ids, sources and domains that are not there.

    Raises:
        ParameterError: naming those that are.
    """
    for name in ("id_column", "source_column", "domain_column"):
        column = getattr(reading, name)
        if column is not None and not (name == "id_column" and column == NUMBERED):
            require(column in columns, name, f"one of {', '.join(columns)}", column)


def named(columns: Sequence[str], reading: Reading) -> tuple[str | None, str | None]:
    """The columns of ids and of sources: what was asked for, else "id" and "source" where they are there."""
    identity = reading.id_column or ("id" if "id" in columns else None)
    source = reading.source_column or ("source" if "source" in columns else None)
    return None if identity == NUMBERED else identity, source


def refuse_twice(ids: Sequence[Any], column: str) -> None:
    """Refuse ids that stand twice in a column.

    Raises:
        ParameterError: naming the first of them and its two places.
    """
    seen: dict[Any, int] = {}
    for place, value in enumerate(ids):
        if value in seen:
            raise twice(column, value, f"row {seen[value] + 1}", f"row {place + 1}")
        seen[value] = place


def twice(column: str, value: Any, first: str, second: str) -> ParameterError:
    """The error for an id that two documents have."""
    return ParameterError(
        f"ids must differ, got {value!r} in column {column} at {first} and at {second}: name another column "
        f"(id_column), or number the documents (id_column={NUMBERED!r})"
    )


def row_shards(total: int, size: int) -> Iterator[Shard]:
    """Rows 0 to `total` in stretches of `size`."""
    for number, start in enumerate(range(0, total, size)):
        count = min(size, total - start)
        yield Shard(number, start, count, place=start, rows=count)


class _Rows:
    """A dataset in memory, or mapped to it."""

    def __init__(self, dataset: Any, reading: Reading) -> None:
        if not len(dataset):
            raise ParameterError("dataset must hold at least one document, got none")
        self.name = getattr(dataset.info, "dataset_name", None) or "dataset"
        self.columns: Sequence[str] = list(dataset.column_names)
        self.bad: list[str] = []
        self._dataset, self._size = dataset, reading.shard_documents
        identity = named(self.columns, reading)[0]
        if identity in self.columns:
            refuse_twice(dataset[identity], str(identity))

    def shards(self) -> Iterator[Shard]:
        return row_shards(len(self._dataset), self._size)

    def read(self, shard: Shard) -> Iterator[Row]:
        rows = self._dataset.select(range(shard.place, shard.place + shard.rows))
        for place, values in enumerate(rows, start=shard.place + 1):
            yield Row(values, f"row {place}")

    def check(self) -> None:
        """Every row is looked at when it is scored."""

    def keep_plan(self, path: Path) -> None:
        """A dataset's rows are counted already."""

    def fingerprint(self) -> str:
        # datasets' own: of the content's history, the same in every process that builds it alike
        return f"{self._dataset._fingerprint} {len(self._dataset)}"

    def take(self, kept: np.ndarray) -> Any:
        return self._dataset.select(np.flatnonzero(kept))

    def write(self, shards: Sequence[Shard], kept: np.ndarray, folder: Path) -> list[str]:
        rows = self.take(kept).with_format("arrow")
        tables = (table for table in rows.iter(_WRITTEN))
        write_tables(folder / "part-000000.parquet", tables, self._dataset.features.arrow_schema)
        return ["part-000000.parquet"]


class _Stream:
    """A dataset that is read from its beginning each time, a shard in memory at a time."""

    def __init__(self, dataset: Any, reading: Reading) -> None:
        self.name = getattr(dataset.info, "dataset_name", None) or "stream"
        self._dataset, self._size = dataset, reading.shard_documents
        first = next(iter(dataset), None)
        if first is None:
            raise ParameterError("dataset must hold at least one document, got none")
        self.columns: Sequence[str] = list(dataset.column_names or first)
        self.bad: list[str] = []
        self._current: tuple[Shard, list[Row]] | None = None
        self._first = hashlib.sha256(json.dumps(first, default=str, sort_keys=True).encode()).hexdigest()

    def shards(self) -> Iterator[Shard]:
        rows, number, start = iter(self._dataset), 0, 0
        while chunk := list(islice(rows, self._size)):
            shard = Shard(number, start, len(chunk), place=start, rows=len(chunk))
            self._current = shard, [Row(one, f"row {start + at + 1}") for at, one in enumerate(chunk)]
            yield shard
            number, start = number + 1, start + len(chunk)

    def read(self, shard: Shard) -> Iterator[Row]:
        if self._current is not None and self._current[0] == shard:
            yield from self._current[1]
            return
        for place, values in enumerate(
            self._dataset.skip(shard.place).take(shard.rows), start=shard.place + 1
        ):
            yield Row(values, f"row {place}")

    def check(self) -> None:
        """A stream is read as it goes."""

    def keep_plan(self, path: Path) -> None:
        """A stream's end is found when it is reached."""

    def fingerprint(self) -> str:
        return self._first

    def take(self, kept: np.ndarray) -> Any:
        return self._dataset.filter(lambda _, place: bool(kept[place]), with_indices=True)

    def write(self, shards: Sequence[Shard], kept: np.ndarray, folder: Path) -> list[str]:
        import pyarrow as pa

        features = self._dataset.features
        schema = features.arrow_schema if features is not None else None
        rows = iter(self.take(kept))
        chunks = iter(lambda: list(islice(rows, _WRITTEN)), [])
        write_tables(
            folder / "part-000000.parquet",
            (pa.Table.from_pylist(chunk, schema=schema) for chunk in chunks),
            schema,
        )
        return ["part-000000.parquet"]


def write_tables(path: Path, tables: Iterable[Any], schema: Any = None) -> None:
    """Arrow tables one after another into a parquet file, whole or not at all.

    Args:
        path (Path): of the file.
        tables (Iterable[pa.Table]): with the same columns.
        schema (pa.Schema | None): of all; None takes the first table's.
    """
    import pyarrow.parquet as pq

    writer = None
    with file_atomic(path) as temporary:
        try:
            for table in tables:
                schema = table.schema if schema is None else schema
                writer = writer or pq.ParquetWriter(temporary, schema)
                writer.write_table(table.cast(schema))
            if writer is None and schema is not None:
                writer = pq.ParquetWriter(temporary, schema)
        finally:
            if writer is not None:
                writer.close()
