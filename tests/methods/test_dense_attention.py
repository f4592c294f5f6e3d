"""Dense attention as a method: the model's own result, counted."""

import torch
from conftest import tiny_llama
from decoder_families import prompts

import salience as sal

CONTRACT = {
    "method": sal.DenseAttention(listed=True, block=16),
    "keep_all": sal.DenseAttention(),
    "model": lambda: tiny_llama(layers=3).eval(),
    "inputs": prompts,
    "bad": {"block": (0, "block must be an integer >= 1, got 0")},
}


@torch.no_grad()
def test_lists_of_everything_are_counted_as_everything():
    model, batch = tiny_llama(layers=3).eval(), prompts()
    for method, kernel in ((sal.DenseAttention(), "dense"), (sal.DenseAttention(listed=True), "gather")):
        with sal.focus(model, method) as handle:
            model(**batch)
        spent = handle.spent["dense-attention"]
        assert (spent["kept share"], spent["kernel"]) == (1.0, kernel)
        assert abs(spent["estimated recall"] - 1) < 1e-6
