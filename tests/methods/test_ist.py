"""IST: the score's rule, what trains when, and that probing leaves nothing behind."""

import math
from itertools import pairwise

import pytest
import torch
from conftest import Listed, collate, losses_of, ragged_samples, tiny_llama, tiny_trainer, with_lora
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model

import salience as sal
from salience.core.errors import ConflictError, ParameterError, TargetError
from salience.core.evidence import saved_for_backward
from salience.core.selection import generator
from salience.hosts.transformers import adapter_layers
from salience.methods.layers.ist import draw_sets, probe_sets, suppress_weights, train_weights, updated_scores

CONTRACT = {
    "method": sal.IST(active_layers=1, score_every=2, probe_batch_size=3),
    "model": lambda: with_lora(tiny_llama(layers=4)),
    "bad": {
        "active_layers": (0, "active_layers must be a whole number >= 1 or None, got 0"),
        "suppressed_layers": (0, "suppressed_layers must be a whole number >= 1 or None, got 0"),
        "candidates": (1, "candidates must be a whole number >= 2, got 1"),
        "suppression": (1.0, r"suppression must be in \[0, 1\), got 1.0"),
        "suppression:2": (-0.1, r"suppression must be in \[0, 1\), got -0.1"),
        "score_lr": (0.0, "score_lr must be > 0, got 0.0"),
        "score_every": (0, "score_every must be a whole number >= 1, got 0"),
        "probe_batch_size": (0, "probe_batch_size must be a whole number >= 1, got 0"),
        "mode": ("uniform", "mode must be one of importance, random, got 'uniform'"),
        "reward": ("log", "reward must be one of exp, neg_loss, got 'log'"),
        "seed": (-1, "seed must be >= 0 or None, got -1"),
    },
}


def model_of(layers=4, **settings):
    return with_lora(tiny_llama(layers=layers), **settings)


def held_out(count=3):
    return [collate(ragged_samples(4, seed=seed)) for seed in range(count)]


def started(model, method, data=None, decay=0.1):
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=1e-2, weight_decay=decay)
    loop = sal.loop(model, method, optimizer=optimizer, data=held_out() if data is None else data)
    loop.begin()
    return loop


def one_step(loop, batch):
    loop.start_step([batch])
    loop.loss(batch).backward()
    loop.finish_step()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def picks(loop, steps, updates=False):
    """The blocks of each of so many steps, without training."""
    rows = []
    for step in range(steps):
        loop.step = step if updates else 0
        loop.before_step()
        rows.append(loop.parts[0].spent()["trained now"])
    return rows


def block_of(name):
    return int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None


# --- the score -------------------------------------------------------------------------------------------------


def test_worked_example():
    sets = torch.tensor([[0, 1], [1, 2], [2, 3]])
    score = updated_scores(torch.zeros(4), sets, [1.0, 2.0, 0.5])
    assert score.tolist() == pytest.approx([-0.0051, -0.5915, 0.0051, 0.5915], abs=5e-5)
    assert train_weights(score).tolist() == pytest.approx([0.5013, 0.6437, 0.4987, 0.3563], abs=5e-5)


def oracle(score, sets, losses, rate, reward):
    """The rule in float64, element by element."""
    score = [float(value) for value in score]
    p = [1 / (1 + math.exp(-value)) for value in score]
    r = [math.exp(-loss) if reward == "exp" else -loss for loss in losses]
    for k, chosen in enumerate(sets):
        for i in chosen:
            score[i] += rate * (r[k] - sum(r) / len(r)) * p[i] * (1 - p[i])
    return [min(max(value, -15.0), 15.0) for value in score]


@pytest.mark.parametrize("reward", ["exp", "neg_loss"])
@pytest.mark.parametrize("layers, size, count", [(8, 4, 3), (5, 2, 7), (2, 1, 2)])
def test_update_matches_the_oracle(layers, size, count, reward):
    random = generator(layers)
    score = torch.randn(layers, generator=random, dtype=torch.float64)
    for round_ in range(3):
        sets = draw_sets(suppress_weights(score), size, count, random)
        losses = (3 * torch.rand(count, generator=random)).tolist()
        expected = oracle(score, sets.tolist(), losses, 10.0, reward)
        score = updated_scores(score, sets, losses, reward=reward)
        assert score.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12), round_


