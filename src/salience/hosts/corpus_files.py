"""Documents in files: JSON lines and text lines, plain, .gz or .zst, and parquet; one file or folders of shards.

Files are looked at once before anything is scored: every row is read and checked, documents are counted, and it is
noted where each shard begins. What cannot be read is an error that names file and line, or, with `skip_bad`, is left
out, counted and listed. That look is kept in the run's folder, so that going on starts at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.documents import Reading
from salience.core.errors import ParameterError
from salience.hosts._corpus_lines import Lines
from salience.hosts._corpus_look import Files, kind_of
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


def open_dataset(
    source: str | Path, reading: Reading, folder: Path, *, split: str = "train"
) -> tuple[Any, Corpus]:
    """The documents of a source as a `Dataset`, for a method that needs all of them at hand.

    Args:
        source (str | Path): as for `open_source`.
        reading (Reading): how it is read; rows that it leaves out are not in the dataset.
        folder (Path): where rows of files are mapped from.
        split (str): of a datasets name or a saved DatasetDict.

    Returns:
        tuple: the dataset, with the columns of the first document of files, and the corpus that it was made of.

    Raises:
        ParameterError: as for `open_source`, and for columns of several types.
    """
    from datasets import Features

    from salience.hosts.sample_pool import mapped

    corpus = open_source(source, reading, split=split)
    if not isinstance(corpus, Files):
        return corpus.take(np.ones(sum(shard.count for shard in corpus.shards()), bool)), corpus
    corpus.check()
    features = Features.from_arrow_schema(corpus.schema()) if isinstance(corpus, Tables) else None

    def rows() -> Iterator[Mapping[str, Any]]:
        for shard in corpus.shards():
            for row in corpus.read(shard):
                yield {name: row.values.get(name) for name in corpus.columns}

    return mapped(rows(), folder, features), corpus


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
