"""DHKD: the losses against their formulas, alignment, two heads, bad input, and training in a Trainer and a loop."""

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import losses_of, tiny_llama, tiny_trainer
from picture_models import (
    TEACHER,
    FlatTeacher,
    images,
    on_pictures,
    picture_trainer,
    pictures,
    seeded,
    shown_model,
    vit,
)

import salience as sal
from salience.core import draws
from salience.core.errors import ConflictError, ParameterError, StructureError
from salience.methods.classes.dhkd import (
    AuxiliaryHead,
    BinaryKLLoss,
    DualHead,
    align_gradients,
    aligned_backward,
    binary_kl,
    binary_kl_norm,
)

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "dhkd.md"
FORMS = ("binary_kl_norm", "binary_kl", "mse")

CONTRACT = {
    "method": sal.DHKD(teacher=TEACHER, aux_head="nonlinear", align=True),
    "model": tiny_llama,
    "trainer_model": shown_model,
    "trainer": {"cls": on_pictures},
    "bad": {
        "gamma": (-1.0, r"gamma must be >= 0 and finite, got -1.0"),
        "alpha": (math.inf, r"alpha must be >= 0 and finite, got inf"),
        "alpha:2": (math.nan, r"alpha must be >= 0 and finite, got nan"),
        "tau": (0.0, r"tau must be > 0 and finite, got 0.0"),
        "loss": ("kl", r"loss must be one of binary_kl_norm, binary_kl, mse, got 'kl'"),
        "aux_head": ("deep", r"aux_head must be one of linear, nonlinear, got 'deep'"),
        "align_scope": ("some", r"align_scope must be one of all, shared, got 'some'"),
        "stop_epoch": (-1, r"stop_epoch must be None or an integer >= 0, got -1"),
        "teacher": (3, r"teacher must be a model or a folder, got 'int'"),
        "cache": ("folder", r"cache must be None unless teacher is a model to fill it, got 'folder'"),
    },
}


def drawn(rows=5, classes=7, seed=0, scale=3.0):
    s, t = scale * torch.randn(2, rows, classes, dtype=torch.float64, generator=seeded(seed))
    return s.requires_grad_(), t


# --- the losses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("form", ["binary_kl_norm", "binary_kl"])
def test_value_and_gradient_of_the_formula(form, tau):
    s, t = drawn()
    if form == "binary_kl_norm":
        p, q = torch.full_like(t, 0.5), ((s - t) / tau).sigmoid()
    else:
        p, q = (t / tau).sigmoid(), (s / tau).sigmoid()
    wanted = tau**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(-1).mean()
    loss = BinaryKLLoss(tau, form=form)(s, t)
    torch.testing.assert_close(loss, wanted, rtol=1e-8, atol=1e-10)
    got, want = (torch.autograd.grad(one, s)[0] for one in (loss, wanted))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-10)


def test_the_worked_example():
    z = torch.tensor([[2.0, 0.0]], requires_grad=True)
    loss = BinaryKLLoss(tau=2.0)(z, torch.zeros(1, 2))
    assert float(loss.detach()) == pytest.approx(0.480458, abs=1e-6)
    grad = torch.autograd.grad(loss, z)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.462117, 0.0]]), rtol=0, atol=1e-6)


