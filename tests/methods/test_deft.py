"""DEFT: the smooth count and its gradient, the penalty in a training loop, and which forward passes are seen."""

import math

import pytest
import torch
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

import salience as sal
from salience.core.errors import ConflictError, StructureError
from salience.core.evidence import saved_for_backward
from salience.methods.features.deft import density, smooth_density, total_density

CONTRACT = {
    "method": sal.DEFT(weight=0.5, eps=1e-3),
    "model": lambda: with_lora(tiny_llama()),
    "bad": {
        "weight": (-1.0, "weight must be >= 0 and finite, got -1.0"),
        "weight:2": (math.nan, "weight must be >= 0 and finite, got nan"),
        "eps": (0.0, "eps must be > 0 and finite, got 0.0"),
        "tau": (-0.1, "tau must be >= 0 and finite, got -0.1"),
        "modules": ((), r"modules must be None or a tuple of parts of module names, got \(\)"),
        "modules:2": ("act", "modules must be None or a tuple of parts of module names, got 'act'"),
    },
}


def activations(*shape, seed=0, low=-6, high=2):
    """Values of both signs over many sizes, a quarter of them exact zeros, float64."""
    generator = torch.Generator().manual_seed(seed)
    a = 10 ** (torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low)
    a = a * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    return a * (torch.rand(*shape, generator=generator) > 0.25)


def test_worked_example():
    a = torch.tensor([[[0.0, 1e-3, 1.0]]])
    assert smooth_density(a, eps=1e-6).tolist() == pytest.approx([(0 + 0.5 + 0.999999) / 3], abs=1e-7)
    assert density(a).tolist() == pytest.approx([2 / 3])
    assert density(a, tau=0.01).tolist() == pytest.approx([1 / 3])


