"""DAREx: the law of the error by Monte Carlo, every kind of mask, the choice of q, and AdamR against torch's Adam."""

import math

import pytest
import torch
from conftest import losses_of, tiny_gpt2, tiny_llama, tiny_trainer
from torch import nn

import salience as sal
from salience.core.errors import ConflictError, ParameterError, TargetError
from salience.methods.weights._darex_divisors import (
    best_divisor,
    error_bound,
    error_moments,
    geometric_search,
    phi,
    row_divisors,
    trimmed_mean,
)
from salience.methods.weights._darex_masks import (
    kth_smallest,
    magnitude_mask,
    masks,
    named_generator,
    random_mask,
    rows_of,
    wanda_mask,
)
from salience.methods.weights.darex import AdamR, in_scope, layer_divisor, sparsified

CONTRACT = {
    "method": sal.DAREx(keep=0.2, q=0.4, decay=0.5),
    "model": lambda: tiny_llama(layers=3),
    "data": tiny_llama(layers=3, seed=1).state_dict(),
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\], got 0.0"),
        "keep:2": (1.5, r"keep must be a share in \(0, 1\], got 1.5"),
        "keep:3": (math.nan, "keep must be a share"),
        "score": ("size", "score must be one of random, magnitude, wanda, got 'size'"),
        "q": (
            0.05,
            r"q must be in \[keep, 1\] = \[0.1, 1\] or one of auto, layer, output, loss, gradient, got 0.05",
        ),
        "q:2": (1.1, r"q must be in \[keep, 1\]"),
        "q:3": ("rows", "one of auto, layer, output, loss, gradient, got 'rows'"),
        "columns": (0.05, r"columns must be in \[keep, 1\] = \[0.1, 1\], got 0.05"),
        "scope": ("mlp", "scope must be one of auto, all, got 'mlp'"),
        "bias_sign": ("plus", "bias_sign must be one of abs, official"),
        "eta": (0.0, "eta must be > 0 and finite or None, got 0.0"),
        "gamma": (1.0, r"gamma must be in \(0, 1\), got 1.0"),
        "stop_share": (0.0, "stop_share must be > 0"),
        "seed": (-1, "seed must be a whole number >= 0, got -1"),
        "decay": (-1.0, "decay must be >= 0 and finite, got -1.0"),
        "norm": ("l0", "norm must be one of l2, l1, got 'l0'"),
    },
}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the error, and q -----------------------------------------------------------------------------------------


def test_error_of_the_worked_example():
    c, keep = torch.tensor([0.2, -0.1, 0.4, 0.3], dtype=torch.float64), 0.1
    for q, bias, square in ((0.1, 0.0, 2.7), (0.5, 0.64, 0.5176), (1.0, 0.72, 0.5454)):
        mean, moment = error_moments(c, keep, q)
        assert float(mean) == pytest.approx(bias, abs=1e-12) and float(moment) == pytest.approx(
            square, abs=1e-12
        )
    best = best_divisor(c, keep)
    assert best == pytest.approx(0.521875) and float(error_moments(c, keep, best)[1]) == pytest.approx(
        0.517365, abs=1e-6
    )
    assert float(c.sum()) ** 2 == pytest.approx(0.64)


@pytest.mark.parametrize("q", [0.1, 0.3, 1.0])
def test_error_law_by_monte_carlo(q):
    c, keep, draws = randn(12, dtype=torch.float64), 0.1, 200_000
    mask = random_mask((draws, 12), keep, torch.Generator().manual_seed(1))
    errors = (c * (1 - mask.double() / q)).sum(1)
    mean, moment = error_moments(c, keep, q)
    deviation = float((moment - mean**2).sqrt())
    assert abs(float(errors.mean() - mean)) < 5 * deviation / math.sqrt(draws)
    assert float(errors.var()) == pytest.approx(deviation**2, rel=0.03)
    if q == keep:
        for gamma in (0.5, 0.9, 0.99):
            assert float((errors.abs() <= error_bound(c, keep, gamma)).double().mean()) >= gamma


