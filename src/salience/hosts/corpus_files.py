"""Documents in files: JSON lines and text lines, plain, .gz or .zst, and parquet; one file or folders of shards.

Files are looked at once before anything is scored: every row is read and checked, documents are counted, and it is
noted where each shard begins. What cannot be read is an error that names file and line, or, with `skip_bad`, is left
out, counted and listed. That look is kept in the run's folder, so that going on starts at once.
"""

from __future__ import annotations

import json
from pathlib import Path

from salience.core.documents import Reading
from salience.core.errors import ParameterError
from salience.hosts._corpus_lines import Lines
from salience.hosts._corpus_look import kind_of
from salience.hosts._corpus_tables import Tables
from salience.hosts.corpus import Corpus, open_corpus

_READ = (".jsonl[.gz|.zst]", ".txt[.gz|.zst]", ".parquet")


def open_source(source: str | Path, reading: Reading, *, split: str = "train") -> Corpus:
    """A corpus from files, folders of files, a folder of `save_to_disk`, a selection, or a datasets name.

    Args:
        source (str | Path): as for `salience tune`, and .gz and .zst of lines, and folders.
        reading (Reading): how it is read.
        split (str): of a datasets name or a saved DatasetDict.

    Raises:
        ParameterError: if there is nothing of that name or kind, or files of several kinds.
    """
    from salience.hosts._data_reading import is_path, load_table

    path = Path(source).expanduser()
    if not path.exists() and not isinstance(source, Path) and not is_path(str(source)):
        return open_corpus(load_table(str(source), split), reading)
    if not path.exists():
        raise ParameterError(f"data must be an existing file, folder or datasets name, got {source}")
    if path.is_dir() and any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return open_corpus(load_table(str(source), split), reading)
    files = data_files(path)
    kinds = sorted({kind_of(file) for file in files})
    if len(kinds) > 1:
        raise ParameterError(f"data must be files of one kind, got {' and '.join(kinds)} in {source}")
    root = path if path.is_dir() else path.parent
    return Tables(root, files, reading) if kinds == ["parquet"] else Lines(root, files, reading)


def data_files(path: Path) -> list[Path]:
    """The files of documents of a path, in order: itself, those of a selection, or all of known endings in a folder.

    Raises:
        ParameterError: if there are none.
    """
    if path.is_file():
        if kind_of(path) == "":
            raise ParameterError(f"data must be a {', '.join(_READ)} file, got {path}")
        return [path]
    chosen_here = selection_files(path)
    if chosen_here is not None:
        return chosen_here
    found = sorted(
        file
        for file in path.rglob("*")
        if file.is_file()
        and kind_of(file)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise ParameterError(f"data must be a folder with {', '.join(_READ)} files, got none in {path}")
    return found


def selection_files(folder: Path) -> list[Path] | None:
    """The files of kept documents of a folder that `Focus.save` or `salience select` wrote; None for another folder.

    Raises:
        ParameterError: if the folder says that it is one but files are missing.
    """
    about = folder / "salience.json"
    if not about.is_file():
        return None
    try:
        names = json.loads(about.read_text(encoding="utf-8")).get("selection")
    except ValueError as error:
        raise ParameterError(f"data must be a whole selection, got {about} ({error})") from error
    if names is None:
        return None
    files = [folder / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ParameterError(f"data must be a whole selection, got {folder} without {', '.join(missing)}")
    return files