def test_invariants():
    s, t = drawn()
    loss = BinaryKLLoss()
    value, order = loss(s, t), torch.randperm(7, generator=seeded(1))
    assert float(value.detach()) > 0 and float(loss(t, t)) == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(loss(s[:, order], t[:, order]), value)
    torch.testing.assert_close(loss(t, s), value)
    for form in FORMS:
        assert abs(float(BinaryKLLoss(form=form)(t + 1, t))) > 1e-3, "a common offset must cost something"
    torch.testing.assert_close(BinaryKLLoss(1e5)(s, t), BinaryKLLoss(form="mse")(s, t), rtol=1e-6, atol=0)
    teacher = t.clone().requires_grad_()
    loss(s, teacher).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("form", ["binary_kl_norm", "binary_kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [0.0, 10.0, 40.0, 1e3, 1e4, -40.0, -1e4])
def test_far_off_heads_have_a_finite_loss_and_a_gradient(gap, dtype, form):
    z = torch.full((2, 3), gap, dtype=dtype, requires_grad=True)
    tau = 2.0
    loss = BinaryKLLoss(tau, form=form)(z, torch.zeros(2, 3, dtype=dtype))
    grad = torch.autograd.grad(loss, z)[0].float()
    assert loss.dtype == torch.float32 and torch.isfinite(loss)
    bound = tau / (2 * 2)
    assert bool((grad.abs() <= bound + 1e-6).all())
    if gap:
        assert bool((grad * math.copysign(1, gap) > 0.1 * bound).all()), "a far-off head must come back"


def test_reductions_and_no_rows():
    s, t = drawn()
    each = BinaryKLLoss(reduction="none")(s, t)
    torch.testing.assert_close(each, binary_kl_norm(s, t))
    torch.testing.assert_close(BinaryKLLoss(reduction="sum")(s, t), each.sum())
    torch.testing.assert_close(BinaryKLLoss(form="binary_kl", reduction="none")(s, t), binary_kl(s, t))
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = BinaryKLLoss()(empty, torch.zeros(0, 4))
    loss.backward()
    assert float(loss.detach()) == 0 and empty.grad.shape == (0, 4)


def test_compiled_and_under_autocast():
    x, t = torch.randn(6, 10, generator=seeded()), torch.randn(6, 5, generator=seeded(1))
    heads = DualHead(torch.nn.Linear(10, 5))

    def step(x):
        main, auxiliary = heads(x)
        return main.square().mean() + BinaryKLLoss()(auxiliary, t)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    grads = []
    for one in (step, compiled):
        heads.zero_grad()
        loss = one(x)
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in heads.parameters())])
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(step(x), grads[0][0], rtol=2e-2, atol=2e-2)


# --- alignment ------------------------------------------------------------------------------------------------


def flat(gradients):
    return torch.cat([one.flatten() for one in gradients])


@pytest.mark.parametrize("scope", ["all", "shared"])
def test_conflicting_gradients_are_made_orthogonal(scope):
    draw = seeded(3)
    backbone, main, auxiliary = (torch.randn(n, dtype=torch.float64, generator=draw) for n in (6, 4, 5))
    first, second = [backbone, main, None], [-backbone + 0.1, None, auxiliary]
    joined = align_gradients(first, second, scope)
    reference = [backbone, main] if scope == "all" else [backbone]
    dot = float((backbone * second[0]).sum())
    factor = dot / float(flat(reference).square().sum())
    assert dot < 0
    torch.testing.assert_close(joined[0], backbone + second[0] - factor * backbone)
    torch.testing.assert_close(joined[1], main * (1 - factor) if scope == "all" else main)
    assert torch.equal(joined[2], auxiliary)
    # what was added to the first gradient has no part along it
    added = [joined[i] - first[i] for i in range(len(reference))]
    assert float((flat(added) * flat(reference)).sum()) == pytest.approx(0, abs=1e-10)


def test_agreeing_gradients_are_added():
    a, b = torch.ones(3), torch.tensor([1.0, 2.0, -0.5])
    assert torch.equal(align_gradients([a, None], [b, a])[0], a + b)
    assert align_gradients([a, None, None], [None, b, None]) == [a, b, None]
    zero = align_gradients([torch.zeros(3)], [b])
    assert torch.equal(zero[0], b)


def test_aligned_backward_adds_to_what_is_there():
    model = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3, generator=seeded())
    first, second = model(x).square().mean(), (model(x) - 5).square().mean()
    wanted = align_gradients(
        *(torch.autograd.grad(one, list(model.parameters()), retain_graph=True) for one in (first, second))
    )
    before = torch.full_like(model.weight, 2.0)
    model.weight.grad = before.clone()
    model.bias.requires_grad_(False)
    first, second = model(x).square().mean(), (model(x) - 5).square().mean()
    aligned_backward(first, second, model.parameters())
    assert model.bias.grad is None and not torch.equal(model.weight.grad, before + wanted[0])
    with pytest.raises(ParameterError, match=r"align_scope must be one of all, shared, got 'none'"):
        aligned_backward(first, second, model.parameters(), scope="none")


# --- two heads ------------------------------------------------------------------------------------------------


def test_each_head_hears_one_loss_and_the_backbone_both():
    backbone, heads = torch.nn.Linear(6, 5), DualHead(torch.nn.Linear(5, 4))
    x, y, t = torch.randn(3, 6), torch.arange(3), torch.randn(3, 4)
    main, auxiliary = heads(torch.tanh(backbone(x)))
    ce, distilled = F.cross_entropy(main, y), BinaryKLLoss()(auxiliary, t)
    first = torch.autograd.grad(ce, list(heads.parameters()), retain_graph=True, allow_unused=True)
    second = torch.autograd.grad(distilled, list(heads.parameters()), retain_graph=True, allow_unused=True)
    assert [one is None for one in first] == [False, False, True, True]
    assert [one is None for one in second] == [True, True, False, False]
    shares = [torch.autograd.grad(one, backbone.weight, retain_graph=True)[0] for one in (ce, distilled)]
    both = torch.autograd.grad(ce + distilled, backbone.weight)[0]
    torch.testing.assert_close(both, shares[0] + shares[1])


