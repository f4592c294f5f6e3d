"""`salience delta`: fine-tuned checkpoints as sparse deltas on their base, and back to an ordinary checkpoint.

Tensors are streamed from and to safetensors; a whole model is in memory only where q or the score is to be found by
running one, and then one at a time.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.core.errors import ParameterError, require
from salience.core.files import check_writable, folder_atomic
from salience.core.spec import describe_method, parse_method
from salience.hosts._hub import local_folder
from salience.hosts._streaming import DTYPES, FLOATS
from salience.hosts.deltas import (
    LoRA,
    Weights,
    Writer,
    as_rows,
    check_pair,
    copy_beside,
    gaps,
    open_base,
    open_tuned,
    read_json,
    row_blocks,
    tied_copies,
    write_about,
)
from salience.jobs._delta_apply import Progress, apply_deltas, in_mebibytes, refuse_filled
from salience.methods.weights.darex import DAREx, divided, in_scope, kept_blocks

__all__ = ["DeltaSettings", "apply_deltas", "make_deltas"]

if TYPE_CHECKING:
    from salience.hosts.deltas import Stored


@dataclass(frozen=True)
class DeltaSettings:
    """Everything that decides the result of making deltas.

    Attributes:
        base (str): checkpoint folder, or id on the hub.
        tuned (tuple[str, ...]): fine-tuned checkpoint or LoRA adapter folders, or ids.
        method (str): `darex:key=value,...`.
        data (str | None): texts to choose q, or Wanda's norms, by; None takes random tokens of the vocabulary.
        samples (int): sequences of them.
        length (int): tokens of a sequence.
        device (str): where models run for that.
    """

    base: str
    tuned: tuple[str, ...]
    method: str = "darex"
    data: str | None = None
    samples: int = 50
    length: int = 128
    device: str = "auto"


@dataclass
class Chosen:
    """What only running the model can say: a divisor for each tensor (or one for all), and input norms."""

    q: float
    by_tensor: Mapping[str, float] = field(default_factory=dict)
    norms: Mapping[str, Tensor] = field(default_factory=dict)
    tried: Mapping[float, float] = field(default_factory=dict)

    def of(self, name: str) -> float:
        return self.by_tensor.get(name, self.q)


def make_deltas(
    settings: DeltaSettings,
    out: str | Path,
    *,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda done, total, what: None,
) -> dict[str, Any]:
    """Write the sparse delta of each fine-tuned checkpoint.

    Args:
        settings (DeltaSettings): what to do.
        out (str | Path): a new or empty folder; for several checkpoints it gets a folder for each, by its name.
        say (Callable): is told what is done.
        progress (Callable): done, all, what: MiB that are written, or values of q that are tried.

    Returns:
        dict: for each delta its folder, bytes, share kept and q.

    Raises:
        ParameterError: before anything is written, or with nothing left of what was.
    """
    out = Path(out)
    refuse_filled(out)
    method = parse_method(settings.method)
    if not isinstance(method, DAREx):
        raise ParameterError(f"method must be darex:key=value,..., got {settings.method!r}")
    require(bool(settings.tuned), "tuned", "at least one folder", settings.tuned)
    names = [Path(one).expanduser().resolve().name for one in settings.tuned]  # of an id, its second half
    twice = next((name for name in names if names.count(name) > 1), None)
    require(twice is None, "tuned", "folders of different names", twice)
    given = settings
    settings = replace(
        given,
        base=str(local_folder(given.base, "base")),
        tuned=tuple(str(local_folder(one, "tuned")) for one in given.tuned),
    )
    itself = next(
        (one for one in settings.tuned if Path(one).resolve() == Path(settings.base).resolve()), None
    )
    require(itself is None, "tuned", "another folder than base", itself)
    base = open_base(settings.base)
    # all of them are looked at before the first is worked on
    for one in settings.tuned:
        _opened(base, one, method, settings.base)[0].close()
    base_bytes = sum(stored.bytes for stored in base.entries.values())
    check_writable(out, free_bytes=int(len(names) * base_bytes * min(1.0, 2 * method.keep)) + (1 << 20))
    results = {}
    with folder_atomic(out) as part:
        for name, one, wrote in zip(names, settings.tuned, given.tuned, strict=True):
            tuned, tied = _opened(base, one, method, settings.base)
            chosen = _choose(
                settings, one, method, base, tuned, say, _named(progress, f"choosing q of {name}")
            )
            folder = part / name if len(names) > 1 else part
            folder.mkdir(exist_ok=True)
            started = time.perf_counter()
            about = _write(folder, base, tuned, method, chosen, tied, in_mebibytes(progress, name))
            tuned.close()
            about["seconds"] = round(time.perf_counter() - started, 3)
            about["base"], about["tuned"] = str(given.base), str(wrote)
            write_about(folder, about)
            beside = settings.base if isinstance(tuned, LoRA) else one
            copy_beside(Path(beside).expanduser(), folder / "model")
            shown = {k: v for k, v in about.items() if k != "tensors"}
            results[name] = {**shown, "folder": str(out / name if len(names) > 1 else out)}
    base.close()
    return results


def _named(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(done, total, name)


def _opened(base: Weights, folder: str, method: DAREx, base_folder: str) -> tuple[Weights | LoRA, set[str]]:
    tuned = open_tuned(folder, base)
    heads = method.heads
    configs = [read_json(Path(base_folder).expanduser() / "config.json", "base")]
    if isinstance(tuned, LoRA):
        check_pair(base, tuned, heads=heads)
        return tuned, tied_copies(base, configs[0])
    configs.append(read_json(Path(folder).expanduser() / "config.json", "tuned"))
    kinds = [config.get("model_type") for config in configs]
    if kinds[0] != kinds[1]:
        raise ParameterError(f"tuned must be of the base's architecture, got a {kinds[1]} on a {kinds[0]}")
    check_pair(base, tuned, heads=heads, extra_rows=method.extra_rows)
    return tuned, tied_copies(tuned, configs[1])


def _choose(
    settings: DeltaSettings,
    folder: str,
    method: DAREx,
    base: Weights,
    tuned: Weights | LoRA,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Chosen:
    if not method.needs_inputs or method.keep == 1:
        return Chosen(1.0 if method.keep == 1 else method.divisor)
    from salience.jobs._delta_choice import choose

    return choose(settings, folder, method, base, tuned, say, progress)


def _write(
    folder: Path,
    base: Weights,
    tuned: Weights | LoRA,
    method: DAREx,
    chosen: Chosen,
    tied: set[str],
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write delta.safetensors; what delta.json will say."""
    names = [key for key in tuned.entries if key not in tied]
    pruned = {
        name
        for name in in_scope(names, method)
        if name in base.entries and base.entries[name].dtype in FLOATS and base.entries[name].numel
    }
    total = sum(tuned.entries[name].bytes for name in names)
    writer = Writer(folder / "delta.safetensors")
    tensors: dict[str, dict[str, Any]] = {}
    done = 0
    for name in names:
        if name not in base.entries or base.entries[name].shape[1:] != tuned.entries[name].shape[1:]:
            tensors[name] = _new(writer, name, tuned)
        else:
            tensors[name] = _changed(writer, name, base, tuned, method if name in pruned else None, chosen)
        done += tuned.entries[name].bytes
        progress(done, total)
    size = writer.finish({"format": "salience-delta", "version": "1"})
    kept = sum(entry.get("kept", 0) for name, entry in tensors.items() if name in pruned)
    entries = sum(base.entries[name].numel for name in pruned)
    return {
        "method": describe_method(method),
        "bytes": size,
        "base_bytes": sum(stored.bytes for stored in base.entries.values()),
        "pruned_tensors": len(pruned),
        "copied_tensors": sum(entry["kind"] != "same" for n, entry in tensors.items() if n not in pruned),
        "delta_entries": entries,
        "kept_share": round(kept / max(entries, 1), 6),
        "q": chosen.q,
        "tried": {f"{q:.6g}": score for q, score in chosen.tried.items()},
        "tensors": tensors,
    }


