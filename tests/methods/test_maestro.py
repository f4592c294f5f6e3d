"""Maestro: factors that compute the same, an ordered sampler, a lasso that works at zero, ranks that only fall."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from conftest import (
    Listed,
    collate,
    losses_of,
    ragged_samples,
    tiny_gpt2,
    tiny_llama,
    tiny_trainer,
    with_lora,
)
from torch import nn
from transformers import TrainerCallback

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError, TargetError
from salience.methods.ranks.maestro import importance, keep_mask, match_loss, split

CONTRACT = {
    "method": sal.Maestro(weight=1e-3, eps=0.5),
    "model": tiny_llama,
    "bad": {
        "weight": (-1.0, "weight must be >= 0 and finite, got -1.0"),
        "eps": (float("nan"), "eps must be >= 0 and finite, got nan"),
        "shrink_every": (0, "shrink_every must be a whole number >= 1 or None, got 0"),
        "sampler": ("pufferfish", "sampler must be one of pair, independent, none, got 'pufferfish'"),
        "keep": (0.0, r"keep must be in \(0, 1\] or None, got 0.0"),
        "keep:2": (1.5, r"keep must be in \(0, 1\] or None, got 1.5"),
        "ignore_first": (-1, "ignore_first must be a whole number >= 0, got -1"),
        "warm_up_steps": (-1, "warm_up_steps must be a whole number >= 0, got -1"),
        "calibration_batches": (-1, "calibration_batches must be a whole number >= 0, got -1"),
        "output": ("small", "output must be one of dense, factors, got 'small'"),
        "seed": (-1, "seed must be >= 0 or None, got -1"),
    },
}


def mlp(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 5)).to(dtype)


def convolutions(**settings):
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, **settings)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1, bias=False)).double()


def trained_a_little(model, layers, inputs, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layers


# --- factors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_full_rank_computes_what_the_dense_layer_computes(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12, bias=bias), nn.Tanh(), nn.Linear(12, 5, bias=bias)).double()
    x = torch.randn(4, 7, dtype=torch.float64)
    expected, names = model(x), [name for name, _ in model.named_parameters()]
    dense = [p.clone() for p in model.parameters()]
    layers = sal.decompose(model)
    assert list(layers) == ["0", "2"] and layers.ranks == [7, 5]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-10)
    sal.to_dense(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert all(type(one) in (nn.Linear, nn.Tanh) for one in model)
    for old, new in zip(dense, model.parameters()):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": "same"},
        {"padding": 2, "padding_mode": "reflect", "bias": False},
        {"padding": (1, 0), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_convolutions_keep_stride_padding_and_dilation(settings):
    model = convolutions(**settings).eval()
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    expected = model(x)
    layers = sal.decompose(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    assert layers["0"].V.shape == (8, 3, 3, 3) and layers["0"].U.shape == (8, 8)
    layers["0"].rank = 2
    cut = model(x)
    assert cut.shape == expected.shape and not torch.allclose(cut, expected)
    sal.to_factors(model)
    torch.testing.assert_close(model(x), cut, rtol=0, atol=1e-10)
    assert type(model[0]) is nn.Sequential and [type(one) for one in model[0]] == [nn.Conv2d, nn.Conv2d]
    assert model[0][1].kernel_size == (1, 1) and (model[0][1].bias is None) == (settings.get("bias") is False)


def test_groups_subclasses_tied_frozen_and_thin_layers_stay_dense():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "own": Own(4, 4),
            "tied": nn.Linear(4, 6, bias=False),
            "embedding": nn.Embedding(6, 4),
            "frozen": nn.Linear(4, 4).requires_grad_(False),
            "thin": nn.Linear(4, 1),
            "plain": nn.Linear(4, 4),
        }
    )
    model["tied"].weight = model["embedding"].weight
    assert list(sal.decompose(model)) == ["plain"]
    with pytest.raises(StructureError, match="model must have linear layers or convolutions to decompose"):
        sal.decompose(model)


def test_a_layer_used_twice_is_factored_once():
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU()))
    x = torch.randn(3, 6)
    expected = model(x)
    assert list(sal.decompose(model)) == ["0"]
    assert model[0] is model[1][0]
    torch.testing.assert_close(model(x), expected)
    sal.to_factors(model)
    assert model[0] is model[1][0] is shared


@pytest.mark.parametrize(
    "settings, paths",
    [
        ({"ignore_first": 1}, ["2", "4"]),
        ({"ignore_last": True}, ["0", "2"]),
        ({"ignore_first": 1, "ignore_last": True}, ["2"]),
    ],
)
def test_first_and_last_layers_are_left_dense_when_asked(settings, paths):
    assert list(sal.decompose(mlp(), **settings)) == paths


def test_weights_that_are_not_finite_change_nothing():
    model = mlp()
    model[4].weight.data[0, 0] = torch.inf
    before = list(model)
    with pytest.raises(StructureError, match="weights must be finite to be decomposed"):
        sal.decompose(model)
    assert list(model) == before and model[0].weight.numel() == 84


def test_a_start_below_full_rank_is_the_truncated_decomposition():
    model = mlp()
    P, S, Q = torch.linalg.svd(model[2].weight.detach(), full_matrices=False)
    sal.decompose(model, rank={"2": 3})
    assert (model[0].rank, model[2].rank) == (7, 3)
    torch.testing.assert_close(model[2].weight, P[:, :3] * S[:3] @ Q[:3], rtol=0, atol=1e-12)
    assert sal.decompose(mlp(), rank=6).ranks == [6, 6, 5]
    with pytest.raises(ParameterError, match=r"rank must be in \[1, 7\], got 8"):
        sal.decompose(mlp(), rank={"0": 8})
    with pytest.raises(ParameterError, match=r"rank must be in \[1, 7\], got 0"):
        sal.decompose(mlp(), rank=0)


def test_physical_slicing_equals_masking_and_dense_is_their_product():
    model, x = mlp(), torch.randn(4, 7, dtype=torch.float64)
    layers = trained_a_little(model, sal.decompose(model), x)
    for layer, rank in zip(layers.values(), (2, 3, 5)):
        layer.rank = rank
    masked = model(x)
    by_hand = x
    for index, layer in zip((0, 2, 4), layers.values()):
        mask = (torch.arange(layer.U.shape[1]) < layer.rank).double()
        by_hand = F.linear(by_hand, layer.U * mask @ layer.V, layer.bias)
        by_hand = by_hand.relu() if index < 4 else by_hand
    torch.testing.assert_close(masked, by_hand, rtol=0, atol=1e-12)
    import copy

    for make in (sal.to_dense, sal.to_factors):
        done = make(copy.deepcopy(model))
        torch.testing.assert_close(done(x), masked, rtol=0, atol=1e-12)
        assert all(type(m) in (nn.Sequential, nn.Linear, nn.ReLU) for m in done.modules())
    # rank 5 of a 5 x 9 layer would be larger as factors
    assert [type(m) for m in done] == [nn.Sequential, nn.ReLU, nn.Sequential, nn.ReLU, nn.Linear]


def test_factors_survive_state_dicts_copies_and_moves():
    model, x = mlp(), torch.randn(4, 7, dtype=torch.float64)
    layers = trained_a_little(model, sal.decompose(model), x)
    layers["2"].rank = 4
    other = mlp(seed=1)
    sal.decompose(other)
    other.load_state_dict(model.state_dict())
    assert other[2].rank == 4
    assert torch.equal(other(x), model(x))
    half = mlp()
    expected = half(x)
    loop = sal.loop(half, sal.Maestro())
    half.float()
    torch.testing.assert_close(half.eval()(x.float()), expected.float())
    loop.record.undo()
    assert half[0].weight.dtype == torch.float32 and type(half[0]) is nn.Linear


def test_conv1d_of_gpt2_is_factored_and_comes_back():
    model = tiny_gpt2().eval()
    batch = collate(ragged_samples(2))
    expected, kinds = model(**batch).logits, [type(m).__name__ for m in model.modules()]
    layers = sal.decompose(model)
    assert layers["transformer.h.0.attn.c_attn"].shape == (96, 32)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-10)
    assert layers["transformer.h.0.attn.c_attn"].weight.shape == (32, 96)
    sal.to_dense(model)
    assert [type(m).__name__ for m in model.modules()] == kinds
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-10)


def test_torch_transformer_layers_run_on_their_weight_property():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        expected = layer(x)
        assert list(sal.decompose(layer)) == ["linear1", "linear2"]
        torch.testing.assert_close(layer(x), expected)


# --- lasso, importance, shrinking ----------------------------------------------------------------------------------


def test_the_values_of_the_small_example():
    U = torch.tensor([[3.0, 0.0], [4.0, 1.0]], dtype=torch.float64)
    V = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert sal.group_lasso(U, V).tolist() == [6.0, 3.0]
    first, second = sal.component_norms(U, V)
    assert first.tolist() == pytest.approx([26**0.5, 1.0]) and second.tolist() == pytest.approx([5**0.5, 2.0])
    assert float(sal.hierarchical_lasso(U, V).sum()) == pytest.approx(10.3350875, abs=1e-7)
    assert importance(U, V).tolist() == pytest.approx([11.4017543, 2.0], abs=1e-7)


@pytest.mark.parametrize("lasso", [sal.hierarchical_lasso, sal.group_lasso])
def test_gradients_match_finite_differences_and_are_finite_at_zero(lasso):
    torch.manual_seed(0)
    U = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    V = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: lasso(a, b).sum(), (U, V))
    with torch.no_grad():
        U[:, 1:] = 0
        V[1:] = 0
    grads = torch.autograd.grad(lasso(U, V).sum(), (U, V))
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert not grads[0][:, 1:].any() and grads[0][:, 0].norm() > 0


def test_tails_never_grow_and_the_plain_lasso_is_the_smaller_one():
    torch.manual_seed(0)
    U, V = torch.randn(9, 6), torch.randn(6, 11)
    hierarchical, scores = sal.hierarchical_lasso(U, V), importance(U, V)
    assert bool((hierarchical.diff() <= 0).all() and (scores.diff() <= 0).all())
    assert bool((sal.group_lasso(U, V) <= hierarchical).all())
    for eps in (0.0, float(scores[3]), float(scores[0]) * 2):
        mask = keep_mask(scores, eps)
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
    assert keep_mask(scores, float(scores[3])).sum() == 4
    # a relative threshold does not see the scale
    assert torch.equal(keep_mask(scores, 0.3, relative=True), keep_mask(1e-6 * scores, 0.3, relative=True))
    assert keep_mask(scores, 0.3, relative=True).sum() < 6


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda one: one.__name__)
def test_what_was_dropped_stays_at_zero_whatever_the_optimizer_remembers(optimizer):
    model, x = mlp(), torch.randn(16, 7, dtype=torch.float64)
    layers = sal.decompose(model)
    steps = optimizer(
        model.parameters(), lr=0.05, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    )
    for step in range(8):
        (model(x).square().mean() + 0.01 * layers.penalty()).backward()
        steps.step()
        steps.zero_grad()
        if step == 3:
            scores = {path: importance(layer.U, layer.V) for path, layer in layers.items()}
            eps = float(scores["2"][4])
            ranks = sal.shrink(layers, eps, optimizer=steps)
            assert ranks["2"] == 5 == layers["2"].rank == int(layers["2"].kept)
            assert ranks == {path: max(int((s >= eps).sum()), 1) for path, s in scores.items()}
            kept = layers["2"].U.detach().clone()
    for layer in layers.values():
        assert not layer.U[:, layer.rank :].any() and not layer.V[layer.rank :].any()
    assert not torch.equal(layers["2"].U[:, :5], kept[:, :5])
    # dropping everything leaves one component
    assert set(sal.shrink(layers, 1e9).values()) == {1}
    assert set(sal.shrink(layers, 0.0).values()) == {1}


def test_the_plain_lasso_keeps_a_prefix_too():
    torch.manual_seed(0)
    layer = next(iter(sal.decompose(nn.Sequential(nn.Linear(4, 4))).values()))
    with torch.no_grad():
        layer.U.copy_(torch.diag(torch.tensor([2.0, 1.0, 0.1, 3.0])))
        layer.V.copy_(torch.eye(4))
    assert sal.shrink({"": layer}, 0.5, hierarchical=False) == {"": 2}


# --- the sampler ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[3, 3, 2], [1], [25, 7]], ids=str)
def test_a_cycle_draws_every_pair_exactly_once(ranks):
    draws = sal.OrderedRanks(ranks, seed=5, start=10)
    every = Counter((layer, rank) for layer, r in enumerate(ranks) for rank in range(1, r + 1))
    size = len(draws)
    cycles = [[draws.at(10 + cycle * size + i) for i in range(size)] for cycle in range(3)]
    assert all(Counter(cycle) == every for cycle in cycles)
    assert size < 5 or len({tuple(cycle) for cycle in cycles}) == 3
    # another process, another order of asking: the same draws
    again = sal.OrderedRanks(ranks, seed=5, start=10)
    assert [again.at(10 + i) for i in reversed(range(size))] == cycles[0][::-1]
    assert (
        size < 5 or [sal.OrderedRanks(ranks, seed=6, start=10).at(10 + i) for i in range(size)] != cycles[0]
    )


def test_independent_ranks_are_uniform():
    draws = sal.OrderedRanks([4, 2], seed=0)
    first = Counter(draws.independent(step)[0] for step in range(2000))
    assert set(first) == {1, 2, 3, 4}
    assert sum((count - 500) ** 2 / 500 for count in first.values()) < 16.3  # 99.9 % quantile, 3 degrees


@pytest.mark.parametrize("ranks", [[], [2, 0]])
def test_ranks_below_one_are_refused(ranks):
    with pytest.raises(ParameterError, match="ranks must be whole numbers >= 1"):
        sal.OrderedRanks(ranks)


def test_only_the_drawn_layer_runs_cut_and_only_in_training():
    model, x = mlp(), torch.randn(4, 7, dtype=torch.float64)
    layers = sal.decompose(model)
    full = model(x)
    for layer, rank in ((0, 3), (2, 1), (1, 9)):
        layers.cut((layer, rank))
        assert [one.cut for one in layers.values()] == [rank if i == layer else None for i in range(3)]
        assert torch.allclose(model(x), full) == (rank == list(layers.values())[layer].rank)
        torch.testing.assert_close(model.eval()(x), full)
        model.train()
    layers.cut((0, 3))
    model(x).sum().backward()
    # whole parameters stay in the graph: data parallel training misses no gradient
    assert layers["0"].U.grad.shape == (12, 7) and not layers["0"].U.grad[:, 3:].any()
    assert layers["0"].U.grad[:, :3].any()


# --- accounting ----------------------------------------------------------------------------------------------------


def test_multiply_adds_of_dense_factored_and_stock_layers():
    model = convolutions(padding=1)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    dense = 2 * 25 * (8 * 27 + 4 * 8)
    assert sal.multiply_adds(model, x) == dense
    layers = sal.decompose(model)
    layers["0"].rank, layers["3"].rank = 3, 1
    small = 2 * 25 * (3 * (8 + 27) + 1 * (4 + 8))
    assert sal.multiply_adds(model, x) == small
    sal.to_factors(model)
    assert sal.multiply_adds(model, x) == small and model.training
    batch = collate(ragged_samples(3))
    llama = tiny_llama()
    tokens = batch["input_ids"].numel()
    weights = sum(m.weight.numel() for m in llama.modules() if isinstance(m, nn.Linear))
    assert sal.multiply_adds(llama, batch) == tokens * weights


def test_a_budget_takes_the_least_important_tails_first():
    scores = [torch.tensor([1.0, 0.5, 0.1, 0.01]), torch.tensor([10.0, 9.0, 8.0, 7.0])]
    shapes = [(4, 12), (4, 12)]  # rank 3 is as large as dense, rank r < 3 holds 16 r of 48
    assert sal.ranks_for_budget(scores, shapes, 1.0) == [4, 4]
    assert sal.ranks_for_budget(scores, shapes, 0.9) == [2, 4]
    assert sal.ranks_for_budget(scores, shapes, 0.67) == [1, 4]
    assert sal.ranks_for_budget(scores, shapes, 1 / 3) == [1, 1]
    with pytest.raises(
        ParameterError, match=r"keep must be at least 0.3333 \(rank 1 in every layer\), got 0.3"
    ):
        sal.ranks_for_budget(scores, shapes, 0.3)


def test_a_search_spares_the_layer_that_the_score_needs():
    model = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    layers = sal.decompose(model)
    ranks = sal.search_ranks(layers, lambda: float(layers["1"].rank), 0.5, step=0.25)
    assert ranks == {"0": 1, "1": 7} and layers.ranks == [16, 16]
    with pytest.raises(ParameterError, match="keep must be at least what rank 1 in every layer costs"):
        sal.search_ranks(layers, lambda: 0.0, 0.1)


# --- batch norm ----------------------------------------------------------------------------------------------------


def test_recalibration_is_the_mean_over_batches_and_leaves_momentum_and_modes():
    model = convolutions()
    model[1].momentum = 0.3
    model[0].eval()
    modes = [m.training for m in model.modules()]
    batches = [torch.randn(4, 3, 6, 6, dtype=torch.float64) for _ in range(3)]
    sal.decompose(model)
    assert sal.recalibrate(model, batches) == 3
    assert model[1].momentum == 0.3 and [m.training for m in model.modules()] == modes
    hidden = [model[0](batch) for batch in batches]
    torch.testing.assert_close(
        model[1].running_mean, torch.stack([h.mean((0, 2, 3)) for h in hidden]).mean(0)
    )
    variances = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in hidden]).mean(0)
    torch.testing.assert_close(model[1].running_var, variances)
    assert sal.recalibrate(mlp(), []) == 0
    with pytest.raises(ParameterError, match="batches must be at least one batch"):
        sal.recalibrate(model, [])
    with pytest.raises(RuntimeError, match="stop"):
        sal.recalibrate(model, batches, lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert model[1].momentum == 0.3 and [m.training for m in model.modules()] == modes


# --- in a loop -----------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    def __init__(self, batch_norm=False):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(16) if batch_norm else nn.Identity()
        self.net = nn.Sequential(
            nn.Linear(8, 16), norm, nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
        )

    def forward(self, inputs, labels):
        logits = self.net(inputs)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def examples(count=4, size=8):
    random = torch.Generator().manual_seed(0)
    return [
        {
            "inputs": torch.randn(size, 8, generator=random),
            "labels": torch.randint(3, (size,), generator=random),
        }
        for _ in range(count)
    ]


def run(model, method, steps, rate=0.05, data=None):
    loop = sal.loop(model, method, shifted=False, data=data)
    loop.begin(torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9))
    batches, seen = examples(), []
    for step in range(steps):
        batch = batches[step % len(batches)]
        loop.start_step([batch])
        loss = loop.loss(batch)
        loss.backward()
        loop.finish_step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        seen.append((float(loss.detach()), [layer.cut for layer in loop.parts[0]._layers.values()]))
    loop.end()
    return loop, seen


def test_each_step_of_a_loop_cuts_one_layer_and_adds_the_penalty():
    model = Classifier()
    reference = Classifier()
    layers = sal.decompose(reference, ignore_last=True)
    draws = sal.OrderedRanks(layers.ranks, seed=0)
    expected = []
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    for step in range(6):
        layers.cut(draws.at(step))
        loss = reference(**examples()[step % 4])["loss"] + 0.01 * layers.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    loop, seen = run(model, sal.Maestro(weight=0.01), 6)
    assert [loss for loss, _ in seen] == pytest.approx(expected, rel=1e-6)
    assert [cut for _, cut in seen] == [
        [draws.at(step)[1] if i == draws.at(step)[0] else None for i in range(2)] for step in range(6)
    ]
    assert all(layer.cut is None for layer in loop.parts[0]._layers.values())


def test_shrinking_every_few_steps_rebuilds_the_sampler():
    loop, seen = run(Classifier(), sal.Maestro(eps=0.4, relative=True, shrink_every=4, weight=1e-3), 12)
    part = loop.parts[0]
    history = part.histories["rank of each layer"]
    assert history.steps == [0, 4, 8, 12]
    values = history.values()
    assert values[0].tolist() == [8.0, 16.0] and bool((values.diff(dim=0) <= 0).all())
    assert values[-1].tolist() == part._layers.ranks and values[1].sum() < 24
    for step, (_, cuts) in enumerate(seen[4:8]):
        assert sum(cut is not None for cut in cuts) == 1, step
        assert all(cut is None or cut <= rank for cut, rank in zip(cuts, values[1].tolist()))


@pytest.mark.parametrize("sampler", ["independent", "none"])
def test_other_samplers(sampler):
    _, seen = run(Classifier(), sal.Maestro(sampler=sampler), 5)
    assert all((cut is None) == (sampler == "none") for _, cuts in seen for cut in cuts)


def test_a_full_pass_matches_the_cut_model_to_the_full_one():
    model = Classifier()
    batch = examples()[0]
    full = model(**batch)["logits"]
    loop = sal.loop(model, sal.Maestro(full_pass=True, weight=0.0), shifted=False)
    loop.begin(torch.optim.SGD(model.parameters(), lr=0.1))
    loop.start_step([batch])
    loss = loop.loss(batch)
    layers = loop.parts[0]._layers
    layers.cut(loop.parts[0]._draws.at(0))
    cut = model(**batch)["logits"]
    own = -(full.softmax(-1) * cut.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(loss, F.cross_entropy(full, batch["labels"]) + own)
    assert not torch.allclose(cut, full)


def test_matching_counts_the_tokens_that_have_a_loss():
    torch.manual_seed(0)
    cut, full = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    active = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 1]]).bool()
    every = -(full.softmax(-1) * cut.log_softmax(-1)).sum(-1)
    wanted = torch.stack([every[0, 0], every[0, 1], every[0, 3], every[1, 3]]).mean()
    torch.testing.assert_close(match_loss(cut, full, active, shifted=True), wanted)
    torch.testing.assert_close(match_loss(cut, full, active, shifted=False), every[active].mean())
    assert float(match_loss(cut, full, torch.zeros_like(active), shifted=False)) == 0.0


def test_warm_up_trains_plain_factors_and_then_splits_them_again():
    method = sal.Maestro(warm_up_steps=3, weight=1.0)
    loop, seen = run(Classifier(), method, 3)
    assert all(cuts == [None, None] for _, cuts in seen) and seen[0][0] < 2
    layer = loop.parts[0]._layers["net.0"]
    product = (layer.U @ layer.V).detach()
    assert layer.U in loop.optimizer.state
    loop.start_step([examples()[0]])
    torch.testing.assert_close(layer.U @ layer.V, product)
    expected = split(product)
    torch.testing.assert_close(layer.U.T @ layer.U, expected[0].T @ expected[0], atol=1e-5, rtol=1e-4)
    assert layer.U not in loop.optimizer.state and layer.bias in loop.optimizer.state
    assert sum(one.cut is not None for one in loop.parts[0]._layers.values()) == 1


def test_undo_before_training_is_exact_and_after_it_holds_the_product():
    model = Classifier()
    before, modules = [p.clone() for p in model.parameters()], list(model.modules())
    loop = sal.loop(model, sal.Maestro(), shifted=False)
    assert list(model.modules()) != modules
    loop.record.undo()
    assert list(model.modules()) == modules
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    loop, _ = run(model, sal.Maestro(), 4)
    batch = examples()[0]
    trained = model(**batch)["logits"]
    loop.record.undo()
    assert list(model.modules()) == modules
    torch.testing.assert_close(model(**batch)["logits"], trained)
    assert not torch.equal(model.net[0].weight, before[0])


def test_finish_leaves_stock_layers_within_the_budget():
    model = Classifier()
    loop, _ = run(model, sal.Maestro(keep=0.5, output="factors"), 8)
    part = loop.parts[0]
    part.finish()
    spent = part.spent()
    held = sum(p.numel() for name, p in model.net.named_parameters() if "weight" in name) - 3 * 16
    assert spent["weights of these layers, as finished"] == held <= 0.5 * (8 * 16 + 16 * 16)
    assert {type(m).__module__ for m in model.net.modules()} <= {
        "torch.nn.modules.linear", "torch.nn.modules.container", "torch.nn.modules.activation"
    } | {"torch.nn.modules.normalization"}  # fmt: skip
    logits = model(**examples()[0])["logits"]
    part.finish()
    loop.record.undo()
    assert torch.equal(model(**examples()[0])["logits"], logits)
    assert part.spent() == spent and part.draw() is not None
    with pytest.raises(ParameterError, match=r"keep must be at least 0\.1458"):
        sal.loop(Classifier(), sal.Maestro(keep=0.1))


def test_batch_norms_are_estimated_at_the_final_ranks():
    model = Classifier(batch_norm=True)
    loop, _ = run(model, sal.Maestro(keep=0.4), 8, data=examples())
    norm, old = model.net[1], model.net[1].running_mean.clone()
    loop.parts[0].finish()
    assert not torch.equal(norm.running_mean, old) and norm.momentum == 0.1
    means = torch.stack([model.net[0](batch["inputs"]).mean(0) for batch in examples()])
    torch.testing.assert_close(norm.running_mean, means.mean(0))


def test_an_optimizer_over_the_dense_weights_is_refused():
    model = Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = sal.loop(model, sal.Maestro(), optimizer=optimizer)
    with pytest.raises(ConflictError, match=r"optimizer must be built after Maestro was attached.*net\.0"):
        loop.begin()


# --- on a Trainer --------------------------------------------------------------------------------------------------


def test_a_trainer_trains_the_factors_and_shrinks_each_epoch(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_llama(layers=1), max_steps=9, weight_decay=0.1)
    handle = sal.focus(trainer, sal.Maestro(eps=0.3, relative=True, weight=1e-3))
    layers = handle.parts[0]._layers
    assert len(layers) == 7 and not any("lm_head" in path or "embed" in path for path in layers)
    start = {path: layer.U.detach().clone() for path, layer in layers.items()}
    trainer.train()
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all({id(one.U), id(one.V)} <= held for one in layers.values())
    assert all(not torch.equal(one.U, start[path]) for path, one in layers.items())
    history = handle.parts[0].histories["rank of each layer"]
    assert history.steps == [0, 4, 8, 9]  # 8 samples in batches of 2
    assert history.values()[-1].sum() < history.values()[0].sum()
    assert len(losses_of(trainer)) == 9
    spent = handle.spent["maestro"]
    assert spent["components kept"] == int(history.values()[-1].sum()) < spent["components"]
    assert handle.scores["maestro.model.layers.0.self_attn.q_proj.importance"].shape == (32,)
    figure = handle.plot(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 10_000
    assert len([axes for axes in figure.axes if axes.get_visible()]) == 7


def test_the_penalty_is_taken_once_a_step_also_under_accumulation(tmp_path):
    first = {}
    for name, size, count in (("whole", 4, 1), ("parts", 1, 4)):
        for weight in (0.0, 0.1):
            trainer = tiny_trainer(
                tmp_path / f"{name}{weight}", max_steps=1, per_device_train_batch_size=size,
                gradient_accumulation_steps=count,
            )  # fmt: skip
            sal.focus(trainer, sal.Maestro(weight=weight, sampler="none"))
            trainer.train()
            first[name, weight] = losses_of(trainer)[0]
    gains = [first[name, 0.1] - first[name, 0.0] for name in ("whole", "parts")]
    model = tiny_llama()
    expected = 0.1 * float(sal.decompose(model, ignore_last=True).penalty().detach())
    assert gains == pytest.approx([expected, expected], rel=1e-3)


@pytest.mark.parametrize("full_pass", [False, True])
def test_evaluation_in_training_runs_all_kept_components(tmp_path, full_pass):
    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            found.append((any(layer.cut for layer in layers), trainer.evaluate()["eval_loss"]))

    found = []
    trainer = tiny_trainer(tmp_path, max_steps=3, callbacks=[Evaluates()])
    trainer.eval_dataset = Listed(ragged_samples(4, seed=9))
    layers = list(sal.focus(trainer, sal.Maestro(full_pass=full_pass)).parts[0]._layers.values())
    trainer.train()
    assert [cut for cut, _ in found] == [not full_pass] * 3
    assert trainer.evaluate()["eval_loss"] == found[-1][1]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"optimizer": True}, "trainer.optimizer must be None"),
        ({"checkpointing": True}, "gradient_checkpointing must be False with full_pass"),
    ],
    ids=str,
)
def test_trainers_that_it_cannot_use_are_refused(tmp_path, change, text):
    trainer = tiny_trainer(tmp_path, gradient_checkpointing="checkpointing" in change)
    if "optimizer" in change:
        trainer.create_optimizer()
    with pytest.raises(ConflictError, match=text):
        sal.focus(trainer, sal.Maestro(full_pass="checkpointing" in change))
    assert type(trainer.model.model.layers[0].mlp.up_proj) is nn.Linear


def test_adapters_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, with_lora(tiny_llama()))
    with pytest.raises(TargetError, match="model must be without PEFT adapters for Maestro"):
        sal.focus(trainer, sal.Maestro())


def test_a_finished_model_trains_on_as_an_ordinary_one(tmp_path):
    trainer = tiny_trainer(tmp_path)
    handle = sal.focus(trainer, sal.Maestro(weight=10.0, keep=0.8))
    trainer.train()
    penalised = losses_of(trainer)[0]
    handle.finish()
    model = trainer.model
    weight = model.model.layers[0].mlp.up_proj.weight
    old = weight.detach().clone()
    trainer.train()
    # no penalty any more, which was hundreds of nats
    assert not torch.equal(weight, old) and penalised > 100 and losses_of(trainer)[-1] < 6
    handle.undo()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_a_second_run_starts_its_epochs_and_draws_anew(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=5)
    handle = sal.focus(trainer, sal.Maestro(eps=0.3, relative=True))
    for _ in range(2):
        trainer.train()
    assert handle.parts[0].histories["rank of each layer"].steps == [0, 4, 5, 4, 5]


def test_undo_after_training_lets_the_trainer_build_another_optimizer(tmp_path):
    trainer = tiny_trainer(tmp_path)
    handle = sal.focus(trainer, sal.Maestro())
    trainer.train()
    handle.undo()
    weight = trainer.model.model.layers[0].mlp.up_proj.weight
    old = weight.detach().clone()
    trainer.train()
    assert not torch.equal(weight, old)
