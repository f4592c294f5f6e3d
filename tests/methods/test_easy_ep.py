"""EASY-EP: the score of the paper by hand, its laws, and what its parameters mean for a model."""

import pytest
import torch
from mixture_families import demonstrations, logits_of, tiny_mixture

import salience as sal
from salience.hosts._experts_pass import run
from salience.hosts.experts import Routed, find_mixtures, select
from salience.methods.experts._easy_ep_routing import route
from salience.methods.experts.easy_ep import score

CONTRACT = {
    "method": sal.EasyEP(keep=0.5),
    "model": tiny_mixture,
    "data": [demonstrations()],
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0.0"),
        "keep:2": (True, r"keep must be a share in \(0, 1\] or a count >= 1, got True"),
        "samples": (0, "samples must be None or an integer >= 1, got 0"),
        "mode": ("zero", "mode must be one of prune, mask, got 'zero'"),
        "reroute": (False, "reroute must be True unless mode is 'mask', got False"),
        "token_weight": (1, "token_weight must be True or False, got 1"),
        "use_norm": ("yes", "use_norm must be True or False, got 'yes'"),
    },
}
# two tokens: the first goes to experts 0 and 1, the second to 1 and 2
BY_HAND = Routed(
    ids=torch.tensor([[0, 1], [1, 2]]),
    weights=torch.tensor([[0.6, 0.4], [0.7, 0.3]]),
    norms=torch.tensor([[2.0, 5.0], [1.0, 10.0]]),
    cosine=torch.tensor([0.9, 0.5]),
    experts=3,
)


def routed(tokens=40, experts=6, seed=0):
    random = torch.Generator().manual_seed(seed)
    return Routed(
        ids=torch.rand(tokens, experts, generator=random).argsort(-1)[:, :2],
        weights=torch.rand(tokens, 2, generator=random),
        norms=torch.rand(tokens, 2, generator=random) * 5,
        cosine=torch.rand(tokens, generator=random) * 2 - 1,
        experts=experts,
    )


def part_of(whole, places):
    named = ("ids", "weights", "norms", "cosine")
    return Routed(*(getattr(whole, name)[places] for name in named), whole.experts)


def test_the_score_by_hand():
    found = score(BY_HAND)
    torch.testing.assert_close(found, torch.tensor([0.12, 0.55, 1.5]).double(), rtol=1e-6, atol=1e-7)
    assert select(found[None], torch.zeros(1, 3), 2).tolist() == [[1, 2]]
    gates = score(BY_HAND, token_weight=False, use_norm=False)
    torch.testing.assert_close(gates, torch.tensor([0.6, 1.1, 0.3]).double(), rtol=1e-6, atol=1e-7)
    assert select(gates[None], torch.zeros(1, 3), 2).tolist() == [[0, 1]]
    plain = score(BY_HAND, token_weight=False)
    torch.testing.assert_close(plain, torch.tensor([1.2, 2.7, 3.0]).double(), rtol=1e-6, atol=1e-6)
    unnormed = score(BY_HAND, use_norm=False)
    torch.testing.assert_close(unnormed, torch.tensor([0.06, 0.39, 0.15]).double(), rtol=1e-6, atol=1e-7)


def test_the_score_is_a_sum_over_tokens_in_any_order():
    whole = routed()
    halves = score(part_of(whole, slice(0, 13))) + score(part_of(whole, slice(13, None)))
    torch.testing.assert_close(halves, score(whole))
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(score(part_of(whole, shuffled)), score(whole))


def test_scaled_gates_rank_alike_and_tokens_that_do_not_turn_count_nothing():
    whole = routed()
    scaled = Routed(whole.ids, 2.5 * whole.weights, whole.norms, whole.cosine, whole.experts)
    torch.testing.assert_close(score(scaled), 2.5 * score(whole))
    still = Routed(whole.ids, whole.weights, whole.norms, torch.ones(40) + 1e-6, whole.experts)
    assert torch.equal(score(still), torch.zeros(6).double()), "a cosine above 1 by rounding counts as 1"


