"""Writing that survives a kill or a full disk: a temporary name, to the disk, then the final name.

Whoever looks at a path written here sees what was there before or all of what is there now. When a write fails, the
earlier files are as they were.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from salience.core.errors import ParameterError, SalienceError

_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


class FileError(SalienceError, OSError):
    """A file or folder could not be written; what was there before is intact."""


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write a file as UTF-8, whole or not at all. Missing parent folders are made.

    Raises:
        FileError: if the disk is full or the place cannot be written; an earlier file is intact.
    """
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all. Missing parent folders are made.

    Raises:
        FileError: as for `write_text_atomic`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _explained(path):
        try:
            _refuse_file(path.parent)
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync(path.parent)
        finally:
            # gone already after a success; a parent that is not a folder fails here as it did above
            with suppress(OSError):
                temporary.unlink()


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write an object as indented JSON, whole or not at all.

    Raises:
        TypeError: if `obj` holds what JSON cannot; nothing is written.
        FileError: as for `write_text_atomic`.
    """
    write_text_atomic(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def file_atomic(path: str | Path) -> Iterator[Path]:
    """Fill a file that appears under its name only when the block ends well. Missing parent folders are made.

    Args:
        path (str | Path): the final place.

    Yields:
        Path: a file beside it that is not there yet, to write.

    Raises:
        FileError: as for `write_text_atomic`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with _explained(path):
        _refuse_file(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _explained(path, *_SPACE):
            yield temporary
        with _explained(path):
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def folder_atomic(path: str | Path) -> Iterator[Path]:
    """Fill a folder that appears under its name only when the block ends well, in place of an earlier one.

    One process at a time may write a path. What a killed process left beside it is cleared by the next: a kill
    between the two renames at the end leaves the earlier folder as `.NAME.old`, and it is put back first.

    Args:
        path (str | Path): the final place.

    Yields:
        Path: an empty folder `.NAME.part` beside it, to fill.

    Raises:
        FileError: if the disk is full or the place cannot be written; the earlier folder is intact.

    Example:
        >>> with folder_atomic("run/model") as folder:  # doctest: +SKIP
        ...     model.save_pretrained(folder)
    """
    path = Path(path)
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    with _explained(path):
        _clear(path, part, old)
        part.mkdir(parents=True)
    try:
        # the block may also read files or ask servers: only a disk that takes no more is about this path
        with _explained(path, *_SPACE):
            yield part
        with _explained(path):
            _sync_tree(part)
            _exchange(part, path, old)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_writable(path: str | Path, *, name: str = "out", free_bytes: int = 50 << 20) -> None:
    """Refuse a folder that cannot be written, before any work. Nothing is left behind; the folder need not exist.

    Args:
        path (str | Path): the folder that will be written.
        name (str): the parameter as the user writes it.
        free_bytes (int): what its disk must have free.

    Raises:
        ParameterError: if it is not a folder, cannot be written, or its disk has too little free.
    """
    path = Path(path)
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise ParameterError(f"{name} must be a writable folder, got {path} ({place} is a file)")
    probe = place / f".salience.{secrets.token_hex(4)}.part"
    try:
        probe.mkdir()
        probe.rmdir()
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise ParameterError(f"{name} must be a writable folder, got {path} ({error.strerror})") from error
    if free < free_bytes:
        raise ParameterError(
            f"{name} must be a writable folder with {_size(free_bytes)} free, got {path} with {_size(free)}"
        )


@contextmanager
def _explained(path: Path, *codes: int) -> Iterator[None]:
    """Turn what the system says of a failed write (if `codes` are given: of these kinds) into one sentence."""
    try:
        yield
    except SalienceError:
        raise
    except OSError as error:
        if codes and error.errno not in codes:
            raise
        raise _failure(path, error.strerror or str(error), full=error.errno in _SPACE) from error
    except SafetensorError as error:
        # reports a full disk with the system's words inside its own
        code = next((code for code in _SPACE if f"(os error {code})" in str(error)), None)
        if code is None:
            raise
        raise _failure(path, os.strerror(code), full=True) from error


def _failure(path: Path, reason: str, *, full: bool) -> FileError:
    advice = "free some space and run again" if full else "choose another place"
    return FileError(f"cannot write {path} ({reason}); what was there before is intact: {advice}")


def _clear(path: Path, part: Path, old: Path) -> None:
    _refuse_file(path)
    if old.exists() and not path.exists():
        old.rename(path)
    for left in (part, old):
        if left.exists():
            shutil.rmtree(left)


def _refuse_file(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))


def _exchange(part: Path, path: Path, old: Path) -> None:
    if path.exists():
        path.rename(old)
    try:
        part.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)


def _sync_tree(folder: Path) -> None:
    paths = sorted(folder.rglob("*"))
    for path in [*(p for p in paths if p.is_file()), *(p for p in paths if p.is_dir()), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Ask the system to put a file, or the names in a folder, on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _size(count: float) -> str:
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.1f} {_UNITS[power]}" if power else f"{count:.0f} {_UNITS[power]}"