def test_equal_losses_do_not_move_the_score_and_advantages_sum_to_zero():
    score = torch.linspace(-2, 2, 6)
    sets = torch.tensor([[0, 1, 2], [0, 3, 4], [0, 2, 5]])
    torch.testing.assert_close(updated_scores(score, sets, [1.3] * 3), score, rtol=0, atol=1e-6)
    # block 0 is in every set: it moves by the sum of all advantages
    moved = updated_scores(score.double(), sets, [0.2, 1.0, 3.0])
    assert float(moved[0]) == pytest.approx(-2.0, abs=1e-12)
    assert not torch.allclose(moved, score.double())


def test_a_higher_loss_lowers_the_score_of_its_blocks_against_the_others():
    sets = torch.tensor([[0, 1], [2, 3], [4, 5]])
    low = updated_scores(torch.zeros(6), sets, [1.0, 1.0, 1.0])
    high = updated_scores(torch.zeros(6), sets, [1.5, 1.0, 1.0])
    change = high - low
    assert change[:2].max() < 0 < change[2:].min()


def test_one_update_is_bounded_and_the_score_stays_in_its_range():
    score = torch.zeros(4)
    moved = updated_scores(score, torch.tensor([[0], [0], [1]]), [0.0, 0.0, 1e9])
    assert moved.abs().max() <= 10 * 3 * 0.25
    far = updated_scores(score, torch.tensor([[0], [1]]), [0.0, 1e6], reward="neg_loss")
    assert far[:2].tolist() == [15.0, -15.0]


def test_candidate_sets_differ_also_when_the_score_leaves_only_one():
    score = torch.tensor([15.0, 15.0, 15.0, -15.0, -15.0, -15.0])
    sets = draw_sets(suppress_weights(score), 3, 20, generator(0))  # all there are
    assert len({tuple(row) for row in sets.tolist()}) == 20
    assert all(a < b for row in sets.tolist() for a, b in pairwise(row))


# --- what trains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("active, expected", [(None, 1), (1, 1), (3, 3), (4, 4)])
def test_exactly_so_many_blocks_train_and_the_others_are_bitwise_unchanged(active, expected):
    model = model_of()
    adapters = {n for n, p in model.named_parameters() if p.requires_grad}
    loop = started(model, sal.IST(active_layers=active, score_every=2))
    for batch in held_out(6):
        before = {n: p.clone() for n, p in model.named_parameters()}
        loop.start_step([batch])
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        blocks = {block_of(n) for n in trained}
        assert len(blocks) == expected and None not in blocks
        assert trained == {n for n in adapters if block_of(n) in blocks}
        loop.loss(batch).backward()
        assert all(p.grad is None for n, p in model.named_parameters() if n not in trained)
        loop.finish_step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) == (name not in trained), name
    loop.end()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapters


def test_adapters_outside_of_the_blocks_always_train_and_frozen_adapters_never():
    model = with_lora(tiny_llama(layers=4), targets=("q_proj", "lm_head"), modules_to_save=["norm"])
    frozen = "layers.0.self_attn.q_proj.lora_A"
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    loop = started(model, sal.IST(active_layers=4))
    loop.before_step()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head" in n for n in trained) and any("model.norm.modules_to_save" in n for n in trained)
    assert not any(frozen in n for n in trained)
    assert {block_of(n) for n in trained} == {0, 1, 2, 3, None}


def test_blocks_without_adapters_are_no_candidates():
    model = model_of(layers=6, layers_to_transform=[1, 3, 5])
    loop = started(model, sal.IST(active_layers=1, candidates=2))
    picks(loop, 1)
    assert loop.parts[0].spent()["layers"] == 3
    assert {block_of(n) for n, p in model.named_parameters() if p.requires_grad} <= {1, 3, 5}


def test_random_mode_is_uniform():
    loop = started(model_of(layers=8), sal.IST(active_layers=2, mode="random"), data=[])
    rows = picks(loop, 2000, updates=True)
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=8).double()
    expected = 2000 * 2 / 8
    # draws without replacement: the statistic times (L - 1) / (L - N_u) follows chi-square with L - 1 degrees
    chi = float(((counts - expected) ** 2 / expected).sum()) * 7 / 6
    assert chi < 24.3, counts  # 99.9 % quantile of 7 degrees of freedom
    assert loop.parts[0].scores() == {} and loop.parts[0].spent()["probe forward passes"] == 0


