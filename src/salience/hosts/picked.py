"""What was picked of a dataset: scores, decisions, and the way from there to files and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from salience.core.part import Part
from salience.core.top_share import threshold
from salience.hosts.corpus import Shard, write_tables
from salience.hosts.scoring import ShardScorer, read_part

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCORES = "scores.f32"  # of all documents, in a run's folder
_ENDS = 5  # examples of each end
# sources that are counted by name; a column of addresses may have as many as there are documents
_MOST_SOURCES, OTHERS = 10_000, "(others)"


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
        return {"score": torch.from_file(str(self.folder / SCORES), size=len(self.values))}

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
