"""Block top-k: scores of means, counts, ties, and that no row sees the future."""

import math

import pytest
import torch
from conftest import tiny_llama
from decoder_families import prompts

import salience as sal
from salience.methods.keys import block_top_k
from salience.methods.keys.block_top_k import score, spend

CONTRACT = {
    "method": sal.BlockTopK(keep=0.3, q_block=16, k_block=8),
    "keep_all": sal.BlockTopK(keep=1.0, q_block=16, k_block=8),
    "model": lambda: tiny_llama(layers=3).eval(),
    "inputs": prompts,
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0.0"),
        "keep:2": (0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0"),
        "q_block": (0, "q_block must be an integer >= 1, got 0"),
        "k_block": (2.5, "k_block must be an integer >= 1, got 2.5"),
    },
}


def states(queries=150, keys=150, heads=4, groups=2, width=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, heads, queries, width, generator=draw), torch.randn(
        2, groups, keys, width, generator=draw
    )


@pytest.mark.parametrize("keep", [0.25, 3, 1.0])
@pytest.mark.parametrize(
    ("queries", "keys", "k_block"), [(150, 150, 8), (63, 63, 16), (40, 150, 32), (5, 5, 8)]
)
def test_it_keeps_the_best_means_before_the_block_the_first_and_the_near(
    keep, queries, keys, k_block, monkeypatch
):
    monkeypatch.setattr(block_top_k, "_SLICE", 3)
    query, key = states(queries, keys)
    made = spend(query, key, keep=keep, q_block=16, k_block=k_block).to_mask()
    for b in range(2):
        for h in range(4):
            for i in range(math.ceil(queries / 16)):
                first = keys - queries + 16 * i
                last = first + 15
                past = first // k_block
                asked = query[b, h, 16 * i : 16 * i + 16].double().mean(0)
                scores = [
                    float(asked @ key[b, h // 2, n * k_block : (n + 1) * k_block].double().mean(0))
                    for n in range(past)
                ]
                wanted = min(keep, past) if isinstance(keep, int) else math.ceil(keep * past - 1e-9)
                # the first block is kept besides, and its own score does not use up the budget
                best = sorted(range(1, past), key=lambda n: -scores[n])[:wanted]
                expected = {0, *best, *range(past, min(last // k_block, (keys - 1) // k_block) + 1)}
                assert set(made[b, h, i].nonzero().flatten().tolist()) == expected


def test_means_are_over_what_is_there():
    query, key = states(70, 70)
    asked, held = score(query, key, q_block=64, k_block=32)
    torch.testing.assert_close(asked[:, :, 1], query[:, :, 64:].mean(2) * 8**-0.5)
    torch.testing.assert_close(held[:, :, 2], key[:, :, 64:].mean(2))


def test_equal_scores_go_to_the_left_and_the_future_changes_nothing():
    query, key = states(64, 64)
    made = spend(query, torch.ones_like(key), keep=2, q_block=16, k_block=8).to_mask()
    assert made[0, 0, 3].nonzero().flatten().tolist() == [0, 1, 2, 6, 7]
    changed = key.clone()
    changed[:, :, 48:] = 100.0
    one, other = (spend(query, k, keep=0.4, q_block=16, k_block=8).to_mask() for k in (key, changed))
    assert torch.equal(one[:, :, :3], other[:, :, :3])
