"""Selects documents of a dataset: the engine behind every method that scores them.

`pick(dataset, method, reading)` scores shard by shard, each into a file that appears whole or not at all, then finds
the exact threshold of the best share (`core/top_share.py`) and hands back the documents above it. Memory holds a
shard at a time; scores and decisions lie on the disk and are mapped. A folder that holds scores of the same
documents, model and settings is gone on with; one of others is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from salience.core.documents import Reading, ScoringMethod
from salience.core.errors import ConflictError, ParameterError
from salience.core.files import check_writable, file_atomic, write_json_atomic
from salience.core.loop import evaluating
from salience.core.progress import bar
from salience.core.top_share import keep_top
from salience.hosts.corpus import Corpus, Shard, open_corpus
from salience.hosts.language import fingerprint, longest, scoring_model, vocabulary
from salience.hosts.picked import SCORES, Picked
from salience.hosts.scoring import ShardScorer, read_part, score_shards

_PLAN, SHARDS = "plan.json", "shards.json"
_KEPT, _DOMAINS = "kept.u8", "domains.u16"
_MOST_DOMAINS = 4096
# told how many documents of how many are scored; 0 in all where that is not known
Progress = Callable[[int, int], None]
# scores shards into a folder and tells of each when its file is there
Engine = Callable[[ShardScorer, Sequence[Shard], Path, Callable[[Shard], None]], None]


def pick(
    dataset: Any,
    method: ScoringMethod,
    data: Any = None,
) -> tuple[Picked, Any]:
    """Score the documents of a dataset and keep the best share of them.

    Args:
        dataset (Dataset | IterableDataset): any columns; see `Reading.columns`.
        method (ScoringMethod): scores batches of documents.
        data (Reading | None): how they are read.

    Returns:
        tuple: the part of a focus, and the dataset of what was kept, of the kind that was given, in its order.

    Raises:
        ParameterError: for bad input, before anything is scored; for a document without text.
        ConflictError: for a folder of other documents, another model or other settings.
    """
    reading = reading_of(data)
    corpus = open_corpus(dataset, reading)
    told = 0
    with bar(
        "documents scored", len(dataset) if isinstance(dataset, Sized) else None, reading.progress
    ) as advance:

        def tell(done: int, _: int) -> None:
            nonlocal told
            advance(done - told)
            told = done

        picked = select(corpus, method, reading, progress=tell)
    return picked, corpus.take(picked.kept)


def reading_of(data: Any) -> Reading:
    """What `focus(dataset, method, data=...)` was given, or the defaults.

    Raises:
        ParameterError: if it is no `Reading`.
    """
    if data is None:
        return Reading()
    if not isinstance(data, Reading):
        raise ParameterError(
            f"data must be a salience.core.documents.Reading for a dataset, got {type(data).__name__}"
        )
    return data


def make_scorer(
    corpus: Corpus, method: ScoringMethod, reading: Reading
) -> tuple[ShardScorer, dict[str, Any]]:
    """What scores a corpus's shards, and everything that decides their scores, as JSON."""
    about: dict[str, Any] = {
        "method": repr(replace(method, keep=1)),  # type: ignore[type-var]
        "documents": corpus.fingerprint(),
        "reading": {
            name: value
            for name, value in asdict(reading).items()
            if name not in ("folder", "device", "skip_bad", "progress")
        },
    }
    if "model" not in getattr(method, "needs", ()):
        return ShardScorer(corpus, reading, method.scorer(None, None)), about
    reader: Any = method
    model, tokenizer = scoring_model(
        reader.model, reader.tokenizer, device=reading.device, dtype=reading.dtype
    )
    length = longest(model, reading.max_length)
    about |= {"model": fingerprint(model), "tokenizer": vocabulary(tokenizer), "max_length": length}
    with evaluating(model):
        function = method.scorer(model, tokenizer)

    def evaluated(batch: Any) -> Any:
        with evaluating(model):
            return function(batch)

    device = next(model.parameters()).device
    return ShardScorer(corpus, reading, evaluated, tokenizer, device, length), about


