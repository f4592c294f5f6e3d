"""Puts sparse deltas back on their base: an ordinary checkpoint, streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.core.errors import ParameterError, require
from salience.core.files import check_writable, folder_atomic
from salience.hosts._hub import local_folder
from salience.hosts._streaming import DTYPES, FLOATS, Stored, Weights, as_rows, crc, read_json
from salience.hosts.deltas import Delta, copy_beside, open_base, write_checkpoint

Progress = Callable[[int, int, str], None]
_CONFIG = ("torch_dtype", "dtype")


def apply_deltas(
    base_folder: str,
    deltas: Sequence[str],
    out: str | Path,
    *,
    weights: Sequence[float] | None = None,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Write the checkpoint of a base with one or several deltas on it: `base + sum_k weight_k (finished_k - base)`.

    One delta of weight 1 is put in place to the bit; otherwise the sum is taken in fp32.

    Args:
        base_folder (str): the base that the deltas were made from: a folder, or an id on the hub.
        deltas (Sequence[str]): delta folders.
        out (str | Path): a new or empty folder.
        weights (Sequence[float] | None): one for each delta; None is 1 each.
        progress (Callable): MiB done, MiB in all, what.

    Returns:
        dict: folder, bytes, files and seconds.

    Raises:
        ParameterError: for another base than the deltas', deltas that contradict each other, or an out folder that
            is not empty.
    """
    out = Path(out)
    refuse_filled(out)
    shares = [1.0] * len(deltas) if weights is None else list(weights)
    require(bool(deltas), "apply", "at least one delta folder", deltas)
    require(len(shares) == len(deltas), "weight", f"given once for each of {len(deltas)} deltas", len(shares))
    opened = [Delta(folder) for folder in deltas]
    base = open_base(local_folder(base_folder, "base"))
    shapes = _result_shapes(base, opened)
    check_writable(out, free_bytes=sum(stored[1] for stored in shapes.values()) + (1 << 20))
    total, done, started = sum(stored[1] for stored in shapes.values()), 0, time.perf_counter()
    sums: dict[str, int] = {}

    def step(count: int) -> None:
        nonlocal done
        done += count
        in_mebibytes(progress, "merging")(done, total)

    def rows(key: str, start: int, stop: int) -> Tensor:
        block = _merged_rows(base, opened, shares, key, start, stop, sums)
        if stop == as_rows(shapes[key][0][1])[0] and key in sums:
            _check_base(key, sums.pop(key), opened)
        return block

    layout = _layout(base, shapes)
    with folder_atomic(out) as part:
        size = write_checkpoint(part, layout, rows, step)
        copy_beside(opened[0].folder / "model", part)
        _set_dtype(part / "config.json", base)
    for one in opened:
        one.close()
    base.close()
    return {
        "folder": str(out), "bytes": size, "files": len(layout), "tensors": len(shapes),
        "seconds": round(time.perf_counter() - started, 3),
    }  # fmt: skip


def in_mebibytes(progress: Progress, what: str) -> Callable[[int, int], None]:
    """Tells of bytes in the unit that a bar can show."""
    return lambda done, total: progress(done >> 20, max(1, total >> 20), f"{what}, MiB")


def refuse_filled(out: Path) -> None:
    """Refuse an out folder that has something in it.

    Raises:
        ParameterError: naming it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParameterError(f"out must be a new or empty folder, got {out} with something in it")


def _result_shapes(
    base: Weights, deltas: Sequence[Delta]
) -> dict[str, tuple[tuple[str, tuple[int, ...]], int]]:
    """Tensor -> ((dtype, shape), bytes) of the result, in the base's order, what is new last."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for delta in deltas:
        for name, about in delta.tensors.items():
            entry = (about["dtype"], tuple(about["shape"]))
            if name in found and found[name] != entry:
                raise ParameterError(
                    f"apply must be deltas of one architecture, got {name} of shape {list(found[name][1])} "
                    f"and {list(entry[1])}"
                )
            if about["kind"] != "new":
                stored = base.entries.get(name)
                rows = about.get("base_rows")
                wanted = entry[1] if rows is None else (rows, *entry[1][1:])
                if stored is None or stored.shape != wanted or stored.dtype != entry[0]:
                    got = "no such tensor" if stored is None else f"{stored.dtype} {list(stored.shape)}"
                    raise ParameterError(
                        f"base must be what {delta.folder} was made from, got {got} for {name} "
                        f"({entry[0]} {list(wanted)} there)"
                    )
            elif len(deltas) > 1:
                raise ParameterError(
                    f"apply must be one delta where a tensor is new to the base, got {len(deltas)} with {name}"
                )
            found[name] = entry
    order = [name for name in base.entries if name in found] + [
        name for name in found if name not in base.entries
    ]
    return {name: (found[name], Stored(Path(), 0, *found[name]).bytes) for name in order}


def _merged_rows(
    base: Weights,
    deltas: Sequence[Delta],
    shares: Sequence[float],
    key: str,
    start: int,
    stop: int,
    sums: dict[str, int],
) -> Tensor:
    stored = base.entries.get(key)
    if stored is None or deltas[0].tensors.get(key, {}).get("kind") == "new":
        return deltas[0].rows(key, start, stop, None)
    last = as_rows(stored.shape)[0]
    if start < last < stop:
        pieces = [
            _merged_rows(base, deltas, shares, key, a, b, sums) for a, b in ((start, last), (last, stop))
        ]
        return torch.cat(pieces)
    old = base.rows(key, start, stop) if stop <= last else None
    if old is not None:
        sums[key] = crc(old, sums.get(key, 0))
    if len(deltas) == 1 and shares[0] == 1:
        return deltas[0].rows(key, start, stop, old)
    involved = [(d, w) for d, w in zip(deltas, shares, strict=True) if key in d.tensors]
    origin = torch.zeros(()) if old is None else old.float()
    total = origin
    for delta, share in involved:
        total = total + share * (delta.rows(key, start, stop, old).float() - origin)
    return total.to(DTYPES[stored.dtype])


def _check_base(key: str, found: int, deltas: Sequence[Delta]) -> None:
    for delta in deltas:
        wanted = delta.tensors.get(key, {}).get("crc32", found)
        if wanted != found:
            raise ParameterError(
                f"base must be what {delta.folder} was made from, got another {key} (CRC-32 {found:08x}, "
                f"not {wanted:08x})"
            )


def _layout(base: Weights, shapes: Mapping[str, Any]) -> dict[str, list[tuple[str, str, tuple[int, ...]]]]:
    """The base's files; what is new goes into the last."""
    layout: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {path.name: [] for path in base.paths}
    for name, ((dtype, shape), _) in shapes.items():
        file = base.entries[name].path.name if name in base.entries else base.paths[-1].name
        layout[file].append((name, dtype, shape))
    return {file: tensors for file, tensors in layout.items() if tensors}


def _set_dtype(path: Path, base: Weights) -> None:
    """The config says the dtype of the weights, which is the base's."""
    config = read_json(path, "apply")
    sizes: dict[str, int] = {}
    for stored in base.entries.values():
        if stored.dtype in FLOATS:
            sizes[stored.dtype] = sizes.get(stored.dtype, 0) + stored.numel
    name = str(FLOATS[max(sizes, key=lambda dtype: sizes[dtype])]).removeprefix("torch.")
    for key in _CONFIG:
        if key in config:
            config[key] = name
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
