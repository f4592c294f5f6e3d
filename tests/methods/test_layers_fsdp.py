"""LISA and IST with two real processes: the same layers on every rank, and the training of one process."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
from test_distributed import launch

STEPS = 8
LOOPS = ["lisa-fsdp", "lisa-fsdp-ends-evaluated", "lisa-ddp", "ist-fsdp-evaluated", "ist-ddp"]
MIXED, TRAINERS = "lisa-fsdp-mixed", ["lisa-trainer", "ist-trainer"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What every case gave in one process, and on each of two ranks."""
    one, both = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("both")
    launch("layers.py", one, *LOOPS, *TRAINERS)
    launch("layers.py", both, *LOOPS, MIXED, *TRAINERS, ranks=2)

    def read(case):
        alone = load_file(one / f"{case}.0") if case != MIXED else {}
        return alone, [load_file(both / f"{case}.{rank}") for rank in range(2)]

    return read


@pytest.mark.slow
@pytest.mark.parametrize("case", LOOPS)
def test_two_processes_train_as_one(case, runs):
    one, both = runs(case)
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
def test_blocks_that_were_frozen_at_the_first_step_train_later_in_mixed_precision(runs):
    _, both = runs(MIXED)
    trained = torch.stack([both[0][f"{step}.gradients"] for step in range(STEPS)])
    first = trained[0]
    assert (trained.any(0) & ~first).any(), "no block was frozen at first and trained later"
    for name, value in both[0].items():
        if name.startswith("weight."):
            assert value.dtype == torch.float32 and torch.equal(value, both[1][name])


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINERS)
def test_a_trainer_with_two_processes_trains_as_one(case, runs):
    one, both = runs(case)
    for rank in both:
        for name, value in one.items():
            torch.testing.assert_close(
                rank[name], value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
