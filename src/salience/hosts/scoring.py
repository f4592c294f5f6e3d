"""Scores of one shard: rows to tokens, tokens to batches of like length, batches to scores, scores to a file.

Batches depend on nothing but the shard, so a shard's scores are the same whoever computes them and whenever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salience.core.documents import Documents, Reading, Scorer
from salience.core.errors import ParameterError, StructureError
from salience.core.files import file_atomic
from salience.core.losses import IGNORE
from salience.hosts._data_encoding import Encoder
from salience.hosts._forms import chosen, wrong
from salience.hosts.corpus import Corpus, Row, Shard, named
from salience.hosts.data import QUESTION_TEMPLATE, fill_template

OWN = (
    "number",
    "id",
    "score",
    "tokens",
    "cut",
    "source",
    "domain",
)  # columns of a part that are the engine's


@dataclass
class ShardScorer:
    """Scores shards of a corpus.

    Attributes:
        corpus (Corpus): whose shards.
        reading (Reading): how it is read.
        scorer (Scorer): the method's function.
        tokenizer (Any): None for a method that needs no tokens.
        device (torch.device): of the batches.
        max_length (int): longest document in tokens.
    """

    corpus: Corpus
    reading: Reading
    scorer: Scorer
    tokenizer: Any = None
    device: torch.device | str = "cpu"
    max_length: int = 0

    def __post_init__(self) -> None:
        self._columns = chosen(self.corpus.columns, self.reading)
        self._id, self._source = named(self.corpus.columns, self.reading)
        encoder = self.tokenizer is not None and "text" not in self._columns
        self._encoder = (
            Encoder(self.tokenizer, chat=bool(self.tokenizer.chat_template), name="data")
            if (encoder)
            else None
        )

    def score(self, shard: Shard) -> dict[str, Any]:
        """Columns of a part: those of `OWN`, then what else the method gives, each of the shard's documents in order.

        Raises:
            ParameterError: for a document without text, naming its place.
        """
        rows = list(self.corpus.read(shard))
        tokens, asked, characters = self._encoded(rows)
        cut = np.array([len(one) > self.max_length > 0 for one in tokens], bool)
        if self.max_length:
            tokens, asked = ([one[: self.max_length] for one in some] for some in (tokens, asked))
        lengths = np.array([len(one) for one in tokens], np.int32)
        found: dict[str, np.ndarray] = {}
        for batch in packed(lengths, self.reading.batch_tokens):
            values = self.scorer(self._documents(shard, rows, tokens, asked, characters, batch))
            for name, value in values.items():
                values_here = _checked(name, value, len(batch))
                empty = False if values_here.dtype == bool else np.nan
                column = found.setdefault(name, np.full(len(rows), empty, values_here.dtype))
                column[batch] = values_here
        if "score" not in found:
            raise StructureError("a scorer must give the column 'score', got none")
        return {
            "number": np.arange(shard.first, shard.first + len(rows)),
            "id": [self._identity(row, shard.first + place) for place, row in enumerate(rows)],
            "score": found.pop("score"),
            "tokens": lengths,
            "cut": cut,
            "source": [self._from(row) for row in rows],
            "domain": [self._value(row, self.reading.domain_column) for row in rows],
            **found,
        }

    def text(self, row: Row) -> str:
        """What a document says, for a reader's eyes."""
        values = [row.values[theirs] for theirs in self._columns.values() if theirs in row.values]
        return "\n".join(value if isinstance(value, str) else str(value) for value in values)

    def _identity(self, row: Row, number: int) -> str:
        if self._id is not None:
            return str(row.values.get(self._id))
        return row.where if row.file else str(number)

    def _from(self, row: Row) -> str:
        return self._value(row, self._source) or row.file or self.corpus.name

    def _value(self, row: Row, column: str | None) -> str:
        return "" if column is None else str(row.values.get(column))

    def _encoded(self, rows: Sequence[Row]) -> tuple[list[Any], list[Any], list[int]]:
        """Tokens, labels and characters of each row."""
        for row in rows:
            why = wrong(row.values, self._columns)
            if why is not None:
                raise ParameterError(f"data must be documents with {why} at {row.where}")
        columns = {ours: [row.values[theirs] for row in rows] for ours, theirs in self._columns.items()}
        characters = [
            sum(len(one) if isinstance(one, str) else len(str(one)) for one in values)
            for values in zip(*columns.values())
        ]
        if self.tokenizer is None:
            return [[] for _ in rows], [[] for _ in rows], characters
        if self._encoder is None:
            ids = self.tokenizer(columns["text"], verbose=False)["input_ids"] if rows else []
            return ids, ids, characters
        if "question" in columns:
            columns = fill_template(columns, QUESTION_TEMPLATE)
        pairs = self._encoder.encode(columns, 0) if rows else []
        return [ids for ids, _ in pairs], [labels for _, labels in pairs], characters

    def _documents(
        self,
        shard: Shard,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        asked: Sequence[Sequence[int]],
        characters: Sequence[int],
        batch: np.ndarray,
    ) -> Documents:
        long = max((len(tokens[place]) for place in batch), default=0)
        ids = torch.zeros(len(batch), long, dtype=torch.int64)
        labels = torch.full((len(batch), long), IGNORE)
        for row, place in enumerate(batch):
            ids[row, : len(tokens[place])] = torch.as_tensor(tokens[place], dtype=torch.int64)
            labels[row, : len(asked[place])] = torch.as_tensor(asked[place], dtype=torch.int64)
        return Documents(
            ids.to(self.device),
            labels.to(self.device),
            torch.tensor([len(tokens[place]) for place in batch]).to(self.device),
            torch.tensor([characters[place] for place in batch]).to(self.device),
            torch.tensor(batch, dtype=torch.int64).to(self.device) + shard.first,
            [rows[place].values for place in batch],
        )