@pytest.mark.parametrize("shape", ["linear", "nonlinear"])
def test_the_exported_student_is_the_plain_one(shape):
    state = torch.get_rng_state()
    main = torch.nn.Linear(5, 4)
    torch.set_rng_state(state)
    heads = DualHead(main, shape, seed=3)
    x = torch.randn(3, 5, generator=seeded())
    assert torch.equal(heads.eval()(x), main(x)) and heads.main is main
    assert not torch.equal(heads.train()(x)[1], main(x))
    again = DualHead(torch.nn.Linear(5, 4), shape, seed=3)
    for one, other in zip(heads.auxiliary.parameters(), again.auxiliary.parameters(), strict=True):
        assert torch.equal(one, other)


def test_making_a_head_moves_no_random_state():
    state = torch.get_rng_state()
    AuxiliaryHead(5, 4, "nonlinear", seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_heads():
    with pytest.raises(
        ParameterError, match=r"batch must be at least two samples for the nonlinear .*, got 1"
    ):
        AuxiliaryHead(5, 4, "nonlinear")(torch.zeros(1, 5))
    assert AuxiliaryHead(5, 4, "nonlinear").eval()(torch.zeros(1, 5)).shape == (1, 4)
    with pytest.raises(ParameterError, match=r"aux_head must be one of linear, nonlinear, got 'deep'"):
        DualHead(torch.nn.Linear(5, 4), "deep")
    with pytest.raises(ParameterError, match=r"main must be a linear layer .*, got 'ReLU'"):
        DualHead(torch.nn.ReLU())


# --- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, text",
    [
        (torch.zeros(4, 5), r"teacher must be logits \[4, 3\] like the student's, got \[4, 5\]"),
        (torch.full((4, 3), math.nan), r"teacher must be finite logits, got nan"),
        (torch.full((4, 3), math.inf), r"teacher must be finite logits, got inf"),
    ],
    ids=["classes", "nan", "inf"],
)
def test_bad_teacher_logits(teacher, text):
    with pytest.raises(ParameterError, match=text):
        BinaryKLLoss()(torch.zeros(4, 3), teacher)


def test_bad_settings_are_refused_before_training(tmp_path):
    with pytest.raises(ParameterError, match=r"gamma, alpha must be not both 0, got \(0.0, 0.0\)"):
        sal.DHKD(gamma=0.0, alpha=0.0)
    trainer = picture_trainer(tmp_path)
    before = dict(vars(trainer))
    cases = {
        r"teacher must be a model, .* for DHKD, got None": sal.DHKD(),
        r"teacher must be a model of 3 classes like the student, got 4": sal.DHKD(teacher=vit(classes=4)),
        r"classifier must be one of .*classifier.*, got 'nowhere'": sal.DHKD(
            teacher=TEACHER, classifier="nowhere"
        ),
    }
    for text, method in cases.items():
        with pytest.raises((ParameterError, StructureError), match=text):
            sal.focus(trainer, method)
        assert vars(trainer) == before
    with pytest.raises(ConflictError, match="model must classify whole samples for DHKD"):
        sal.focus(tiny_trainer(tmp_path / "text"), sal.DHKD(teacher=TEACHER))
    with pytest.raises(ConflictError, match="stop_epoch and cache must be None in a loop of your own"):
        sal.loop(vit(), sal.DHKD(teacher=TEACHER, stop_epoch=1))
    with pytest.raises(ConflictError, match="both take the teacher's logits"):
        sal.focus(trainer, [sal.DHKD(teacher=TEACHER), sal.PLD(teacher=TEACHER)])
    loop = sal.loop(vit(), sal.DHKD(teacher=TEACHER), shifted=False)
    with pytest.raises(ConflictError, match="optimizer must be given to the loop for DHKD"):
        loop.begin()


