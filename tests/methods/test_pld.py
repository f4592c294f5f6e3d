"""PLD: the loss against its formula, its invariants, bad input, and training in a Trainer and a loop."""

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
from salience.core.errors import ConflictError, ParameterError
from salience.methods.classes.pld import PlackettLuceLoss, rank_weights, ranked_loss, teacher_order

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "pld.md"

CONTRACT = {
    "method": sal.PLD(teacher=TEACHER, tau=2.0),
    "model": tiny_llama,
    "trainer_model": shown_model,
    "trainer": {"cls": on_pictures},
    "bad": {
        "tau": (0.0, r"tau must be > 0 and finite, got 0.0"),
        "tau:2": (math.inf, r"tau must be > 0 and finite, got inf"),
        "tau:3": (math.nan, r"tau must be > 0 and finite, got nan"),
        "weights": ("student", r"weights must be one of teacher, uniform, first, got 'student'"),
        "label_floor": (1.5, r"label_floor must be in \[0, 1\], got 1.5"),
        "top_m": (0, r"top_m must be None or an integer >= 1, got 0"),
        "teacher": (3, r"teacher must be a model or a folder, got 'int'"),
        "cache": ("folder", r"cache must be None unless teacher is a model to fill it, got 'folder'"),
    },
}


def drawn(rows=5, classes=7, seed=0, scale=2.0):
    s, t = scale * torch.randn(2, rows, classes, dtype=torch.float64, generator=seeded(seed))
    return s.requires_grad_(), t, torch.randint(0, classes, (rows,), generator=seeded(seed + 1))


def by_hand(student, teacher, labels, tau=1.0, weights=None):
    """The formula with plain loops, of each row."""
    rows = []
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        others = sorted((k for k in range(len(t)) if k != y), key=lambda k: (-float(t[k]), k))
        order, q = [y, *others], (t / tau).softmax(0)
        alpha = q[order] if weights is None else weights
        terms = [alpha[k] * (torch.logsumexp(s[order[k:]], 0) - s[order[k]]) for k in range(len(order))]
        rows.append(torch.stack(terms).sum())
    return torch.stack(rows)


# --- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rows, classes", [(5, 7), (1, 2), (3, 63), (4, 1)])
def test_value_and_gradient_of_the_formula(rows, classes, tau):
    s, t, y = drawn(rows, classes)
    loss, wanted = PlackettLuceLoss(tau)(s, t, y), by_hand(s, t, y, tau).mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    got, want = (torch.autograd.grad(one, s)[0] for one in (loss, wanted))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(got.sum(-1), torch.zeros(rows, dtype=torch.float64), rtol=0, atol=1e-13)
    assert classes > 1 or float(loss) == 0


def test_the_worked_example():
    s = torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    t, y = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64), torch.tensor([1])
    order = teacher_order(t, y)
    assert order.tolist() == [[1, 0, 2]]
    q = torch.tensor([[0.09003, 0.66524, 0.24473]], dtype=torch.float64)
    torch.testing.assert_close(rank_weights(t, order), q, rtol=0, atol=1e-5)
    loss = PlackettLuceLoss()(s, t, y)
    assert float(loss) == pytest.approx(0.24510, abs=1e-5)
    grad = torch.tensor([[-0.1569, -0.0301, 0.1870]], dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, s)[0], grad, rtol=0, atol=1e-4)


def test_special_weights_are_known_losses():
    s, t, y = drawn(6, 9)
    first = PlackettLuceLoss(weights="first", reduction="none")(s, t, y)
    torch.testing.assert_close(first, F.cross_entropy(s, y, reduction="none"))
    uniform = PlackettLuceLoss(weights="uniform", reduction="none")(s, t, y)
    torch.testing.assert_close(
        uniform, by_hand(s, t, y, weights=torch.full((9,), 1 / 9)), rtol=1e-6, atol=1e-8
    )
    s2, t2, y2 = drawn(4, 2, seed=3)
    q = t2.softmax(-1).gather(1, y2[:, None])[:, 0]
    two = PlackettLuceLoss(reduction="none")(s2, t2, y2)
    torch.testing.assert_close(two, q * F.cross_entropy(s2, y2, reduction="none"))


def test_invariants():
    s, t, y = drawn(5, 8)
    loss = PlackettLuceLoss()
    value = loss(s, t, y)
    assert float(value) >= 0
    torch.testing.assert_close(loss(s + 1e3, t, y), value, rtol=1e-12, atol=1e-12)
    order = torch.randperm(8, generator=seeded(2))
    torch.testing.assert_close(loss(s[:, order], t[:, order], order.argsort()[y]), value)
    other = drawn(5, 8, seed=9)[0]
    assert float(loss((s + other) / 2, t, y)) <= float((value + loss(other, t, y)) / 2)
    raised = s.detach().clone()
    raised[torch.arange(5), y] += 5
    assert float(loss(raised, t, y)) < float(value)
    teacher = t.clone().requires_grad_()
    loss(s, teacher, y).backward()
    assert teacher.grad is None