def test_low_scores_are_trained():
    loop = started(model_of(layers=8), sal.IST(active_layers=2))
    loop.parts[0].load_state({**loop.parts[0].state(), "score": torch.linspace(8, -8, 8)})
    picked = torch.tensor(picks(loop, 200)).flatten()
    assert (picked >= 4).sum() > 0.9 * len(picked) and (picked < 2).sum() < 5
    assert loop.parts[0].scores()["importance"].argmax() == 7


# --- probing ---------------------------------------------------------------------------------------------------


def scalings(model):
    return {
        path: (dict(layer.scaling), {k: v.hex() for k, v in layer.scaling.items()})
        for block in adapter_layers(model).values()
        for path, layer in block
    }


def odd_model():
    """Different ranks and scales in different modules, none of them a power of two."""
    model = model_of(
        r=3, lora_alpha=7, rank_pattern={"v_proj": 5}, alpha_pattern={"up_proj": 11}, dropout=0.3
    )
    for block in adapter_layers(model).values():
        block[0][1].scale_layer(1.1)
    return model.train()


def test_probing_leaves_scales_modes_and_attention_as_they_were():
    model = odd_model()
    model.base_model.model.model.layers[1].mlp.eval()
    before, modes = scalings(model), {n: m.training for n, m in model.named_modules()}
    attention = {n: m.scaling for n, m in model.named_modules() if n.endswith("self_attn")}
    loop = started(model, sal.IST(score_every=1))
    picks(loop, 5, updates=True)
    assert loop.parts[0].spent()["probe forward passes"] == 12
    assert loop.parts[0].scores()["importance"].abs().sum() > 0
    assert scalings(model) == before
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: m.scaling for n, m in model.named_modules() if n.endswith("self_attn")} == attention


def test_scales_and_modes_come_back_when_a_probe_raises():
    model = odd_model()
    before, modes = scalings(model), {n: m.training for n, m in model.named_modules()}
    loop = started(model, sal.IST(score_every=1))
    loop.step = 1

    def fails(*args, **kwargs):
        assert scalings(model) != before
        raise RuntimeError("in the probe")

    handle = model.base_model.model.lm_head.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="in the probe"):
        loop.before_step()
    handle.remove()
    assert scalings(model) == before
    assert {n: m.training for n, m in model.named_modules()} == modes


def test_probe_losses_are_those_of_a_model_with_smaller_adapters():
    model, batch = odd_model().eval(), held_out(1)[0]
    loop = started(model, sal.IST())
    adapters = adapter_layers(model)
    losses = probe_sets(loop, adapters, torch.tensor([[0, 2], [1, 3]]), batch, suppression=0.5)
    for chosen, loss in zip(([0, 2], [1, 3]), losses):
        other = odd_model().eval()
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_B" in name and block_of(name) in chosen:
                    parameter.mul_(0.5)
            assert float(other(**batch).loss) == pytest.approx(loss, rel=1e-5)


def test_a_loss_that_is_not_finite_skips_the_update():
    model = model_of()
    loop = started(model, sal.IST(score_every=1))
    picks(loop, 3, updates=True)
    score = loop.parts[0].scores()["importance"]
    weight = model.base_model.model.lm_head.weight
    kept = weight.detach().clone()
    weight.data.fill_(math.nan)
    loop.step = 3
    loop.before_step()
    assert torch.equal(loop.parts[0].scores()["importance"], score)
    assert loop.parts[0].spent()["updates skipped (loss not finite)"] == 1
    weight.data.copy_(kept)
    loop.before_step()
    assert not torch.equal(loop.parts[0].scores()["importance"], score)


@pytest.mark.parametrize("given", [False, True], ids=["training set", "held out"])
def test_probe_batches_come_from_the_held_out_data_if_there_is_any(given, tmp_path):
    seen = []

    class Counted(Listed):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    model = model_of()
    trainer = tiny_trainer(tmp_path, model, max_steps=3)
    trainer.train_dataset = Counted(ragged_samples(8))
    data = held_out(2) if given else None
    handle = sal.focus(trainer, sal.IST(score_every=2, probe_batch_size=5), data=data)
    probed = []
    handle.parts[0].before_step = wrapped(handle.parts[0].before_step, model, probed)
    trainer.train()
    assert len(seen) == 4 * 2 + (0 if given else 5)  # the loader reads one batch ahead
    sizes = {len(ids) for ids in probed}
    assert sizes == ({4} if given else {5})
    if given:
        assert all(any(torch.equal(ids, batch["input_ids"]) for batch in data) for ids in probed)
    # three probes of one update see the same batch
    assert len(probed) == 3 and all(torch.equal(a, b) for a, b in pairwise(probed))