@pytest.mark.parametrize("eps", [1e-7, 1e-3, 20.0])
def test_invariants(eps):
    a = activations(3, 5, 63)
    c = smooth_density(a, eps=eps)
    assert ((c >= 0) & (c <= 1)).all() and c.shape == (3,)
    assert smooth_density(torch.zeros(2, 1, 4), eps=eps).tolist() == [0.0, 0.0]
    torch.testing.assert_close(smooth_density(-a, eps=eps), c, rtol=0, atol=0)
    assert (smooth_density(1.1 * a, eps=eps) > c).all()
    assert (smooth_density(a, eps=1.1 * eps) < c).all()
    torch.testing.assert_close(c, (a**2 / (a**2 + eps)).mean((1, 2)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(smooth_density(a, eps=1e-30), density(a).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [1e-7, 1e-3])
def test_gradient_is_exact_where_the_quotient_cancels(dtype, eps):
    a = activations(2, 7, 33).to(dtype)
    leaf = a.clone().requires_grad_()
    smooth_density(leaf, eps=eps).sum().backward()
    wide = a.double()
    want = 2 * wide * eps / (wide**2 + eps) ** 2 / (7 * 33)
    # fp16 itself cannot hold the smallest slopes
    tolerance = {torch.float32: (1e-4, 0.0), torch.bfloat16: (5e-3, 0.0), torch.float16: (2e-3, 1e-7)}[dtype]
    torch.testing.assert_close(leaf.grad.double(), want, rtol=tolerance[0], atol=tolerance[1])


def test_float64_gradient_passes_gradcheck_with_a_mask():
    a = activations(2, 3, 4, low=-2, high=0).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert torch.autograd.gradcheck(lambda x: smooth_density(x, eps=0.01, mask=mask), a)
    assert smooth_density(a, eps=0.01, mask=mask)[1] == 0 and density(a, mask=mask)[1] == 0


def test_padding_counts_unless_it_is_masked():
    a = torch.ones(1, 4, 5)
    a[0, 2:] = 0
    mask = torch.tensor([[True, True, False, False]])
    assert density(a).item() == 0.5 and density(a, mask=mask).item() == 1.0
    everything = torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(smooth_density(a, mask=everything), smooth_density(a))


def test_nan_goes_through():
    a = torch.tensor([[[0.0, torch.nan]], [[1.0, 0.0]]])
    assert smooth_density(a).isnan().tolist() == [True, False]
    assert density(a).tolist() == [0.5, 0.5]


def test_layers_are_averaged_and_two_sides_added():
    values = [torch.tensor([v, 2 * v]) for v in (0.1, 0.3, 0.8)]
    torch.testing.assert_close(total_density(values, [False] * 3), torch.tensor([0.4, 0.8]))
    torch.testing.assert_close(total_density(values, [True] * 3), torch.tensor([0.4, 0.8]))
    torch.testing.assert_close(total_density(values, [False, False, True]), torch.tensor([1.0, 2.0]))


def double_llama():
    return with_lora(tiny_llama()).double()


def oracle(model, samples, weight, eps, masked=False):
    """Loss and penalty of one batch by hand: hooks of the test's own, formulas of the card."""
    seen = []
    handles = [
        module.register_forward_hook(lambda _, __, a: seen.append(a))
        for name, module in model.named_modules()
        if name.endswith("act_fn")
    ]
    batch = collate(samples)
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    terms = torch.stack([a**2 / (a**2 + eps) for a in seen])  # [L, B, T, D]
    if masked:
        mask = batch["attention_mask"][None, :, :, None].double()
        per_sample = (terms * mask).sum((2, 3)) / (mask.sum((2, 3)) * terms.shape[-1])
    else:
        per_sample = terms.mean((2, 3))
    return loss + weight * per_sample.mean()


def grads(model):
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return got


def loop_grads(model, method, samples, cut=None):
    loop = sal.loop(model, method)
    loop.begin()
    cut = cut or len(samples)
    batches = [collate(samples[i : i + cut]) for i in range(0, len(samples), cut)]
    loop.start_step(batches)
    for batch in batches:
        loop.loss(batch).backward()
    loop.finish_step()
    loop.end()
    loop.record.undo()
    return grads(model)


def close(got, want, rtol=1e-5):
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_the_loops_gradient_is_that_of_loss_plus_penalty(masked):
    model, samples = double_llama(), ragged_samples(4)
    oracle(model, samples, 0.7, 1e-3, masked).backward()
    want = grads(model)
    got = loop_grads(model, sal.DEFT(weight=0.7, eps=1e-3, mask_padding=masked), samples)
    close(got, want)
    assert all("lora_" in name for name in got), "base weights got a gradient"


def test_accumulated_batches_give_the_gradient_of_one():
    samples = [sample for sample in ragged_samples(40) if len(sample["labels"]) == 12][:4]
    model = double_llama()
    method = sal.DEFT(weight=0.7, eps=1e-3)
    close(loop_grads(model, method, samples, cut=1), loop_grads(model, method, samples))


def test_masking_changes_nothing_without_padding_and_something_with():
    model = double_llama()
    same = [sample for sample in ragged_samples(40) if len(sample["labels"]) == 12][:3]
    for samples, equal in ((same, True), (ragged_samples(3), False)):
        plain = loop_grads(model, sal.DEFT(eps=1e-3), samples)
        masked = loop_grads(model, sal.DEFT(eps=1e-3, mask_padding=True), samples)
        name = next(iter(plain))
        assert torch.allclose(plain[name], masked[name], rtol=1e-9) == equal


def checkpointed(model):
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@pytest.mark.parametrize("make", [double_llama, tiny_gpt2], ids=["lora", "all"])
def test_gradient_checkpointing_gives_the_same_gradients_and_keeps_no_activations(make):
    model, samples, method = make(), ragged_samples(4), sal.DEFT(weight=0.7, eps=1e-3)
    want = loop_grads(model, method, samples)
    checkpointed(model)
    close(loop_grads(model, method, samples), want)
    with saved_for_backward() as plain:
        model(**collate(samples))
    loop = sal.loop(model, method)
    loop.begin()
    loop.start_step([collate(samples)])
    with saved_for_backward() as penalized:
        loop.loss(collate(samples))
    # numbers of each sample, not activations
    assert penalized["bytes"] < plain["bytes"] + 1000


def test_gradient_checkpointing_meets_weights_and_accumulation():
    model = double_llama()
    samples = [sample for sample in ragged_samples(40) if len(sample["labels"]) == 12][:4]
    methods = [sal.DEFT(weight=0.7, eps=1e-3), sal.LossReweighting(temperature=0.4)]
    want = loop_grads(model, methods, samples, cut=2)
    close(loop_grads(checkpointed(model), methods, samples, cut=2), want)


def test_reentrant_checkpointing_is_refused():
    model = with_lora(tiny_llama())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with pytest.raises(
        ConflictError, match=r"gradient checkpointing must be non-reentrant \(use_reentrant=False\)"
    ):
        loop_grads(model, sal.DEFT(), ragged_samples(2))


def test_a_forward_pass_of_its_own_under_checkpointing_is_left_alone():
    """Its second run does what its first did: nothing."""
    model = checkpointed(double_llama())
    batch = collate(ragged_samples(2))
    loop = sal.loop(model, sal.DEFT(eps=1e-3))
    loop.begin()
    loop.start_step([batch])
    loss = loop.loss(batch)
    with torch.no_grad():
        model(**collate(ragged_samples(3)))
    loss.backward()
    loop.finish_step()
    model(**collate(ragged_samples(3))).loss.backward()


def test_a_second_forward_pass_is_detected_and_one_after_an_exception_is_not():
    model, batch = double_llama(), collate(ragged_samples(2))
    loop = sal.loop(model, sal.DEFT())
    loop.begin()
    loop.start_step([batch])
    loop.before_forward(batch)
    model(**batch)
    with pytest.raises(
        ConflictError, match="the model must run once before its penalty is taken, got a second"
    ):
        model(**batch)
    loop.loss(batch).backward()
    loop.finish_step()


def test_parameters_below_the_activations_must_train():
    model = tiny_llama()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    with pytest.raises(ConflictError, match="parameters below an MLP activation must train"):
        loop_grads(model, sal.DEFT(), ragged_samples(2))


def test_a_weight_of_zero_is_bitwise_the_plain_run_and_still_measures(tmp_path):
    def run(methods, name):
        trainer = tiny_trainer(tmp_path / name, with_lora(tiny_llama()))
        handle = sal.focus(trainer, methods) if methods else None
        trainer.train()
        return losses_of(trainer), trainer.model.state_dict(), handle

    plain, weights, _ = run(None, "plain")
    losses, ours, handle = run(sal.DEFT(weight=0.0), "zero")
    assert losses == plain
    for name, value in weights.items():
        assert torch.equal(ours[name], value), name
    assert handle.scores["deft.density"].shape == (2,) and handle.spent["deft"]["density"] > 0


def test_a_trainer_lowers_the_density_and_nothing_leaks(tmp_path):
    settings = {"max_steps": 21, "learning_rate": 0.02, "per_device_train_batch_size": 4}
    density_of = {}
    for weight in (0.0, 5.0):
        model = with_lora(tiny_llama(hidden_act="relu"))
        trainer = tiny_trainer(tmp_path / str(weight), model, **settings)
        trainer.eval_dataset = Listed(ragged_samples(4, seed=9))
        with sal.focus(trainer, sal.DEFT(weight=weight, tau=0.01)) as handle:
            trainer.train()
            trainer.evaluate()
            part = handle.parts[0]
            assert not part._values
            history = part.histories["density of each layer"]
            assert history.steps == [0, 10, 20] and history.values().shape == (3, 2)
            spent = handle.spent["deft"]
            assert spent["layers"] == 2 and spent["density above tau"] <= spent["density"]
            assert spent["density at first"] == pytest.approx(float(history.rows[0].mean()), abs=1e-4)
            density_of[weight] = spent["density"]
    assert density_of[5.0] < 0.8 * density_of[0.0]


def test_the_meter_counts_every_forward_pass_in_eval_mode_until_undone():
    model = tiny_llama(hidden_act="relu").eval()
    seen = {}
    watch = [
        module.register_forward_hook(lambda _, __, a, n=name: seen.setdefault(n, []).append(a))
        for name, module in model.named_modules()
        if name.endswith("act_fn")
    ]
    with sal.focus(model, sal.DEFT(tau=0.05)) as handle:
        assert handle.scores == {} and handle.spent["deft"] == {"layers": 2}
        with torch.no_grad():
            for seed, count in ((1, 3), (2, 1)):
                model(**collate(ragged_samples(count, seed=seed)))
        model.train()
        model(**collate(ragged_samples(2)))
        model.eval()
    for handle_ in watch:
        handle_.remove()
    for name, tau in (("deft.density", 0.0), ("deft.density above tau", 0.05)):
        want = [
            torch.cat([(a.abs() > tau).double().mean((1, 2)) for a in layer[:2]]).mean()
            for layer in seen.values()
        ]
        assert handle.scores[name].tolist() == pytest.approx([float(w) for w in want])
    with torch.no_grad():
        before = handle.scores["deft.density"]
        model(**collate(ragged_samples(3)))
    assert torch.equal(handle.scores["deft.density"], before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_meter_sees_generation_under_peft_and_masks_padding():
    model = with_lora(tiny_llama(hidden_act="relu")).eval()
    batch = collate(ragged_samples(2, seed=3), side="left")
    with sal.focus(model, sal.DEFT(mask_padding=True)) as handle, torch.no_grad():
        model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    assert 0 < handle.scores["deft.density"].min() < 1
    # one pass over the prompts and three over single tokens, two samples each
    assert handle.parts[0]._sums[:, 2].tolist() == [8.0, 8.0]


def test_an_exception_in_the_model_leaves_the_meter_ready():
    model = tiny_llama().eval()
    with sal.focus(model, sal.DEFT()) as handle, torch.no_grad():
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[10_000]]))
        model(input_ids=torch.tensor([[1, 2, 3]]))
        assert handle.parts[0]._depth == 0 and handle.scores["deft.density"].shape == (2,)