def select(
    corpus: Corpus,
    method: ScoringMethod,
    reading: Reading,
    *,
    engine: Engine | None = None,
    progress: Progress = lambda *_: None,
) -> Picked:
    """Score a corpus and decide.

    Args:
        corpus (Corpus): whose documents.
        method (ScoringMethod): scores them.
        reading (Reading): how they are read, and where scores are kept.
        engine (Engine | None): who scores the shards that have no file yet; None is this process.
        progress (Callable): told after every shard.

    Raises:
        SalienceError: as for `pick`.
    """
    if reading.folder is not None:
        check_writable(reading.folder, name="folder")
    if reading.folder is None or not (Path(reading.folder) / _PLAN).exists():
        corpus.check()
    scorer, about = make_scorer(corpus, method, reading)
    temporary = tempfile.TemporaryDirectory(prefix="salience-") if reading.folder is None else None
    folder = Path(temporary.name if temporary is not None else str(reading.folder))
    same_work(folder, about)
    corpus.keep_plan(folder / SHARDS)
    shards: list[Shard] = []
    counted = 0

    def counting() -> Iterator[Shard]:
        for shard in corpus.shards():
            shards.append(shard)
            yield shard

    def done(shard: Shard) -> None:
        nonlocal counted
        counted += shard.count
        progress(counted, total)

    total = 0
    if engine is None:
        score_shards(scorer, counting(), folder, done=done)
    else:
        total = sum(shard.count for shard in counting())
        engine(scorer, shards, folder, done)
    return decide(scorer, method, shards, folder, keep_alive=temporary)


def help_scoring(corpus: Corpus, method: ScoringMethod, reading: Reading, engine: Engine) -> None:
    """Score a part of the shards that another process has planned and will decide on.

    Raises:
        ConflictError: if that process does other work.
    """
    folder = Path(str(reading.folder))
    scorer, about = make_scorer(corpus, method, reading)
    same_work(folder, about)
    corpus.keep_plan(folder / SHARDS)
    engine(scorer, list(corpus.shards()), folder, lambda _: None)


def same_work(folder: Path, about: dict[str, Any]) -> None:
    """Refuse a folder with scores of something else; write down what this one's are of.

    Raises:
        ConflictError: naming what differs.
    """
    path = folder / _PLAN
    # as it will be read again
    about = json.loads(json.dumps(about, default=str))
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ParameterError(f"folder must hold a readable {_PLAN}, got {path}") from error
        differs = sorted(key for key in {*about, *before} if about.get(key) != before.get(key))
        if differs:
            raise ConflictError(
                f"folder must be new or hold scores of the same work, got {folder}, whose {' and '.join(differs)} "
                "differ: take another folder"
            )
        return
    if (folder / "parts").exists():
        raise ConflictError(
            f"folder must be new or hold scores of the same work, got {folder} with parts and without {_PLAN}"
        )
    write_json_atomic(path, about)


def decide(
    scorer: ShardScorer,
    method: ScoringMethod,
    shards: Sequence[Shard],
    folder: Path,
    *,
    keep_alive: Any = None,
) -> Picked:
    """Keep the best share of scores that are all there."""
    values, domains, about = gather(folder, shards, by_domain=scorer.reading.domain_column is not None)
    kept = np.memmap(folder / _KEPT, np.uint8, "w+", shape=(len(values),))
    keep_top(values, method.keep, domains=domains, out=kept)
    kept.flush()
    skipped = getattr(scorer.corpus, "bad_count", 0)
    if skipped:
        about["skipped"] = skipped
    return Picked(method.slug(), scorer, shards, folder, values, kept, about, keep_alive)


def gather(
    folder: Path, shards: Sequence[Shard], *, by_domain: bool = False
) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    """The scores of all shards as one mapped file, the number of each document's domain, and counts."""
    total = sum(shard.count for shard in shards)
    names: dict[str, int] = {}
    counts = {"tokens": 0, "unscored": 0}
    domains = np.memmap(folder / _DOMAINS, np.uint16, "w+", shape=(total,)) if by_domain else None
    with file_atomic(folder / SCORES) as temporary:
        values = np.memmap(temporary, np.float32, "w+", shape=(total,))
        for shard in shards:
            table = read_part(folder, shard)
            score = table["score"].to_numpy()
            place = slice(shard.first, shard.first + shard.count)
            values[place] = score
            counts["tokens"] += int(table["tokens"].to_numpy().sum())
            for field in table.schema:
                if str(field.type) == "bool":
                    counts[field.name] = counts.get(field.name, 0) + int(table[field.name].to_numpy().sum())
            counts["unscored"] += int(np.isnan(score).sum())
            if domains is not None:
                codes = [names.setdefault(name, len(names)) for name in table["domain"].to_pylist()]
                if len(names) > _MOST_DOMAINS:
                    raise ParameterError(
                        f"domain_column must be of at most {_MOST_DOMAINS} domains, got more"
                    )
                domains[place] = codes
        values.flush()
        del values
    mapped = np.memmap(folder / SCORES, np.float32, "r", shape=(total,))
    return mapped, domains, {name: count for name, count in counts.items() if count}
