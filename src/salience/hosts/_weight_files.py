"""Looks at the weights of a checkpoint folder file by file before anything is loaded: whole, finite, no pickle.

Reads one tensor at a time and runs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salience.core.errors import ParameterError, first_line

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}
# what a Trainer leaves beside the weights
_NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
_OTHER_WEIGHTS = {".safetensors", ".h5", ".msgpack", ".gguf", ".onnx"}
_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # bytes, as in safetensors
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_SMALL_FLOATS = {torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz}
_CHUNK = 1 << 24  # numbers that are looked at together
_SHOWN = 4


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a local checkpoint folder that is not whole and finite. Reads one tensor at a time, runs nothing.

    Raises:
        ParameterError: without a readable config.json; with pickles, another library's weights or no weights; an
            adapter; a shard missing; a file truncated, corrupt or only a Git LFS pointer; NaN or infinity.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ParameterError(f"model must be an existing folder or a hub id, got {folder}")
    if (folder / "adapter_config.json").exists():
        raise ParameterError(
            f"model must be a whole checkpoint, got an adapter in {folder}: "
            "load it with peft, and save what merge_and_unload() returns"
        )
    config = _json(folder / "config.json", "a folder with config.json")
    for path in _weight_files(folder, config):
        _check_weights(path)


def listed(keys: Sequence[str]) -> str:
    """The first few of many names, and how many more there are."""
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + rest


def _json(path: Path, wanted: str) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ParameterError(f"model must be {wanted}, got {path.parent} without it") from error
    except OSError as error:
        raise ParameterError(f"model must be {wanted}, got {path} ({error.strerror})") from error
    except ValueError as error:
        reason = "a Git LFS pointer: run git lfs pull" if _is_pointer(path) else first_line(error)
        raise ParameterError(f"model must be {wanted}, got {path} ({reason})") from error
    if not isinstance(loaded, dict):
        raise ParameterError(f"model must be {wanted}, got {path} (not an object)")
    return loaded


def _weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files that from_pretrained will read, in its order of preference."""
    named = str(config.get("transformers_weights") or "")
    single, index = named or _WEIGHTS, _INDEX
    if named.endswith(".index.json"):
        single, index = "", named
    if single.endswith(".safetensors") and (folder / single).is_file():
        return [folder / single]
    if (folder / index).is_file():
        return _shards(folder / index)
    names = sorted(path.name for path in folder.iterdir() if path.is_file() or path.is_symlink())
    pickles = [name for name in names if Path(name).suffix in PICKLES and not name.startswith(_NOT_WEIGHTS)]
    if pickles:
        refuse_pickles(folder, pickles, config)
    others = [name for name in names if Path(name).suffix in _OTHER_WEIGHTS]
    found = f"only {listed(others)}" if others else "no weights"
    raise ParameterError(f"model must be a folder with {named or _WEIGHTS}, got {found} in {folder}")


def _shards(index: Path) -> list[Path]:
    wanted = "a folder whose weight index names its shards"
    shards = _json(index, wanted).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(_is_name(value) for value in shards.values()):
        raise ParameterError(f"model must be {wanted}, got {index} without a weight_map of file names")
    paths = [index.parent / name for name in sorted({*shards.values()})]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ParameterError(
            f"model must be a folder with all shards of its index, got {index.parent} without {listed(missing)}"
        )
    return paths


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value == Path(value).name and value.endswith(".safetensors")


def refuse_pickles(folder: Path, names: Sequence[str], config: Mapping[str, Any]) -> None:
    """Say that these files are pickles, and how to convert them elsewhere.

    Raises:
        ParameterError: always.
    """
    if any(name.startswith("pytorch_model") for name in names):
        made = next(iter(config.get("architectures") or []), "AutoModelForCausalLM")
        convert = f"import transformers as t; t.{made}.from_pretrained('{folder}').save_pretrained('NEW')"
    else:
        convert = (
            "import torch, safetensors.torch as s; "
            f"s.save_file(torch.load('{folder / names[0]}', weights_only=True), '{_WEIGHTS}')"
        )
    raise ParameterError(
        f"model must be safetensors weights, got the pickle {listed(names)} in {folder} (it can run code when it is "
        f'loaded): if you trust it, convert it elsewhere with python -c "{convert}"'
    )


def _check_weights(path: Path) -> None:
    size = path.stat().st_size
    if _is_pointer(path):
        raise ParameterError(f"model must be real weights, got a Git LFS pointer in {path}: run git lfs pull")
    expected = _expected_size(path)
    if expected is not None and size < expected:
        raise ParameterError(
            f"model must be whole weights, got {path} truncated at {size} of at least {expected} bytes"
        )
    try:
        with safe_open(path, framework="pt") as file:
            require_finite(((name, file.get_tensor(name)) for name in file.keys()), str(path))  # noqa: SIM118
    except SafetensorError as error:
        raise ParameterError(f"model must be whole weights, got {path} corrupt ({error})") from error


def _is_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _expected_size(path: Path) -> int | None:
    """Bytes that the header of a safetensors file promises; None if it is no such header."""
    size = path.stat().st_size
    if size < 8:
        return 8
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _LARGEST_HEADER:
            return None
        if size < 8 + length:
            return 8 + length
        header = file.read(length)
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return 8 + length + int(max(ends, default=0))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return None


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Refuse weights with NaN or infinity; one tensor is looked at after the other.

    Raises:
        ParameterError: naming the first such tensor.
    """
    for name, tensor in tensors:
        if not _is_finite(tensor):
            raise ParameterError(f"model must be finite weights, got NaN or infinity in {name} of {where}")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.dtype in FLOATS:
        # the extremes of a chunk are NaN if any of it is, and need no mask as large as the chunk
        return all(
            bool(torch.isfinite(torch.stack(torch.aminmax(chunk))).all())
            for chunk in tensor.detach().flatten().split(_CHUNK)
            if chunk.numel()
        )
    if tensor.dtype in _SMALL_FLOATS:
        return all(bool(torch.isfinite(chunk.float()).all()) for chunk in tensor.flatten().split(_CHUNK))
    return True