def test_producing_the_teachers_order_with_growing_gaps_costs_nothing():
    _, t, y = drawn(3, 6)
    place = teacher_order(t, y).argsort(-1).double()
    losses = [float(PlackettLuceLoss()(-gap * place, t, y)) for gap in (1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-12


def test_equal_teacher_logits_are_ordered_by_class():
    t, y = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0]]), torch.tensor([2])
    assert teacher_order(t, y).tolist() == [[2, 1, 3, 0, 4]]
    big = torch.zeros(2, 700)
    assert teacher_order(big, torch.tensor([0, 5]))[1].tolist() == [5, *range(5), *range(6, 700)]


def test_a_floor_keeps_the_label_where_the_teacher_is_wrong():
    t, y = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0]]), torch.tensor([1, 1])
    order = teacher_order(t, y)
    plain, floored = rank_weights(t, order), rank_weights(t, order, label_floor=0.25)
    assert float(plain[0, 0]) < 1e-3 and float(floored[0, 0]) == 0.25
    assert torch.equal(plain[:, 1:], floored[:, 1:]) and torch.equal(plain[1], floored[1])


@pytest.mark.parametrize("top_m", [1, 3, 6, 7])
def test_the_rest_is_one_last_group(top_m):
    s, t, y = drawn(5, 7)
    loss = PlackettLuceLoss(top_m=top_m, reduction="none")(s, t, y)
    order, q = teacher_order(t, y), t.softmax(-1)
    wanted = []
    for row in range(5):
        pi = order[row].tolist()
        named = pi[: top_m + 1]
        terms = [q[row, k] * (torch.logsumexp(s[row, pi[i:]], 0) - s[row, k]) for i, k in enumerate(named)]
        wanted.append(torch.stack(terms).sum())
    torch.testing.assert_close(loss, torch.stack(wanted), rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x: PlackettLuceLoss(top_m=top_m)(x, t, y), s)
    if top_m >= 6:
        torch.testing.assert_close(loss, PlackettLuceLoss(reduction="none")(s, t, y))


def test_far_apart_logits_stay_finite():
    s = torch.tensor([[0.0, -1e4, -2e4], [-2e4, 0.0, 1e4]], requires_grad=True)
    t, y = torch.tensor([[-3.0, 0.0, 3.0]] * 2), torch.tensor([0, 0])
    for scale, dtype in ((1.0, torch.float32), (1.0, torch.bfloat16)):
        loss = PlackettLuceLoss()((scale * s).to(dtype), t, y)
        grad = torch.autograd.grad(loss, s)[0]
        assert torch.isfinite(loss) and torch.isfinite(grad).all() and bool((grad.abs() <= 1).all())


def test_a_class_that_the_student_masks_out_costs_nothing_without_weight():
    s = torch.tensor([[1.0, 0.5, -math.inf]], requires_grad=True)
    loss = PlackettLuceLoss(weights="first")(s, torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([0]))
    torch.testing.assert_close(loss, F.cross_entropy(s[:, :2], torch.tensor([0])))
    assert torch.isfinite(torch.autograd.grad(loss, s)[0]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_raised(dtype):
    s, t, y = drawn(8, 1000)
    half = s.detach().to(dtype)
    loss = PlackettLuceLoss()(half, t.float(), y)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), PlackettLuceLoss()(half.double(), t, y), rtol=1e-5, atol=1e-6)
    shifted = PlackettLuceLoss()(s.float() + 1e3, t.float(), y)
    torch.testing.assert_close(shifted, PlackettLuceLoss()(s.float(), t.float(), y), rtol=2e-4, atol=0)


def test_reductions_ignored_rows_and_token_shapes():
    s, t, y = drawn(6, 5)
    each = PlackettLuceLoss(reduction="none")(s, t, y)
    torch.testing.assert_close(PlackettLuceLoss(reduction="sum")(s, t, y), each.sum())
    ignored = y.clone()
    ignored[[1, 4]] = -100
    keep = [0, 2, 3, 5]
    torch.testing.assert_close(PlackettLuceLoss(ignore_index=-100)(s, t, ignored), each[keep].mean())
    rows = PlackettLuceLoss(ignore_index=-100, reduction="none")(s, t, ignored)
    assert rows[[1, 4]].tolist() == [0, 0] and torch.equal(rows[keep], each[keep])
    tokens = PlackettLuceLoss(ignore_index=-100)(s.view(2, 3, 5), t.view(2, 3, 5), ignored.view(2, 3))
    torch.testing.assert_close(tokens, each[keep].mean())


