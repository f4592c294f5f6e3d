"""How time and memory are measured, and what a reader needs to know of the machine that measured them."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch


def about(device: str) -> dict[str, str]:
    """Versions, hardware and commit, for a reader who wants to see the same numbers."""
    from importlib.metadata import version

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") and torch.cuda.is_available() else ""
    return {
        **{name: version(name) for name in ("salience", "torch", "transformers", "peft")},
        "python": platform.python_version(),
        "machine": gpu or f"{_cpu()} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)",
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


class Meter:
    """Time and exact memory of a block of work.

    Attributes:
        seconds (float): wall time.
        peak_bytes (int): on a GPU the most that torch had allocated; on a CPU the growth of the process's peak
            resident set over its size at the start (0 where the system does not tell).
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_bytes = 0


@contextmanager
def measured(device: str = "cpu") -> Iterator[Meter]:
    """Measure the block: `with measured("cuda") as meter: ...`."""
    meter, gpu = Meter(), device.startswith("cuda")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    else:
        before = _reset_peak_rss()
    started = time.perf_counter()
    try:
        yield meter
    finally:
        if gpu:
            torch.cuda.synchronize()
        meter.seconds = time.perf_counter() - started
        meter.peak_bytes = torch.cuda.max_memory_allocated() if gpu else max(_rss("VmHWM") - before, 0)


@contextmanager
def saved_for_backward() -> Iterator[dict[str, int]]:
    """Count the bytes of distinct tensors that autograd keeps for backward inside the block, parameters not
    included: `{"bytes": n}` after it."""
    seen: dict[int, int] = {}
    counted = {"bytes": 0}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # a frozen linear layer keeps its transposed weight, which is a view of the parameter and costs nothing
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield counted
    counted["bytes"] = sum(seen.values())


def _rss(field_name: str) -> int:
    path = Path("/proc/self/status")
    if not path.is_file():
        return 0
    row = next((line for line in path.read_text().splitlines() if line.startswith(field_name)), "")
    return int(row.split()[1]) * 1024 if row else 0


def _reset_peak_rss() -> int:
    path = Path("/proc/self/clear_refs")
    try:
        path.write_text("5")  # Linux: forget the peak of the resident set
    except OSError:
        return _rss("VmHWM")
    return _rss("VmRSS")


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except OSError:
        return ""
    return done.stdout.strip()
