"""Random experts: as many as asked for, drawn for each layer, without demonstrations and without anyone else."""

import torch
from mixture_families import demonstrations, tiny_mixture

import salience as sal
from salience.methods.experts.random_experts import score

CONTRACT = {
    "method": sal.RandomExperts(keep=0.5),
    "model": tiny_mixture,
    "data": [demonstrations()],
    "bad": {
        "keep": (1.5, r"keep must be a share in \(0, 1\] or a count >= 1, got 1.5"),
        "mode": ("zero", "mode must be one of prune, mask, got 'zero'"),
        "seed": (-1, "seed must be an integer >= 0, got -1"),
    },
}


def test_draws_are_the_seeds_own():
    assert torch.equal(score(3, 8, 5), score(3, 8, 5)) and not torch.equal(score(3, 8, 5), score(3, 8, 6))
    rows = score(3, 8, 5)
    assert rows.shape == (3, 8) and not torch.equal(rows[0], rows[1])


def test_needs_no_demonstrations_and_keeps_every_expert_equally_often():
    model, often = tiny_mixture(), torch.zeros(2, 8)
    for seed in range(60):
        with sal.focus(model, sal.RandomExperts(keep=2, seed=seed)) as handle:
            often.scatter_add_(1, handle.parts[0].kept, torch.ones(2, 2))
            assert handle.spent["random-experts"]["demonstrations"] == 0
    # 60 * 2 / 8 = 15 each; four standard deviations of a binomial
    assert often.sum() == 240 and (often - 15).abs().max() < 4 * (60 * 0.25 * 0.75) ** 0.5