def test_labels_out_of_range_say_so():
    model, batch = vit(), pictures(images(4))
    loop = sal.loop(
        model, sal.DHKD(teacher=TEACHER), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), shifted=False
    )
    loop.begin()
    loop.start_step([batch])
    loop.before_forward(batch)
    model(pixel_values=batch["pixel_values"])
    batch["labels"] = batch["labels"] + 2
    with pytest.raises(ParameterError, match=r"labels must be class indices in \[0, 3\), got 3"):
        loop.with_penalty(torch.zeros(()), None)
    loop.record.undo()


# --- training -------------------------------------------------------------------------------------------------


def gradients(method, batch, seed=3):
    """Of the formula on one whole batch: of the model and of the auxiliary head, which is made as on a Trainer."""
    model = vit()
    head = AuxiliaryHead(16, 3, method.aux_head, seed=draws.number(seed))
    features = model.vit(pixel_values=batch["pixel_values"]).last_hidden_state[:, 0]
    main, auxiliary = model.classifier(features), head(features)
    with torch.no_grad():
        t = TEACHER(batch["pixel_values"])
    first = method.gamma * F.cross_entropy(main, batch["labels"])
    second = method.alpha * BinaryKLLoss(method.tau, form=method.loss)(auxiliary, t)
    named = dict(model.named_parameters()) | {f"dhkd.auxiliary.{n}": p for n, p in head.named_parameters()}
    if method.align:
        aligned_backward(first, second, named.values(), scope=method.align_scope)
    else:
        (first + second).backward()
    return (first + second).detach(), {n: p.grad for n, p in named.items() if p.grad is not None}


def stepped(folder, method, batch=8, accumulation=1, others=(), **settings):
    """One step of a Trainer: what it logs, and the gradients that it steps with."""
    from transformers import TrainerCallback

    model, kept = vit(), {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            named = dict(model.named_parameters()) | handle.parts[0]._parameters
            kept.update({n: p.grad.clone() for n, p in named.items() if p.grad is not None})

    trainer = picture_trainer(
        folder,
        model,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        callbacks=[Keep()],
        **settings,
    )
    handle = sal.focus(trainer, [method, *others])
    trainer.train()
    return trainer, handle, kept


SETTINGS = {
    "plain": sal.DHKD(teacher=TEACHER, alpha=0.5),
    "weighted": sal.DHKD(teacher=TEACHER, alpha=2.0, gamma=0.3, tau=0.5, loss="binary_kl"),
    "mse": sal.DHKD(teacher=TEACHER, loss="mse"),
    "aligned": sal.DHKD(teacher=TEACHER, align=True),
    "aligned, shared": sal.DHKD(teacher=TEACHER, align=True, align_scope="shared", gamma=0.5),
}


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4)], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_a_trainer_step_has_the_gradient_of_the_formula(name, batch, accumulation, tmp_path):
    loss, wanted = gradients(SETTINGS[name], pictures(images(8)))
    trainer, handle, found = stepped(tmp_path, SETTINGS[name], batch, accumulation)
    assert losses_of(trainer)[0] == pytest.approx(float(loss), rel=1e-4)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")
    assert handle.spent["dhkd"] == {"teacher passes": accumulation, "auxiliary parameters in training": 51}


