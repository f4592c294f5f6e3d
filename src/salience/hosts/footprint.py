"""What a checkpoint needs: parameters, bytes on disk, memory of a forward pass, speed of reading and of writing.

Each checkpoint is loaded by a process of its own that cannot import salience: its memory is not mixed with that of
whoever made it, and that it loads there at all is the proof that it is an ordinary one. All processes live at the
same time and are timed in turns, so that a machine that slows down does so for all.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from salience.core.errors import SalienceError, require

TOLERANCE = 1e-5  # of logits in float32, beside the largest of them where that is above 1
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_CHILD = Path(__file__).with_name("_footprint_child.py")


class CheckpointError(SalienceError, RuntimeError):
    """A written checkpoint does not load, or does not compute what the model in memory did."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to measure.

    Attributes:
        folder (Path): config and safetensors.
        made (str): the class that loads it, by its name in transformers.
        logits (Path | None): a file with `input_ids` [B, T] and the float32 `logits` that they must give.
    """

    folder: Path
    made: str
    logits: Path | None = None


def bytes_on_disk(folder: Path) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most of a checkpoint's numbers, as its first weight file has them; float32 if it has no floats."""
    numbers: dict[torch.dtype, int] = {}
    for path in sorted(folder.glob("*.safetensors"))[:1]:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                piece = file.get_slice(name)
                dtype = _DTYPES.get(piece.get_dtype())
                if dtype is not None:
                    numbers[dtype] = numbers.get(dtype, 0) + prod(piece.get_shape())
    return max(numbers, key=lambda dtype: numbers[dtype], default=torch.float32)


def measure(
    checkpoints: Mapping[str, Checkpoint],
    *,
    tokens: int,
    new_tokens: int,
    repeats: int = 5,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, dict[str, Any]]:
    """Load every checkpoint in a process of its own, check its logits, and time them all in turns.

    Args:
        checkpoints (Mapping[str, Checkpoint]): by name; all are in memory at the same time.
        tokens (int): of the prompt, >= 1; random ones, in a batch of one.
        new_tokens (int): written behind it, one at a time, >= 1.
        repeats (int): timed rounds, >= 1, after one that is not counted.
        device (str): "cpu", "cuda", ...
        progress (Callable): told how many of how many steps are done.

    Returns:
        dict: by name: parameters, bytes_on_disk, dtype, peak_bytes (weights and all that a forward pass over the
        prompt held: resident memory of the process on a CPU, what torch allocated on a GPU),
        prefill_tokens_per_second and decode_tokens_per_second (medians; None for a model that does not generate),
        the single times behind them, and logits_difference (the largest; None where none were given).

    Raises:
        CheckpointError: if one does not load or its logits are not those that were given.
    """
    for name, value in (("tokens", tokens), ("new_tokens", new_tokens), ("repeats", repeats)):
        require(value >= 1, name, ">= 1", value)
    found: dict[str, dict[str, Any]] = {}
    times: dict[str, list[dict[str, float | None]]] = {name: [] for name in checkpoints}
    total, done = (repeats + 2) * len(checkpoints), 0
    with ExitStack() as stack:
        started = {
            name: stack.enter_context(_process(one, tokens, device)) for name, one in checkpoints.items()
        }
        for name, process in started.items():
            found[name] = {
                **process.answer(),
                "bytes_on_disk": bytes_on_disk(checkpoints[name].folder),
                "logits_difference": process.difference(),
            }
            done += 1
            progress(done, total)
        for turn in range(repeats + 1):
            # the first round warms caches up; then forwards and backwards in turn, so that none is always the last
            for name in started if turn % 2 else reversed(started):
                taken = started[name].ask({"do": "speed", "new": new_tokens})
                if turn:
                    times[name].append(taken)
                done += 1
                progress(done, total)
    for name, rounds in times.items():
        found[name] |= _speeds(rounds, tokens, new_tokens)
    return found


def _speeds(rounds: list[dict[str, Any]], tokens: int, new_tokens: int) -> dict[str, Any]:
    prefill = [one["prefill"] for one in rounds]
    decode = [one["decode"] for one in rounds if one["decode"] is not None]
    return {
        "prefill_seconds": prefill,
        "decode_seconds": decode,
        "prefill_tokens_per_second": tokens / median(prefill),
        "decode_tokens_per_second": new_tokens / median(decode) if decode else None,
    }


class _Process:
    def __init__(
        self, checkpoint: Checkpoint, process: subprocess.Popen[str], errors: IO[str], scratch: Path
    ) -> None:
        self._checkpoint, self._process, self._errors, self._scratch = checkpoint, process, errors, scratch

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            said = [row.strip() for row in self._errors.read().splitlines() if row.strip()]
            raise CheckpointError(
                f"{self._checkpoint.folder} must be a checkpoint that from_pretrained loads without salience, got "
                f"{said[-1][:300] if said else f'exit code {self._process.returncode}'}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self.answer()  # says why the process ended
        return self.answer()

    def difference(self) -> float | None:
        """The largest difference of a logit from the expected ones; an error above the tolerance."""
        given = self._checkpoint.logits
        if given is None:
            return None
        out = self._scratch / "logits.safetensors"
        self.ask({"do": "logits", "inputs": str(given), "out": str(out)})
        wanted, got = load_file(str(given))["logits"], load_file(str(out))["logits"]
        difference = float((wanted - got).abs().max()) if wanted.shape == got.shape else float("inf")
        allowed = TOLERANCE * max(float(wanted.abs().max()), 1.0)
        if not difference <= allowed:
            raise CheckpointError(
                f"{self._checkpoint.folder} must give the logits of the model that it was written from within "
                f"{allowed:.1e}, got a difference of {difference:.3g}"
            )
        return difference


@contextmanager
def _process(checkpoint: Checkpoint, tokens: int, device: str) -> Iterator[_Process]:
    threads = str(torch.get_num_threads())
    # -P: the folder of the script holds modules named as libraries are
    command = [
        sys.executable,
        "-P",
        str(_CHILD),
        str(checkpoint.folder),
        checkpoint.made,
        device,
        str(tokens),
        threads,
    ]
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        try:
            yield _Process(checkpoint, process, errors, Path(scratch))
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    # what was not read any more by a process that ended is of no use
                    try:
                        pipe.close()
                    except BrokenPipeError:
                        continue
