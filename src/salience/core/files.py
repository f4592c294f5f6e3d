"""Writes that are whole or not there: temporary name, fsync, rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from salience.core.errors import SalienceError


class FileError(SalienceError, OSError):
    """A file or folder cannot be written or read; what was there before is intact."""


def write_text_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Raises:
        FileError: if it cannot be written (no permission, disk full); an earlier file stays as it was.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with staging.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        sync(path.parent)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise FileError(f"{path} must be writable, got {error.strerror or error}") from error


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_text_atomic` of a value as JSON."""
    write_text_atomic(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def folder_atomic(path: Path) -> Iterator[Path]:
    """A folder that appears whole: fill the one that is given, it takes the name `path` at the end of the block.

    An earlier folder of that name is replaced; after an exception it is still there and the new one is gone.

    Raises:
        FileError: if it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    except OSError as error:
        raise FileError(f"{path} must be writable, got {error.strerror or error}") from error
    try:
        yield staging
        for inner in sorted(staging.rglob("*")):
            if inner.is_file():
                sync(inner)
        sync(staging)
        staging.chmod(0o755)  # mkdtemp makes it private
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            staging.rename(path)
            shutil.rmtree(old)
        else:
            staging.rename(path)
        sync(path.parent)
    except OSError as error:
        raise FileError(f"{path} must be writable, got {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_writable(folder: Path, *, free_bytes: int = 50 << 20) -> None:
    """Refuse a folder that cannot be made or written to, or that has too little room, before any work.

    Raises:
        FileError: `out must be a writable folder, got ...`
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise FileError(f"out must be a writable folder, got {folder} ({existing} is a file)")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise FileError(f"out must be a writable folder, got {folder} (no permission in {existing})")
    free = shutil.disk_usage(existing).free
    if free < free_bytes:
        raise FileError(
            f"out must have {free_bytes >> 20} MiB of free disk, got {free >> 20} MiB in {existing}"
        )


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