def packed(lengths: np.ndarray, budget: int) -> Iterator[np.ndarray]:
    """Documents in batches of like length, the longest first; of equal ones the first in the shard is first.

    Args:
        lengths (np.ndarray): [N] tokens.
        budget (int): tokens of a batch with its padding; a longer document is a batch of its own.

    Yields:
        np.ndarray: [B] places.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        stop = start + max(1, budget // longest)
        yield order[start:stop]
        start = stop


def write_part(path: Path, columns: Mapping[str, Any]) -> None:
    """A shard's scores as a parquet file, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    with file_atomic(path) as temporary:
        pq.write_table(table, temporary)


def part_path(folder: Path, number: int) -> Path:
    """Where the scores of a shard lie."""
    return folder / "parts" / f"part-{number:06d}.parquet"


def read_part(folder: Path, shard: Shard, columns: Sequence[str] | None = None) -> Any:
    """A shard's scores as an Arrow table.

    Raises:
        ParameterError: for a file that is not there, is broken, or has another number of documents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = part_path(folder, shard.number)
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ParameterError(f"folder must hold whole parts of scores, got {path} ({error})") from error
    if len(table) != shard.count:
        raise ParameterError(
            f"folder must hold scores of {shard.count} documents in {path}, got {len(table)}: remove it"
        )
    return table


def score_shards(
    scorer: ShardScorer,
    shards: Iterator[Shard] | Sequence[Shard],
    folder: Path,
    *,
    done: Callable[[Shard], None] = lambda _: None,
) -> None:
    """Score every shard that has no file yet."""
    for shard in shards:
        path = part_path(folder, shard.number)
        if not path.exists():
            write_part(path, scorer.score(shard))
        done(shard)


def _checked(name: str, value: Any, count: int) -> np.ndarray:
    tensor = torch.as_tensor(value).detach().cpu()
    values = (tensor if tensor.dtype == torch.bool else tensor.float()).numpy()
    if values.shape != (count,):
        raise StructureError(f"column {name!r} of a scorer must be [{count}], got {list(values.shape)}")
    return values
