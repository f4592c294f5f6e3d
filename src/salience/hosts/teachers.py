"""A teacher beside a student: run once for each batch without gradients, or read from a file that it filled once.

The teacher keeps its own device and dtype: inputs go to it, its logits come back to the student. Autocast is off
around it, so that it says the same whatever the student is trained in, and it is in eval mode only while it runs.

A cache is a folder of safetensors parts with a manifest. Every row of logits is kept under a digest of the inputs
that it belongs to: a shuffled order finds its rows, and rows of other data, of another order under the same indices,
or of an augmented view are refused instead of being answered with somebody else's logits.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.errors import ConflictError, ParameterError, require
from salience.core.files import write_bytes_atomic, write_json_atomic
from salience.core.loop import evaluating
from salience.core.losses import logits_of
from salience.hosts._teacher_rows import ANSWERS, row_digests, shown, weights_digest
from salience.hosts.transformers import unwrap

__all__ = [
    "LogitCache",
    "Teacher",
    "cache_logits",
    "check_pair",
    "open_teacher",
    "row_digests",
    "training_rows",
]

_MANIFEST, _FORMAT = "teacher-logits.json", 1


class Source(Protocol):
    """What gives a teacher's logits for a batch."""

    classes: int | None
    passes: int

    def logits(self, inputs: Mapping[str, Any], like: Tensor) -> Tensor:
        """[B, C] for a batch, without graph, on the device of `like`, at least fp32."""


