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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from salience.core.documents import Reading, ScoringMethod
from salience.core.errors import ConflictError, ParameterError
from salience.core.files import check_writable, file_atomic, write_json_atomic
from salience.core.loop import evaluating
from salience.core.part import Part
from salience.core.progress import bar
from salience.core.top_share import keep_top, threshold
from salience.hosts.corpus import Corpus, Shard, open_corpus, write_tables
from salience.hosts.language import fingerprint, longest, scoring_model, vocabulary
from salience.hosts.scoring import ShardScorer, part_path, score_shards

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLAN, _SHARDS = "plan.json", "shards.json"
_SCORES, _KEPT, _DOMAINS = "scores.f32", "kept.u8", "domains.u16"
_MOST_DOMAINS = 4096
_ENDS = 5  # examples of each end
# sources that are counted by name; a column of addresses may have as many as there are documents
_MOST_SOURCES, OTHERS = 10_000, "(others)"
# told how many documents of how many are scored; 0 in all where that is not known
Progress = Callable[[int, int], None]
# scores shards into a folder and tells of each when its file is there
Engine = Callable[[ShardScorer, Sequence[Shard], Path, Callable[[Shard], None]], None]


class Picked(Part):
    """What was picked of a dataset: scores, decisions, and the way to files and a picture.

    Attributes:
        slug (str): of the method.
        corpus (Corpus): whose documents.
        shards (tuple[Shard, ...]): of it.
        folder (Path): where the parts lie.
        values (np.ndarray): [N] float32, mapped.
        kept (np.ndarray): [N] uint8, mapped, 1 where kept.
        sources (dict[str, list[int]]): where documents come from -> how many there are, how many are kept.
        about (dict[str, Any]): what the engine counted, for `spent`.
        examples (list[dict]): the documents with the highest and the lowest scores.
    """

    def __init__(
        self,
        slug: str,
        scorer: ShardScorer,
        shards: Sequence[Shard],
        folder: Path,
        values: np.ndarray,
        kept: np.ndarray,
        about: dict[str, Any],
        keep_alive: Any = None,
    ) -> None:
        super().__init__()
        self.slug, self.corpus, self.shards, self.folder = slug, scorer.corpus, tuple(shards), folder
        self.values, self.kept, self.about = values, kept, about
        self.sources = _by_source(self.folder, self.shards, kept)
        self.examples = _ends(scorer, self.folder, self.shards, values, kept)
        self._keep_alive = keep_alive

    def scores(self) -> dict[str, Tensor]:
        # mapped from the file, not read: a corpus has more scores than there is memory to waste
        return {"score": torch.from_file(str(self.folder / _SCORES), size=len(self.values))}

    def spent(self) -> dict[str, Any]:
        kept = int(np.count_nonzero(self.kept))
        return {
            "documents": len(self.values),
            "kept": kept,
            "share": round(kept / len(self.values), 6),
            "threshold": threshold(self.values, self.kept),
            **self.about,
        }

    def save(self, folder: Path, *, last: bool = True) -> list[str]:
        """Write `scores.parquet` (id, score, decision and what else was measured), and the documents kept.

        Args:
            folder (Path): is there.
            last (bool): of several methods that picked one after another; earlier ones write
                `scores-<slug>.parquet` alone.

        Returns:
            list[str]: names of the files that hold documents.
        """
        _write_decisions(
            folder / ("scores.parquet" if last else f"scores-{self.slug}.parquet"),
            self.folder,
            self.shards,
            self.kept,
        )
        if not last:
            return []
        data = folder / "data"
        data.mkdir(exist_ok=True)
        return [f"data/{name}" for name in self.corpus.write(self.shards, self.kept, data)]

    def draw(self) -> Figure:
        from salience.core.pictures_picked import draw_picked

        return draw_picked(self.values, self.kept, self.sources, self.examples)


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
    corpus.keep_plan(folder / _SHARDS)
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
    corpus.keep_plan(folder / _SHARDS)
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
    with file_atomic(folder / _SCORES) as temporary:
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
    mapped = np.memmap(folder / _SCORES, np.float32, "r", shape=(total,))
    return mapped, domains, {name: count for name, count in counts.items() if count}


def read_part(folder: Path, shard: Shard, columns: Sequence[str] | None = None) -> Any:
    """A shard's scores as an Arrow table.

    Raises:
        ParameterError: for a file that is not there, is broken, or has another number of documents.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = part_path(folder, shard.number)
    try:
        table = pq.read_table(path, columns=None if columns is None else list(columns))
    except (OSError, pa.ArrowException) as error:
        raise ParameterError(f"folder must hold whole parts of scores, got {path} ({error})") from error
    if len(table) != shard.count:
        raise ParameterError(
            f"folder must hold scores of {shard.count} documents in {path}, got {len(table)}: remove it"
        )
    return table


def _write_decisions(path: Path, folder: Path, shards: Sequence[Shard], kept: np.ndarray) -> None:
    import pyarrow as pa

    def decided() -> Iterator[Any]:
        for shard in shards:
            marks = np.asarray(kept[shard.first : shard.first + shard.count]).astype(bool)
            decision = pa.array(np.where(marks, "keep", "drop"))
            yield read_part(folder, shard).add_column(3, "decision", decision)

    write_tables(path, decided())


def _by_source(folder: Path, shards: Sequence[Shard], kept: np.ndarray) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for shard in shards:
        marks = np.asarray(kept[shard.first : shard.first + shard.count]).astype(bool)
        column = read_part(folder, shard, ["source"])["source"].combine_chunks().dictionary_encode()
        codes = column.indices.to_numpy()
        every, ours = np.bincount(codes), np.bincount(codes[marks], minlength=int(codes.max(initial=0)) + 1)
        for name, total, chosen in zip(column.dictionary.to_pylist(), every, ours):
            known = name in found or len(found) < _MOST_SOURCES
            counts = found.setdefault(name if known else OTHERS, [0, 0])
            counts[0] += int(total)
            counts[1] += int(chosen)
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def _ends(
    scorer: ShardScorer, folder: Path, shards: Sequence[Shard], values: np.ndarray, kept: np.ndarray
) -> list[dict[str, Any]]:
    """The documents with the highest scores, then those with the lowest, each once."""
    candidates: list[tuple[float, int]] = []
    for shard in shards:
        part = np.asarray(values[shard.first : shard.first + shard.count])
        known = np.flatnonzero(~np.isnan(part))
        order = known[np.argsort(-part[known], kind="stable")]
        chosen = np.unique(np.concatenate((order[:_ENDS], order[-_ENDS:])))
        candidates += [(float(part[at]), shard.first + int(at)) for at in chosen]
        candidates.sort(key=lambda one: (-one[0], one[1]))
        if len(candidates) > 2 * _ENDS:
            candidates = candidates[:_ENDS] + candidates[-_ENDS:]
    by_number = {number: score for score, number in candidates}
    texts: dict[int, dict[str, Any]] = {}
    for shard in shards:
        wanted = {number for number in by_number if shard.first <= number < shard.first + shard.count}
        if not wanted:
            continue
        ids = read_part(folder, shard, ["id", "source"])
        for place, row in enumerate(scorer.corpus.read(shard)):
            number = shard.first + place
            if number in wanted:
                texts[number] = {
                    "id": ids["id"][place].as_py(),
                    "source": ids["source"][place].as_py(),
                    "score": by_number[number],
                    "kept": bool(kept[number]),
                    "text": scorer.text(row)[:600],
                }
    return [texts[number] for _, number in candidates]
