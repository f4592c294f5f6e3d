"""Expert frequency: tokens are counted, and the busiest experts stay."""

import torch
from mixture_families import demonstrations, tiny_mixture

import salience as sal
from salience.hosts.experts import Routed
from salience.methods.experts.frequency_experts import score

CONTRACT = {
    "method": sal.FrequencyExperts(keep=0.5),
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


def test_counts_tokens():
    assert score(ROUTED).tolist() == [2, 3, 1, 0]


def test_the_busiest_stay():
    model = tiny_mixture()
    with sal.focus(model, sal.FrequencyExperts(keep=3), data=demonstrations()) as handle:
        hits = handle.scores["frequency-experts.experts"]
        kept = handle.parts[0].kept
    assert hits.sum().item() == 2 * 2 * 25, "two experts for each of 25 tokens in two layers"
    for row, stays in zip(hits, kept, strict=True):
        gone = [index for index in range(8) if index not in stays]
        assert len(stays) == 3 and row[stays].min() >= row[gone].max()