class Teacher:
    """A model that is asked and never trained.

    Args:
        model (nn.Module): called with the batch's tensors by name, or with its only tensor; returns logits [B, C].

    Attributes:
        classes (int | None): how many, where its configuration says so.
        passes (int): forward passes so far.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.classes: int | None = getattr(getattr(unwrap(model), "config", None), "num_labels", None)
        self.passes = 0

    def logits(self, inputs: Mapping[str, Any], like: Tensor) -> Tensor:
        """As `Source.logits`.

        Raises:
            ParameterError: if the teacher takes nothing of the batch, or its logits are not finite.
        """
        given = _placed(inputs, self.model)
        device = next((v.device.type for v in given.values() if isinstance(v, Tensor)), "cpu")
        off = torch.autocast(device, enabled=False)
        with torch.no_grad(), evaluating(self.model), off:
            found = logits_of(_called(self.model, given))
        self.passes += 1
        found = found.detach()
        require(found.dim() == 2, "teacher", "a model that gives logits [B, C]", list(found.shape))
        _check_finite(found)
        return _raised(found).to(like.device)


class LogitCache:
    """Logits that a teacher gave once, by the content of the row.

    Args:
        folder (str | Path): what `cache_logits` filled.

    Raises:
        ParameterError: if it holds none, or not all parts yet.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._about = _read_manifest(self.folder)
        self.classes: int | None = self._about["classes"]
        self.passes = 0
        self._files: dict[int, Any] = {}
        digests = []
        for number, rows in enumerate(_parts(self._about["rows"], self._about["part_size"])):
            path = _part_path(self.folder, number)
            require(
                path.is_file(),
                "cache",
                f"complete (run cache_logits again), missing {path.name}",
                self.folder,
            )
            digests.append(self._file(number).get_tensor("digests"))
            require(
                len(digests[-1]) == len(rows), "cache", f"{len(rows)} rows in {path.name}", len(digests[-1])
            )
        self.digests = torch.cat(digests)
        self._where = {digest: row for row, digest in reversed(list(enumerate(self.digests.tolist())))}

    def __len__(self) -> int:
        return len(self.digests)

    def logits(self, inputs: Mapping[str, Any], like: Tensor) -> Tensor:
        """As `Source.logits`, in any order of the rows.

        Raises:
            ParameterError: if a row of the batch is not one of the cached data.
        """
        found = [self._where.get(digest) for digest in row_digests(inputs).tolist()]
        rows = [row for row in found if row is not None]
        if len(rows) < len(found):
            place = found.index(None)
            raise ParameterError(
                "batch must hold rows of the data that the cache was made of (no augmentation, no other data), got "
                f"row {place} that {self.folder} has not"
            )
        return self._read(rows).to(like.device)

    def rows(self, indices: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Logits [B, C] of these indices of the data, after checking that the inputs are still in that order.

        Raises:
            ParameterError: if row i of the batch is not row `indices[i]` of the cached data.
        """
        wrong = (self.digests[indices.cpu()] != row_digests(inputs)).nonzero()
        if len(wrong):
            place = int(wrong[0])
            raise ParameterError(
                f"data must be in the order of the cache {self.folder}, got another row at {int(indices[place])}"
            )
        return self._read(indices.tolist())

    def _read(self, rows: list[int]) -> Tensor:
        size = self._about["part_size"]
        slices = [self._file(row // size).get_slice("logits")[row % size : row % size + 1] for row in rows]
        if not slices:
            return torch.empty(0, self.classes or 0)
        return _raised(torch.cat(slices))

    def _file(self, number: int) -> Any:
        from safetensors import safe_open

        if number not in self._files:
            self._files[number] = safe_open(str(_part_path(self.folder, number)), "pt")
        return self._files[number]


def cache_logits(
    teacher: nn.Module,
    dataset: Any,
    folder: str | Path,
    *,
    collate: Callable[[list[Any]], Mapping[str, Any]],
    batch_size: int = 32,
    part_size: int = 4096,
) -> LogitCache:
    """Run a teacher over a data set once; a killed run goes on with the first part that is missing.

    Under torchrun rank r does the parts r, r + world, ... . Logits are kept in the teacher's own dtype. Of parts that
    exist already the first and the last row are compared with the data, so that other data or another order is
    found before anything is added; `LogitCache` compares every row when it is read.

    Args:
        teacher (nn.Module): as for `Teacher`.
        dataset (Any): rows by index, with a length, always the same (no random augmentation).
        folder (str | Path): one for each teacher and data set.
        collate (Callable): makes a batch of a list of rows; usually the Trainer's `data_collator`.
        batch_size (int): rows in a forward pass, >= 1.
        part_size (int): rows in a file, >= 1: what a kill can cost.

    Returns:
        LogitCache: complete; with a process group after all ranks are done.

    Raises:
        ParameterError: if the folder belongs to another teacher or other data, or logits are not finite.
    """
    from safetensors.torch import save

    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    require(sized and len(dataset) > 0, "dataset", "rows with a length and indices", type(dataset).__name__)
    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    require(part_size >= 1, "part_size", ">= 1", part_size)
    folder, source, on_cpu = Path(folder), Teacher(teacher), torch.empty(0)
    first = collate([dataset[0]])
    classes = source.logits(first, on_cpu).shape[1]
    about = {
        "format": _FORMAT, "rows": len(dataset), "part_size": part_size, "classes": classes,
        "teacher": weights_digest(teacher), "inputs": sorted(shown(first)),
    }  # fmt: skip
    _claim(folder, about)
    for number, rows in enumerate(_parts(len(dataset), part_size)):
        path = _part_path(folder, number)
        if path.is_file():
            _check_part(path, rows, dataset, collate)
            continue
        if number % distributed.size() != distributed.rank():
            continue
        logits, digests = [], []
        for start in range(rows.start, rows.stop, batch_size):
            batch = collate([dataset[row] for row in range(start, min(start + batch_size, rows.stop))])
            given = source.logits(batch, on_cpu)
            logits.append(given.to(_dtype_of(teacher)))
            digests.append(row_digests(batch))
        tensors = {"logits": torch.cat(logits).contiguous(), "digests": torch.cat(digests)}
        write_bytes_atomic(path, save(tensors))
    distributed.all_reduce_sum(torch.zeros(1))  # a barrier: all parts are there
    return LogitCache(folder)


def open_teacher(teacher: Any, student: nn.Module, name: str = "the method") -> Source:
    """A teacher from what a user gives: a model, a checkpoint's folder, or a folder of cached logits.

    Args:
        teacher (nn.Module | str | Path): a model stays where it is, in its dtype; a checkpoint is loaded in its own
            dtype to the student's device.
        student (nn.Module): to compare with.
        name (str): of the method, for messages.

    Returns:
        Source: gives logits for batches.

    Raises:
        ParameterError: if it is none of these, is the student itself, or has another number of classes.
    """
    wanted = "a model, a checkpoint's folder, or a folder of cached logits"
    known = isinstance(teacher, nn.Module | str | Path)
    require(known, "teacher", f"{wanted} for {name}", None if teacher is None else type(teacher).__name__)
    source: Source
    if isinstance(teacher, nn.Module):
        if unwrap(teacher) is unwrap(student):
            raise ParameterError("teacher must be another model than the student, got the student itself")
        source = Teacher(teacher)
    elif (Path(teacher) / _MANIFEST).is_file():
        source = LogitCache(teacher)
    elif (Path(teacher) / "config.json").is_file():
        source = Teacher(_load(Path(teacher)).to(next(student.parameters()).device))
    else:
        raise ParameterError(f"teacher must be {wanted}, got {str(teacher)!r}")
    classes = getattr(getattr(unwrap(student), "config", None), "num_labels", None)
    if source.classes is not None and classes is not None:
        _check_classes(source.classes, classes)
    return source


def check_pair(student: Tensor, teacher: Tensor) -> Tensor:
    """The teacher's logits for the student's: repeated where the student's head gave the batch several times.

    Args:
        student (Tensor): [M * B, C].
        teacher (Tensor): [B, C].

    Returns:
        Tensor: [M * B, C], the teacher's.

    Raises:
        ParameterError: if the shapes do not fit.
    """
    require(
        student.dim() == 2, "student", "a classifier of whole samples with logits [B, C]", list(student.shape)
    )
    _check_classes(teacher.shape[-1], student.shape[-1])
    whole = len(teacher) > 0 and len(student) % len(teacher) == 0
    require(whole, "teacher", f"a model that gives logits of {len(student)} rows", len(teacher))
    copies = len(student) // len(teacher)
    return teacher.repeat(copies, 1) if copies > 1 else teacher


def training_rows(trainer: Any) -> tuple[Any, Callable[[list[Any]], Mapping[str, Any]]]:
    """The data set of a running Trainer and its collate function, as its own loader uses them.

    Raises:
        ConflictError: for a stream, whose rows have no order.
    """
    loader = trainer.callback_handler.train_dataloader
    if not hasattr(trainer.train_dataset, "__len__"):
        raise ConflictError("train_dataset must have a length to cache a teacher's logits, got a stream")
    return loader.dataset, loader.collate_fn


def _dtype_of(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _placed(inputs: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    first = next(model.parameters(), None)
    dtype = _dtype_of(model)
    given: dict[str, Any] = {k: v for k, v in inputs.items() if k not in ANSWERS}
    for name, value in given.items():
        if isinstance(value, Tensor):
            value = value if first is None else value.to(first.device)
            given[name] = value.to(dtype) if value.is_floating_point() else value
    return given


def _called(model: nn.Module, given: dict[str, Any]) -> Any:
    taken = inspect.signature(unwrap(model).forward).parameters
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values()):
        return model(**given)
    named = {name: value for name, value in given.items() if name in taken}
    tensors = [value for value in given.values() if isinstance(value, Tensor)]
    if named:
        return model(**named)
    if len(tensors) == 1:
        return model(tensors[0])  # names its only input otherwise
    raise ParameterError(
        f"teacher must take what the batch holds ({sorted(given)}), got one that takes {list(taken)}"
    )


def _raised(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_finite(logits: Tensor) -> None:
    bad = ~torch.isfinite(logits)
    if bool(bad.any()):
        require(False, "teacher", "a model whose logits are finite", float(logits[bad][0]))


def _check_classes(teacher: int, student: int) -> None:
    require(teacher == student, "teacher", f"a model of {student} classes like the student", teacher)


def _load(folder: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    from salience.hosts.checkpoints import check_checkpoint

    check_checkpoint(folder)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    for auto in (AutoModelForImageClassification, AutoModelForSequenceClassification):
        if type(config) in auto._model_mapping:
            model: nn.Module = auto.from_pretrained(str(folder), local_files_only=True, dtype="auto")
            return model.eval()
    raise ParameterError(f"teacher must be a checkpoint of a classifier, got one of {type(config).__name__}")


def _parts(rows: int, size: int) -> list[range]:
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _part_path(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    require(path.is_file(), "cache", f"a folder with {_MANIFEST}", str(folder))
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    require(about.get("format") == _FORMAT, "cache", f"of format {_FORMAT}", about.get("format"))
    return about


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Write the manifest, or compare with the one that is there."""
    if (folder / _MANIFEST).is_file():
        stored = _read_manifest(folder)
        for key, value in about.items():
            require(stored[key] == value, f"cache {folder}", f"of this {key} ({value})", stored[key])
    elif distributed.rank() == 0:
        write_json_atomic(folder / _MANIFEST, about)
    distributed.all_reduce_sum(torch.zeros(1))  # a barrier: nobody writes before the check


def _check_part(
    path: Path, rows: range, dataset: Any, collate: Callable[[list[Any]], Mapping[str, Any]]
) -> None:
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        stored = file.get_tensor("digests")
    for place, row in ((0, rows.start), (-1, rows.stop - 1)):
        same = len(stored) == len(rows) and bool(row_digests(collate([dataset[row]]))[0] == stored[place])
        if not same:
            raise ParameterError(
                f"dataset must be in the order of the cache {path.parent}, got another row at {row}"
            )
