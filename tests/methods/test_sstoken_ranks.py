"""SsToken on several processes: the same gradient as on one, and a history that every rank has whole."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import collate, ragged_samples, tiny_gpt2
from safetensors import safe_open
from safetensors.torch import load_file

from salience.methods.tokens.sstoken import history_losses

sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
from test_distributed import launch


@pytest.mark.slow
def test_two_ranks_are_one_process(tmp_path):
    history = history_losses(tiny_gpt2(seed=5), [collate(ragged_samples(8))]).save(tmp_path / "h.safetensors")
    ways = {"whole": (8, 1, 1), "accumulated": (2, 4, 1), "ranks": (2, 2, 2)}
    losses = {}
    for name, (batch, accumulation, ranks) in ways.items():
        (tmp_path / name).mkdir()
        launch("sstoken.py", tmp_path / name, batch, accumulation, history, ranks=ranks)
        with safe_open(tmp_path / name / "gradients.safetensors", "pt") as file:
            losses[name] = float(file.metadata()["loss"])
    whole = load_file(tmp_path / "whole" / "gradients.safetensors")
    for name in ("accumulated", "ranks"):
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-5)
        grads = load_file(tmp_path / name / "gradients.safetensors")
        for key, grad in whole.items():
            torch.testing.assert_close(
                grads[key], grad, rtol=1e-5, atol=1e-7, msg=lambda m, k=key: f"{k}: {m}"
            )
    measured = load_file(tmp_path / "whole" / "history-0.safetensors")
    assert len(measured) == 7
    for rank in range(2):
        path = tmp_path / "ranks" / f"history-{rank}.safetensors"
        shared = load_file(path)
        assert shared.keys() == measured.keys()
        for key, values in measured.items():
            torch.testing.assert_close(shared[key], values, rtol=0, atol=1e-5)
        with safe_open(path, "pt") as file:
            assert file.metadata()["passes"] == "2"  # four batches over two ranks
