"""Router score: gate weights are summed, and what experts do with their tokens does not count."""

import torch
from mixture_families import demonstrations, tiny_mixture

import salience as sal
from salience.hosts.experts import Routed
from salience.methods.experts.router_score_experts import score

CONTRACT = {
    "method": sal.RouterScoreExperts(keep=0.5),
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


def test_sums_gate_weights():
    assert score(ROUTED).tolist() == [1.0, 1.25, 0.125, 0.0]


def test_the_experts_outputs_do_not_count():
    model = tiny_mixture()
    found = []
    for factor in (1.0, 3.0):
        with torch.no_grad():
            model.model.layers[-1].mlp.experts.down_proj.mul_(factor)
        with sal.focus(model, sal.RouterScoreExperts(keep=3), data=demonstrations()) as handle:
            found.append(handle.scores["router-score-experts.experts"])
    assert torch.equal(*found)
    # renormalised: 1 for each token
    torch.testing.assert_close(found[0].sum(-1), torch.full((2,), 25.0).double(), rtol=1e-5, atol=0)
