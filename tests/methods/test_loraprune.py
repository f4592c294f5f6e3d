"""LoRAPrune: scores, schedule, masks that only grow, and a model that is smaller and the same function."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import collate, losses_of, ragged_samples, tiny_gpt2, tiny_llama, tiny_trainer, with_lora
from torch import nn

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError, TargetError, TrainingError
from salience.core.part import gradient_bytes
from salience.methods.heads.loraprune import (
    importance,
    lora_gradient,
    lowest_masked,
    masked_count,
    moved,
    normalised,
    ratio_at,
    unit_scores,
)

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FAST = sal.LoRAPrune(steps=6, prune_every=1, rank=2, learning_rate=1e-2)


def batches(count=3, size=4, seed=0):
    return [collate(ragged_samples(size, seed=seed + number)) for number in range(count)]


CONTRACT = {
    "method": sal.LoRAPrune(keep=0.5, steps=3, prune_every=1, rank=2),
    "model": tiny_llama,
    "data": batches(),
    "trainer_model": lambda: with_lora(tiny_llama(), targets=ALL),
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\], got 0.0"),
        "keep:2": (1.5, r"keep must be a share in \(0, 1\], got 1.5"),
        "units": ("layers", "units must be one of auto, heads, channels, both, got 'layers'"),
        "metric": ("taylor", "metric must be one of lora, grad, magnitude, wanda, random, got 'taylor'"),
        "multiple": (0, "multiple must be a whole number >= 1 or None, got 0"),
        "start": (0.7, r"start must be in \[0, 1 - keep\], got 0.7"),
        "warmup": (-0.1, "warmup must be >= 0, got -0.1"),
        "warmup:2": (0.9, "cooldown must be less than 1, got 1.0"),
        "cooldown": (-0.1, "cooldown must be >= 0, got -0.1"),
        "prune_every": (0, "prune_every must be a whole number >= 1, got 0"),
        "decay": (1.0, r"decay must be in \[0, 1\), got 1.0"),
        "skip_first": (-1, "skip_first must be a whole number >= 0, got -1"),
        "skip_last": (0.1, "skip_last must be a whole number >= 0, got 0.1"),
        "steps": (0, "steps must be a whole number >= 1 or None, got 0"),
        "learning_rate": (0.0, "learning_rate must be > 0, got 0.0"),
        "rank": (0, "rank must be a whole number >= 1, got 0"),
        "alpha": (0.0, "alpha must be > 0, got 0.0"),
        "dropout": (1.0, r"dropout must be in \[0, 1\), got 1.0"),
        "seed": (-1, "seed must be >= 0 or None, got -1"),
    },
}


@torch.no_grad()
def logits(model, batch=None):
    return model(**(batch or batches(1, seed=9)[0])).logits


def pruned(method=FAST, model=None, data=None):
    model = tiny_llama() if model is None else model
    return model, sal.focus(model, method, data=batches() if data is None else data)


# --- scores ------------------------------------------------------------------------------------------------------

A, GA = (torch.tensor(row, dtype=torch.float64) for row in ([[1, 0, 2]], [[0.1, 0.2, 0]]))
B, GB = (torch.tensor([row], dtype=torch.float64).T for row in ([1, 0, -1, 2], [0.5, 1, 0, -0.5]))
W = torch.tensor([[1, 1, 0], [0, 2, 1], [1, 0, 1], [2, 1, 0]], dtype=torch.float64)


def test_worked_example():
    G = lora_gradient(A, B, GA, GB)
    close = lambda got, wanted: torch.testing.assert_close(  # noqa: E731
        got, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-8
    )
    close(G, [[0.55, 0.1, 1], [0.9, -0.2, 2], [-0.1, -0.2, 0], [-0.25, 0.5, -1]])
    S = importance(W + 2 * B @ A, G)
    close(S, [[1.65, 0.1, 4], [0, 0.4, 2], [0.1, 0, 0], [1.5, 0.5, 8]])
    rows, columns, heads = torch.arange(4).view(4, 1), torch.arange(3).view(3, 1), torch.arange(4).view(2, 2)
    close(normalised(unit_scores(S, rows, out=True)), [0.48800275, 0.20368811, 0.008487, 0.84870044])
    close(normalised(unit_scores(S, columns, out=False)), [0.22558432, 0.06941056, 0.97174785])
    close(unit_scores(S, heads, out=True), [8.15, 10.1])
    close(normalised(unit_scores(S, heads, out=True)), [0.62797834, 0.77823082])


def test_the_gradient_is_what_one_step_of_descent_takes_off_the_product():
    draw = torch.Generator().manual_seed(0)
    a, b, ga, gb = (torch.randn(*size, generator=draw, dtype=torch.float64)
                    for size in ((3, 5), (7, 3), (3, 5), (7, 3)))  # fmt: skip
    torch.testing.assert_close(lora_gradient(a, b, ga, gb), b @ a - (b - gb) @ (a - ga))
    # the term gB gA: z does depend on the size of the gradients, so scaled ones must be un-scaled
    index = torch.arange(7).view(7, 1)
    z = [
        normalised(unit_scores(importance(b, lora_gradient(a, b, s * ga, s * gb) @ a.T), index, out=True))
        for s in (1e-4, 1e-3, 1.0)
    ]
    torch.testing.assert_close(z[0], z[1], rtol=1e-2, atol=0)
    assert (z[2] - z[1]).abs().max() > 0.05


def test_scores_without_any_gradient_are_zero_and_average_out():
    zero = normalised(torch.zeros(4))
    assert torch.equal(zero, torch.zeros(4))
    assert moved(torch.ones(2), torch.tensor([2.0, 0.0]), 0.9).tolist() == pytest.approx([1.1, 0.9])


def test_schedule():
    at = {39: 0, 40: 0.0047923, 100: 0.2396681, 200: 0.44331906, 350: 0.49999998, 352: 0.5, 390: 0.5}
    for step, wanted in at.items():
        got = ratio_at(step, 390, start=0.0, target=0.5, warmup=0.1, cooldown=0.1)
        assert got == pytest.approx(wanted, abs=5e-9), step
    # the target itself is reached, and what is whole up to rounding is whole
    assert [masked_count(32, share) for share in (0.5, 0.49999999, 0.1 * 5)] == [16, 16, 16]
    assert masked_count(10, 1 - 0.7) == 3 and masked_count(10, 0.29) == 2


def test_masks_only_grow_and_ties_go_by_index():
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(12, dtype=torch.bool)
    for count in (2, 5, 5, 3, 9):
        new = lowest_masked(torch.rand(12, generator=draw), mask, count)
        assert not (new & ~mask).any() and int((~new).sum()) == max(count, int((~mask).sum()))
        mask = new
    assert lowest_masked(torch.zeros(4), torch.tensor([True, True, True, False]), 2).tolist() == [
        False, True, True, False,
    ]  # fmt: skip


# --- on a model --------------------------------------------------------------------------------------------------


def test_a_model_becomes_smaller_in_place_and_comes_back_bit_for_bit():
    model = tiny_llama().eval()
    whole = logits(model)
    modules, config = [id(m) for m in model.modules()], model.config.to_dict()
    _, handle = pruned(model=model)
    assert handle.target is model and (
        model.config.num_key_value_heads,
        model.config.num_attention_heads,
    ) == (1, 2)
    assert model.config.intermediate_size == 32 and model.model.layers[1].mlp.down_proj.weight.shape == (
        32,
        32,
    )
    spent = handle.spent["loraprune"]
    assert spent["parameters"] == sum(p.numel() for p in model.parameters())
    assert spent["share removed"] == pytest.approx(
        1 - spent["parameters"] / spent["parameters before"], abs=1e-4
    )
    assert spent["channels kept in a layer"] == "32 of 64"
    assert all(p.requires_grad for p in model.parameters()) and not model.training
    assert not any("lora" in name for name, _ in model.named_parameters())
    handle.undo()
    assert torch.equal(logits(model), whole) and model.config.to_dict() == config
    assert [id(m) for m in model.modules()] == modules


def test_finish_makes_it_final_and_the_checkpoint_is_plain(tmp_path):
    from transformers import LlamaForCausalLM

    model, handle = pruned()
    small = logits(model)
    handle.save(tmp_path)
    handle.undo()
    assert torch.equal(logits(model), small), "finish forgets what would bring the units back"
    again = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), small, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 32


def masked_and_cut(model, method, monkeypatch):
    """Logits of the tuned model under LoRA and masks, and of the one that was merged and cut."""
    from salience.methods.heads import _loraprune_tuning as tuning

    seen, train = [], tuning._train

    def look(method, model, *arguments):
        train(method, model, *arguments)
        model.eval()
        seen.append(logits(model))

    monkeypatch.setattr(tuning, "_train", look)
    sal.focus(model, method, data=batches())
    return seen[0], logits(model)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_the_model_under_lora_and_masks_is_the_merged_and_cut_one(make, monkeypatch):
    masked, small = masked_and_cut(make().eval(), FAST, monkeypatch)
    torch.testing.assert_close(small, masked, rtol=0, atol=1e-5)


def test_merging_before_cutting_is_merging_after():
    draw = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*size, generator=draw) for size in ((8, 6), (2, 6), (8, 2)))
    rows, columns = torch.tensor([0, 3, 4, 7]), torch.tensor([1, 2, 5])
    before = (weight + 2 * b @ a)[rows][:, columns]
    after = weight[rows][:, columns] + 2 * b[rows] @ a[:, columns]
    torch.testing.assert_close(before, after)


def test_keep_one_tunes_and_merges():
    model = tiny_llama()
    before, count = logits(model), sum(p.numel() for p in model.parameters())
    _, handle = pruned(replace(FAST, keep=1.0), model)
    assert sum(p.numel() for p in model.parameters()) == count
    assert handle.spent["loraprune"]["share removed"] == 0 and not torch.allclose(logits(model), before)


def test_tuning_with_a_target_lowers_the_loss():
    data = batches(2)
    model, _ = pruned(replace(FAST, keep=0.5, steps=40, prune_every=2), data=data)
    other, handle = pruned(replace(FAST, steps=1), data=data)
    trained, untrained = (float(one(**data[0]).loss.detach()) for one in (model, other))
    assert trained < untrained - 0.1
    assert handle.spent["loraprune"]["channels kept in a layer"] == "32 of 64"


def test_the_same_seed_gives_the_same_model_and_moves_no_global_state():
    state = torch.get_rng_state()
    first, _ = pruned(replace(FAST, dropout=0.3))
    torch.manual_seed(99)
    again, _ = pruned(replace(FAST, dropout=0.3), model=tiny_llama())
    assert torch.equal(logits(first), logits(again))
    torch.set_rng_state(state)
    other, _ = pruned(replace(FAST, dropout=0.3, seed=5), model=tiny_llama())
    assert not torch.equal(logits(first), logits(other))


@pytest.mark.parametrize("metric", ["lora", "grad", "magnitude", "wanda", "random"])
def test_only_the_true_gradient_needs_gradients_of_the_weights(metric, monkeypatch):
    seen = []
    original = nn.utils.clip_grad_norm_

    def look(parameters, *args):
        parameters = list(parameters)
        seen.append(all("lora" in name or p.grad is None for name, p in model.named_parameters()))
        return original(parameters, *args)

    from salience.methods.heads import _loraprune_part as watched

    sizes = []
    monkeypatch.setattr(watched, "gradient_bytes", lambda one: sizes.append(gradient_bytes(one)) or sizes[-1])
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", look)
    model = tiny_llama()
    _, handle = pruned(replace(FAST, metric=metric), model)
    base = 4 * 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)  # bytes of the projections' gradients
    lora = 4 * 2 * 2 * (2 * 64 + 2 * 48 + 3 * 96)
    assert set(sizes) == {lora + base if metric == "grad" else lora}
    assert handle.spent["loraprune"]["gradient bytes"] == sizes[0]
    assert all(seen) and len(seen) == 6
    assert gradient_bytes(model) == 0


def test_the_true_gradient_is_that_of_the_merged_weight():
    """metric="grad" against autograd on a model whose LoRA is merged, in float64."""
    model = with_lora(tiny_llama().double(), targets=ALL)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    batch = batches(1)[0]
    loop = started(model, sal.LoRAPrune(metric="grad", steps=100, decay=0.0))
    one_step(loop, batch)
    got = loop.parts[0].scores()["channels"]
    plain = with_lora(tiny_llama().double(), targets=ALL)
    for parameter in plain.parameters():
        parameter.data = parameter.data.double()
    plain = plain.merge_and_unload()
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(**batch).loss.backward()
    for layer, block in enumerate(plain.model.layers):
        sums = [(p.weight * p.weight.grad).abs().sum(axis) for p, axis in
                ((block.mlp.gate_proj, 1), (block.mlp.up_proj, 1), (block.mlp.down_proj, 0))]  # fmt: skip
        wanted = sum(one / one.norm() for one in sums)
        torch.testing.assert_close(got[layer].double(), wanted.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("metric", ["lora", "grad", "magnitude", "wanda"])
def test_a_channel_that_does_nothing_goes_first(metric):
    model = tiny_llama()
    dead = torch.arange(0, 64, 2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, dead] *= 1e-4
            layer.mlp.up_proj.weight[dead] *= 1e-4
            layer.mlp.gate_proj.weight[dead] *= 1e-4
    _, handle = pruned(replace(FAST, metric=metric, units="channels", learning_rate=1e-5), model)
    kept = handle.parts[0].kept()["channels"]
    share = sum(int((row % 2 == 1).sum()) for row in kept) / sum(len(row) for row in kept)
    assert share > 0.95


def test_gpt2_loses_channels_only_unless_heads_are_asked_for(tmp_path):
    model, handle = pruned(model=tiny_gpt2().eval())
    spent = handle.spent["loraprune"]
    assert spent["units"] == "channels" and "ties their number to the hidden size" in spent["left out"]
    assert model.config.n_inner == 64 and model.config.n_head == 4
    handle.save(tmp_path)
    model, handle = pruned(replace(FAST, units="both"), tiny_gpt2().eval())
    assert (
        handle.spent["loraprune"]["heads kept in a layer"] == "2 of 4" and torch.isfinite(logits(model)).all()
    )
    with pytest.raises(ConflictError, match="got 2 of 4 heads a layer, which GPT2Config cannot state"):
        handle.save(tmp_path / "no")
    with pytest.raises(ConflictError, match="cannot state"):
        model.save_pretrained(tmp_path / "no")


def test_layers_that_are_spared_live_in_memory_only(tmp_path):
    model, handle = pruned(replace(FAST, skip_first=1, skip_last=1), tiny_llama(layers=4))
    widths = [layer.mlp.up_proj.out_features for layer in model.model.layers]
    assert widths == [64, 32, 32, 64] and torch.isfinite(logits(model)).all()
    with pytest.raises(
        ConflictError, match=r"got 2 layers that are wider than the others \(skip_first, skip_last\)"
    ):
        handle.save(tmp_path)


def test_channels_are_rounded_up_to_a_multiple():
    for keep, multiple, wanted in ((0.3, None, 24), (0.3, 1, 20), (0.5, 48, 48), (0.9, 64, 64)):
        model, _ = pruned(replace(FAST, keep=keep, multiple=multiple, units="channels", steps=1))
        assert model.config.intermediate_size == wanted, (keep, multiple)


def test_pictures_and_scores():
    _, handle = pruned()
    figure = handle.plot()
    assert [axes.get_title(loc="left").split(":")[0] for axes in figure.axes[:2]] == ["heads", "channels"]
    history = handle.parts[0].histories["importance of each head"]
    assert history.values().shape[1] == 4 and history.steps[-1] == 6
    assert handle.scores["loraprune.channels"].shape == (2, 64)


# --- in a loop and on a Trainer ----------------------------------------------------------------------------------


def started(model, method):
    chosen = [p for p in model.parameters() if p.requires_grad]
    loop = sal.loop(model, method, optimizer=torch.optim.SGD(chosen, lr=1e-3))
    loop.begin()
    return loop


def one_step(loop, *micro_batches, scale=1.0):
    loop.start_step(micro_batches)
    for batch in micro_batches:
        loop.loss(batch).backward()
    loop.finish_step()
    loop.optimizer.step()
    loop.optimizer.zero_grad()


def test_scores_follow_the_formula_on_the_gradients_of_the_step():
    """Against a transcription in float64 that makes G entry by entry, with two micro-batches."""
    model = with_lora(tiny_llama().double(), targets=ALL)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    data = batches(2)
    loop = started(model, sal.LoRAPrune(steps=100))
    loop.start_step(data)
    for batch in data:
        loop.loss(batch).backward()
    loop.finish_step()
    wanted = []
    for block in model.base_model.model.model.layers:
        attention, total = block.self_attn, 0.0
        for name, width in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8), ("o_proj", 16)):
            layer = getattr(attention, name)
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            g = b.grad @ a + b @ a.grad - b.grad @ a.grad
            s = (g * (layer.base_layer.weight + layer.scaling["default"] * b @ a)).abs()
            sums = [(s[u * width : (u + 1) * width].sum() if name != "o_proj"
                     else s[:, u * width : (u + 1) * width].sum()).item() for u in range(2)]  # fmt: skip
            length = (sums[0] ** 2 + sums[1] ** 2) ** 0.5 + 1e-8
            total = total + torch.tensor(sums, dtype=torch.float64) / length
        wanted.append(0.1 * total)
    loop.optimizer.step()
    torch.testing.assert_close(
        loop.parts[0].scores()["heads"].double(), torch.stack(wanted), rtol=1e-6, atol=1e-8
    )


def test_a_score_that_is_not_finite_skips_the_update():
    model = with_lora(tiny_llama(), targets=ALL)
    loop = started(model, sal.LoRAPrune(steps=100))
    data = batches(2)
    one_step(loop, data[0])
    before = loop.parts[0].scores()
    loop.start_step([data[1]])
    loop.loss(data[1]).backward()
    loop.finish_step()
    model.base_model.model.model.layers[0].mlp.up_proj.lora_A["default"].weight.grad[0, 0] = torch.nan
    loop.optimizer.step()
    after = loop.parts[0].scores()
    assert all(torch.equal(after[kind], before[kind]) for kind in after)
    assert loop.parts[0].spent()["steps skipped (score not finite)"] == 1


def test_masks_in_training_only_grow_and_reach_the_target():
    model = with_lora(tiny_llama(), targets=ALL)
    loop = started(model, sal.LoRAPrune(steps=20, prune_every=2, keep=0.5, multiple=1))
    part, last, sizes = loop.parts[0], None, []
    for step in range(20):
        one_step(loop, batches(1, seed=step)[0])
        now = {kind: mask.clone() for kind, mask in part.masks.items()}
        assert last is None or all(not (now[kind] & ~last[kind]).any() for kind in now)
        last = now
        sizes.append(now["channels"].sum(1).tolist())
    assert sizes[0] == sizes[1] == [64, 64] and sizes[-1] == [32, 32]
    assert all(a == b for a, b in sizes) and len(set(map(tuple, sizes))) > 4


def test_a_masked_unit_gets_no_gradient():
    model = with_lora(tiny_llama(), targets=ALL)
    loop = started(model, sal.LoRAPrune(steps=10))
    loop.parts[0].masks["channels"][0, 3] = False
    loop.parts[0].masks["heads"][1, 0] = False
    loop.start_step([batches(1)[0]])
    loop.loss(batches(1)[0]).backward()
    layers = model.base_model.model.model.layers
    up = layers[0].mlp.up_proj.lora_B["default"].weight.grad
    assert (up[3] == 0).all() and (up[4] != 0).any()
    keys = layers[1].self_attn.k_proj.lora_B["default"].weight.grad
    assert (keys[:8] == 0).all() and (keys[8:] != 0).any()


def test_on_a_trainer_finish_leaves_the_smaller_plain_model(tmp_path):
    from transformers import LlamaForCausalLM

    model = with_lora(tiny_llama(), targets=ALL)
    trainer = tiny_trainer(tmp_path / "run", model, max_steps=6, gradient_accumulation_steps=2)
    handle = sal.focus(trainer, sal.LoRAPrune(prune_every=2))
    trainer.train()
    assert len(losses_of(trainer)) == 6
    masked = logits(model.eval())
    assert not handle.parts[0].masks["heads"].all()
    handle.save(tmp_path / "out")
    assert type(trainer.model) is LlamaForCausalLM and trainer.model.config.num_key_value_heads == 1
    torch.testing.assert_close(logits(trainer.model.eval()), masked, rtol=0, atol=1e-5)
    again = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again), masked, rtol=0, atol=1e-5)
    assert handle.spent["loraprune"]["share removed"] > 0.3
    handle.finish()
    handle.undo()
    assert not any(module._forward_pre_hooks for module in trainer.model.modules())
    from conftest import Listed

    trainer.eval_dataset = Listed(ragged_samples(4, seed=9))
    assert trainer.evaluate()["eval_loss"] > 0


def test_finish_before_training_and_a_short_run(tmp_path):
    model = with_lora(tiny_llama(), targets=ALL)
    trainer = tiny_trainer(tmp_path, model, max_steps=2)
    handle = sal.focus(trainer, sal.LoRAPrune(steps=100))
    with pytest.raises(ConflictError, match="finish must come after training"):
        handle.finish()
    trainer.train()
    assert handle.parts[0].masks["channels"].all()
    handle.finish()
    assert trainer.model.config.intermediate_size == 32, "what the schedule had left to do is done at the end"


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, text",
    [
        (tiny_llama, "must be a Trainer whose model is a PEFT model with LoRA.*got LlamaForCausalLM"),
        (
            lambda: with_lora(tiny_llama()),
            "k_proj must have one plain LoRA adapter.*got Linear: add it to target",
        ),
        (
            lambda: with_lora(tiny_llama(), targets=ALL, use_dora=True),
            "one plain LoRA adapter.*got a DoraLinear",
        ),
    ],
    ids=["no peft", "not everywhere", "dora"],
)
def test_a_trainer_without_plain_lora_everywhere_is_refused(make, text, tmp_path):
    with pytest.raises(TargetError, match=text):
        sal.focus(tiny_trainer(tmp_path, make()), sal.LoRAPrune())


def test_frozen_lora_is_refused(tmp_path):
    model = with_lora(tiny_llama(), targets=ALL)
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(ConflictError, match="q_proj must train to be scored, got a frozen one"):
        sal.focus(tiny_trainer(tmp_path, model), sal.LoRAPrune())


@pytest.mark.parametrize(
    "method, data, error, text",
    [
        (FAST, None, ConflictError, "data must be batches to tune on"),
        (FAST, [], ParameterError, "data must be batches .dictionaries. with labels, got 'NoneType'"),
        (FAST, [{"input_ids": torch.ones(1, 4)}], ParameterError, r"with labels, got \['input_ids'\]"),
        (sal.LoRAPrune(), iter(batches(1)), ParameterError, "steps must be given for data without a length"),
        (replace(FAST, keep=0.4), batches(1), ParameterError, "which leaves one of the 2 key/value heads"),
        (replace(FAST, keep=0.01, units="channels"), batches(1), ParameterError, "leaves one of the 64 channels"),
        (replace(FAST, multiple=65), batches(1), ParameterError, "multiple must be at most the 64 channels"),
        (replace(FAST, skip_first=2), batches(1), ParameterError, "less than the model's 2 layers, got 2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_any_work(method, data, error, text):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        sal.focus(model, method, data=data)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_models_are_refused():
    with pytest.raises(TargetError, match="model must be a transformers model"):
        sal.focus(nn.Linear(2, 2), FAST, data=batches(1))
    with pytest.raises(TargetError, match="model must have no adapters"):
        sal.focus(with_lora(tiny_llama()), FAST, data=batches(1))
    with pytest.raises(ConflictError, match="steps must be given for a loop of one's own"):
        sal.loop(with_lora(tiny_llama(), targets=ALL), sal.LoRAPrune())
    from transformers import Olmo2Config, Olmo2ForCausalLM

    olmo = Olmo2ForCausalLM(
        Olmo2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
    )
    with pytest.raises(StructureError, match="only projections and norms inside of one head"):
        sal.focus(olmo, replace(FAST, units="heads"), data=batches(1))
    assert sal.focus(olmo, FAST, data=batches(1)).spent["loraprune"]["units"] == "channels"


def test_a_loss_that_is_not_finite_stops_and_restores():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match="loss must be finite, got nan in step 1"):
        pruned(model=model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert model.state_dict().keys() == before.keys()


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_encoders(kind):
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    draw = torch.Generator().manual_seed(1)
    if kind == "bert":
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(vocab_size=64, num_labels=3, **sizes)
        )
        ids = torch.randint(3, 64, (4, 6), generator=draw)
        data = [{"input_ids": ids, "labels": torch.randint(3, (4,), generator=draw)}]
    else:
        config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes)
        model = transformers.ViTForImageClassification(config)
        images = torch.randn(4, 3, 16, 16, generator=draw)
        data = [{"pixel_values": images, "labels": torch.randint(3, (4,), generator=draw)}]
    _, handle = pruned(model=model, data=data)
    assert model.config.intermediate_size == 24
    assert handle.spent["loraprune"]["units"] == ("channels" if kind == "bert" else "heads and channels")
    assert torch.isfinite(logits(model, data[0])).all()