def wrapped(before_step, model, probed):
    """Records the batches of forward passes that run inside of `before_step`."""

    def record(module, args, kwargs):
        probed.append(kwargs["input_ids"])

    def watched(loop):
        handle = model.register_forward_pre_hook(record, with_kwargs=True)
        try:
            before_step(loop)
        finally:
            handle.remove()

    return watched


# --- with a Trainer, and refusals ------------------------------------------------------------------------------


def test_on_a_trainer_scores_are_recorded_and_drawn(tmp_path):
    model = model_of()
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = tiny_trainer(tmp_path, model, max_steps=20, gradient_accumulation_steps=2)
    handle = sal.focus(trainer, [sal.IST(score_every=5), sal.LossReweighting()])
    trainer.train()
    assert len(losses_of(trainer)) == 20
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert all(p.requires_grad == (n in before) for n, p in model.named_parameters())
    history = handle.parts[0].histories["importance"]
    assert history.steps == [0, 5, 10, 15] and history.values().shape == (4, 4)
    assert torch.equal(history.values()[-1], handle.scores["ist.importance"])
    assert history.values()[0].tolist() == [0.0] * 4
    spent = handle.spent["ist"]
    assert spent["layers"] == 4 and spent["share of adapter parameters"] == 0.25
    assert spent["probe forward passes"] == 9
    assert "probe forward passes 9" in repr(handle)


@pytest.mark.parametrize(
    "config, found",
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "got PREFIX_TUNING"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "got PROMPT_TUNING"),
        (LoraConfig(target_modules=["lm_head"]), "got LORA"),
        (None, "got no PEFT adapters"),
    ],
)
def test_models_without_adapters_in_their_blocks_are_refused(config, found):
    model = tiny_llama(layers=4)
    model = model if config is None else get_peft_model(model, config)
    with pytest.raises(
        TargetError, match=f"target of IST must be a model whose blocks hold PEFT adapters.*{found}"
    ):
        sal.loop(model, sal.IST(), data=held_out())


@pytest.mark.parametrize(
    "layers, settings, text",
    [
        (1, {}, "layers with adapters must be at least 2, got 1"),
        (4, {"active_layers": 5}, "active_layers must be at most the model's 4 layers with adapters, got 5"),
        (
            4,
            {"suppressed_layers": 4},
            "suppressed_layers must be less than the model's 4 layers with adapters",
        ),
        (2, {}, "candidates must be at most 2, the ways to suppress 1 of 2 layers, got 3"),
    ],
)
def test_sizes_that_do_not_fit_the_model_are_refused(layers, settings, text):
    with pytest.raises(ParameterError, match=text):
        sal.loop(model_of(layers=layers), sal.IST(**settings), data=held_out())


def test_a_loop_without_batches_to_probe_with_is_refused_at_once():
    with pytest.raises(ConflictError, match="data must be a sequence of batches to probe with"):
        sal.loop(model_of(), sal.IST())
    sal.loop(model_of(), sal.IST(mode="random"))


def test_dora_and_adapters_without_a_wrapper():
    from peft import inject_adapter_in_model

    for model in (
        with_lora(tiny_llama(layers=4), use_dora=True),
        inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama(layers=4)),
    ):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name)
        loop = started(model, sal.IST(score_every=1))
        for batch in held_out():
            one_step(loop, batch)
        assert loop.parts[0].spent()["probe forward passes"] == 6


def test_what_lies_below_the_lowest_active_block_keeps_nothing_for_backward():
    model, batch = model_of(), held_out(1)[0]
    loop = started(model, sal.IST(active_layers=1))
    kept = {}
    for _ in range(40):
        loop.start_step([batch])
        with saved_for_backward() as saved:
            loop.loss(batch)
        kept[loop.parts[0].spent()["trained now"][0]] = saved["bytes"]
    assert sorted(kept, key=kept.get) == [3, 2, 1, 0] and kept[3] < 0.6 * kept[0]
    loop.end()
    with saved_for_backward() as saved:
        loop.loss(batch)
    assert saved["bytes"] > kept[0]
