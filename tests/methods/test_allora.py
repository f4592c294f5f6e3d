"""ALLoRA: the scaled backward pass against plain autograd, the optimizer's part, and peft's layers in every state."""

import copy
import math
import warnings

import pytest
import torch
from conftest import collate, ragged_samples, tiny_gpt2, tiny_llama, tiny_trainer, with_lora
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import salience as sal
from salience.core.errors import ConflictError, StructureError
from salience.methods.weights.allora import adapter_branch, row_norms, scales

pytestmark = pytest.mark.filterwarnings("ignore:ALLoRA scales gradients")


def lora_llama():
    return with_lora(tiny_llama())


CONTRACT = {
    "method": sal.ALLoRA(eta=2.0),
    "model": lora_llama,
    "bad": {
        "eta": (0.0, "eta must be > 0 and finite, got 0.0"),
        "eta:2": (math.inf, "eta must be > 0 and finite, got inf"),
        "eta:3": (math.nan, "eta must be > 0 and finite, got nan"),
        "variant": ("rows", "variant must be one of weight, output, asf, got 'rows'"),
        "apply": ("grad", "apply must be one of gradient, update, got 'grad'"),
    },
}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def single(r=3, fan_in=5, fan_out=7, zero=False, bias=True, **settings):
    """One float64 peft layer on a Linear, B with rows from 1e-3 to 10."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(fan_in, fan_out, bias=bias))
        model = get_peft_model(
            plain, LoraConfig(r=r, target_modules=["0"], **{"lora_alpha": r, **settings})
        ).double()
    layer = model.base_model.model[0]
    if not zero:
        sizes = torch.logspace(-3, 1, fan_out, dtype=torch.float64).unsqueeze(1)
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(randn(fan_out, r, seed=1) * sizes)
    return model, layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight


def gradients(model, A, B, dy, x):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    y.backward(dy)
    return y.detach(), leaf.grad, A.grad.clone(), B.grad.clone()


def test_worked_example():
    A, B = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    norms = row_norms(A, B)
    assert norms.tolist() == [0.0, 5.0]
    assert scales(norms, 2.0).tolist() == pytest.approx([2.0, 1 / math.sqrt(5.25)])
    assert scales(norms, 2.0)[1].item() == pytest.approx(0.436436, abs=5e-7)


@pytest.mark.parametrize("r", [1, 4, 63])
def test_row_norms_are_those_of_the_product(r):
    A, B = (
        randn(r, 5, seed=2),
        randn(9, r, seed=3) * torch.logspace(-6, 3, 9, dtype=torch.float64).unsqueeze(1),
    )
    torch.testing.assert_close(row_norms(A, B), (B @ A).norm(dim=1), rtol=1e-12, atol=0)
    assert row_norms(torch.zeros_like(A), B).tolist() == [0.0] * 9
    low = row_norms(A.bfloat16(), B.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(
        low, (B.bfloat16().float() @ A.bfloat16().float()).norm(dim=1), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("eta", [0.3, 1.0, 3.0])
def test_scales_fall_from_eta(eta):
    s = scales(torch.tensor([0.0, 1e-3, 1.0, 10.0, 1e6]), eta)
    assert s[0] == torch.tensor(eta) and (s.diff() < 0).all() and (s > 0).all()
    rho = torch.rand(63, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 9
    torch.testing.assert_close(scales(rho, eta), 1 / (rho + 1 / eta**2).sqrt(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("eta", [0.5, 2.0])
@pytest.mark.parametrize("lead", [(2, 4), (1,), (0,)], ids=str)
@pytest.mark.parametrize("r", [3, 8], ids=["r=3", "r>n"])
def test_gradients_are_those_of_plain_lora_on_scaled_output_gradients(eta, lead, r):
    model, _, A, B = single(r=r)
    x, dy = randn(*lead, 5, seed=4), randn(*lead, 7, seed=5)
    y, plain_x, _, plain_B = gradients(model, A, B, dy, x)
    s = 1 / ((B @ A).detach().norm(dim=1) + 1 / eta**2).sqrt()
    _, _, scaled_A, _ = gradients(model, A, B, dy * s, x)
    with sal.focus(model, sal.ALLoRA(eta=eta)):
        got_y, got_x, got_A, got_B = gradients(model, A, B, dy, x)
    torch.testing.assert_close(got_y, y)
    torch.testing.assert_close(got_x, plain_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_A, scaled_A, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got_B, s[:, None] * plain_B, rtol=1e-10, atol=1e-12)


def test_output_variant_scales_each_token_by_its_own_output():
    model, _, A, B = single()
    x, dy = randn(2, 4, 5, seed=4), randn(2, 4, 7, seed=5)
    _, plain_x, _, _ = gradients(model, A, B, dy, x)
    s = 1 / ((x @ A.T @ B.T).detach().abs() + 1 / 4).sqrt()
    _, _, want_A, want_B = gradients(model, A, B, dy * s, x)
    with sal.focus(model, sal.ALLoRA(eta=2.0, variant="output")):
        _, got_x, got_A, got_B = gradients(model, A, B, dy, x)
    for got, want in ((got_x, plain_x), (got_A, want_A), (got_B, want_B)):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_asf_variant_changes_the_output_and_has_ordinary_gradients():
    model, layer, A, B = single()
    x, dy = randn(2, 4, 5, seed=4), randn(2, 4, 7, seed=5)
    leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
    f = leaves[0] @ leaves[1].T @ leaves[2].T
    want = layer.base_layer(leaves[0]) + f / (f.abs() + 1 / 4).sqrt()
    want.backward(dy)
    with sal.focus(model, sal.ALLoRA(eta=2.0, variant="asf")):
        y, *grads = gradients(model, A, B, dy, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), want.detach())
        layer.merge()
        with pytest.raises(ConflictError, match="adapters must not be merged with variant 'asf'"):
            model(x)
        layer.unmerge()
    torch.testing.assert_close(y, want.detach())
    for got, leaf in zip(grads, leaves):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-12)


def test_from_zero_gradients_are_eta_times_larger_for_b_and_zero_for_a():
    model, _, A, B = single(zero=True)
    x, dy = randn(6, 5, seed=4), randn(6, 7, seed=5)
    *_, plain_B = gradients(model, A, B, dy, x)
    with sal.focus(model, sal.ALLoRA(eta=3.0)):
        *_, got_A, got_B = gradients(model, A, B, dy, x)
    torch.testing.assert_close(got_B, 3.0 * plain_B, rtol=1e-12, atol=0)
    assert not got_A.any()


def first_step(method, make, eta=2.0):
    model, _, A, B = single(zero=True)
    loop = sal.loop(model, method) if method else None
    optimizer = make([A, B])
    if loop:
        loop.begin(optimizer)
    gradients(model, A, B, randn(6, 7, seed=5), randn(6, 5, seed=4))
    optimizer.step()
    return A.detach(), B.detach()


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_one_sgd_step_from_zero_is_loras_at_eta_times_the_rate(apply):
    ours = first_step(sal.ALLoRA(eta=2.0, apply=apply), lambda p: torch.optim.SGD(p, lr=0.1))
    plain = first_step(None, lambda p: torch.optim.SGD(p, lr=0.2))
    for got, want in zip(ours, plain):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)


def test_adamw_undoes_scaled_gradients_but_not_scaled_updates():
    settings = {"lr": 0.1, "weight_decay": 0.0, "eps": 1e-30}
    plain, faster = (
        first_step(None, lambda p, k=k: torch.optim.AdamW(p, **{**settings, "lr": k})) for k in (0.1, 0.2)
    )
    gradient = first_step(sal.ALLoRA(eta=2.0), lambda p: torch.optim.AdamW(p, **settings))
    update = first_step(sal.ALLoRA(eta=2.0, apply="update"), lambda p: torch.optim.AdamW(p, **settings))
    torch.testing.assert_close(gradient[1], plain[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(update[1], faster[1], rtol=1e-9, atol=0)


def test_update_scales_what_the_optimizer_did():
    """Rows of B's step by s, A's step by the mean of s, with s from before the step; weight decay is in the step."""

    def stepped(method):
        model, _, A, B = single()
        optimizer = torch.optim.AdamW([A, B], lr=0.1, weight_decay=0.3)
        loop = sal.loop(model, method, optimizer=optimizer) if method else None
        if loop:
            loop.begin()
        old = A.detach().clone(), B.detach().clone()
        gradients(model, A, B, randn(6, 7, seed=5), randn(6, 5, seed=4))
        optimizer.step()
        if loop:
            loop.end()
            kept = A.detach().clone(), B.detach().clone()
            before = B.detach().clone()
            optimizer.step()
            assert not torch.equal(before, B) and not optimizer._optimizer_step_pre_hooks
            return old, kept
        return old, (A.detach(), B.detach())

    (A0, B0), (A1, B1) = stepped(None)
    _, (A2, B2) = stepped(sal.ALLoRA(eta=2.0, apply="update"))
    s = 1 / ((B0 @ A0).norm(dim=1) + 0.25).sqrt()
    torch.testing.assert_close(A2, A0 + s.mean() * (A1 - A0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(B2, B0 + s[:, None] * (B1 - B0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_warns_only_where_the_optimizer_undoes_it(apply):
    for make, undoes in ((torch.optim.AdamW, True), (torch.optim.RMSprop, True), (torch.optim.SGD, False)):
        model, _, A, B = single()
        loop = sal.loop(model, sal.ALLoRA(apply=apply))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loop.begin(make([A, B], lr=0.1))
        texts = [str(one.message) for one in caught]
        assert any(f"{make.__name__} undoes" in text for text in texts) == (undoes and apply == "gradient"), (
            texts
        )
        loop.end()


def test_an_update_needs_an_optimizer():
    with pytest.raises(ConflictError, match="apply must be 'gradient' for a model"):
        sal.focus(single()[0], sal.ALLoRA(apply="update"))
    loop = sal.loop(single()[0], sal.ALLoRA(apply="update"))
    with pytest.raises(ConflictError, match="optimizer must be given for apply='update', got None"):
        loop.begin()
    with pytest.raises(ValueError, match="apply must be gradient with variant 'asf', got 'update'"):
        sal.ALLoRA(variant="asf", apply="update")


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"lora_alpha": 16}, r"lora_alpha must be r \(no scaling factor\), got lora_alpha 16 with r 3"),
        ({"lora_dropout": 0.05}, "lora_dropout must be 0, got 0.05"),
        ({"use_rslora": True}, "use_rslora must be False, got True"),
        ({"use_dora": True}, "LoRA must be plain .*, got DoraLinearVariant"),
        ({"lora_bias": True}, "lora_bias must be False, got True"),
    ],
    ids=["alpha", "dropout", "rslora", "dora", "bias"],
)
def test_nothing_of_plain_lora_is_ignored_silently(settings, text):
    with pytest.raises(ConflictError, match=text):
        sal.focus(single(**settings)[0], sal.ALLoRA())


def test_refuses_models_without_lora_and_layers_of_other_kinds():
    with pytest.raises(StructureError, match=r"model must have LoRA layers .* got none in LlamaForCausalLM"):
        sal.focus(tiny_llama(), sal.ALLoRA())
    model = with_lora(tiny_llama(), targets=("q_proj", "embed_tokens"))
    with pytest.raises(
        ConflictError, match=r"LoRA must be on Linear or Conv1D layers for ALLoRA, got .*embed_tokens"
    ):
        sal.focus(model, sal.ALLoRA())


def test_a_scale_that_is_set_later_is_refused_too():
    model, layer, *_ = single()
    with sal.focus(model, sal.ALLoRA()):
        layer.set_scale("default", 2.0)
        with pytest.raises(ConflictError, match=r"the adapter must not be scaled, got scaling 2.0 at"):
            model(randn(2, 5))


def test_disabled_merged_and_mixed_adapters_and_evaluation():
    model, layer, *_ = single()
    x = randn(4, 5, seed=4)
    plain = model(x).detach()
    with sal.focus(model, sal.ALLoRA(eta=2.0)):
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x), plain)
            assert torch.equal(model(x, adapter_names=["default"] * 4), plain)
        with model.disable_adapter():
            assert torch.equal(model(x), layer.base_layer(x))
        layer.merge()
        torch.testing.assert_close(model(x), plain, rtol=1e-6, atol=1e-6)
        layer.unmerge()
        with pytest.raises(ConflictError, match="adapter_names must be None while ALLoRA trains"):
            model(x, adapter_names=["default"] * 4)


def test_several_active_adapters_are_scaled_each_by_its_own_rows():
    model, layer, *_ = single(bias=True)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    model.double()
    with torch.no_grad():
        layer.lora_B["other"].weight.copy_(randn(7, 2, seed=9))
    x, dy = randn(6, 5, seed=4), randn(6, 7, seed=5)

    def grads():
        model.zero_grad()
        model(x).backward(dy)
        return {name: layer.lora_B[name].weight.grad.clone() for name in ("default", "other")}

    plain = grads()
    with sal.focus(model, sal.ALLoRA(eta=2.0)) as handle:
        got = grads()
        assert len(handle.scores) == 2 and handle.spent["allora"]["output channels"] == 14
    for name in ("default", "other"):
        A, B = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
        s = 1 / ((B @ A).norm(dim=1) + 0.25).sqrt()
        torch.testing.assert_close(got[name], s[:, None] * plain[name], rtol=1e-10, atol=1e-12, msg=name)


def lora_gpt2():
    return with_lora(tiny_gpt2(), targets=("c_attn", "c_proj"), fan_in_fan_out=True).double()


def all_grads(model, method=None, **context):
    model.zero_grad()
    batch = collate(ragged_samples(3, seed=5))
    if method is None:
        model(**batch).loss.backward()
    else:
        with sal.focus(model, method):
            model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_conv1d_layers_of_a_whole_model():
    """The last layer's B sees the plain output gradient, so its rows must be scaled exactly."""
    model = lora_gpt2()
    plain, ours = all_grads(model), all_grads(model, sal.ALLoRA(eta=2.0))
    assert plain.keys() == ours.keys() and all("lora_" in name for name in ours)
    last = "base_model.model.transformer.h.1.mlp.c_proj.lora_{}.default.weight"
    weights = dict(model.named_parameters())
    norms = (weights[last.format("B")] @ weights[last.format("A")]).detach().norm(dim=1)
    s = 1 / (norms + 0.25).sqrt()
    torch.testing.assert_close(
        ours[last.format("B")], s[:, None] * plain[last.format("B")], rtol=1e-9, atol=1e-12
    )
    # grad of x is not scaled, so this also holds for every layer below
    first = last.replace("h.1", "h.0").format
    s = 1 / ((weights[first("B")] @ weights[first("A")]).detach().norm(dim=1) + 0.25).sqrt()
    torch.testing.assert_close(ours[first("B")], s[:, None] * plain[first("B")], rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = lora_gpt2()
    want = all_grads(model, sal.ALLoRA(eta=2.0))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    got = all_grads(model, sal.ALLoRA(eta=2.0))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_and_adapters_of_another_dtype_compute_as_in_peft(base):
    model = lora_llama()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(base)
    batch = collate(ragged_samples(3, seed=5))

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=base == torch.float32):
            loss = model(**batch).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    plain_loss, plain = run()
    with sal.focus(model, sal.ALLoRA(eta=2.0)):
        loss, ours = run()
    assert torch.equal(loss, plain_loss)
    weights = dict(model.named_parameters())
    for name, grad in ours.items():
        assert grad.dtype == torch.float32
        if "lora_B" in name:
            s = scales(row_norms(weights[name.replace("lora_B", "lora_A")], weights[name]), 2.0)
            want = s[:, None] * plain[name]
            assert (grad - want).norm() < 0.02 * want.norm(), name


