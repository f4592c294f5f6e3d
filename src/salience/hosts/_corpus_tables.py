"""Documents in parquet files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.errors import ParameterError, first_line
from salience.hosts._corpus_look import Files, Seen, UnreadableError
from salience.hosts._forms import wrong
from salience.hosts.corpus import Row, Shard, write_tables


class Tables(Files):
    """Parquet files."""

    def _first_columns(self) -> list[str]:
        for number, name in enumerate(self._names):
            try:
                return list(self._opened(number).schema_arrow.names)
            except UnreadableError as error:
                if not self._reading.skip_bad:
                    raise ParameterError(f"data must be readable files, got {name} ({error})") from error
        raise ParameterError(f"data must hold at least one document, got none in {self.name}")

    def schema(self) -> Any:
        """Of the first file that can be read, as Arrow holds it."""
        for number in range(len(self.files)):
            try:
                return self._opened(number).schema_arrow
            except UnreadableError:
                continue
        raise ParameterError(f"data must hold at least one document, got none in {self.name}")

    def read(self, shard: Shard) -> Iterator[Row]:
        name = self._names[shard.file]
        values = self._table(shard).to_pylist()
        for place, row in enumerate(values, start=shard.place + 1):
            if wrong(row, self._form) is None:
                yield Row(row, f"row {place} of {name}", name)

    def write(self, shards: Sequence[Shard], kept: np.ndarray, folder: Path) -> list[str]:
        names = []
        for number in range(len(self.files)):
            mine = [shard for shard in shards if shard.file == number]
            if not any(np.asarray(kept[shard.first : shard.first + shard.count]).any() for shard in mine):
                continue
            name = f"part-{number:06d}.parquet"
            write_tables(folder / name, (self._kept(shard, kept) for shard in mine))
            names.append(name)
        return names

    def _kept(self, shard: Shard, kept: np.ndarray) -> Any:
        table = self._table(shard)
        good = np.array([wrong(row, self._form) is None for row in self._asked(table).to_pylist()], bool)
        mask = np.zeros(len(good), bool)
        mask[good] = np.asarray(kept[shard.first : shard.first + shard.count]).astype(bool)
        return table.filter(mask)

    def _rows(self, number: int) -> Iterator[Seen]:
        import pyarrow as pa

        name, place = self._names[number], 0
        try:
            opened = self._opened(number)
            columns = [*self._form.values(), *([self._id] if self._id else [])]
            missing = [column for column in columns if column not in opened.schema_arrow.names]
            if missing:
                raise UnreadableError(f"no column {missing[0]}")
            for batch in opened.iter_batches(batch_size=1024, columns=columns):
                for values in batch.to_pylist():
                    why = wrong(values, self._form)
                    yield Seen(values, why, f"row {place + 1} of {name}", place, 0)
                    place += 1
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UnreadableError(first_line(error)) from error

    def _opened(self, number: int) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.files[number])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UnreadableError(first_line(error)) from error

    def _table(self, shard: Shard) -> Any:
        """The rows of a shard, from the row groups that hold them."""
        import pyarrow as pa

        try:
            opened = self._opened(shard.file)
            groups: list[int] = []
            first = seen = 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if seen + rows > shard.place and seen < shard.place + shard.rows:
                    first = seen if not groups else first
                    groups.append(group)
                seen += rows
            return opened.read_row_groups(groups).slice(shard.place - first, shard.rows)
        except (UnreadableError, OSError, pa.ArrowException) as error:
            raise ParameterError(
                f"data must be readable files, got {self._names[shard.file]} ({error})"
            ) from error

    def _asked(self, table: Any) -> Any:
        return table.select(list(dict.fromkeys(self._form.values())))
