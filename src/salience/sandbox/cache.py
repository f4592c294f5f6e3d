"""Folders that are made once, in place, and found again: the sandbox's models are trained, never downloaded.

A folder's name holds a hash of everything that its content depends on. It is made under a temporary name beside
its place, forced to disk and renamed, so that what carries the final name is whole; a manifest of names and sizes,
checked at every use, notices files that went missing later. Unlike `core.files.folder_atomic` several processes may
make the same folder at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salience.core.errors import SalienceError, require
from salience.core.places import cache_folder

__all__ = ["cache_folder", "cached"]

_MANIFEST = "made.json"
_ABANDONED_SECONDS = 24 * 3600
_SPACE = (errno.ENOSPC, errno.EDQUOT)


def cached(name: str, key: dict[str, Any], make: Callable[[Path], None]) -> Path:
    """The folder `{name}-{hash of key}`; `make` fills it if it is not there yet.

    Processes that race each make one; the first to finish wins and the others use its folder.

    Args:
        name (str): what it is; letters, digits, "-" and "_".
        key (dict[str, Any]): everything that the content depends on, as JSON values: a version number of the recipe,
            its settings. The versions of Python (whose sources are the corpus), torch and transformers are added.
        make (Callable[[Path], None]): called with an empty folder to fill with files.

    Returns:
        Path: a whole folder, to be read only.

    Raises:
        SalienceError: if the cache cannot be written; the text says how to choose another place.
    """
    require(name.replace("-", "").replace("_", "").isalnum(), "name", "letters, digits, - and _", name)
    root = cache_folder()
    final = root / f"{name}-{_digest(key)}"
    if _whole(final):
        return final
    temporary = _temporary(root, final.name)
    try:
        make(temporary)
        _seal(temporary)
        return _place(temporary, final)
    except OSError as error:
        if error.errno not in _SPACE:
            raise
        raise _unwritable(root, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _digest(key: dict[str, Any]) -> str:
    import torch
    import transformers

    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__.partition(".")[0],
        "transformers": transformers.__version__.partition(".")[0],
    }
    text = json.dumps({"key": key, "versions": versions}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _temporary(root: Path, name: str) -> Path:
    try:
        root.mkdir(parents=True, exist_ok=True)
        for old in root.glob(f".{name}.*"):
            # a killed process left it; a younger one may belong to a process that still works on it
            if time.time() - old.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=f".{name}.", dir=root))
    except OSError as error:
        raise _unwritable(root, error) from error


def _unwritable(root: Path, error: OSError) -> SalienceError:
    return SalienceError(
        f"cannot write to the cache folder {root} ({error.strerror}); "
        "set SALIENCE_CACHE to a folder that can be written"
    )


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    for path in [*files, manifest, *folders, folder]:
        _sync(path)


def _place(temporary: Path, final: Path) -> Path:
    if final.exists() and not _whole(final):
        # moved away under a name of this process first: removing in place would show others half a folder
        aside = temporary.with_name(temporary.name + "-broken")
        final.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        temporary.rename(final)
    except OSError:
        # renaming onto a folder that is not empty fails: another process was first
        if not _whole(final):
            raise
    else:
        _sync(final.parent)
    return final


def _whole(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
