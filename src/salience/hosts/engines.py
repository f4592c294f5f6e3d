"""Who scores the shards: this process, the ranks that torchrun started, or the workers of a Ray cluster.

All of them do the same work: a shard is scored alone, by batches that depend on nothing but the shard, and its file
appears whole or not at all. So it does not matter who does it, when, or how often somebody was killed meanwhile.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from salience.core.documents import Reading, ScoringMethod
from salience.core.errors import ParameterError, SalienceError, first_line, require
from salience.hosts.corpus import Shard
from salience.hosts.corpus_files import open_source
from salience.hosts.scoring import ShardScorer, part_path, score_shards
from salience.hosts.selecting import SHARDS, make_scorer

_POLL = 0.2  # seconds between looks for files of others


@dataclass(frozen=True)
class Work:
    """What a worker needs to score shards of a corpus by itself; it can be sent to another machine.

    Attributes:
        source (str): files or a datasets name, as this worker sees them.
        method (ScoringMethod): whose model is a folder or an id.
        reading (Reading): how it is read.
        folder (str): of the run, which holds the list of shards.
        split (str): of a datasets name.
        threads (int): of a worker on CPUs.
    """

    source: str
    method: ScoringMethod
    reading: Reading
    folder: str
    split: str = "train"
    threads: int = 1

    def open(self) -> ShardScorer:
        """The corpus and the model, loaded here."""
        import torch

        torch.set_num_threads(self.threads)
        corpus = open_source(self.source, self.reading, split=self.split)
        corpus.keep_plan(Path(self.folder) / SHARDS)
        return make_scorer(corpus, self.method, self.reading)[0]


def ranks() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def rank_engine(
    scorer: ShardScorer, shards: Sequence[Shard], folder: Path, done: Callable[[Shard], None]
) -> None:
    """Score this rank's shards, every n-th; rank 0 then waits for those of the others.

    If another rank fails, torchrun ends all of them, so waiting has no end of its own.
    """
    rank, size = ranks()
    mine = [shard for shard in shards if shard.number % size == rank]
    others = [shard for shard in shards if shard.number % size != rank]
    score_shards(scorer, mine, folder, done=done)
    if rank:
        return
    for shard in others:
        while not part_path(folder, shard.number).exists():
            time.sleep(_POLL)
        done(shard)


def wait_for(path: Path) -> None:
    """Wait until rank 0 has written a file."""
    while not path.exists():
        time.sleep(_POLL)


def ray_engine(
    work: Work, *, address: str | None, workers: int | None, timeout: float, gpus: bool
) -> Callable[[ShardScorer, Sequence[Shard], Path, Callable[[Shard], None]], None]:
    """An engine of Ray Data: actors, each with a model of its own; a shard whose actor dies is scored by another.

    Args:
        work (Work): what they do.
        address (str | None): of a cluster, "auto" for the one of this machine; None starts one here.
        workers (int | None): actors; None is one for each GPU, or each CPU.
        timeout (float): seconds in which a cluster has to answer.
        gpus (bool): each actor gets a GPU.

    Raises:
        ParameterError: if Ray is not installed or the address does not answer.
    """
    require(workers is None or workers >= 1, "workers", ">= 1", workers)
    ray = _started(address, timeout, workers)

    def engine(
        scorer: ShardScorer, shards: Sequence[Shard], folder: Path, done: Callable[[Shard], None]
    ) -> None:
        missing: dict[int, Shard] = {}
        for shard in shards:
            if part_path(folder, shard.number).exists():
                done(shard)
            else:
                missing[shard.number] = shard
        try:
            for number in _scored(ray, work, list(missing.values()), workers, gpus) if missing else ():
                done(missing[number])
        finally:
            ray.shutdown()

    return engine


def _started(address: str | None, timeout: float, workers: int | None) -> Any:
    # read when Ray is imported; its C++ parts tell every retry, and what went wrong is told below
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ParameterError(
            "engine must be local, or ray with Ray Data installed, got none: pip install 'salience[scale]'"
        ) from error
    if ray.is_initialized():
        return ray
    if address not in (None, "auto", "local"):
        _require_answer(str(address), timeout)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {"include_dashboard": False, "num_cpus": workers or os.cpu_count()}
    else:
        options["address"] = address
    # what Ray starts here ends with the thread that started it, so that must be this one
    failed = _failure(ray, options) if address is None else _failure_within(timeout + 20, ray, options)
    if failed is not None:
        where = "this machine" if address is None else address
        token = "" if address is None else "; one that asks for a token wants RAY_AUTH_MODE=token"
        raise ParameterError(f"address must be a Ray cluster that answers, got {where} ({failed}{token})")
    return ray


def _failure(ray: Any, options: dict[str, Any]) -> str | None:
    try:
        ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        return first_line(error)
    return None


def _failure_within(seconds: float, ray: Any, options: dict[str, Any]) -> str | None:
    """What takes the connection but is no Ray would be waited for long."""
    found: list[str | None] = []
    thread = threading.Thread(target=lambda: found.append(_failure(ray, options)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else f"no answer within {seconds:g} s"


def _require_answer(address: str, timeout: float) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    require(bool(host) and port.isdigit(), "address", "HOST:PORT, ray://HOST:PORT or auto", address)
    try:
        socket.create_connection((host, int(port)), timeout=timeout).close()
    except OSError as error:
        raise ParameterError(
            f"address must be a Ray cluster that answers within {timeout:g} s, got {address} "
            f"({error.strerror or error})"
        ) from error


def _scored(ray: Any, work: Work, shards: Sequence[Shard], workers: int | None, gpus: bool) -> Iterator[int]:
    """Numbers of shards as they are done, in any order."""
    import ray.data as stream

    # its own bar, plan and warnings; the driver tells what users want to know
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = stream.DataContext.get_current()
    context.enable_progress_bars = False
    there = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
    number = max(1, min(workers or there, len(shards)))
    rows = stream.from_items([asdict(shard) for shard in shards], override_num_blocks=len(shards))
    scored = rows.map(
        _Worker,
        fn_constructor_args=(work,),
        compute=stream.ActorPoolStrategy(size=number),
        num_cpus=1,
        num_gpus=1 if gpus else 0,
    )
    for row in scored.iter_rows():
        if row["error"]:
            raise SalienceError(f"worker on {row['host']}: {row['error']}")
        yield row["number"]


class _Worker:
    """Lives on some machine of the cluster and scores what it is given.

    What is wrong with the input there is handed back: raised, it would come as Ray's report of an actor that died.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._scorer: ShardScorer | None = None

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        shard, error = Shard(**row), ""
        try:
            self._scorer = self._scorer or self._work.open()
            score_shards(self._scorer, [shard], Path(self._work.folder))
        except SalienceError as wrong:
            error = str(wrong)
        return {"number": shard.number, "error": error, "host": socket.gethostname()}
