"""One batch of 8, four accumulated batches of 2 and two real processes with 4 each give the same gradient."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

WORKERS = Path(__file__).parent.parent / "workers"
# its weights are made for each micro-batch over all ranks, so accumulation is another method there
WHOLE_BATCH_ONLY = {"loss-reweighting"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(worker, *arguments, ranks=1):
    """Run a worker script as one process or as several under torchrun."""
    command = [sys.executable]
    if ranks > 1:
        command += [
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={ranks}",
            f"--master-port={free_port()}",
        ]
    command += [str(WORKERS / worker), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    ways = {
        "whole": (8, 1, 1),
        "accumulated": (2, 4, 1),
        "two ranks": (4, 1, 2),
        "two ranks, accumulated": (2, 2, 2),
    }
    folders = {}
    for name, (batch, accumulation, ranks) in ways.items():
        folders[name] = tmp_path_factory.mktemp("gradients")
        launch("gradients.py", folders[name], batch, accumulation, ranks=ranks)
    return folders


def read(folder, mix):
    path = folder / f"{mix}.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), float(file.metadata()["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accumulated", "two ranks", "two ranks, accumulated"])
@pytest.mark.parametrize(
    "mix", ["tokens", "samples", "penalty", "tokens+samples", "tokens+penalty", "all", "loss-reweighting"]
)
def test_a_step_cut_another_way_has_the_same_gradient(mix, way, results):
    if mix in WHOLE_BATCH_ONLY and "accumulated" in way:
        pytest.skip("weights are made for each micro-batch")
    whole, loss = read(results["whole"], mix)
    grads, again = read(results[way], mix)
    assert again == pytest.approx(loss, rel=1e-5)
    assert grads.keys() == whole.keys()
    for key, grad in whole.items():
        torch.testing.assert_close(grads[key], grad, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}")
