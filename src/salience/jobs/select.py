"""The job of `salience select`: score a corpus, keep the best share, write it and a report."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from salience.core.documents import Reading, ScoringMethod
from salience.core.errors import ConflictError, require
from salience.core.evidence import about
from salience.core.files import write_json_atomic
from salience.core.method import Method
from salience.core.spec import build_method, describe_method, parse_method
from salience.hosts import checkpoints, corpus_files, engines, selecting
from salience.hosts.picked import Picked
from salience.hosts.scoring import score_shards
from salience.jobs.asking import command_line, own_folder

ENGINES = ("local", "ray")
SANDBOX_DOCUMENTS, QUICK_DOCUMENTS = 2000, 300
USUAL = "attention-influence"


@dataclass(frozen=True, kw_only=True)
class SelectSettings:
    """Everything that decides what `salience select` does.

    Attributes:
        data (str | None): files, a folder of them or a datasets name; None takes the sandbox's corpus.
        model (str | None): checkpoint or hub id of the model that scores; None takes the sandbox's.
        method (str | None): `SLUG:key=value,...`; None takes `USUAL`.
        keep (float | None): share that is kept; None is the method's own.
        columns (tuple[str, ...]): OURS=THEIRS.
        id_column, source_column, domain_column, max_length, batch_tokens, shard_documents, skip_bad, device, dtype:
            as in `Reading`.
        split (str): of a datasets name.
        engine (str): of `ENGINES`.
        workers (int | None): of Ray; None is one for each CPU or GPU.
        address (str | None): of a Ray cluster; None starts one on this machine.
        timeout (float): seconds in which the cluster has to answer.
        seed (int): of the sandbox.
        quick (bool): the sandbox in its short form.
    """

    data: str | None = None
    model: str | None = None
    method: str | None = None
    keep: float | None = None
    columns: tuple[str, ...] = ()
    id_column: str | None = None
    source_column: str | None = None
    domain_column: str | None = None
    split: str = "train"
    max_length: int | None = None
    batch_tokens: int = 8192
    shard_documents: int = 2048
    skip_bad: bool = False
    engine: str = "local"
    workers: int | None = None
    address: str | None = None
    timeout: float = 10.0
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        require(self.engine in ENGINES, "engine", f"one of {', '.join(ENGINES)}", self.engine)
        require(self.timeout > 0, "timeout", "> 0", self.timeout)
        require(self.seed >= 0, "seed", ">= 0", self.seed)
        require(self.keep is None or 0.0 < self.keep <= 1.0, "keep", "in (0, 1]", self.keep)
        if self.address is not None and self.engine != "ray":
            raise ConflictError(f"address must be given with engine ray, got engine {self.engine}")

    def command(self, out: Path) -> str:
        """The command line that does the same."""
        return command_line("select", self, out, {"columns": "column"})


def select(
    settings: SelectSettings,
    out: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any] | None:
    """Select documents into `out`, or go on with it there.

    Args:
        settings (SelectSettings): what to do.
        out (Path): gets `salience.json`, `scores.parquet`, `data/`, `result.json` and `report.html`.
        say (Callable): told in a sentence what happens now.
        progress (Callable): told how many of how many documents are scored.

    Returns:
        dict: what `result.json` holds; None on the ranks of torchrun that only helped.

    Raises:
        SalienceError: for bad input, before anything is scored.
    """
    reading = _reading(settings, out)
    checkpoints.check_device(settings.device)
    method = _method(settings, None)
    own_folder(out)
    source, name = _data(settings, say)
    if "model" in method.needs:
        method = _method(settings, settings.model or _sandbox_model(settings, say))
    if getattr(method, "scorer", None) is None:
        return _by_focus(settings, method, source, reading, out, name, say)
    rank, size = engines.ranks()
    if rank:
        engines.wait_for(out / selecting.SHARDS)
    say(f"reading {name}")
    corpus = corpus_files.open_source(source, reading, split=settings.split)
    # has a scorer, as was seen above
    scores = cast(ScoringMethod, method)
    engine = _engine(settings, method, source, reading, out, size)
    say(f"scoring: {describe_method(replace(method, **_unnamed(method)))}")
    if rank:
        selecting.help_scoring(corpus, scores, reading, engines.rank_engine)
        return None
    picked = selecting.select(corpus, scores, reading, engine=engine or _local, progress=progress)
    say("writing what was kept")
    return _finish(settings, method, picked, out, name)


def _reading(settings: SelectSettings, out: Path) -> Reading:
    columns = {}
    for pair in settings.columns:
        ours, equals, theirs = pair.partition("=")
        require(bool(equals and ours and theirs), "column", "OURS=THEIRS", pair)
        columns[ours] = theirs
    return Reading(
        columns=columns,
        id_column=settings.id_column,
        source_column=settings.source_column,
        domain_column=settings.domain_column,
        max_length=settings.max_length,
        batch_tokens=settings.batch_tokens,
        shard_documents=settings.shard_documents,
        folder=str(out),
        device=settings.device,
        dtype=settings.dtype,
        skip_bad=settings.skip_bad,
    )


def _method(settings: SelectSettings, model: str | None) -> Method:
    method = parse_method(settings.method or USUAL)
    if "dataset" not in method.targets():
        raise ConflictError(f"method must choose samples of a dataset for select, got {method.slug()}")
    values: dict[str, Any] = {}
    if settings.keep is not None:
        values["keep"] = settings.keep
    if settings.method is None and settings.model is None:
        # the sandbox's model reads 384 positions
        values |= {"probes": 50, "shots": 0, "min_tokens": 32}
    if model is not None:
        values["model"] = model
    return build_method(method.slug(), {**method.parameters(), **values})


def _unnamed(method: Method) -> dict[str, Any]:
    """Models and tokenizers are told elsewhere."""
    return {name: None for name in ("model", "tokenizer") if hasattr(method, name)}


def _data(settings: SelectSettings, say: Callable[[str], None]) -> tuple[str, str]:
    if settings.data is not None:
        return settings.data, Path(settings.data).name or settings.data
    from salience.sandbox import corpus

    say("making the sandbox corpus (once on this machine)")
    count = QUICK_DOCUMENTS if settings.quick else SANDBOX_DOCUMENTS
    return str(corpus.corpus_folder(count, settings.seed)), "the sandbox corpus"


def _sandbox_model(settings: SelectSettings, say: Callable[[str], None]) -> str:
    from salience.sandbox import corpus

    say("making the sandbox model (once on this machine)")
    return str(corpus.folder(settings.seed, settings.quick))


def _local(*arguments: Any) -> None:
    scorer, shards, folder, done = arguments
    score_shards(scorer, shards, folder, done=done)


def _engine(
    settings: SelectSettings, method: Method, source: str, reading: Reading, out: Path, size: int
) -> selecting.Engine | None:
    import torch

    if size > 1:
        if settings.engine == "ray":
            raise ConflictError("engine must be local under torchrun, got ray")
        return engines.rank_engine
    if settings.engine == "local":
        return None
    gpus = checkpoints.check_device(settings.device).type == "cuda"
    there = os.cpu_count() or 1
    threads = max(1, there // (settings.workers or there)) if not gpus else torch.get_num_threads()
    work = engines.Work(
        _absolute(source), cast(ScoringMethod, method), replace(reading, folder=str(out.absolute())),
        str(out.absolute()), settings.split, threads,
    )  # fmt: skip
    return engines.ray_engine(
        work, address=settings.address, workers=settings.workers, timeout=settings.timeout, gpus=gpus
    )


def _absolute(source: str) -> str:
    return str(Path(source).absolute()) if Path(source).exists() else source


def _by_focus(
    settings: SelectSettings,
    method: Method,
    source: str,
    reading: Reading,
    out: Path,
    name: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A method that decides on all samples together, in this process: one release of what lasts in its folder."""
    from salience.report.select import build_release
    from salience.verb import focus

    if settings.engine != "local" or engines.ranks()[1] > 1:
        raise ConflictError(
            f"engine must be local and without torchrun for {method.slug()}, got {settings.engine} "
            f"in {engines.ranks()[1]} processes"
        )
    say(f"reading {name}")
    if getattr(method, "state", None) is None:
        # so that the same command goes on where it was killed
        method = build_method(method.slug(), {**method.parameters(), "state": str(out / "pool")})
    shown = describe_method(replace(method, **_unnamed(method)))
    say(f"scoring: {shown}")
    try:
        rows, corpus = corpus_files.open_dataset(source, reading, out / "rows", split=settings.split)
        handle = focus(rows, method, data=replace(reading, folder=None))
        say("writing what was chosen")
        handle.save(out)
    finally:
        shutil.rmtree(out / "rows", ignore_errors=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
    spent, part = handle.spent[method.slug()], cast(Any, handle.parts[0])
    result = {
        "title": f"{spent['kept']:,} of {spent['samples']:,} samples of {name}",
        "method": shown,
        "model": str(getattr(method, "model", None)),
        "data": settings.data or name,
        "spent": spent,
        "clusters": part.clusters,
        "skipped": corpus.bad,
        "files": json.loads((out / "salience.json").read_text(encoding="utf-8"))["selection"],
        "command": settings.command(out),
        "about": about(settings.device),
    }
    write_json_atomic(out / "result.json", result)
    build_release(out, result)
    return result


def _finish(settings: SelectSettings, method: Method, picked: Picked, out: Path, name: str) -> dict[str, Any]:
    from salience.report.select import build_select

    files = picked.save(out)
    spent = picked.spent()
    shown = describe_method(replace(method, **_unnamed(method)))
    model = getattr(method, "model", None)
    write_json_atomic(
        out / "salience.json", {"methods": [shown], "spent": {method.slug(): spent}, "selection": files}
    )
    result = {
        "title": f"{spent['kept']:,} of {spent['documents']:,} documents of {name}",
        "method": shown,
        "model": None if model is None else str(model),
        "data": settings.data or name,
        "spent": spent,
        "sources": picked.sources,
        "examples": picked.examples,
        "skipped": picked.corpus.bad,
        "files": files,
        "command": settings.command(out),
        "about": about(settings.device),
    }
    write_json_atomic(out / "result.json", result)
    build_select(out, result, picked.values, picked.kept)
    return result
