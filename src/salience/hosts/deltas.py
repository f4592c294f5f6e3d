"""Base and fine-tuned checkpoints side by side, LoRA adapters as deltas, and the file of a sparse delta.

A delta folder holds `delta.safetensors`, `delta.json` and, in `model/`, what the fine-tuned model had beside its
weights (config, tokenizer). For each tensor that changes the file has

    NAME/values   [n] in the base's dtype: the finished weights at the changed places
    NAME/gaps     [m] uint8: how many places lie before the next one; 255 adds 255 and goes on, so trailing ones
                  say nothing
    NAME/whole    in place of the two: the finished tensor
    NAME/rows     rows beyond the base's (a grown vocabulary)
    pad.N         nothing, so that what follows lies at a multiple of 8 bytes

Finished weights and not differences: putting them in place is exact, in the base's dtype and on every machine.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.core.errors import ParameterError
from salience.hosts._lora_weights import LoRA
from salience.hosts._streaming import (
    FLOATS,
    Stored,
    Weights,
    Writer,
    as_rows,
    crc,
    read_json,
    row_blocks,
    weight_files,
)

__all__ = ["LoRA", "Stored", "Weights", "Writer", "as_rows", "crc", "read_json", "row_blocks", "weight_files"]
FORMAT, VERSION = "salience-delta", 1
_ESCAPE = 255
_PIECE = 1 << 18  # gaps that are decoded together
# what makes a folder a model beside its weights
_BESIDE = {".json", ".txt", ".model", ".jinja"}
_NOT_BESIDE = re.compile(
    r"(.*\.index|adapter_config|trainer_state|all_results|\w+_results|salience|result)\.json"
)
_OUTPUTS = ("lm_head.weight", "embed_out.weight", "decoder.weight")


def open_base(folder: str | Path, name: str = "base") -> Weights:
    """The tensors of a checkpoint folder.

    Raises:
        ParameterError: if it is no folder, a shard is missing or truncated, or weights are integers or quantised.
    """
    folder = _folder(folder, name)
    _refuse_quantised(read_json(folder / "config.json", name), folder, name)
    weights = Weights(weight_files(folder, name), name)
    for key, stored in weights.entries.items():
        if stored.dtype not in FLOATS and (stored.dtype == "U8" or key.endswith("weight")):
            raise ParameterError(
                f"{name} must be floating-point weights, got {stored.dtype} in {key} of {stored.path}: "
                "quantised weights have no delta"
            )
    return weights


def open_tuned(folder: str | Path, base: Weights) -> Weights | LoRA:
    """A fine-tuned checkpoint, or a LoRA adapter on the base.

    Raises:
        ParameterError: as for `open_base`.
    """
    folder = _folder(folder, "tuned")
    if (folder / "adapter_config.json").is_file():
        return LoRA(folder, base)
    return open_base(folder, "tuned")


def check_pair(
    base: Weights, tuned: Weights | LoRA, *, heads: Sequence[str] = (), extra_rows: bool = False
) -> None:
    """Refuse a fine-tuned checkpoint that is not of the base's architecture and vocabulary.

    Args:
        base (Weights): the base.
        tuned (Weights | LoRA): what was made of it.
        heads (Sequence[str]): parts of names of tensors that only one of them may have, or in another shape.
        extra_rows (bool): whether tuned may have more rows.

    Raises:
        ParameterError: naming the tensor, and the shapes.
    """
    for ours, theirs, one, other in (("base", "tuned", base, tuned), ("tuned", "base", tuned, base)):
        lone = [key for key in one.entries if key not in other.entries and not _any(heads, key)]
        if lone:
            more = f" and {len(lone) - 1} more" if len(lone) > 1 else ""
            raise ParameterError(
                f"tuned must be of the base's architecture, got {lone[0]}{more} in {ours}, not in {theirs}"
            )
    for key, stored in base.entries.items():
        if key not in tuned.entries:
            continue
        shape, wanted = tuned.entries[key].shape, stored.shape
        grown = len(shape) == len(wanted) and shape[1:] == wanted[1:] and shape[0] > wanted[0]
        if shape != wanted and not _any(heads, key) and not (extra_rows and grown):
            hint = ": extra_rows=True keeps the added rows as they are" if grown and not extra_rows else ""
            raise ParameterError(
                f"tuned must be of the base's architecture and vocabulary, got {key} of shape {list(shape)} "
                f"on a base's {list(wanted)}{hint}"
            )
        if (tuned.entries[key].dtype in FLOATS) != (stored.dtype in FLOATS):
            raise ParameterError(
                f"tuned must be of the base's kind of numbers, got {key} in {tuned.entries[key].dtype} "
                f"on a base's {stored.dtype}"
            )


def tied_copies(weights: Weights, config: dict[str, Any]) -> set[str]:
    """Output matrices that are stored although the config ties them to the embedding, and equal it."""
    nested = config.get("text_config") or {}
    if not config.get("tie_word_embeddings", nested.get("tie_word_embeddings", False)):
        return set()
    inputs = [
        k
        for k in weights.entries
        if k.endswith((".embed_tokens.weight", "wte.weight", "word_embeddings.weight"))
    ]
    sums = {(weights.entries[key].shape, weights.checksum(key)) for key in inputs}
    outputs = [key for key in weights.entries if key.endswith(_OUTPUTS)]
    return {key for key in outputs if (weights.entries[key].shape, weights.checksum(key)) in sums}


def gaps(places: Tensor, before: int) -> tuple[Tensor, int]:
    """Rising places as gaps in bytes.

    Args:
        places (Tensor): [n] int64.
        before (int): the last place that was written; -1 at the beginning.

    Returns:
        tuple: [m] uint8, and the last place.
    """
    if not places.numel():
        return torch.empty(0, dtype=torch.uint8), before
    distance = torch.diff(places, prepend=torch.tensor([before])) - 1
    ends = (distance // _ESCAPE + 1).cumsum(0) - 1
    coded = torch.full((int(ends[-1]) + 1,), _ESCAPE, dtype=torch.uint8)
    coded[ends] = (distance % _ESCAPE).to(torch.uint8)
    return coded, int(places[-1])


def places(coded: Tensor, before: int = -1) -> tuple[Tensor, int]:
    """The inverse of `gaps`, also of a piece.

    Args:
        coded (Tensor): [m] uint8.
        before (int): what the piece before left over; -1 at the beginning.

    Returns:
        tuple: [n] int64, and what this piece leaves over.
    """
    ends = coded != _ESCAPE
    # a byte of 255 goes 255 places on; any other goes its value and one more on, to the place that it ends at
    reached = (coded.long() + ends).cumsum(0) + before
    return reached[ends], int(reached[-1]) if len(reached) else before


def copy_beside(source: Path, target: Path) -> None:
    """Copy config, tokenizer and the like: what stands beside the weights of a model."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _BESIDE and not _NOT_BESIDE.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)


