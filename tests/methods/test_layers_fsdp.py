"""LISA and IST with two real processes: the same layers on every rank, and the training of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

WORKER = Path(__file__).parent.parent / "workers" / "layers.py"
STEPS = 8


def run(out, case, ranks):
    command = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command += [str(WORKER), str(out), case]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(f"{out}.{rank}") for rank in range(ranks)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", ["lisa-fsdp", "lisa-fsdp-ends-evaluated", "lisa-ddp", "ist-fsdp-evaluated", "ist-ddp"]
)
def test_two_processes_train_as_one(case, tmp_path):
    (one,) = run(tmp_path / "one", case, 1)
    both = run(tmp_path / "both", case, 2)
    for rank in both:
        for step in range(STEPS):
            for what in ("flags", "gradients", "state"):
                assert torch.equal(rank[f"{step}.{what}"], one[f"{step}.{what}"]), (what, step)
            # only what trains has a gradient
            assert torch.equal(rank[f"{step}.gradients"], rank[f"{step}.flags"])
            if case.startswith("lisa"):
                assert not (rank[f"{step}.state"] & ~rank[f"{step}.flags"] & rank["inside"]).any(), (
                    "state is left"
                )
        for name, value in one.items():
            if name.startswith(("weight.", "score.")):
                torch.testing.assert_close(
                    rank[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
                )
    assert len({tuple(one[f"{step}.flags"].tolist()) for step in range(STEPS)}) > 1
    if "lisa-fsdp" in case:
        # each rank holds its half (and a step counter for each tensor)
        for step in range(STEPS):
            assert both[0][f"{step}.bytes"] < 0.6 * one[f"{step}.bytes"]


@pytest.mark.slow
def test_blocks_that_were_frozen_at_the_first_step_train_later_in_mixed_precision(tmp_path):
    both = run(tmp_path / "both", "lisa-fsdp-mixed", 2)
    trained = torch.stack([both[0][f"{step}.gradients"] for step in range(STEPS)])
    first = trained[0]
    assert (trained.any(0) & ~first).any(), "no block was frozen at first and trained later"
    for name, value in both[0].items():
        if name.startswith("weight."):
            assert value.dtype == torch.float32 and torch.equal(value, both[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lisa-trainer", "ist-trainer"])
def test_a_trainer_with_two_processes_trains_as_one(case, tmp_path):
    (one,) = run(tmp_path / "one", case, 1)
    for rank in run(tmp_path / "both", case, 2):
        for name, value in one.items():
            torch.testing.assert_close(
                rank[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
