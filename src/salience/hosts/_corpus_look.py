"""The look at files before anything is scored: rows are checked, documents counted, shards found, bad rows listed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.documents import Reading
from salience.core.errors import ParameterError
from salience.core.files import write_json_atomic
from salience.hosts._forms import chosen
from salience.hosts.corpus import Row, Shard, check_columns, named, twice

LINES, TEXTS, TABLES = (".jsonl", ".ndjson", ".json"), (".txt",), (".parquet",)
PACKED = (".gz", ".zst")
_ENDS = 1 << 16  # bytes of both ends of a file that tell whether it is the same
_LISTED = 1000  # bad rows that are listed one by one


def kind_of(path: Path) -> str:
    """ "lines", "text" or "parquet"; empty for another ending."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in TABLES:
        return "parquet"
    ending = suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in PACKED else (suffixes or [""])[-1]
    return "lines" if ending in LINES else "text" if ending in TEXTS else ""


class Seen:
    """A row as it was found: its values or what is wrong with it, and where it is."""

    __slots__ = ("line", "place", "raw", "values", "where", "why")

    def __init__(
        self, values: Any, why: str | None, where: str, place: int, line: int, raw: bytes = b""
    ) -> None:
        self.values, self.why, self.where = values, why, where
        self.place, self.line, self.raw = place, line, raw


class UnreadableError(Exception):
    """A file that cannot be read to its end."""


class Files:
    """What both kinds of files have in common."""

    def __init__(self, root: Path, files: Sequence[Path], reading: Reading) -> None:
        self.name = root.name if len(files) > 1 else files[0].name
        self.files = list(files)
        self.bad: list[str] = []
        self.bad_count = 0
        self._names = [str(file.relative_to(root)) for file in files]
        self._reading = reading
        self._shards: list[Shard] | None = None
        self.columns: Sequence[str] = self._first_columns()
        check_columns(self.columns, reading)
        self._form = chosen(self.columns, reading)
        self._id = named(self.columns, reading)[0]

    def fingerprint(self) -> str:
        found = hashlib.sha256()
        for name, file in zip(self._names, self.files):
            size = file.stat().st_size
            found.update(f"{name} {size}".encode())
            with file.open("rb") as opened:
                found.update(opened.read(_ENDS))
                opened.seek(max(0, size - _ENDS))
                found.update(opened.read(_ENDS))
        return found.hexdigest()[:32]

    def shards(self) -> Iterator[Shard]:
        self.check()
        yield from self._shards or ()

    def check(self) -> None:
        """Read every row once, unless that was done."""
        if self._shards is None:
            self._look()

    def keep_plan(self, path: Path) -> None:
        """Take the shards from an earlier look, or look now and write them down."""
        key = f"{self.fingerprint()} {self._reading.shard_documents} {self._reading.skip_bad}"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == key:
                self._shards = [Shard(**one) for one in stored["shards"]]
                self.bad, self.bad_count = stored["bad"], stored["bad_count"]
                return
        shards = [asdict(shard) for shard in self.shards()]
        write_json_atomic(path, {"key": key, "shards": shards, "bad": self.bad, "bad_count": self.bad_count})

    def take(self, kept: np.ndarray) -> Any:
        return None

    def _look(self) -> None:
        """Read everything once: shards, bad rows, ids that stand twice."""
        size = self._reading.shard_documents
        shards: list[Shard] = []
        hashes: list[np.ndarray] = []
        total = 0
        for number, name in enumerate(self._names):
            mine: list[Shard] = []
            identities: list[int] = []
            count = rows = place = line = 0
            start_count = len(self.bad)
            try:
                for row in self._rows(number):
                    if rows == 0:
                        place, line = row.place, row.line
                    rows += 1
                    if row.why is not None:
                        self._spoiled(f"{row.why} at {row.where}")
                    else:
                        count += 1
                        if self._id is not None:
                            identities.append(_hashed(row.values.get(self._id)))
                    if count == size:
                        mine.append(Shard(0, 0, count, number, place, rows, line))
                        count = rows = 0
            except UnreadableError as error:
                del self.bad[start_count:]
                self._spoiled(f"readable files, got {self._names[number]} ({error})", whole=True)
                continue
            if count:
                mine.append(Shard(0, 0, count, number, place, rows, line))
            if not mine:
                self._spoiled(f"files with documents, got none in {name}", whole=True)
            for shard in mine:
                shards.append(Shard(**{**asdict(shard), "number": len(shards), "first": total}))
                total += shard.count
            hashes.append(np.array(identities, np.uint64))
        if not total:
            raise ParameterError(f"data must hold at least one document, got none in {self.name}")
        self._shards = shards
        if self._id is not None:
            self._refuse_twice(np.concatenate(hashes))

    def _spoiled(self, what: str, *, whole: bool = False) -> None:
        if not self._reading.skip_bad:
            wanted = "" if whole else "documents with "
            raise ParameterError(f"data must be {wanted}{what} (skip_bad leaves such out)")
        self.bad_count += 1
        if len(self.bad) < _LISTED:
            self.bad.append(what)

    def _refuse_twice(self, hashes: np.ndarray) -> None:
        hashes.sort()
        again = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        if not again:
            return
        seen: dict[Any, str] = {}
        for shard in self._shards or ():
            for row in self.read(shard):
                value = row.values.get(str(self._id))
                if _hashed(value) in again:
                    if value in seen:
                        raise twice(str(self._id), value, seen[value], row.where)
                    seen[value] = row.where

    def read(self, shard: Shard) -> Iterator[Row]:
        raise NotImplementedError

    def _rows(self, number: int) -> Iterator[Seen]:
        raise NotImplementedError

    def _first_columns(self) -> list[str]:
        raise NotImplementedError


def _hashed(value: Any) -> int:
    return int.from_bytes(
        hashlib.blake2b(repr(value).encode("utf-8", "replace"), digest_size=8).digest(), "little"
    )