def test_no_row_is_zero_with_a_gradient():
    for s, y in ((torch.zeros(0, 4), torch.zeros(0).long()), (torch.zeros(2, 4), torch.full((2,), -100))):
        s.requires_grad_()
        loss = PlackettLuceLoss(ignore_index=-100)(s, torch.zeros_like(s), y)
        loss.backward()
        assert float(loss) == 0 and s.grad is not None and bool((s.grad == 0).all())


def test_compiled_and_under_autocast():
    s, t, y = (one.detach() for one in drawn(6, 10))
    criterion, model = PlackettLuceLoss(), torch.nn.Linear(10, 10)

    def step(x):
        return criterion(model(x), t.float(), y)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    x = s.float()
    grads = []
    for one in (step, compiled):
        model.zero_grad()
        loss = one(x)
        loss.backward()
        grads.append((loss.detach(), model.weight.grad.clone()))
    for plain, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step(x)
    torch.testing.assert_close(loss, grads[0][0], rtol=2e-2, atol=2e-2)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("top_m", [None, 2])
def test_second_derivatives(top_m):
    s, t, y = drawn(2, 4)
    criterion = PlackettLuceLoss(top_m=top_m)
    assert torch.autograd.gradgradcheck(lambda x: criterion(x, t, y), s)


# --- bad input ------------------------------------------------------------------------------------------------

