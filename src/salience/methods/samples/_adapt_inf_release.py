"""One release of AdaptInf: what arrives is measured, joins the pool, and what was decided is written down."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from salience.core.documents import Documents
from salience.core.errors import ParameterError
from salience.core.files import write_json_atomic
from salience.core.part import Part
from salience.core.progress import bar
from salience.hosts.corpus import Shard, named, open_corpus, write_tables
from salience.hosts.language import fingerprint, longest, scoring_model
from salience.hosts.pictured import Pictured
from salience.hosts.sample_meter import SampleMeter
from salience.hosts.sample_pool import SamplePool, as_dataset, joined
from salience.hosts.scoring import ShardScorer, read_part, score_shards
from salience.hosts.selecting import reading_of

if TYPE_CHECKING:
    from types import TracebackType

    from matplotlib.figure import Figure

    from salience.methods.samples.adapt_inf import AdaptInf

_KNOWN = ("id", "source", "release")


@dataclass(frozen=True)
class Chosen:
    """Decisions on n samples in k clusters.

    Attributes:
        train (Tensor): [n] bool, chosen to train on.
        pool (Tensor): [n] bool, stays in the pool.
        labels (Tensor): [n] int64, -1 for a sample with nothing to learn.
        redundancy (Tensor): [n], the largest cosine with an earlier sample of its cluster.
        experts (list[int | None]): [k] which of the method's experts was asked.
        bits (list[list[float]]): [k][S] entropy of each expert.
        shares (list[int]): [k] samples that were to be chosen.
    """

    train: Tensor
    pool: Tensor
    labels: Tensor
    redundancy: Tensor
    experts: list[int | None]
    bits: list[list[float]]
    shares: list[int]


class Arrival:
    """The work of a release, in a folder; a context in which the model is at hand.

    Attributes:
        finished (Any): the decisions of this very release where it was finished by an earlier call, else None.
        ids (list[str]): [n] of pool and arrivals, in order of arrival.
        scores (dict[str, Tensor]): [n] each.
        vectors (np.ndarray): [n, d] float16, mapped.
    """

    def __init__(self, method: AdaptInf, dataset: Any, data: Any, folder: Path) -> None:
        self._method, self._reading = method, reading_of(data)
        shared = ("vectors", "layer", "dim", "seed", "experts")
        self._pool = SamplePool(folder, {name: getattr(method, name) for name in shared})
        model, tokenizer = scoring_pair(method.model, method.tokenizer, self._reading)
        self._length = longest(model, self._reading.max_length)
        sees = hasattr(tokenizer, "image_processor")
        self._tokenizer = tokenizer.tokenizer if sees else tokenizer
        self._device = next(model.parameters()).device
        pictured = Pictured(tokenizer, self._reading.columns, self._length) if sees else None
        self._meter = SampleMeter(
            model,
            vectors=method.vectors,
            layer=method.layer,
            dim=method.dim,
            seed=method.seed,
            experts=method.experts,
            pictured=pictured,
        )
        # signs are drawn on the device: vectors of another kind of device cannot be compared
        self._measured_by = [fingerprint(model), self._length, self._device.type]
        self._work = folder / "work"
        self._arrived = as_dataset(dataset, self._work / "stream")
        self._about: dict[str, Any] = {
            "documents": str(open_corpus(self._arrived, self._reading).fingerprint())
        }
        self._about |= {"measured_by": self._measured_by, "method": repr(method)}
        self.finished = self._again()
        self.ids: list[str] = []
        self.scores: dict[str, Tensor] = {}
        self.vectors = np.zeros((0, 0), np.float16)
        self._identity = named(self._arrived.column_names, self._reading)[0]
        if self.finished is None:
            if self._identity is not None:
                self._pool.refuse_known(map(str, self._arrived[self._identity]))
            self._measure()

    def __enter__(self) -> Arrival:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._meter  # and with it the model, where it was loaded here

    def finish(self, chosen: Chosen, *, lasting: bool) -> None:
        """Keep the decisions, and write the pool if it is to last."""
        import pyarrow as pa

        names = list(self._method.experts)
        asked = [
            None if label < 0 or chosen.experts[label] is None else names[chosen.experts[label]]
            for label in chosen.labels.tolist()
        ]
        score = [
            float("nan") if expert is None else float(self.scores[expert][place])
            for place, expert in enumerate(asked)
        ]
        decisions = {
            "id": self.ids,
            "score": pa.array(score, pa.float32()),
            "decision": np.where(chosen.train.numpy(), "keep", "drop"),
            "pool": chosen.pool.numpy(),
            "cluster": chosen.labels.numpy(),
            "expert": pa.array(asked, pa.string()),
            "redundancy": chosen.redundancy.numpy(),
            **{name: self._known[name] for name in _KNOWN[1:]},
            **{name: values.numpy() for name, values in self.scores.items()},
        }
        self._decisions = pa.table({name: pa.array(values) for name, values in decisions.items()})
        self._train = self._rows.select(chosen.train.nonzero().squeeze(1).tolist())
        self._clusters = [
            {
                "samples": int((chosen.labels == number).sum()),
                "chosen": share,
                "expert": None if expert is None else names[expert],
                "bits": [None if bit == -np.inf else round(bit, 4) for bit in bits],
            }
            for number, (share, expert, bits) in enumerate(zip(chosen.shares, chosen.experts, chosen.bits))
        ]
        if not lasting:
            return
        stays = chosen.pool.nonzero().squeeze(1).numpy()
        columns = {name: [self._known[name][place] for place in stays] for name in _KNOWN}
        self._pool.commit(
            rows=self._rows.select(stays),
            train=self._train,
            columns=columns | {name: values[stays].tolist() for name, values in self.scores.items()},
            vectors=np.asarray(self.vectors[stays]),
            pruned=[self.ids[place] for place in (~chosen.pool).nonzero().squeeze(1).tolist()],
            decisions=self._decisions,
            about={**self._about, "arrived": len(self._arrived), "rescored": self._rescored,
                   "pool": len(stays), "clusters": self._clusters},
        )  # fmt: skip

    def release(self, keep_alive: Any = None) -> Release:
        """The part of the focus."""
        if self.finished is not None:
            line = self._pool.releases[-1]
            return Release(
                self.finished,
                self._pool.train(),
                line["clusters"],
                line["rescored"],
                len(self._pool.releases),
            )
        number = len(self._pool.releases) or 1
        return Release(self._decisions, self._train, self._clusters, self._rescored, number, keep_alive)

    def _again(self) -> Any:
        """What was decided, where the pool's newest release is this one: killed behind its end, or run twice."""
        if not self._pool.releases:
            return None
        line = self._pool.releases[-1]
        same = all(line.get(name) == value for name, value in json.loads(json.dumps(self._about)).items())
        return self._pool.decisions() if same else None

    def _measure(self) -> None:
        pool, number = self._pool, len(self._pool.releases) + 1
        plan = {**self._about, "release": number}
        path = self._work / "plan.json"
        if path.exists() and _read(path) != json.loads(json.dumps(plan)):
            # a release that was broken off, of other data or another model
            for name in ("new", "old", "vectors.f16"):
                shutil.rmtree(self._work / name, ignore_errors=True)
        write_json_atomic(path, plan)
        new = self._scored(self._arrived, self._work / "new", "new")
        if self._identity is None:
            # numbers begin again with each release
            new["id"] = [f"{number}:{name}" for name in new["id"]]
        changed = bool(pool.releases) and pool.releases[-1]["measured_by"] != self._measured_by
        old: dict[str, Any] = dict(pool.columns) if pool.releases else {}
        if pool.releases:
            old["vectors"] = pool.vectors
        if changed:
            again = self._scored(pool.rows, self._work / "old", "old")
            old |= {name: again[name] for name in again if name not in _KNOWN}
        self._rescored = len(pool.columns["id"]) if changed else 0
        self._rows = joined(pool.rows, self._arrived)
        new["release"] = [number] * len(new["id"])
        self._known = {name: [*old.get(name, []), *new[name]] for name in _KNOWN}
        self.ids = self._known["id"]
        names = ["loss", *self._method.experts]
        self.scores = {
            name: torch.tensor([*old.get(name, []), *new[name]], dtype=torch.float32) for name in names
        }
        self.vectors = _stacked(old.get("vectors"), new["vectors"], self._work / "vectors.f16")

    def _scored(self, rows: Any, folder: Path, which: str) -> dict[str, Any]:
        """Columns and vectors of rows; what was scored before a kill is found again."""
        corpus, dim = open_corpus(rows, self._reading), self._meter.dim
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "vectors.f16"
        mode: Literal["r+", "w+"] = "r+" if path.exists() else "w+"
        vectors = np.memmap(path, np.float16, mode, shape=(len(rows), dim))

        def measured(batch: Documents) -> dict[str, Tensor]:
            found, scores = self._meter(batch)
            vectors[batch.numbers.cpu().numpy()] = found.half().numpy()
            return {"score": scores["loss"], **scores}

        scorer = ShardScorer(corpus, self._reading, measured, self._tokenizer, self._device, self._length)
        shards = list(corpus.shards())
        # a shard's file is written behind its vectors, so that where there is one, the other is there
        with bar(f"{which} samples scored", len(rows), self._reading.progress) as advance:

            def done(shard: Shard) -> None:
                vectors.flush()
                advance(shard.count)

            score_shards(scorer, shards, folder, done=done)
        found: dict[str, Any] = {"vectors": vectors}
        for shard in shards:
            table = read_part(folder, shard).to_pydict()
            for name in ("id", "source", "loss", *self._method.experts):
                found.setdefault(name, []).extend(table[name])
        return found