@pytest.mark.parametrize("align", [False, True])
def test_beside_a_method_that_weights_the_gradient_is_the_same(align, tmp_path):
    method = sal.DHKD(teacher=TEACHER, align=align)
    _, wanted = gradients(method, pictures(images(8)))
    # it mixes nothing, but the loop weights samples and keeps penalties apart
    _, _, found = stepped(tmp_path, method, 2, 4, others=[sal.CutMix(prob=0.0)])
    for key, grad in wanted.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def test_a_loop_of_ones_own_trains_both_heads():
    method, batch = sal.DHKD(teacher=TEACHER, alpha=0.5), pictures(images(6))
    loss, wanted = gradients(method, batch, seed=4)
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loop = sal.loop(model, method, optimizer=optimizer, shifted=False, seed=4)
    loop.begin()
    part = loop.parts[0]
    before = copy.deepcopy(part._head.state_dict())
    for _ in range(2):
        loop.start_step([batch])
        found = loop.loss(batch)
        found.backward()
        loop.finish_step()
        if loop.step == 1:
            torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=1e-6)
            named = dict(model.named_parameters()) | part._parameters
            for name, grad in wanted.items():
                torch.testing.assert_close(named[name].grad, grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(part._head.state_dict()["outer.weight"], before["outer.weight"])
    loop.end()
    part.undo()
    loop.record.undo()
    assert len(optimizer.param_groups) == 1 and len(optimizer.state) == len(list(model.parameters()))


def test_the_head_is_dropped_and_checkpoints_never_have_it(tmp_path):
    from safetensors.torch import load_file

    trainer = picture_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    vit().save_pretrained(tmp_path / "plain")
    plain, names = set(load_file(tmp_path / "plain" / "model.safetensors")), set(vit().state_dict())
    handle = sal.focus(trainer, sal.DHKD(teacher=TEACHER))
    trainer.train()
    assert set(load_file(tmp_path / "checkpoint-1" / "model.safetensors")) == plain
    assert len(trainer.optimizer.param_groups) == 3
    handle.save(tmp_path / "saved")
    assert set(load_file(tmp_path / "saved" / "model.safetensors")) == plain
    groups = trainer.optimizer.optimizer.param_groups if hasattr(trainer.optimizer, "optimizer") else None
    assert groups is not None and len(groups) == 2
    assert handle.parts[0]._head is None
    handle.undo()
    assert set(trainer.model.state_dict()) == names


def test_the_heads_gradients_are_those_of_one_step(tmp_path):
    method = sal.DHKD(teacher=TEACHER)
    trainer = picture_trainer(tmp_path, max_steps=3, learning_rate=0.0, per_device_train_batch_size=8)
    handle = sal.focus(trainer, method)
    trainer.train()
    _, wanted = gradients(method, pictures(images(8)))
    for name, parameter in handle.parts[0]._parameters.items():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_after_stop_epoch_there_is_no_teacher(tmp_path):
    teacher = FlatTeacher()
    trainer = picture_trainer(tmp_path, max_steps=8)  # four steps an epoch
    sal.focus(trainer, sal.DHKD(teacher=teacher, stop_epoch=1))
    trainer.train()
    assert teacher.calls == 4
    untaught = picture_trainer(tmp_path / "none", max_steps=2)
    plain = picture_trainer(tmp_path / "plain", max_steps=2)
    sal.focus(untaught, sal.DHKD(teacher=teacher, stop_epoch=0))
    untaught.train()
    plain.train()
    assert teacher.calls == 4 and losses_of(untaught) == pytest.approx(losses_of(plain), rel=1e-6)


def test_mixed_images_are_what_the_teacher_sees(tmp_path):
    seen = []
    teacher = FlatTeacher()
    teacher.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    _, handle, _ = stepped(tmp_path, sal.DHKD(teacher=teacher), others=[sal.CutMix()])
    given = pictures(images(8))["pixel_values"].flatten(1)
    rows = [bool((row == given).all(-1).any()) for row in seen[0].flatten(1)]
    assert handle.spent["cutmix"]["mixed"] == 1 and not all(rows)


def test_bf16_training_is_near_plain_training(tmp_path):
    runs = []
    for bf16 in (False, True):
        trainer = picture_trainer(tmp_path / str(bf16), bf16=bf16, max_steps=4)
        sal.focus(trainer, sal.DHKD(teacher=TEACHER))
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=3e-2) and runs[0] != runs[1]


def test_cached_logits_give_the_same_run(tmp_path):
    runs = []
    for settings in ({}, {"cache": tmp_path / "logits"}):
        trainer = picture_trainer(tmp_path / str(len(settings)), max_steps=4)
        sal.focus(trainer, sal.DHKD(teacher=FlatTeacher(), **settings))
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_the_formula(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
    from safetensors.torch import load_file
    from test_distributed import launch

    cases = ("dhkd,4,1", "dhkd,2,2", "aligned,4,1", "aligned,2,2")
    launch("distillation.py", tmp_path, *cases, ranks=2)
    for case in cases:
        method = sal.DHKD(teacher=TEACHER, alpha=0.5, gamma=0.7, align=case.startswith("aligned"))
        _, wanted = gradients(method, pictures(images(8)))
        found = load_file(tmp_path / f"{case}.safetensors")
        assert found.keys() == wanted.keys()
        for key, grad in wanted.items():
            torch.testing.assert_close(
                found[key], grad, rtol=1e-4, atol=1e-6, msg=lambda m, k=f"{case} {key}": f"{k}: {m}"
            )


def test_the_loop_of_the_page_and_of_the_docstring_run():
    import doctest

    from salience.methods.classes import dhkd

    assert doctest.testmod(dhkd, extraglobs={"torch": torch}).failed == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names = {}
    run = [block for block in blocks if not block.startswith("# not run")]
    for block in run:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(run) == 1 and torch.isfinite(names["loss"])
    assert type(names["student"][-1]) is torch.nn.Linear