def test_a_model_is_scored_by_its_own_routing():
    model, batch = tiny_mixture(), demonstrations()
    seen = {}
    run(find_mixtures(model), batch, lambda layer, one: seen.update({layer: one}))
    expected = torch.stack([score(seen[layer], use_norm=False) for layer in range(2)])
    with sal.focus(model, sal.EasyEP(use_norm=False), data=batch) as handle:
        assert torch.equal(handle.scores["easy-ep.experts"], expected)
        best = expected.sort(-1, descending=True).indices[:, :4].sort(-1).values
        assert torch.equal(handle.parts[0].kept, best)
    with sal.focus(model, sal.EasyEP(samples=1), data=batch) as handle:
        assert handle.spent["easy-ep"]["demonstrations"] == 1 and handle.spent["easy-ep"]["tokens"] == 10


def test_spent_tells_the_sizes_before_and_after():
    model = tiny_mixture()
    before = model.num_parameters()
    handle = sal.focus(model, sal.EasyEP(keep=2), data=demonstrations())
    spent = handle.spent["easy-ep"]
    # two layers lose 6 experts of 3 * 32 * 48 numbers and 6 rows of the router
    assert spent["parameters before"] - spent["parameters"] == 2 * 6 * (3 * 32 * 48 + 32)
    assert spent["parameters before"] == before and spent["bytes before"] == 4 * before
    assert spent["bytes"] == 4 * spent["parameters"] == 4 * model.num_parameters()


def test_two_cuts_after_each_other_come_off_one_by_one():
    model = tiny_mixture()
    whole = logits_of(model)
    first = sal.focus(model, sal.EasyEP(keep=6), data=demonstrations())
    once = logits_of(model)
    with sal.focus(model, sal.EasyEP(keep=3, mode="mask"), data=demonstrations()):
        assert not torch.equal(logits_of(model), once)
    assert torch.equal(logits_of(model), once)
    first.undo()
    assert torch.equal(logits_of(model), whole)


# routing in groups without some experts


def rules(**settings):
    return {"groups": 4, "chosen": 2, "top_k": 3, **settings}


def test_routing_without_removals_is_the_stock_router_of_deepseek():
    model = tiny_mixture("deepseek3", n_group=4, topk_group=2)
    router = find_mixtures(model).layers[0].router
    hidden = torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
    logits, weights, ids = router(hidden)
    keep = torch.ones(8, dtype=torch.bool)
    found, chosen = route(logits, router.e_score_correction_bias, keep, **rules(top_k=2))
    order, stock = chosen.argsort(-1), ids.argsort(-1)
    assert torch.equal(chosen.gather(1, order), ids.gather(1, stock))
    torch.testing.assert_close(found.gather(1, order) * 2.5, weights.gather(1, stock))


def test_routing_among_survivors_is_what_the_cut_router_does():
    model = tiny_mixture("deepseek3")
    router = find_mixtures(model).layers[0].router
    bias = router.e_score_correction_bias.clone()
    hidden = torch.randn(60, 32, generator=torch.Generator().manual_seed(3))
    logits = router(hidden)[0]
    with sal.focus(model, sal.EasyEP(), data=demonstrations()) as handle:
        keep = torch.zeros(8, dtype=torch.bool)
        keep[handle.parts[0].kept[0]] = True
        _, weights, ids = router(hidden)
    found, chosen = route(logits, bias, keep, groups=2, chosen=1, top_k=2)
    order, stock = chosen.argsort(-1), ids.argsort(-1)
    assert torch.equal(chosen.gather(1, order), ids.gather(1, stock))
    torch.testing.assert_close(found.gather(1, order) * 2.5, weights.gather(1, stock))


def test_a_removed_expert_is_never_chosen_however_few_are_left():
    random = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(200, 12, generator=random), -1.5 * torch.rand(12, generator=random)
    keep = torch.zeros(12, dtype=torch.bool)
    keep[[0, 1, 3, 4, 5, 6]] = True  # the last group has none, the third has one
    weights, ids = route(logits, bias, keep, **rules())
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    assert ((ids == -1) == (weights == 0)).all() and (ids >= 0).any(-1).all() and ids.max() < 6
    official = route(logits, bias, keep, **rules(), official=True)[1]
    assert (official == -1).any(), "the official rule chooses removed experts here"


@pytest.mark.parametrize("family", ["qwen2", "deepseek3"])
def test_every_ablation_cuts_a_model(family):
    model = tiny_mixture(family)
    whole = logits_of(model)
    for settings in ({"token_weight": False}, {"use_norm": False}):
        with sal.focus(model, sal.EasyEP(**settings), data=demonstrations()):
            assert not torch.allclose(logits_of(model), whole)