def tiny_t5(**settings):
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=3, num_heads=4,
            dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0, **settings,
        )
    ).double()  # fmt: skip


def seq2seq_batch():
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (3, 9), generator=generator)
    labels = torch.randint(3, 64, (3, 6), generator=generator)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    labels[1, 4:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("masked", [False, True], ids=["all tokens", "masked"])
def test_encoder_decoders_add_the_mean_of_each_side(masked):
    model, batch, weight, eps = tiny_t5(), seq2seq_batch(), 0.7, 1e-3
    sides = {"encoder": [], "decoder": []}
    handles = [
        module.register_forward_hook(lambda _, __, a, seen=seen: seen.append(a))
        for side, seen in sides.items()
        for name, module in model.named_modules()
        if name.startswith(side) and name.endswith("DenseReluDense.act")
    ]
    loss = model(**batch).loss
    for handle in handles:
        handle.remove()
    kept = {"encoder": batch["attention_mask"] == 1, "decoder": batch["labels"] != -100}
    for side, seen in sides.items():
        terms = torch.stack([(a**2 / (a**2 + eps)).mean(-1) for a in seen])  # [L, B, T]
        mask = kept[side].double() if masked else torch.ones_like(terms[0])
        loss = loss + weight * ((terms * mask).sum(-1) / mask.sum(-1)).mean()
    assert [len(seen) for seen in sides.values()] == [2, 3]
    loss.backward()
    want = grads(model)
    method = sal.DEFT(weight=weight, eps=eps, mask_padding=masked, modules=("DenseReluDense.act",))
    for one in (method, sal.DEFT(weight=weight, eps=eps, mask_padding=masked)):
        loop = sal.loop(model, one, shifted=False)
        loop.begin()
        loop.start_step([batch])
        loop.loss(batch).backward()
        loop.finish_step()
        loop.record.undo()
        close(grads(model), want)


class Flat(nn.Module):
    """A network that flattens its tokens before the MLP, as packed and expert layers do."""

    def __init__(self, extra=0):
        super().__init__()
        self.up, self.act, self.extra = nn.Linear(4, 8), nn.ReLU(), extra

    def forward(self, x, labels=None, attention_mask=None):
        flat = x.flatten(0, 1)
        hidden = self.act(self.up(torch.cat([flat, flat[: self.extra]])))
        return {"loss": hidden.square().mean(), "logits": hidden[: len(flat)].view(*x.shape[:2], -1)}


def test_flattened_tokens_are_given_back_to_their_samples_or_refused():
    x = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 5, [1] * 2 + [0] * 3, [0] * 5])
    model = Flat().eval()
    for masked in (False, True):
        with sal.focus(model, sal.DEFT(modules=("act",), mask_padding=masked)) as handle:
            a = model(x, attention_mask=mask)["logits"]
        weights = mask.float() if masked else torch.ones(3, 5)
        rows = (a != 0).float().mean(-1)
        want = ((rows * weights).sum(1) / weights.sum(1)).nanmean()
        assert handle.scores["deft.density"].item() == pytest.approx(float(want))
    refused = r"activations of act must belong to the 3 samples .* shape \[16, 8\]"
    model = Flat(extra=1).eval()
    with sal.focus(model, sal.DEFT(modules=("act",))), pytest.raises(ConflictError, match=refused):
        model(x)
    refused, method = "mask_padding must be False for act", sal.DEFT(modules=("act",), mask_padding=True)
    model = Flat(extra=3).eval()
    with (
        sal.focus(model, method),
        pytest.raises(ConflictError, match=f"{refused}, whose 6 tokens are not those"),
    ):
        model(x, attention_mask=mask)


