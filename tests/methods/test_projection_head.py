"""ProjectionHead: heads that are thrown away, the contrastive loss at its edges, and the linear theory."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from conftest import tiny_llama, tiny_trainer
from torch import nn

import salience as sal
from salience.core.errors import ParameterError, StructureError
from salience.core.method import Method
from salience.core.part import Part

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "projection-head.md"
CONTRACT = {
    "method": sal.ProjectionHead(kind="mlp", hidden=16, out=8, weight=0.5),
    "model": tiny_llama,
    "bad": {
        "kind": ("deep", "kind must be one of none, linear, mlp, fixed, got 'deep'"),
        "kappa": (0.9, "kappa must be >= 1 and finite, got 0.9"),
        "kappa:2": (math.inf, "kappa must be >= 1 and finite, got inf"),
        "hidden": (0, "hidden must be None or >= 1, got 0"),
        "out": (-1, "out must be None or >= 1, got -1"),
        "temperature": (0.0, "temperature must be > 0 and finite, got 0.0"),
        "weight": (0.0, "weight must be > 0 and finite, got 0.0"),
    },
}


def sample(rows=10, width=6, classes=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    z = torch.randn(rows, width, generator=draw, dtype=torch.float64)
    return z, torch.randint(classes, (rows,), generator=draw)


def by_hand(z, labels, temperature):
    """The formula, row by row in float64."""
    rows = []
    for a in range(len(z)):
        s = [float(torch.dot(z[a], z[b]) / z[a].norm() / z[b].norm()) / temperature for b in range(len(z))]
        alike = [b for b in range(len(z)) if b != a and labels[b] == labels[a]]
        if alike:
            total = math.log(sum(math.exp(s[b]) for b in range(len(z)) if b != a))
            rows.append(total - sum(s[b] for b in alike) / len(alike))
    return sum(rows) / len(rows) if rows else 0.0


def test_worked_examples():
    assert sal.fixed_weights(3, 2.0).tolist() == [1.0, 0.5, 0.25]
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    loss = sal.supervised_contrastive(z, torch.tensor([0, 0, 1, 1]))
    assert (
        float(loss)
        == pytest.approx(math.log(math.exp(2) + 2) - 2, abs=1e-6)
        == pytest.approx(0.239545, abs=1e-6)
    )


@pytest.mark.parametrize("temperature", [0.02, 0.5, 2.0])
def test_the_loss_is_the_formula_with_its_gradient(temperature):
    z, labels = sample()
    labels[0] = 7  # alone in its class: left out
    found = sal.supervised_contrastive(z, labels, temperature=temperature)
    assert float(found) == pytest.approx(by_hand(z, labels, temperature), rel=1e-9)
    z.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda value: sal.supervised_contrastive(value, labels, temperature=max(temperature, 0.5)), (z,)
    )


def test_the_loss_does_not_see_scale_or_order():
    z, labels = sample()
    loss = sal.supervised_contrastive(z, labels)
    scales = 0.1 + torch.rand(10, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(sal.supervised_contrastive(z * scales, labels), loss)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sal.supervised_contrastive(z[order], labels[order]), loss)


def test_two_views_are_one_view_with_each_label_twice():
    z, _ = sample()
    labels = torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(
        sal.supervised_contrastive(z, labels), sal.supervised_contrastive(z, torch.cat((labels, labels)))
    )
    # the samples' own numbers give the self-supervised loss: one positive each
    own = sal.supervised_contrastive(z, torch.arange(5))
    assert float(own) == pytest.approx(by_hand(z, torch.arange(5).repeat(2), 0.5))


def test_edges_are_finite_with_finite_gradients():
    z, _ = sample()
    for labels in (torch.arange(10), torch.zeros(10, dtype=torch.long), torch.full((10,), -1)):
        held = z.clone()
        held[0] = 0
        held.requires_grad_()
        loss = sal.supervised_contrastive(held, labels)
        loss.backward()
        assert bool(loss.isfinite()) and bool(held.grad.isfinite().all())
    assert float(sal.supervised_contrastive(z, torch.arange(10))) == 0, "nobody has a partner"


def test_ignored_samples_change_nothing():
    z, labels = sample()
    more = torch.cat((z, torch.full((2, 6), 3.0, dtype=torch.float64)))
    ignored = torch.cat((labels, torch.tensor([-1, -1])))
    torch.testing.assert_close(
        sal.supervised_contrastive(more, ignored), sal.supervised_contrastive(z, labels)
    )


def test_the_fixed_head_reweights_gradients_too_and_learns_nothing():
    head = sal.FixedHead(5, kappa=1.5)
    w = sal.fixed_weights(5, 1.5)
    assert float(w[0]) == 1 and bool((w.diff() < 0).all())
    assert float(w[1] * w[2]) == pytest.approx(float(w[3]))
    h = torch.randn(4, 5, requires_grad=True, generator=torch.Generator().manual_seed(0))
    z = head(h)
    z.backward(torch.ones_like(z))
    torch.testing.assert_close(h.grad, w.expand(4, 5))
    assert not list(head.parameters()) and not head.state_dict()
    assert torch.equal(sal.FixedHead(5, kappa=1.0)(h), h)
    # no overflow where 1 / kappa**i has one, and about twenty features carry the loss at 1.05
    assert bool(sal.fixed_weights(4096, 3.0).isfinite().all())
    assert sal.FixedHead(2048, kappa=1.05).effective() == pytest.approx(20.5, abs=1)
    # a checkpoint cannot change kappa
    assert "kappa=1.5" in repr(head) and head.load_state_dict({}) is not None


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_heads_can_start_as_the_identity(kind):
    head = sal.make_head(kind, 6, identity=True)
    h = sample()[0].float()
    torch.testing.assert_close(head(h), h)
    assert sal.symmetric_relu(torch.tensor([-2.0, -0.1, 0.0, 0.1, 2.0]), 0.5).tolist() == [-1.5, 0, 0, 0, 1.5]


def test_heads_have_the_widths_asked_for_and_move_no_global_randomness():
    before = torch.get_rng_state()
    head = sal.make_head("mlp", 6, hidden=4, out=3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert head(torch.zeros(2, 5, 6)).shape == (2, 5, 3)
    again = sal.make_head("mlp", 6, hidden=4, out=3, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters()))
    h = torch.randn(2, 6)
    assert sal.make_head("none", 6)(h) is h


def test_a_wrapped_encoder_keeps_its_representation():
    encoder = nn.Linear(8, 4)
    model = sal.ProjectionHead(kind="mlp").wrap(encoder, 4)
    x = torch.randn(3, 8)
    pre, post = model.both(x)
    assert torch.equal(pre, encoder(x)) and torch.equal(model.representation(x), pre)
    assert torch.equal(model(x), post) and not torch.equal(pre, post)
    assert model.encoder is encoder


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: sal.supervised_contrastive(torch.zeros(3), torch.zeros(3).long()), "z must be float"),
        (
            lambda: sal.supervised_contrastive(torch.zeros(1, 3), torch.zeros(1).long()),
            "with two samples at least",
        ),
        (
            lambda: sal.supervised_contrastive(torch.zeros(4, 3), torch.zeros(3).long()),
            r"labels must be int64 \[4\]",
        ),
        (
            lambda: sal.supervised_contrastive(torch.zeros(4, 3), torch.zeros(4)),
            r"labels must be int64 \[4\]",
        ),
        (
            lambda: sal.supervised_contrastive(torch.zeros(4, 3), torch.zeros(4).long(), temperature=-1.0),
            "temperature must be > 0 and finite, got -1.0",
        ),
        (
            lambda: sal.make_head("mlp", 4, hidden=3, identity=True),
            "hidden must be None or 4 for an identity, got 3",
        ),
        (lambda: sal.make_head("mlp", 0), "features must be >= 1, got 0"),
        (lambda: sal.fixed_weights(4, 0.5), "kappa must be >= 1 and finite, got 0.5"),
    ],
)
def test_bad_input_is_one_clear_error(call, text):
    with pytest.raises(ParameterError, match=text):
        call()


def test_the_linear_theory_of_depth():
    """Spectral contrastive loss of a two-layer linear net: post-projection 1 - alpha, pre sqrt(phi (1 - alpha))."""
    double = torch.float64
    phi = torch.tensor([1.0, 0.7, 0.5, 0.3], dtype=double)
    alpha = torch.tensor([0.1, 0.6, 0.0, 0.3], dtype=double)
    draw = torch.Generator().manual_seed(0)
    w1, w2 = (0.3 * torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=double))[0] for _ in range(2))
    positive, spread = (phi.square() * (1 - alpha).square()).diag(), phi.square().diag()
    for _ in range(12_000):
        m = w2 @ w1
        gram = m.T @ m
        # d/dM of -2 tr(G Sp) + tr(G S G S) = 4 M (S G S - Sp)
        slope = 4 * m @ (spread @ gram @ spread - positive)
        w1, w2 = w1 - 0.05 * w2.T @ slope, w2 - 0.05 * slope @ w1.T
    post, pre = (w2 @ w1 @ phi.diag()).norm(dim=0), (w1 @ phi.diag()).norm(dim=0)
    torch.testing.assert_close(post, 1 - alpha, atol=0.01, rtol=0)
    torch.testing.assert_close(pre, (phi * (1 - alpha)).sqrt(), atol=0.01, rtol=0)


def test_on_a_trainer_the_loss_is_added_and_the_model_stays_ordinary(tmp_path):
    names = set(tiny_llama().state_dict())
    plain, focused = (
        tiny_trainer(tmp_path / name, tiny_llama(), per_device_train_batch_size=8)
        for name in ("plain", "focused")
    )
    handle = sal.focus(focused, sal.ProjectionHead(kind="fixed", kappa=1.1))
    plain.train()
    focused.train()
    first = [next(row["loss"] for row in t.state.log_history if "loss" in row) for t in (plain, focused)]
    assert first[1] > first[0]
    assert set(focused.model.state_dict()) == names
    handle.save(tmp_path / "saved")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert set(again.state_dict()) == names
    assert torch.equal(again.lm_head.weight, focused.model.lm_head.weight)


def test_a_learnt_head_trains_and_a_probe_leaves_the_features_to_the_contrastive_loss(tmp_path):
    grads = {}
    for probe, weight in ((False, 1e-12), (True, 1e-12)):
        trainer = tiny_trainer(tmp_path, tiny_llama(), max_steps=2)
        handle = sal.focus(trainer, sal.ProjectionHead(kind="mlp", weight=weight, probe=probe))
        before = [p.clone() for p in handle.parts[0]._head.parameters()]
        start = trainer.model.model.layers[0].mlp.up_proj.weight.detach().clone()
        from transformers import TrainerCallback

        class Look(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, probe=probe, **kwargs):
                grads[probe] = float(kwargs["model"].model.layers[0].mlp.up_proj.weight.grad.abs().max())

        trainer.add_callback(Look())
        trainer.train()
        assert any(not torch.equal(a, b) for a, b in zip(before, handle.parts[0]._head.parameters()))
        assert start.shape == trainer.model.model.layers[0].mlp.up_proj.weight.shape
    assert grads[True] < 1e-6 < grads[False]


def test_a_model_without_a_linear_layer_is_refused():
    class Bare(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(StructureError, match="model must end in a linear layer"):
        sal.loop(Bare(), sal.ProjectionHead())


def test_the_loop_on_the_page_runs_and_learns():
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "two_views" in b)
    space = {}
    exec(compile(block, str(PAGE), "exec"), space)
    assert float(space["loss"].detach()) < float(space["first"])
    assert space["features"].shape == (400, 64)


def test_compiled_gives_what_eager_gives():
    z, labels = sample()
    head = sal.make_head("mlp", 6)

    def step(h, y):
        return sal.supervised_contrastive(head(h), y)

    fast = torch.compile(step, backend="aot_eager")
    torch.testing.assert_close(fast(z.float(), labels), step(z.float(), labels), rtol=1e-5, atol=1e-6)


def test_bf16_autocast_keeps_the_loss_in_fp32():
    z, labels = sample()
    head, h = sal.FixedHead(6, kappa=1.2), z.float()
    exact = sal.supervised_contrastive(head(h), labels)
    with torch.autocast("cpu", torch.bfloat16):
        near = sal.supervised_contrastive(head(h.bfloat16()), labels)
        same = sal.supervised_contrastive(head(h), labels)
    assert torch.equal(same, exact) and near.dtype == torch.float32
    torch.testing.assert_close(near, exact, rtol=0.01, atol=0)


SIZE = {"per_device_train_batch_size": 4}


class OnesPart(Part):
    """Weights of one: the loop then computes the loss itself and keeps penalties apart."""

    def __init__(self):
        super().__init__()
        self.weights_samples = True


@dataclass(frozen=True, kw_only=True)
class Ones(Method):
    unit: ClassVar[str] = "sample"

    def attach_trainer(self, site, record):
        return OnesPart()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_beside_a_method_that_weights_a_learnt_head_trains_the_same(accumulation, tmp_path):
    heads = []
    for methods in ([], [Ones()]):
        trainer = tiny_trainer(
            tmp_path, tiny_llama(), gradient_accumulation_steps=accumulation, max_steps=2, **SIZE
        )
        handle = sal.focus(trainer, [*methods, sal.ProjectionHead(kind="mlp", hidden=4, out=4)])
        start = [p.detach().clone() for p in handle.parts[-1]._head.parameters()]
        trainer.train()
        heads.append([p.detach().clone() for p in handle.parts[-1]._head.parameters()])
        assert any(not torch.equal(a, b) for a, b in zip(start, heads[-1], strict=True))
    for one, other in zip(*heads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
