"""A pool of samples that outlives a run: rows, vectors and decisions in a folder, one generation after another.

Each release is written as a folder of its own that appears whole or not at all; then `pool.json` points to it and the
one before is removed. A kill at any moment leaves the pool of the last release, or the new one.

    pool.json                 what the pool was made with, and a line for each release
    release-0002/rows/        the samples that stay, as `datasets` saves them
    release-0002/train/       those that were chosen to train on
    release-0002/vectors.f16  [n, d] of those that stay, mapped
    release-0002/samples.parquet, pruned.parquet, decisions.parquet
    work/                     scores of a release that is not finished
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.errors import ConflictError, ParameterError, first_line
from salience.core.files import check_writable, folder_atomic, write_json_atomic

_MANIFEST, _VERSION = "pool.json", 1


class SamplePool:
    """The pool in a folder; empty where there is none yet.

    Args:
        folder (str | Path): made by the first `commit`.
        made_with (Mapping[str, Any]): settings, as JSON values, that all releases of a pool share.

    Attributes:
        releases (list[dict]): what was written of each.
        rows (Dataset | None): the samples, None where there are none.
        columns (dict[str, list]): what is known of each: id, source, release and more.
        vectors (np.ndarray): [n, d] float16, mapped.
        pruned (set[str]): ids that left the pool for good.

    Raises:
        ParameterError: if the folder cannot be written or its files are broken.
        ConflictError: if it was made with other settings.
    """

    def __init__(self, folder: str | Path, made_with: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        check_writable(self.folder, name="state")
        self._made_with = json.loads(json.dumps(made_with))
        self.releases: list[dict[str, Any]] = []
        self.rows: Any = None
        self.columns: dict[str, list[Any]] = {}
        self.vectors = np.zeros((0, 0), np.float16)
        self.pruned: set[str] = set()
        path = self.folder / _MANIFEST
        if path.exists():
            self._load(path)
        elif self.folder.is_dir():
            # a release that was broken off is ours; anything else belongs to somebody
            names = (one.name for one in self.folder.iterdir())
            if not all(name.startswith(("release-", ".release-", "work")) for name in names):
                raise ParameterError(f"state must be a new folder or one with {_MANIFEST}, got {folder}")

    @property
    def current(self) -> Path | None:
        """The folder of the newest release."""
        return self.folder / _name(len(self.releases)) if self.releases else None

    def train(self) -> Any:
        """The samples that the newest release chose, as a Dataset."""
        assert self.current is not None  # asked after a release
        return _saved(self.current / "train")

    def decisions(self) -> Any:
        """The Arrow table of the newest release."""
        assert self.current is not None
        return _table(self.current / "decisions.parquet")

    def refuse_known(self, ids: Iterable[str]) -> None:
        """Refuse ids that the pool holds or has pruned.

        Raises:
            ParameterError: naming the first.
        """
        held = set(self.columns.get("id", ()))
        for name in ids:
            if name in held or name in self.pruned:
                where = "is in the pool" if name in held else "was pruned from it"
                raise ParameterError(f"ids must be new to the pool, got {name!r}, which {where}")

    def commit(
        self,
        *,
        rows: Any,
        train: Any,
        columns: Mapping[str, Sequence[Any]],
        vectors: np.ndarray,
        pruned: Sequence[str],
        decisions: Any,
        about: Mapping[str, Any],
    ) -> None:
        """Write a release and make it the pool.

        Args:
            rows (Dataset): the samples that stay.
            train (Dataset): those to train on.
            columns (Mapping): what is known of each sample that stays.
            vectors (np.ndarray): [n, d] of them.
            pruned (Sequence[str]): ids of those that leave.
            decisions (pa.Table): of all that were looked at.
            about (Mapping): a line on the release, as JSON values.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        number = len(self.releases) + 1
        gone = sorted(self.pruned | set(pruned))
        with folder_atomic(self.folder / _name(number)) as place:
            rows.save_to_disk(str(place / "rows"))
            train.save_to_disk(str(place / "train"))
            vectors.astype(np.float16).tofile(place / "vectors.f16")
            pq.write_table(
                pa.table({name: list(values) for name, values in columns.items()}), place / "samples.parquet"
            )
            pq.write_table(pa.table({"id": pa.array(gone, pa.string())}), place / "pruned.parquet")
            pq.write_table(decisions, place / "decisions.parquet")
        self.releases.append(dict(about))
        write_json_atomic(
            self.folder / _MANIFEST,
            {"version": _VERSION, "made_with": self._made_with, "releases": self.releases},
        )
        for old in self.folder.glob("release-*"):
            if old.name != _name(number):
                shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        self._read()

    def _load(self, path: Path) -> None:
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            releases, made_with = raw["releases"], raw["made_with"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ParameterError(f"state must hold a readable {_MANIFEST}, got {path}") from error
        differs = sorted(
            name
            for name in {*made_with, *self._made_with}
            if made_with.get(name) != self._made_with.get(name)
        )
        if differs:
            had = ", ".join(f"{name}={made_with.get(name)!r}" for name in differs)
            raise ConflictError(f"state must be a pool of the same settings, got {self.folder} with {had}")
        self.releases = releases
        self._read()

    def _read(self) -> None:
        place = self.current
        if place is None:
            return
        self.rows = _saved(place / "rows")
        self.columns = _table(place / "samples.parquet").to_pydict()
        self.pruned = set(_table(place / "pruned.parquet")["id"].to_pylist())
        count = len(self.columns["id"])
        values = np.memmap(place / "vectors.f16", np.float16, "c") if count else np.zeros(0, np.float16)
        whole = count == 0 or (values.size and values.size % count == 0)
        if len(self.rows) != count or not whole:
            raise ParameterError(f"state must hold as many rows as vectors, got {place} with other numbers")
        self.vectors = values.reshape(count, -1) if count else np.zeros((0, 0), np.float16)


def joined(first: Any, second: Any) -> Any:
    """Rows of two datasets one after another; a column that one of them lacks is None there.

    Raises:
        ParameterError: if a column of both is of different types.
    """
    from datasets import concatenate_datasets

    if first is None or not len(first):
        return second
    try:
        return concatenate_datasets([first, second])
    except ValueError as error:
        raise ParameterError(
            f"dataset must have columns of the pool's types, got {first_line(error)}"
        ) from error


def as_dataset(target: Any, folder: Path) -> Any:
    """A `Dataset` as it is; the rows of an `IterableDataset` written to a file in `folder` and mapped.

    Raises:
        ParameterError: as for `mapped`.
    """
    from datasets import Dataset

    if isinstance(target, Dataset):
        return target
    features = target.features
    # pictures as they are stored: made anew they would be other bytes
    return mapped(target if features is None else target.decode(False), folder, features)


def mapped(rows: Iterable[Mapping[str, Any]], folder: Path, features: Any = None) -> Any:
    """Rows written to a parquet file in `folder`, a part of them in memory at a time, and mapped as a `Dataset`.

    Args:
        rows (Iterable[Mapping]): with the same columns each.
        folder (Path): made if it does not exist.
        features (Features | None): types of the columns; None takes those of the first rows.

    Raises:
        ParameterError: if there are no rows, or a value of another type than its column.
    """
    import pyarrow as pa
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    from salience.hosts.corpus import write_tables

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.parquet"
    try:
        write_tables(path, _tables(rows, features))
        if not path.exists():
            raise ParameterError("dataset must hold at least one sample, got none")
        found = Dataset.from_parquet(str(path), cache_dir=str(folder / "mapped"))
    except (pa.ArrowException, DatasetsError, ValueError, TypeError) as error:
        raise ParameterError(
            f"dataset must have columns of one type each, got {first_line(error)}"
        ) from error
    # the same for the same rows, so that work that was broken off is known again
    return found.select(range(len(found)), new_fingerprint=_digest(path))


def _tables(rows: Iterable[Mapping[str, Any]], features: Any, chunk: int = 1000) -> Iterator[Any]:
    import pyarrow as pa

    left = iter(rows)
    while part := list(islice(left, chunk)):
        if features is None:
            yield pa.Table.from_pylist(part)
        else:
            encoded = [features.encode_example(row) for row in part]
            yield pa.Table.from_pylist(encoded, schema=features.arrow_schema)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _name(number: int) -> str:
    return f"release-{number:04d}"


def _saved(path: Path) -> Any:
    from datasets import load_from_disk

    try:
        return load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ParameterError(f"state must hold whole releases, got {path} ({first_line(error)})") from error


def _table(path: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise ParameterError(f"state must hold whole releases, got {path} ({first_line(error)})") from error
