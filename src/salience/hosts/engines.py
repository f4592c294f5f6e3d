"""Who scores the shards: this process, the ranks that torchrun started, or the workers of a Ray cluster.

All of them do the same work: a shard is scored alone, by batches that depend on nothing but the shard, and its file
appears whole or not at all. So it does not matter who does it, when, or how often somebody was killed meanwhile.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salience.core.documents import Reading, ScoringMethod
from salience.core.errors import ParameterError, first_line, require
from salience.hosts.corpus import Shard
from salience.hosts.corpus_files import open_source
from salience.hosts.scoring import ShardScorer, part_path, score_shards
from salience.hosts.selecting import _SHARDS, make_scorer

_POLL = 0.2  # seconds between looks for files of others
_AHEAD = 2  # shards that a worker has been given at a time


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
        corpus.keep_plan(Path(self.folder) / _SHARDS)
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
    """An engine of Ray actors, each with a model of its own; one that dies is started again with its shard.

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
        missing = [shard for shard in shards if not part_path(folder, shard.number).exists()]
        for shard in shards:
            if shard not in missing:
                done(shard)
        try:
            if missing:
                _by_actors(ray, work, missing, workers, gpus, done)
        finally:
            ray.shutdown()

    return engine


def _started(address: str | None, timeout: float, workers: int | None) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ParameterError(
            "engine must be local or ray with Ray installed, got no Ray: pip install ray"
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
        raise ParameterError(f"address must be a Ray cluster that answers, got {where} ({failed})")
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


def _by_actors(
    ray: Any,
    work: Work,
    shards: Sequence[Shard],
    workers: int | None,
    gpus: bool,
    done: Callable[[Shard], None],
) -> None:
    resources = ray.cluster_resources()
    there = int(resources.get("GPU" if gpus else "CPU", 1))
    number = max(1, min(workers or there, len(shards)))
    settings = {"num_cpus": 1, "num_gpus": 1 if gpus else 0, "max_restarts": -1, "max_task_retries": -1}
    actor = ray.remote(**settings)(_Worker)
    pool = [actor.remote(work) for _ in range(number)]
    waiting, running = list(reversed(shards)), {}
    for _ in range(_AHEAD):
        for one in pool:
            if waiting:
                shard = waiting.pop()
                running[one.score.remote(shard)] = (one, shard)
    while running:
        ready, _ = ray.wait(list(running), num_returns=1)
        one, shard = running.pop(ready[0])
        ray.get(ready[0])
        done(shard)
        if waiting:
            following = waiting.pop()
            running[one.score.remote(following)] = (one, following)


class _Worker:
    """Lives on some machine of the cluster and scores what it is given."""

    def __init__(self, work: Work) -> None:
        self._folder = Path(work.folder)
        self._scorer = work.open()

    def score(self, shard: Shard) -> int:
        score_shards(self._scorer, [shard], self._folder)
        return shard.number