def test_accumulated_batches_give_the_gradient_of_one():
    model = lora_gpt2()
    loop = sal.loop(model, sal.ALLoRA(eta=2.0), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    loop.begin()
    samples = ragged_samples(8)
    got = []
    for cut in (8, 2):
        batches = [collate(samples[i : i + cut]) for i in range(0, 8, cut)]
        model.zero_grad()
        loop.start_step(batches)
        for batch in batches:
            loop.loss(batch).backward()
        loop.finish_step()
        # transformers computes the loss in fp32
        got.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, value in got[0].items():
        torch.testing.assert_close(
            got[1][name], value, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_second_derivatives_are_refused():
    x, A, B = randn(2, 5).requires_grad_(), randn(3, 5), randn(7, 3).requires_grad_()
    grad = torch.autograd.grad(adapter_branch(x, A, B).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_is_saved_is_an_ordinary_adapter(tmp_path):
    torch.manual_seed(1)
    trainer = tiny_trainer(tmp_path, lora_llama(), optim="sgd", learning_rate=0.1)
    handle = sal.focus(trainer, sal.ALLoRA(eta=2.0))
    trainer.train()
    handle.save(tmp_path / "adapter")
    trainer.model.eval()
    batch = collate(ragged_samples(3, seed=5))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
    config = loaded.peft_config["default"]
    assert config.lora_alpha == config.r and config.lora_dropout == 0
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model(**batch).logits)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(
            merged(**batch).logits, trainer.model(**batch).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_history_scores_and_spent(apply, tmp_path):
    trainer = tiny_trainer(tmp_path, lora_llama(), max_steps=12, learning_rate=0.01)
    handle = sal.focus(trainer, sal.ALLoRA(eta=2.0, apply=apply))
    trainer.train()
    history = handle.parts[0].histories["mean scale of each layer"]
    assert history.steps == [0, 10] and history.values().shape == (2, 8)
    assert (history.values() > 0).all() and (history.values() <= 2).all()
    spent = handle.spent["allora"]
    assert (
        spent["layers"] == 8
        and 0 < spent["smallest factor"] <= spent["mean factor"] <= spent["largest factor"] <= 2
    )
    assert all(
        name.endswith("default.row_norms") and value.dim() == 1 for name, value in handle.scores.items()
    )


def test_a_copied_model_uses_its_own_adapters():
    model, _, _, B = single()
    with sal.focus(model, sal.ALLoRA(eta=2.0)):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            B.zero_()
        x = randn(2, 5)
        assert not torch.equal(twin(x), model(x))
        twin(x).sum().backward()
    assert B.grad is None and twin.base_model.model[0].lora_B["default"].weight.grad is not None


@pytest.mark.slow
def test_compiles():
    model, _, A, B = single()
    x, dy = randn(6, 5, seed=4), randn(6, 7, seed=5)
    with sal.focus(model, sal.ALLoRA(eta=2.0)):
        want = gradients(model, A, B, dy, x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        compiled(leaf).backward(dy)
        for got, value in zip((leaf.grad, A.grad, B.grad), want[1:]):
            torch.testing.assert_close(got, value)