def _new(writer: Writer, name: str, tuned: Weights | LoRA) -> dict[str, Any]:
    """A tensor that the base does not have: copied."""
    stored = tuned.entries[name]
    writer.align()
    writer.enter(f"{name}/whole", stored.dtype, stored.shape)
    for start, stop in row_blocks(stored.shape):
        writer.add(tuned.rows(name, start, stop))
    return {"kind": "new", "dtype": stored.dtype, "shape": list(stored.shape)}


def _changed(
    writer: Writer, name: str, base: Weights, tuned: Weights | LoRA, method: DAREx | None, chosen: Chosen
) -> dict[str, Any]:
    """A tensor of the base, pruned (with a method) or copied as far as it changed."""
    stored, shape = base.entries[name], base.entries[name].shape
    dtype = DTYPES[stored.dtype]
    about: dict[str, Any] = {"kind": "same", "dtype": stored.dtype, "shape": list(tuned.entries[name].shape)}
    about["crc32"] = base.checksum(name)
    if DTYPES[stored.dtype].is_floating_point:
        _refuse_bad_numbers(name, shape, base, tuned)
    if method is None:
        same = all(
            torch.equal(tuned.rows(name, *block).to(dtype), base.rows(name, *block))
            for block in row_blocks(shape)
        )
        if not same:
            about["kind"] = "copied"
            _write_whole(writer, name, stored, lambda start, stop: tuned.rows(name, start, stop).to(dtype))
    else:
        about |= {
            "kind": "pruned",
            "q": chosen.of(name),
            **_pruned(writer, name, base, tuned, method, chosen),
        }
    if about["shape"] != list(shape):
        first, last = as_rows(shape)[0], as_rows(tuned.entries[name].shape)[0]
        about |= {"base_rows": first}
        writer.align()
        writer.enter(f"{name}/rows", stored.dtype, (last - first, as_rows(shape)[1]))
        for start, stop in row_blocks((last - first, as_rows(shape)[1])):
            writer.add(tuned.rows(name, first + start, first + stop).to(dtype))
    return about