def test_best_divisor_is_the_minimum_of_many_units():
    c, keep = randn(7, 30, dtype=torch.float64) + 0.3, 0.05
    found = best_divisor(c, keep)
    losses = {
        q: float(error_moments(c, keep, q)[1].sum()) for q in (found, found * 1.02, found / 1.02, keep, 1.0)
    }
    assert min(losses, key=losses.get) == found and keep < found < 1
    assert best_divisor(torch.tensor([1.0, -1.0]), 0.1) == 1.0


def test_phi():
    assert phi(0.5) == 0.5 and phi(0.0) == phi(1.0) == 0.0
    assert phi(0.5 + 2e-6) == pytest.approx(0.5, abs=1e-9)
    assert phi(0.9) == pytest.approx(phi(0.1)) == pytest.approx(0.8 / math.log(9))


def transcribed(s, squares, keep, eta, gamma):
    """The scan over the whole grid, in plain Python."""
    chosen = []
    for one, square in zip(s.tolist(), squares.tolist()):
        best, at = math.inf, keep
        for number in range(math.ceil(keep * 1000 - 1e-6), 999):
            q = number / 1000
            value = eta * (1 - keep / q) * one + eta**2 * phi(1 - keep) * square / (4 * q * q)
            value = abs(value + math.log(2 / (1 - gamma)))
            if value <= best:
                best, at = value, q
        chosen.append(at)
    return chosen


@pytest.mark.parametrize("sign", ["abs", "official"])
def test_row_divisors_against_a_transcription(sign):
    sums, squares = 20 * randn(9, dtype=torch.float64), 10 + 30 * torch.rand(9, dtype=torch.float64)
    found = row_divisors(sums, squares, 0.1, gamma=0.9, stop_share=2.0, bias_sign=sign)
    wanted = transcribed(sums.abs() if sign == "abs" else sums, squares, 0.1, 0.45, 0.9)
    assert found.tolist() == pytest.approx(wanted)
    # with most rows satisfied at once, the scan ends before the others find theirs
    early = row_divisors(sums, squares, 0.1, gamma=0.9, stop_share=0.1, bias_sign=sign)
    assert bool((early <= found).all())


def test_layer_divisor_is_the_mean_over_rows_and_counts_the_bias():
    delta, means, bias = randn(6, 40, seed=2) + 0.5, randn(40, seed=3).abs(), randn(6, seed=4)
    method = sal.DAREx(keep=0.1, stop_share=2.0, eta=0.1)
    c = torch.cat([delta.double() * means.double(), bias.double()[:, None]], 1)
    rows = row_divisors(c.sum(1), c.square().sum(1), 0.1, stop_share=2.0, eta=0.1)
    found = layer_divisor("w", delta.shape, rows_of(delta), means, method, bias)
    assert 0.1 < found < 0.998 and found == pytest.approx(float(rows.mean()))
    assert found != layer_divisor("w", delta.shape, rows_of(delta), means, method)
    with pytest.raises(ParameterError, match="input means of w must be 40 long, got 39"):
        layer_divisor("w", delta.shape, rows_of(delta), means[:39], method)


def test_geometric_search_tries_sixteen_points_and_takes_the_best():
    found, tried = geometric_search(lambda q: -abs(q - 0.23), 0.01)
    assert len(tried) == 16 and min(tried) == pytest.approx(0.01) and max(tried) == 1.0
    assert found == min(tried, key=lambda q: abs(q - 0.23))


def test_trimmed_mean_leaves_out_the_farthest():
    assert trimmed_mean([1.0, 2.0, 3.0, 100.0]) == 2.0 and trimmed_mean([1.0, 3.0]) == 2.0


# --- masks ----------------------------------------------------------------------------------------------------


def test_kth_smallest_is_exact():
    values = torch.cat([randn(997), torch.zeros(20), torch.full((13,), 0.5), 1e-30 * randn(10)]).view(40, 26)
    ordered = values.abs().flatten().sort().values
    for k in (1, 5, 21, 300, 1040):
        assert kth_smallest(rows_of(values), values.shape, k) == float(ordered[k - 1])
    assert kth_smallest(rows_of(values), values.shape, 0) == -1.0
    half = values.bfloat16()
    assert kth_smallest(rows_of(half), half.shape, 300) == float(half.abs().flatten().sort().values[299])