def test_models_without_activation_modules_are_refused():
    with pytest.raises(
        StructureError, match=r"modules must match a module of LlamaForCausalLM, got \('relu',\)"
    ):
        sal.focus(tiny_llama(), sal.DEFT(modules=("relu",)))

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 4)) for _ in range(2))

    with pytest.raises(StructureError, match="MLP activations must be modules, got none"):
        sal.focus(Functional(), sal.DEFT())


def test_experts_and_masks_do_not_go_together():
    model = Flat()
    model.experts = nn.ModuleList([nn.ReLU(), nn.ReLU()])
    with pytest.raises(ConflictError, match=r"mask_padding must be False with experts, .* got experts\.0"):
        sal.focus(model, sal.DEFT(modules=("experts",), mask_padding=True))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.GELU], ids=["relu", "gelu"])
def test_prompt_tuning_counts_virtual_tokens(activation):
    from peft import PromptTuningConfig, get_peft_model

    act = "relu" if activation is nn.ReLU else "gelu"
    model = get_peft_model(
        tiny_llama(hidden_act=act), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    for masked in (False, True):
        got = loop_grads(model, sal.DEFT(eps=1e-3, mask_padding=masked), ragged_samples(3))
        assert len(got) == 1 and all(value.abs().sum() > 0 for value in got.values())


def test_autocast_and_bfloat16_train(tmp_path):
    model = with_lora(tiny_llama()).to(torch.bfloat16)
    trainer = tiny_trainer(tmp_path, model, bf16=True)
    with sal.focus(trainer, sal.DEFT(eps=1e-3)) as handle:
        trainer.train()
        assert 0 < handle.scores["deft.density"].min() <= 1
    assert all(math.isfinite(loss) for loss in losses_of(trainer))