def _pruned(
    writer: Writer, name: str, base: Weights, tuned: Weights | LoRA, method: DAREx, chosen: Chosen
) -> dict[str, Any]:
    stored, q = base.entries[name], chosen.of(name)
    width = as_rows(stored.shape)[1]

    def delta(start: int, stop: int) -> Tensor:
        return tuned.rows(name, start, stop).float() - base.rows(name, start, stop).float()

    blocks = kept_blocks(name, stored.shape, delta, method, chosen.norms.get(name))
    item = DTYPES[stored.dtype].itemsize
    # places cost a byte each: from here on they cost more than they save
    dense, kept = method.keep * (item + 1) >= item, 0
    if dense:
        writer.align()
        writer.enter(f"{name}/whole", stored.dtype, stored.shape)
    values: list[Tensor] = []
    coded: list[Tensor] = []
    before = -1
    for start, stop, mask in blocks:
        old, new = (one.rows(name, start, stop).flatten() for one in (base, tuned))
        # only kept places are worked on: they are a small share
        where = mask.flatten().nonzero().flatten()
        kept += len(where)
        before_them, after_them = old[where], new[where]
        if q == 1 and len(where) == len(old):
            finished = after_them.to(old.dtype)  # the fine-tuned weights to the bit
        else:
            change = after_them.float() - before_them.float()
            finished = divided(before_them, change, torch.ones_like(where, dtype=torch.bool), q)
        if dense:
            writer.add(old.index_copy_(0, where, finished))
            continue
        changed = (finished != before_them).nonzero().flatten()
        values.append(finished[changed])
        piece, before = gaps(where[changed] + start * width, before)
        coded.append(piece)
    if not dense and any(len(piece) for piece in values):
        writer.align()
        writer.enter(f"{name}/values", stored.dtype, (sum(map(len, values)),))
        for piece in values:
            writer.add(piece)
        length = sum(map(len, coded))
        # escapes at the end say nothing and bring the next tensor to its place
        padding = -(writer.size + length) % 8
        writer.enter(f"{name}/gaps", "U8", (length + padding,))
        for piece in coded:
            writer.add(piece)
        writer.add(torch.full((padding,), 255, dtype=torch.uint8))
    return {"kept": kept}


def _write_whole(writer: Writer, name: str, stored: Stored, rows: Callable[[int, int], Tensor]) -> None:
    writer.align()
    writer.enter(f"{name}/whole", stored.dtype, stored.shape)
    for start, stop in row_blocks(stored.shape):
        writer.add(rows(start, stop))


def _refuse_bad_numbers(name: str, shape: tuple[int, ...], base: Weights, tuned: Weights | LoRA) -> None:
    for start, stop in row_blocks(shape):
        for what, one in (("base", base), ("tuned", tuned)):
            # the smallest and the largest are NaN where any is
            block = one.rows(name, start, stop)
            if block.numel() and not bool(torch.isfinite(torch.stack(block.aminmax())).all()):
                raise ParameterError(f"{what} must be finite weights, got NaN or infinity in {name}")


def command(base: str, rest: Sequence[str]) -> str:
    """The command that does the next step, as one would type it."""
    return shlex.join(["salience", "delta", "--base", base, *rest])