def test_magnitude_keeps_the_largest_and_drops_ties():
    delta = torch.tensor([[0.1, -0.3, 0.2], [0.2, 0.5, -0.2]])
    assert magnitude_mask(delta, 0.5).tolist() == [[False, True, False], [False, True, False]]
    assert bool(magnitude_mask(delta, 0.9).all())  # int(6 * 0.1) is 0: nothing is dropped


def test_wanda_weighs_by_the_input_within_rows():
    delta = torch.tensor([[1.0, -0.5, 0.1, 0.2], [0.3, 0.3, 0.3, 0.3]])
    kept = wanda_mask(delta, torch.tensor([0.1, 2.0, 1.0, 4.0]), 0.5)
    assert kept.tolist() == [[False, True, False, True]] * 2
    ties = wanda_mask(torch.ones(2, 4), torch.ones(4), 0.5)
    assert ties.tolist() == [[True, True, False, False]] * 2


def collected(name, shape, delta=None, **settings):
    rows = rows_of(torch.zeros(shape) if delta is None else delta)
    return torch.cat([mask for _, _, mask in masks(name, shape, rows, **settings)])


def test_random_masks_go_by_name_and_seed():
    shape = (300, 4001)  # more than one block
    one = collected("a", shape, keep=0.1, seed=3)
    assert torch.equal(one, collected("a", shape, keep=0.1, seed=3)) and one.shape == shape
    assert not torch.equal(one, collected("b", shape, keep=0.1, seed=3))
    assert not torch.equal(one, collected("a", shape, keep=0.1, seed=4))
    deviation = math.sqrt(0.1 * 0.9 / one.numel())
    assert abs(float(one.double().mean()) - 0.1) < 4 * deviation
    assert named_generator(0, "a").initial_seed() != named_generator(0, "b").initial_seed()
    assert bool(collected("a", (7,), keep=1.0).all())


def test_structured_masks_drop_whole_columns():
    mask = collected("a", (4000, 100), keep=0.01, columns=0.05)
    used = mask.any(0)
    assert int(used.sum()) == 5
    assert float(mask[:, used].double().mean()) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 20_000))
    vector = collected("a", (5000,), keep=0.2, columns=0.5)
    assert float(vector.double().mean()) == pytest.approx(0.2, abs=0.03)


# --- a model --------------------------------------------------------------------------------------------------


def test_scope():
    decoder = ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up.weight",
               "model.layers.0.input_layernorm.weight", "lm_head.weight"]  # fmt: skip
    assert in_scope(decoder, sal.DAREx()) == decoder[1:3]
    assert in_scope(decoder, sal.DAREx(scope="all")) == decoder[:4]
    encoder = ["bert.embeddings.weight", "bert.layer.0.attention.weight", "classifier.weight"]
    assert in_scope(encoder, sal.DAREx()) == encoder[:2]


def test_q_of_keep_is_dare_and_keep_of_one_the_identity():
    base, tuned = randn(30, 20), randn(30, 20, seed=1)
    dare, kept = sparsified("w", base, tuned, sal.DAREx(keep=0.3))
    same, _ = sparsified("w", base, tuned, sal.DAREx(keep=0.3, q=0.3))
    mask = collected("w", (30, 20), keep=0.3)
    assert torch.equal(dare, same) and kept == int(mask.sum())
    assert torch.equal(dare, torch.where(mask, base + (tuned - base) / 0.3, base))
    whole, kept = sparsified("w", base, tuned, sal.DAREx(keep=1.0))
    assert kept == 600
    torch.testing.assert_close(whole, tuned, rtol=0, atol=1e-6)


