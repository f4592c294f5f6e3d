"""Safetensors read and written row by row, so that no tensor has to be in memory as a whole.

Files are read with plain reads and not through a memory map: mapped pages count as memory of the process.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from salience.core.errors import ParameterError, first_line

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# buffers such as positions; they are copied and have no delta
INTEGERS = {"I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool}
DTYPES = {**FLOATS, **INTEGERS, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 20  # numbers
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LARGEST_HEADER = 100_000_000  # bytes, as in safetensors
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Stored:
    """A tensor and where it lies: its file, the first byte in it, dtype (safetensors' name) and shape."""

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize


def as_rows(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) as which a tensor is walked: its last dimension is the columns; a vector is one column."""
    if len(shape) < 2:
        return math.prod(shape), 1
    return math.prod(shape[:-1]), shape[-1]


def row_blocks(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of each block of about a million numbers, whole rows."""
    rows, columns = as_rows(shape)
    step = max(1, _BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


class Weights:
    """The tensors of safetensors files, by name; opened when read, closed by `close`.

    Args:
        paths (Sequence[Path]): files, in the order in which their tensors are listed.
        name (str): the parameter as the user wrote it, for errors.

    Attributes:
        entries (dict[str, Stored]): every tensor.
    """

    def __init__(self, paths: Sequence[Path], name: str) -> None:
        self._name = name
        self._open: dict[Path, BinaryIO] = {}
        self.paths = tuple(paths)
        self.entries: dict[str, Stored] = {}
        for path in paths:
            for key, stored in _read_header(path, name).items():
                if key in self.entries:
                    raise ParameterError(
                        f"{name} must hold each tensor once, got {key} twice in {path.parent}"
                    )
                self.entries[key] = stored

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor as [stop - start, columns], in its own dtype."""
        stored = self.entries[key]
        columns = as_rows(stored.shape)[1]
        dtype = DTYPES[stored.dtype]
        found = torch.empty((stop - start) * columns, dtype=dtype)
        if stored.path not in self._open:
            self._open[stored.path] = stored.path.open("rb", buffering=0)
        file = self._open[stored.path]
        file.seek(stored.offset + start * columns * dtype.itemsize)
        target, done = _bytes(found), 0
        while done < len(target):
            count = file.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                raise ParameterError(
                    f"{self._name} must be whole weights, got {stored.path} cut off in {key}"
                )
            done += count
        return found.view(stop - start, columns)

    def whole(self, key: str) -> Tensor:
        """A tensor in its own shape."""
        shape = self.entries[key].shape
        return self.rows(key, 0, as_rows(shape)[0]).view(shape)

    def checksum(self, key: str) -> int:
        """CRC-32 of a tensor's bytes."""
        total = 0
        for start, stop in row_blocks(self.entries[key].shape):
            total = crc(self.rows(key, start, stop), total)
        return total

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open = {}


class Writer:
    """Writes one safetensors file, tensor after tensor.

    With `planned` the header comes first and data goes to its place at once; without it the data waits in a file
    beside until sizes are known. Tensors have to be written in the planned order, which is by falling item size: then
    each lies where its type may lie.
    """

    def __init__(self, path: Path, planned: Sequence[tuple[str, str, Sequence[int]]] | None = None) -> None:
        self._path = path
        self._planned = planned is not None
        self._entries: dict[str, Any] = {}
        self._size = self._expected = 0
        self._waiting = path if self._planned else path.with_name(f"{path.name}.data")
        self._file = self._waiting.open("xb")
        if planned is not None:
            for name, dtype, shape in planned:
                self._enter(name, dtype, shape)
            self._expected, self._size = self._size, 0
            self._file.write(_header(self._entries))

    def add(self, data: Tensor) -> None:
        """Append numbers to the tensor that is being written."""
        raw = _bytes(data)
        self._file.write(raw)
        self._size += len(raw)

    def tensor(self, name: str, data: Tensor) -> None:
        """A whole tensor, entered and written; only without a plan."""
        size = self._size
        self._enter(name, NAMES[data.dtype], data.shape)
        self._size = size
        if data.numel():
            self.add(data)

    def enter(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Begin a tensor whose data follows by `add`; only without a plan."""
        size = self._size
        self._enter(name, dtype, shape)
        self._size = size

    @property
    def size(self) -> int:
        """Bytes of data so far."""
        return self._size

    def align(self) -> None:
        """Fill up to a multiple of 8 bytes with a tensor `pad.N`; only without a plan."""
        gap = -self._size % 8
        if gap:
            self.tensor(f"pad.{len(self._entries)}", torch.zeros(gap, dtype=torch.uint8))

    def finish(self, metadata: Mapping[str, str] | None = None) -> int:
        """Close the file; its size in bytes."""
        self._file.close()
        if not self._planned:
            with self._path.open("xb") as file, self._waiting.open("rb") as data:
                file.write(_header(self._entries, metadata))
                while block := data.read(1 << 22):
                    file.write(block)
            self._waiting.unlink()
        elif self._size != self._expected:
            raise RuntimeError(f"{self._path} has {self._size} bytes of data and planned {self._expected}")
        return self._path.stat().st_size

    def _enter(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        size = math.prod(shape) * DTYPES[dtype].itemsize
        span = [self._size, self._size + size]
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        self._size += size


def crc(data: Tensor, before: int = 0) -> int:
    """CRC-32 of a tensor's bytes, going on from `before`."""
    return zlib.crc32(_bytes(data), before)


def weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a checkpoint folder: one, or the shards of its index.

    Raises:
        ParameterError: if there are none, or a shard of the index is missing.
    """
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    index = folder / _INDEX
    if not index.is_file():
        others = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5")
        )
        found = f"only {', '.join(others[:3])}" if others else "no weights"
        raise ParameterError(f"{name} must be a folder with {_SINGLE} or its shards, got {found} in {folder}")
    places = read_json(index, name).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(v, str) and Path(v).name == v for v in places.values()
    ):
        raise ParameterError(f"{name} must have an index with a weight_map of file names, got {index}")
    paths = [folder / shard for shard in dict.fromkeys(places.values())]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ParameterError(f"{name} must have all shards of its index, got {folder} without {missing[0]}")
    return paths


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ParameterError: if it is missing, unreadable or no object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ParameterError(
            f"{name} must be a folder with {path.name}, got {path.parent} without it"
        ) from error
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"{name} must have a readable {path.name}, got {path} ({first_line(error)})"
        ) from error
    if not isinstance(found, dict):
        raise ParameterError(f"{name} must have a {path.name} that is an object, got {path}")
    return found


def _bytes(data: Tensor) -> memoryview:
    raw: Any = data.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)


def _header(entries: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    content = json.dumps(
        {"__metadata__": {"format": "pt", **(metadata or {})}, **entries}, separators=(",", ":")
    )
    raw = content.encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _read_header(path: Path, name: str) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        if start == _POINTER:
            raise ParameterError(
                f"{name} must be real weights, got a Git LFS pointer in {path}: run git lfs pull"
            )
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        if size < 8 or length > _LARGEST_HEADER or size < 8 + length:
            raise ParameterError(
                f"{name} must be whole weights, got {path} truncated or corrupt in its header"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        found, end = {}, 0
        for key, entry in header.items():
            begin, stop = map(int, entry["data_offsets"])
            end = max(end, stop)
            if entry["dtype"] not in DTYPES:
                raise ParameterError(
                    f"{name} must be floating-point weights, got {entry['dtype']} in {key} of {path}: "
                    "quantised weights have no delta"
                )
            shape = tuple(map(int, entry["shape"]))
            found[key] = Stored(path, 8 + length + begin, entry["dtype"], shape)
            if found[key].bytes != stop - begin:
                raise ValueError(f"{key} of {stop - begin} bytes")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ParameterError):
            raise
        raise ParameterError(
            f"{name} must be whole weights, got {path} corrupt ({first_line(error)})"
        ) from error
    if size < 8 + length + end:
        raise ParameterError(
            f"{name} must be whole weights, got {path} truncated at {size} of {8 + length + end} bytes"
        )
    return found
