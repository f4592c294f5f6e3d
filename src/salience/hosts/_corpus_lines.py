"""Documents in files of lines, plain or packed."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from salience.core.errors import ParameterError, first_line
from salience.core.files import file_atomic
from salience.hosts._corpus_look import PACKED, Files, Seen, UnreadableError, kind_of
from salience.hosts._forms import wrong
from salience.hosts.corpus import Row, Shard


class Lines(Files):
    """Files of lines."""

    _cursor: tuple[int, int, int, BinaryIO] | None = None

    def _first_columns(self) -> list[str]:
        for number, name in enumerate(self._names):
            if kind_of(self.files[number]) == "text":
                return ["text"]
            try:
                for row in islice(self._rows(number, checked=False), 1000):
                    if row.why is None:
                        return list(row.values)
                    if not self._reading.skip_bad:
                        raise ParameterError(f"data must be documents with {row.why} at {row.where}")
            except UnreadableError as error:
                if not self._reading.skip_bad:
                    raise ParameterError(f"data must be readable files, got {name} ({error})") from error
            else:
                if not self._reading.skip_bad:
                    raise ParameterError(f"data must be files with documents, got none in {name}")
        raise ParameterError(f"data must hold at least one document, got none in {self.name}")

    def read(self, shard: Shard) -> Iterator[Row]:
        for row in self._seen(shard):
            yield Row(row.values, row.where, self._names[shard.file])

    def write(self, shards: Sequence[Shard], kept: np.ndarray, folder: Path) -> list[str]:
        names = []
        for number, file in enumerate(self.files):
            mine = [shard for shard in shards if shard.file == number]
            marks = [np.asarray(kept[shard.first : shard.first + shard.count]) for shard in mine]
            if not any(one.any() for one in marks):
                continue
            name = f"part-{number:06d}.jsonl"
            with file_atomic(folder / name) as temporary, temporary.open("wb") as out:
                for shard, mark in zip(mine, marks):
                    for place, row in enumerate(self._seen(shard)):
                        if mark[place]:
                            plain = kind_of(file) == "text"
                            raw = json.dumps(row.values, ensure_ascii=False).encode() if plain else row.raw
                            out.write(raw.rstrip(b"\r\n") + b"\n")
            names.append(name)
        return names

    def _seen(self, shard: Shard) -> Iterator[Seen]:
        """The good rows of a shard; goes on in the open file where the last shard of it ended."""
        stream = self._at(shard)
        try:
            for row in islice(self._parsed(stream, shard.file, shard.place, shard.line), shard.rows):
                if row.why is None:
                    yield row
                end = row.place + len(row.raw)
                line = row.line + 1
            self._cursor = (shard.file, end, line, stream)
        except (OSError, EOFError, zlib.error) as error:
            raise ParameterError(
                f"data must be readable files, got {self._names[shard.file]} ({error})"
            ) from error

    def _at(self, shard: Shard) -> BinaryIO:
        cursor, self._cursor = self._cursor, None
        if cursor is not None and cursor[0] == shard.file and cursor[1] <= shard.place:
            stream, behind = cursor[3], shard.place - cursor[1]
        else:
            if cursor is not None:
                cursor[3].close()
            stream, behind = self._open(shard.file), shard.place
            if self.files[shard.file].suffix.lower() not in PACKED:
                stream.seek(shard.place)
                behind = 0
        while behind > 0:
            # packed files have no other way to a place in them
            got = len(stream.read(min(behind, 1 << 20)))
            if not got:
                break
            behind -= got
        return stream

    def _open(self, number: int) -> BinaryIO:
        import pyarrow as pa

        file = self.files[number]
        ending = file.suffix.lower()
        if ending == ".gz":
            return io.BufferedReader(gzip.open(file), 1 << 20)
        if ending == ".zst":
            # closes the file below with itself
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"), 1 << 20)
        return file.open("rb")

    def _rows(self, number: int, *, checked: bool = True) -> Iterator[Seen]:
        import pyarrow as pa

        try:
            with self._open(number) as stream:
                yield from self._parsed(stream, number, 0, 1, checked=checked)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            raise UnreadableError(first_line(error)) from error

    def _parsed(
        self, stream: BinaryIO, number: int, place: int, line: int, *, checked: bool = True
    ) -> Iterator[Seen]:
        """Rows from here on; blank lines at the end of a stretch belong to no row."""
        plain, name = kind_of(self.files[number]) == "text", self._names[number]
        for raw in stream:
            if raw.strip():
                where = f"line {line} of {name}"
                values, why = _parse(raw.removeprefix(b"\xef\xbb\xbf") if place == 0 else raw, plain)
                if why is None and checked:
                    why = wrong(values, self._form)
                yield Seen(values, why, where, place, line, raw)
            place += len(raw)
            line += 1


def _parse(raw: bytes, plain: bool) -> tuple[Any, str | None]:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return None, f"UTF-8 text, got byte 0x{error.object[error.start]:02x}"
    if plain:
        return {"text": text.rstrip("\r\n")}, None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"one JSON object a line, got {error.msg} (column {error.colno})"
    except RecursionError:
        return None, "one JSON object a line, got one nested too deep"
    if not isinstance(values, dict):
        return None, f"one JSON object a line, got {type(values).__name__}"
    return values, None