S, T, Y = torch.zeros(4, 3), torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])
BAD = {
    "other classes": (
        S,
        torch.zeros(4, 5),
        Y,
        r"teacher must be logits \[4, 3\] like the student's, got \[4, 5\]",
    ),
    "other rows": (
        S,
        torch.zeros(3, 3),
        Y,
        r"teacher must be logits \[4, 3\] like the student's, got \[3, 3\]",
    ),
    "too large": (S, T, torch.tensor([0, 1, 3, 0]), r"labels must be class indices in \[0, 3\), got 3"),
    "negative": (S, T, torch.tensor([0, -100, 1, 0]), r"labels must be class indices in \[0, 3\), got -100"),
    "float labels": (S, T, Y.float(), r"labels must be class indices of an integer dtype, got 'float32'"),
    "soft labels": (S, T, torch.zeros(4, 3), r"labels must be class indices \[4\], got \[4, 3\]"),
    "nan teacher": (S, T * math.nan, Y, r"teacher must be finite logits, got nan"),
    "inf teacher": (S, T - math.inf, Y, r"teacher must be finite logits, got -inf"),
    "one row": (S[0], T[0], Y[0], r"student must be logits \[..., C\] of at least one row, got \[3\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case):
    student, teacher, labels, text = BAD[case]
    with pytest.raises(ParameterError, match=text):
        PlackettLuceLoss()(student, teacher, labels)


def test_bad_settings_of_the_loss():
    with pytest.raises(ParameterError, match=r"reduction must be one of mean, sum, none, got 'max'"):
        PlackettLuceLoss(reduction="max")
    with pytest.raises(ParameterError, match=r"top_m must be <= 3, the number of classes, got 4"):
        PlackettLuceLoss(top_m=4)(S, T, Y)


def test_bad_teachers_are_refused_before_training(tmp_path):
    trainer = picture_trainer(tmp_path)
    cases = {
        r"teacher must be a model, a checkpoint's folder, or .* for PLD, got None": sal.PLD(),
        r"teacher must be another model than the student": sal.PLD(teacher=trainer.model),
        r"teacher must be a model of 3 classes like the student, got 4": sal.PLD(teacher=vit(classes=4)),
        r"teacher must be a model, .* folder of cached logits, got '/no/where'": sal.PLD(teacher="/no/where"),
    }
    before = dict(vars(trainer))
    for text, method in cases.items():
        with pytest.raises(ParameterError, match=text):
            sal.focus(trainer, method)
        assert vars(trainer) == before
    llama = tiny_trainer(tmp_path / "text")
    with pytest.raises(ConflictError, match="model must classify whole samples for PLD on a Trainer"):
        sal.focus(llama, sal.PLD(teacher=TEACHER))
    with pytest.raises(ConflictError, match="a mixed image has two labels"):
        sal.focus(trainer, [sal.PLD(teacher=TEACHER), sal.CutMix()])


def test_a_teacher_that_fails_while_training_says_so(tmp_path):
    for name, teacher, text in (
        ("classes", FlatTeacher(classes=5), "teacher must be a model of 3 classes like the student, got 5"),
        ("nan", FlatTeacher(scale=math.nan), "teacher must be a model whose logits are finite, got nan"),
    ):
        trainer = picture_trainer(tmp_path / name)
        sal.focus(trainer, sal.PLD(teacher=teacher))
        with pytest.raises(ParameterError, match=text):
            trainer.train()


# --- training -------------------------------------------------------------------------------------------------


def gradient(model, batch, teacher=TEACHER, **settings):
    """Of the formula on one whole batch."""
    with torch.no_grad():
        t = teacher(batch["pixel_values"])
    loss = PlackettLuceLoss(**settings)(model(pixel_values=batch["pixel_values"]).logits, t, batch["labels"])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


class Keep:
    """A callback that keeps the gradients of the first step."""

    def __new__(cls, model):
        from transformers import TrainerCallback

        class Callback(TrainerCallback):
            grads: dict = {}  # noqa: RUF012

            def on_pre_optimizer_step(self, args, state, control, **kwargs):
                self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        return Callback()


@pytest.mark.parametrize("batch, accumulation", [(8, 1), (2, 4), (3, 3)], ids=str)
def test_a_trainer_step_has_the_gradient_of_the_formula(batch, accumulation, tmp_path):
    model = vit()
    loss, wanted = gradient(copy.deepcopy(model), pictures(images(8)))
    keep = Keep(model)
    trainer = picture_trainer(
        tmp_path,
        model,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        callbacks=[keep],
    )
    handle = sal.focus(trainer, sal.PLD(teacher=TEACHER))
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(float(loss), rel=1e-4)
    for name, grad in wanted.items():
        torch.testing.assert_close(
            keep.grads[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert handle.spent["pld"] == {"teacher passes": -(-8 // batch)}
    weights = handle.scores["pld.weight of each rank"]
    assert weights.shape == (3,) and float(weights.sum()) == pytest.approx(1, abs=1e-5)


def test_a_loop_of_ones_own_has_the_same_gradient():
    model, batch = vit(), pictures(images(6))
    loss, wanted = gradient(copy.deepcopy(model), batch, tau=3.0)
    loop = sal.loop(model, sal.PLD(teacher=TEACHER, tau=3.0), shifted=False)
    loop.begin()
    loop.start_step([batch])
    found = loop.loss(batch)
    found.backward()
    loop.finish_step()
    loop.end()
    torch.testing.assert_close(found.detach(), loss, rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_the_teacher_is_asked_once_a_batch_without_gradients(tmp_path):
    teacher = FlatTeacher().bfloat16().train()
    trainer = picture_trainer(tmp_path, max_steps=3)
    sal.focus(trainer, sal.PLD(teacher=teacher))
    trainer.train()
    assert teacher.calls == 3 and teacher.training
    assert teacher.modes == {(False, False, torch.bfloat16)}
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_bf16_training_is_near_plain_training(tmp_path):
    runs = []
    for bf16 in (False, True):
        trainer = picture_trainer(tmp_path / str(bf16), bf16=bf16, max_steps=4)
        sal.focus(trainer, sal.PLD(teacher=TEACHER))
        trainer.train()
        runs.append(losses_of(trainer))
    assert runs[1] == pytest.approx(runs[0], rel=3e-2) and runs[0] != runs[1]


def test_cached_logits_give_the_same_run(tmp_path):
    runs, states = [], []
    for name, settings in (("plain", {}), ("filled", {"cache": tmp_path / "logits"}), ("read", {})):
        teacher = FlatTeacher() if name != "read" else str(tmp_path / "logits")
        trainer = picture_trainer(tmp_path / name, max_steps=5, num_train_epochs=3)
        sal.focus(trainer, sal.PLD(teacher=teacher, **settings))
        trainer.train()
        runs.append(losses_of(trainer))
        states.append(trainer.model.state_dict())
    assert runs[0] == pytest.approx(runs[1], rel=1e-6) and runs[1] == runs[2]
    assert all(torch.equal(value, states[2][name]) for name, value in states[1].items())


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_the_formula(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
    from safetensors.torch import load_file
    from test_distributed import launch

    _, wanted = gradient(vit(), pictures(images(8)))
    cases = ("pld,4,1", "pld,2,2")
    launch("distillation.py", tmp_path, *cases, ranks=2)
    for case in cases:
        found = load_file(tmp_path / f"{case}.safetensors")
        for name, grad in wanted.items():
            torch.testing.assert_close(
                found[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=f"{case} {name}": f"{n}: {m}"
            )


def test_the_loop_of_the_page_and_of_the_docstring_run():
    import doctest

    from salience.methods.classes import pld

    assert doctest.testmod(pld, extraglobs={"torch": torch}).failed == 0
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names = {}
    run = [block for block in blocks if not block.startswith("# not run")]
    for block in run:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(run) == 2 and torch.isfinite(names["loss"])


def test_rows_of_a_bare_loss_agree():
    s, t, y = drawn()
    losses, weights = PlackettLuceLoss().rows(s, t, y)
    torch.testing.assert_close(ranked_loss(s, teacher_order(t, y), weights), losses)
