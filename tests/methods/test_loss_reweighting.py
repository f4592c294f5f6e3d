"""LossReweighting: invariants, the worked example, and sharding."""

import math

import pytest
import torch
from conftest import collate, ragged_samples, tiny_gpt2, tiny_llama

import salience as sal
from salience.methods.samples.loss_reweighting import rank_loss, scaled_losses, score, spend

STRATEGIES = ("linupper", "quadratic", "extremes")
CONTRACT = {
    "method": sal.LossReweighting(temperature=0.4),
    "model": tiny_llama,
    "bad": {
        "strategy": ("upper", "strategy must be one of linupper, quadratic, extremes, uniform, got 'upper'"),
        "temperature": (0.0, "temperature must be > 0 and finite, got 0.0"),
        "temperature:2": (math.inf, "temperature must be > 0 and finite, got inf"),
        "delta": (-1.0, "delta must be > 0 and finite, got -1.0"),
        "warmup_steps": (-1, "warmup_steps must be >= 0, got -1"),
        "range_floor": (0.0, "range_floor must be > 0, got 0.0"),
        "scope": ("node", "scope must be one of global, local, got 'node'"),
    },
}


def weights(losses, strategy="linupper", r=1.0):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    present = torch.ones_like(losses, dtype=torch.bool)
    return spend(score(scaled_losses(losses, present), strategy), present, temperature=r)


@pytest.mark.parametrize(
    "strategy, expected",
    [
        ("linupper", [0.1237, 0.2039, 0.3362, 0.3362]),
        ("quadratic", [0.1463, 0.3097, 0.3977, 0.1463]),
        ("extremes", [0.3362, 0.2039, 0.1237, 0.3362]),
        ("uniform", [0.25] * 4),
    ],
)
def test_worked_example(strategy, expected):
    assert weights([1, 2, 3, 5], strategy).tolist() == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("size", [1, 2, 63])
def test_invariants(strategy, size):
    losses = torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(size)) * 4
    w = weights(losses, strategy, 0.4)
    assert float(w.sum()) == pytest.approx(1.0) and (w > 0).all()
    torch.testing.assert_close(weights(losses + 7, strategy, 0.4), w)
    torch.testing.assert_close(weights(losses * 3, strategy, 0.4), w)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(weights(losses[order], strategy, 0.4), w[order])
    assert float(w.max() / w.min()) <= math.exp(1 / 0.4) * (1 + 1e-9)
    torch.testing.assert_close(
        weights(losses, strategy, 1e9), torch.full_like(w, 1 / size), rtol=1e-6, atol=0
    )


def test_linupper_gives_all_high_losses_the_same_largest_weight():
    losses = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0])
    w = weights(losses)
    assert w[2] == w[3] == w[4] > w[1] > w[0]


def test_equal_losses_are_uniform_and_rows_without_labels_are_absent():
    assert weights([2.0] * 5).tolist() == pytest.approx([0.2] * 5)
    losses = torch.tensor([1.0, torch.nan, 3.0])
    present = torch.tensor([True, False, True])
    w = spend(score(scaled_losses(losses.nan_to_num(), present), "linupper"), present)
    assert w[1] == 0 and float(w.sum()) == pytest.approx(1.0)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert spend(torch.zeros(3), nothing).tolist() == [0, 0, 0]


def test_ranks_averaged_give_the_gradient_of_one_batch():
    losses = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = weights(losses)
    counts = torch.full((8,), 5)
    leaf = losses.clone().requires_grad_()
    (rank_loss(w[:4], leaf[:4], counts[:4], 2) + rank_loss(w[4:], leaf[4:], counts[4:], 2)).div(2).backward()
    torch.testing.assert_close(leaf.grad, w)


def mean_loss(model, sample):
    batch = collate([sample])
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:])


@pytest.mark.parametrize("cut", [8, 4])
def test_the_loops_gradient_is_the_weighted_sum_of_sample_gradients(cut):
    samples = ragged_samples(8)
    model = tiny_gpt2()
    loop = sal.loop(model, sal.LossReweighting(temperature=0.4))
    loop.begin()
    batches = [collate(samples[i : i + cut]) for i in range(0, 8, cut)]
    loop.start_step(batches)
    for batch in batches:
        loop.loss(batch).backward()
    loop.finish_step()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for start in range(0, 8, cut):
        alone = [mean_loss(model, sample) for sample in samples[start : start + cut]]
        # each micro-batch gets the same total mass
        w = weights(torch.stack(alone).detach(), "linupper", 0.4)
        ((w * torch.stack(alone)).sum() * cut / 8).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            got[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_warmup_is_uniform_over_samples():
    samples = ragged_samples(6)
    loop = sal.loop(tiny_llama(), sal.LossReweighting(temperature=0.1, warmup_steps=1))
    loop.begin()
    for step in range(2):
        loop.start_step([collate(samples)])
        loop.loss(collate(samples)).backward()
        loop.finish_step()
        w = loop.parts[0].scores()["weights"]
        assert (w.max() - w.min() < 1e-6) == (step == 0)
