"""REAP: the mean over the tokens that an expert gets, so that a seldom and strong expert stays."""

import torch
from mixture_families import demonstrations, tiny_mixture

import salience as sal
from salience.hosts.experts import Routed, find_mixtures, measure
from salience.methods.experts.reap import score

CONTRACT = {
    "method": sal.REAP(keep=0.5),
    "model": tiny_mixture,
    "data": [demonstrations()],
    "bad": {
        "keep": (1.5, r"keep must be a share in \(0, 1\] or a count >= 1, got 1.5"),
        "mode": ("zero", "mode must be one of prune, mask, got 'zero'"),
        "samples": (-1, "samples must be None or an integer >= 1, got -1"),
    },
}

ROUTED = Routed(
    ids=torch.tensor([[0, 1], [1, 2], [1, 0]]),
    weights=torch.tensor([[0.5, 0.25], [0.75, 0.125], [0.25, 0.5]]),
    norms=torch.tensor([[2.0, 4.0], [1.0, 16.0], [2.0, 1.0]]),
    cosine=torch.tensor([0.9, 0.5, 0.1]),
    experts=4,
)


def test_sums_weighted_lengths():
    assert score(ROUTED).tolist() == [1.5, 2.25, 2.0, 0.0]


def test_the_sum_is_divided_by_the_tokens_of_the_expert():
    model, batch = tiny_mixture(), demonstrations()
    sums = measure(find_mixtures(model), {"all": [batch]}, score)
    with sal.focus(model, sal.REAP(keep=4), data=batch) as handle:
        means = handle.scores["reap.experts"]
    torch.testing.assert_close(means * sums.hits, sums.scores)
    seldom = (sums.hits[0] > 0) & (sums.hits[0] < sums.hits[0].max())
    assert seldom.any() and not torch.equal(means.argsort(-1), sums.scores.argsort(-1))