class Release(Part):
    """What was decided in a release.

    Attributes:
        decisions (pa.Table): of every sample of pool and arrivals: id, score, decision, cluster, expert ...
        train (Dataset): what was chosen.
        clusters (list[dict]): samples, chosen, expert, and bits of every expert.
    """

    def __init__(
        self,
        decisions: Any,
        train: Any,
        clusters: list[dict[str, Any]],
        rescored: int,
        number: int,
        keep_alive: Any = None,
    ) -> None:
        super().__init__()
        self.decisions, self.train, self.clusters = decisions, train, clusters
        self._rescored, self._number, self._keep_alive = rescored, number, keep_alive

    def scores(self) -> dict[str, Tensor]:
        floats = [field.name for field in self.decisions.schema if str(field.type) == "float"]
        return {name: torch.tensor(self.decisions[name].to_numpy()) for name in floats}

    def spent(self) -> dict[str, Any]:
        pool = self.decisions["pool"].to_numpy()
        experts = [one["expert"] or "chance" for one in self.clusters]
        return {
            "release": self._number,
            "samples": len(self.decisions),
            "kept": len(self.train),
            "pool": int(pool.sum()),
            "pruned": int((~pool).sum()),
            "scored again": self._rescored,
            "clusters": len(self.clusters),
            "experts": {name: experts.count(name) for name in sorted(set(experts))},
        }

    def save(self, folder: Path, *, last: bool = True) -> list[str]:
        """Write `scores.parquet`, and what was chosen in `data/`."""
        write_tables(folder / ("scores.parquet" if last else "scores-adapt-inf.parquet"), [self.decisions])
        if not last:
            return []
        rows = self.train.with_format("arrow")
        path = folder / "data" / "part-000000.parquet"
        write_tables(path, rows.iter(1000), self.train.features.arrow_schema)
        return ["data/part-000000.parquet"]

    def draw(self) -> Figure:
        from salience.core.pictures_picked import draw_clusters

        return draw_clusters(self.clusters)


def scoring_pair(model: Any, tokenizer: Any, reading: Any) -> tuple[Any, Any]:
    """Model and tokenizer or processor; a processor's tokenizer is what the model is checked against."""
    if isinstance(model, tuple | list) and len(model) == 2:
        model, tokenizer = model
    inner = getattr(tokenizer, "tokenizer", None) if hasattr(tokenizer, "image_processor") else tokenizer
    model, own = scoring_model(model, inner, device=reading.device, dtype=reading.dtype)
    return model, tokenizer if hasattr(tokenizer, "image_processor") else own


def _stacked(old: np.ndarray | None, new: np.ndarray, path: Path) -> np.ndarray:
    """Two mapped arrays as one."""
    if old is None or not len(old):
        return new
    if old.shape[1] != new.shape[1]:
        raise ParameterError(f"state must hold vectors of {new.shape[1]} numbers, got {old.shape[1]}")
    both = np.memmap(path, np.float16, "w+", shape=(len(old) + len(new), new.shape[1]))
    both[: len(old)], both[len(old) :] = old, new
    return both


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