def test_dtype_is_the_bases_and_sums_are_fp32():
    base, tuned = randn(64, 64).bfloat16(), randn(64, 64, seed=1).bfloat16()
    merged, _ = sparsified("w", base, tuned, sal.DAREx(keep=0.5))
    mask = collected("w", (64, 64), keep=0.5)
    wanted = (base.float() + (tuned.float() - base.float()) / 0.5).bfloat16()
    assert merged.dtype == torch.bfloat16 and torch.equal(merged, torch.where(mask, wanted, base))


def test_on_a_model_heads_stay_and_undo_restores():
    model, base = tiny_llama(), tiny_llama(seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with sal.focus(model, sal.DAREx(keep=0.25), data=base) as handle:
        state = model.state_dict()
        assert torch.equal(state["lm_head.weight"], before["lm_head.weight"])
        name = "model.layers.0.mlp.up_proj.weight"
        at_base = state[name] == base.state_dict()[name]
        assert 0.7 < float(at_base.float().mean()) < 0.8
        spent = handle.spent["darex"]
        assert spent["divided by"] == 0.25 and 0.24 < spent["share kept"] < 0.26 and spent["tensors"] == 14
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_a_model_needs_its_base():
    with pytest.raises(TargetError, match="data must be the base of the fine-tuned model"):
        sal.focus(tiny_llama(), sal.DAREx())
    with pytest.raises(
        ConflictError, match=r"got model\.layers\.0\.self_attn\.q_proj\.weight of shape \[16, 16\]"
    ):
        sal.focus(tiny_llama(), sal.DAREx(), data=tiny_llama(hidden=16))
    with pytest.raises(ConflictError, match="q must be a number or 'auto'"):
        sal.focus(tiny_llama(), sal.DAREx(q="output"), data=tiny_llama())
    with pytest.raises(ParameterError, match=r"columns must be 1 with score 'magnitude', got 0\.5"):
        sal.DAREx(score="magnitude", columns=0.5)
    with pytest.raises(
        ParameterError, match="q must be a number, auto, output, loss or gradient with score 'wanda'"
    ):
        sal.DAREx(score="wanda", q="layer")


# --- AdamR ----------------------------------------------------------------------------------------------------


def pair(seed=0):
    weights = [
        nn.Parameter(randn(3, 4, seed=seed, dtype=torch.float64)),
        nn.Parameter(randn(5, dtype=torch.float64)),
    ]
    return weights, [w.detach() + 0.1 * randn(*w.shape, seed=9, dtype=torch.float64) for w in weights]


def test_adamr_worked_example():
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    anchor = torch.tensor([0.5, 2.5], dtype=torch.float64)
    optimizer = AdamR([weight], {weight: anchor}, lr=0.1, decay=0.5)
    weight.grad = torch.tensor([0.3, -0.4], dtype=torch.float64)
    optimizer.step()
    assert weight.tolist() == pytest.approx([0.82928933, 2.17071068], abs=1e-7)


def test_adamr_without_decay_is_adam():
    ours, theirs = pair()[0], pair()[0]
    optimizers = AdamR(ours, dict(zip(ours, pair()[1])), lr=0.1, decay=0.0), torch.optim.Adam(theirs, lr=0.1)
    for step in range(4):
        for weights, optimizer in zip((ours, theirs), optimizers):
            for weight in weights:
                weight.grad = randn(*weight.shape, seed=step, dtype=torch.float64)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_adamr_without_gradient_pulls_by_lr_times_decay():
    weights, anchors = pair()
    optimizer = AdamR(weights, dict(zip(weights, anchors)), lr=0.1, decay=0.5)
    wanted = [w.detach() - 0.05 * (w.detach() - a) for w, a in zip(weights, anchors)]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    for weight, want in zip(weights, wanted):
        torch.testing.assert_close(weight.detach(), want, rtol=0, atol=1e-12)
    assert len(optimizer.state_dict()["param_groups"][0]["params"]) == 2
    assert not any("pre" in key for key in optimizer.state_dict()["param_groups"][0])


def test_adamr_takes_groups_and_skips_what_has_no_gradient():
    weights, anchors = pair()
    groups = [{"params": weights[1:], "lr": 0.2}, {"params": weights[:1]}]
    optimizer = AdamR(groups, dict(zip(weights, anchors)), lr=0.1, decay=0.5)
    before = weights[0].detach().clone()
    weights[1].grad = torch.zeros_like(weights[1])
    wanted = weights[1].detach() - 0.1 * (weights[1].detach() - anchors[1])
    optimizer.step()
    assert torch.equal(weights[0], before)
    torch.testing.assert_close(weights[1].detach(), wanted, rtol=0, atol=1e-12)
    with pytest.raises(
        ParameterError, match=r"pretrained must be of its parameter's shape \[3, 4\], got \[5\]"
    ):
        AdamR(weights, {weights[0]: anchors[1]})
    with pytest.raises(ConflictError, match="closure must be None"):
        optimizer.step(lambda: 0.0)


def by_hand(model, batches, lr, decay, norm):
    """AdamR written out in float64, over all parameters of a model."""
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    second = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for step, batch in enumerate(batches, 1):
        model.zero_grad()
        model(**batch).loss.backward()
        with torch.no_grad():
            for n, p in model.named_parameters():
                first[n] = 0.9 * first[n] + 0.1 * p.grad
                second[n] = 0.999 * second[n] + 0.001 * p.grad**2
            hats = {n: v / (1 - 0.999**step) for n, v in second.items()}
            vbar = math.sqrt(
                sum(float(v.sum()) for v in hats.values()) / sum(v.numel() for v in hats.values())
            )
            for n, p in model.named_parameters():
                away = p - base[n]
                p -= lr * decay / vbar * (away if norm == "l2" else away.sign())
                p -= lr / (1 - 0.9**step) * first[n] / (hats[n].sqrt() + 1e-8)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_a_trainer_runs_adamr(tmp_path, norm):
    from conftest import collate, ragged_samples

    samples = ragged_samples(2)
    lr, decay = 1e-3, 0.05
    trainer = tiny_trainer(
        tmp_path, tiny_gpt2(), samples=samples, learning_rate=lr, max_grad_norm=0.0, optim="adamw_torch"
    )
    handle = sal.focus(trainer, sal.DAREx(decay=decay, norm=norm))
    trainer.train()
    oracle = tiny_gpt2()
    by_hand(oracle, [collate(samples)] * 3, lr, decay, norm)
    plain = tiny_trainer(
        tmp_path / "plain", tiny_gpt2(), samples=samples, learning_rate=lr, max_grad_norm=0.0
    )
    plain.train()
    apart = 0.0
    for (name, ours), theirs, without in zip(
        trainer.model.named_parameters(), oracle.parameters(), plain.model.parameters()
    ):
        # a key bias has no gradient but rounding, and Adam makes steps of it
        if not name.endswith("c_attn.bias"):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9, msg=name)
        apart = max(apart, float((ours - without).detach().abs().max()))
    assert apart > 1e-6, "the decay did nothing"
    assert handle.spent["darex"]["mean |delta|"] > 0


def test_decay_keeps_a_run_closer_to_its_base(tmp_path):
    means = []
    for decay in (0.0, 1.0):
        trainer = tiny_trainer(tmp_path / str(decay), max_steps=20)
        handle = sal.focus(trainer, sal.DAREx(decay=decay))
        trainer.train()
        means.append(handle.spent["darex"]["mean |delta|"])
        assert len(losses_of(trainer)) == 20
    assert means[1] < 0.7 * means[0]


def test_other_optimizers_are_refused(tmp_path):
    trainer = tiny_trainer(tmp_path, optim="sgd")
    sal.focus(trainer, sal.DAREx())
    with pytest.raises(
        ConflictError, match="optimizer must be torch's Adam or AdamW for the decay of DAREx, got SGD"
    ):
        trainer.train()
    model = nn.Linear(2, 2)
    loop = sal.loop(model, sal.DAREx(), optimizer=torch.optim.Adam(model.parameters(), weight_decay=0.1))
    with pytest.raises(ConflictError, match=r"weight_decay must be 0 or decoupled \(AdamW\)"):
        loop.begin()