class Delta:
    """A delta folder, opened for reading.

    Attributes:
        about (dict[str, Any]): what delta.json says.
        weights (Weights): its tensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = _folder(folder, "apply")
        self.about = read_json(self.folder / "delta.json", "apply")
        if self.about.get("format") != FORMAT or self.about.get("version") != VERSION:
            raise ParameterError(
                f"apply must be a delta folder of version {VERSION}, got {self.folder} with "
                f"{self.about.get('format')} {self.about.get('version')}"
            )
        if not isinstance(self.about.get("tensors"), dict):
            raise ParameterError(f"apply must have a delta.json with tensors, got {self.folder} without")
        path = self.folder / "delta.safetensors"
        if not path.is_file():
            raise ParameterError(f"apply must be a folder with {path.name}, got {self.folder} without it")
        self.weights = Weights([path], "apply")
        self.tensors: dict[str, dict[str, Any]] = self.about["tensors"]
        self._cursor: _Cursor | None = None

    def rows(self, key: str, start: int, stop: int, base: Tensor | None) -> Tensor:
        """Rows of the finished tensor, given those of the base (None beyond its last row)."""
        entries = self.weights.entries
        if f"{key}/whole" in entries:
            return self.weights.rows(f"{key}/whole", start, stop)
        if base is None:
            first = self.tensors[key]["base_rows"]
            return self.weights.rows(f"{key}/rows", start - first, stop - first)
        if f"{key}/values" not in entries:
            return base
        width = base.shape[1]
        if self._cursor is None or self._cursor.key != key or self._cursor.reached > start * width:
            self._cursor = _Cursor(self.weights, key)
        where, values = self._cursor.until(start * width, stop * width)
        filled = base.clone().flatten()
        filled[where - start * width] = values
        return filled.view_as(base)

    def close(self) -> None:
        self.weights.close()


class _Cursor:
    """Walks the sparse entries of one tensor once, in pieces."""

    def __init__(self, weights: Weights, key: str) -> None:
        self.key = key
        self.reached = 0  # places below this were given out
        self._weights = weights
        self._bytes = weights.entries[f"{key}/gaps"].numel
        self._byte = self._value = 0
        self._before = -1
        self._where = torch.empty(0, dtype=torch.int64)

    def until(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Places in [start, stop) and their values; nothing before `start` may be asked for again."""
        while self._byte < self._bytes and not (self._where.numel() and self._where[-1] >= stop):
            end = min(self._byte + _PIECE, self._bytes)
            coded = self._weights.rows(f"{self.key}/gaps", self._byte, end).flatten()
            found, self._before = places(coded, self._before)
            self._where, self._byte = torch.cat([self._where, found]), end
        low, high = (int(torch.searchsorted(self._where, place)) for place in (start, stop))
        values = self._weights.rows(f"{self.key}/values", self._value + low, self._value + high).flatten()
        where = self._where[low:high]
        self._where, self._value, self.reached = self._where[high:].clone(), self._value + high, stop
        return where, values


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write delta.json."""
    content = {"format": FORMAT, "version": VERSION, **about}
    (folder / "delta.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_checkpoint(
    folder: Path,
    layout: dict[str, list[tuple[str, str, tuple[int, ...]]]],
    rows: Callable[[str, int, int], Tensor],
    done: Callable[[int], None],
) -> int:
    """Write a checkpoint's weights, streaming.

    Args:
        folder (Path): exists.
        layout (dict): file name -> (tensor, dtype, shape) in it; an index is written for more than one file.
        rows (Callable): (tensor, first row, row after the last) -> those rows in the tensor's dtype.
        done (Callable): is told how many bytes were written since.

    Returns:
        int: bytes of all weight files.
    """
    total, where, size = 0, {}, 0
    for file, tensors in layout.items():
        # falling item size, so that each lies where its type may lie
        ordered = sorted(tensors, key=lambda entry: -Stored(folder, 0, entry[1], (1,)).bytes)
        writer = Writer(folder / file, ordered)
        for name, dtype, shape in ordered:
            where[name] = file
            size += Stored(folder, 0, dtype, shape).bytes
            for start, stop in row_blocks(shape):
                block = rows(name, start, stop)
                writer.add(block)
                done(block.numel() * block.element_size())
        total += writer.finish()
    if len(layout) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1) + "\n", encoding="utf-8"
        )
    return total


def _any(words: Sequence[str], key: str) -> bool:
    return any(word in key for word in words)


def _folder(folder: str | Path, name: str) -> Path:
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise ParameterError(f"{name} must be an existing local folder, got {folder}")
    return path


def _refuse_quantised(config: dict[str, Any], folder: Path, name: str) -> None:
    found = config.get("quantization_config")
    if found:
        kind = found.get("quant_method", "some") if isinstance(found, dict) else found
        raise ParameterError(f"{name} must be floating-point weights, got {kind} quantisation in {folder}")
