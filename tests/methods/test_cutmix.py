"""CutMix: the box and the share, the loss of two labels, collate functions, and training in a Trainer and a loop."""

import copy
import doctest
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from conftest import Listed, losses_of, ragged_samples, tiny_llama, tiny_trainer
from picture_models import pictures, seeded, shown_model
from picture_models import vit as pictures_model
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import salience as sal
from salience.core import draws
from salience.core.errors import ConflictError, ParameterError
from salience.core.method import Method
from salience.core.part import Part
from salience.methods.samples.cutmix import (
    CutMix,
    cut_box,
    kept_share,
    mixed_loss,
    mixed_targets,
    paste,
    paste_masked,
)

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "cutmix.md"


def on_pictures(**given):
    """A Trainer whose batches are images."""
    from transformers import Trainer

    return Trainer(**{**given, "data_collator": pictures})


def images(count=8, seed=0, size=8):
    draw = seeded(seed)
    return [
        {"pixel_values": torch.randn(3, size, size, generator=draw), "labels": i % 3} for i in range(count)
    ]


def picture_trainer(folder, model=None, count=8, **settings):
    return tiny_trainer(folder, model or pictures_model(), images(count), on_pictures, **settings)


CONTRACT = {
    "method": sal.CutMix(prob=0.8),
    "model": tiny_llama,
    "trainer_model": shown_model,
    "trainer": {"cls": on_pictures, "per_device_train_batch_size": 4},
    "bad": {
        "alpha": (-0.1, r"alpha must be >= 0 and finite, got -0.1"),
        "alpha:2": (math.nan, r"alpha must be >= 0 and finite, got nan"),
        "alpha:3": (math.inf, r"alpha must be >= 0 and finite, got inf"),
        "prob": (1.5, r"prob must be in \[0, 1\], got 1.5"),
        "prob:2": (-0.5, r"prob must be in \[0, 1\], got -0.5"),
        "box_rounding": ("ceil", r"box_rounding must be one of floor_half, exact, got 'ceil'"),
    },
}


# --- the box --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "height, width, lam, center, box, share",
    [
        (8, 8, 0.75, (1, 6), (0, 3, 4, 8), 0.8125),
        (8, 8, 0.0, (4, 4), (0, 8, 0, 8), 0.0),
        (5, 8, 0.0, (2, 4), (0, 4, 0, 8), 0.2),
        (8, 8, 1.0, (3, 3), (3, 3, 3, 3), 1.0),
        (8, 8, 0.97, (3, 3), (3, 3, 3, 3), 1.0),
    ],
    ids=["clipped", "whole", "a row survives", "nothing", "a side of one is empty"],
)
def test_worked_boxes(height, width, lam, center, box, share):
    assert cut_box(lam, center, height, width) == box
    assert kept_share(box, height, width) == pytest.approx(share, abs=1e-15)


def test_exact_boxes_keep_odd_sides():
    assert cut_box(0.0, (2, 4), 5, 8, rounding="exact") == (0, 5, 0, 8)
    assert cut_box(0.97, (3, 3), 8, 8, rounding="exact") == (3, 4, 3, 4)
    for center in range(7):
        top, bottom, *_ = cut_box(1 - (3 / 7) ** 2 + 1e-9, (center, 3), 7, 7, rounding="exact")
        assert bottom - top <= 3 and (0 <= top <= center < bottom <= 7)


@pytest.mark.parametrize("size, mean", [(224, 0.318), (32, 0.299), (8, 0.233)])
def test_the_mean_share_of_the_box_at_alpha_one(size, mean):
    draw = seeded(1)
    drawn = [CutMix().draw(2, size, size, generator=draw) for _ in range(3000)]
    pasted = torch.tensor([1 - lams[0] for _, _, lams in drawn])
    assert float(pasted.mean()) == pytest.approx(mean, abs=4 * float(pasted.std()) / 3000**0.5)
    if size == 8:
        assert float((pasted == 0).float().mean()) == pytest.approx(0.062, abs=0.012)


@pytest.mark.parametrize("rounding", ["floor_half", "exact"])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (5, 3, 7, 10), (6, 2, 63, 8)], ids=str)
def test_pixels_and_share_agree(rounding, per_sample, shape):
    x = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
    before, y = x.clone(), torch.arange(shape[0])
    for seed in range(20):
        method = CutMix(box_rounding=rounding, per_sample=per_sample)
        mixed = method(x, y, generator=seeded(seed))
        assert torch.equal(x, before)
        lams = mixed.lam.tolist() if per_sample else [mixed.lam] * shape[0]
        boxes = mixed.boxes if per_sample else mixed.boxes * shape[0]
        for i, (lam, (top, bottom, left, right)) in enumerate(zip(lams, boxes, strict=True)):
            partner = int(mixed.partners[i])
            assert mixed.partner_labels[i] == partner
            inside = torch.zeros(shape[2:], dtype=torch.bool)
            inside[top:bottom, left:right] = True
            assert torch.equal(mixed.images[i][:, inside], x[partner][:, inside])
            assert torch.equal(mixed.images[i][:, ~inside], x[i][:, ~inside])
            assert lam == pytest.approx(1 - int(inside.sum()) / inside.numel(), abs=1e-7)
            if partner != i:
                changed = (mixed.images[i] != x[i]).all(0)
                assert torch.equal(changed, inside)
        again = method(x.clone(), y, generator=seeded(seed), inplace=True)
        assert torch.equal(again.images, mixed.images)


def test_in_place_writes_into_the_given_tensor():
    x = torch.rand(4, 3, 8, 8)
    mixed = CutMix()(x, torch.arange(4), generator=seeded(3), inplace=True)
    assert mixed.images is x


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_any_dtype(dtype):
    x = torch.randint(0, 255, (4, 3, 8, 8), generator=seeded()).to(dtype)
    partners = torch.tensor([1, 2, 3, 0])
    mixed = paste(x, partners, (2, 6, 0, 5))
    assert mixed.dtype == dtype and torch.equal(mixed[:, :, 2:6, :5], x[partners][:, :, 2:6, :5])
    assert torch.equal(paste_masked(x, partners, torch.tensor([2, 6, 0, 5])), mixed)


def test_permuting_the_batch_permutes_the_result():
    x, partners, order = torch.rand(6, 3, 8, 8), torch.randperm(6), torch.tensor([3, 1, 5, 0, 2, 4])
    back = order.argsort()
    moved = paste(x[order], back[partners[order]], (1, 5, 2, 8))
    assert torch.equal(moved, paste(x, partners, (1, 5, 2, 8))[order])


def test_gradients_reach_both_images_of_feature_maps():
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    weight, partners = torch.rand(3, 2, 4, 4, dtype=torch.float64), torch.tensor([1, 1, 0])
    grads = []
    for mixed in (paste(x, partners, (0, 2, 1, 4)), paste_masked(x, partners, torch.tensor([0, 2, 1, 4]))):
        grads.append(torch.autograd.grad((mixed * weight).sum(), x)[0])
    expected = torch.zeros_like(weight)
    for i in range(3):
        for row in range(4):
            for column in range(4):
                source = int(partners[i]) if row < 2 and column >= 1 else i
                expected[source, :, row, column] += weight[i, :, row, column]
    for grad in grads:
        torch.testing.assert_close(grad, expected)


def test_off_is_off_and_prob_is_a_share():
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    for method in (CutMix(alpha=0.0), CutMix(prob=0.0)):
        mixed = method(x, y, generator=seeded())
        assert mixed.images is x and mixed.lam == 1.0 and mixed.boxes == ()
        assert torch.equal(mixed.loss(x.flatten(1)[:, :5]), F.cross_entropy(x.flatten(1)[:, :5], y))
    draw = seeded(2)
    share = sum(CutMix(prob=0.3).draw(2, 8, 8, generator=draw) is not None for _ in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=0.04)


def test_without_correction_the_draw_decides():
    drawn = CutMix(correct_lam=False, alpha=0.5).draw(2, 9, 9, generator=seeded(5))
    same = CutMix(alpha=0.5).draw(2, 9, 9, generator=seeded(5))
    assert drawn[1] == same[1] and drawn[2] != same[2]
    assert same[2] == [kept_share(same[1][0], 9, 9)]


def test_a_generator_repeats_and_the_global_state_stays():
    x, y, state = torch.rand(5, 3, 8, 8), torch.arange(5), torch.get_rng_state()
    first, second = (CutMix(per_sample=True)(x, y, generator=seeded(4)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.images, second.images) and first.boxes == second.boxes


# --- the loss -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, "each"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_terms_are_the_loss_of_soft_targets(lam, smoothing):
    logits = torch.randn(7, 5, dtype=torch.float64, generator=seeded()).requires_grad_()
    y, other = torch.randint(0, 5, (2, 7), generator=seeded(1))
    lam = torch.rand(7, dtype=torch.float64, generator=seeded(2)) if lam == "each" else lam
    loss = mixed_loss(logits, y, other, lam, label_smoothing=smoothing)
    soft = mixed_targets(y, other, lam, 5, label_smoothing=smoothing)
    torch.testing.assert_close(soft.sum(1), torch.ones(7))
    expected = F.cross_entropy(logits, soft.double())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    got, want = (torch.autograd.grad(one, logits)[0] for one in (loss, expected))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        mixed_loss(logits, soft.double(), soft.double(), 0.4), expected, rtol=1e-6, atol=1e-6
    )


def test_weights_and_ignored_labels_keep_two_normalisers():
    logits = torch.randn(6, 4, dtype=torch.float64, generator=seeded())
    y, other = torch.tensor([0, 1, -100, 3, 2, 1]), torch.tensor([1, -100, 3, 2, 1, 0])
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5], dtype=torch.float64)
    terms = []
    for targets in (y, other):
        above = sum(
            float(weight[k]) * -float(logits[i].log_softmax(0)[k]) for i, k in enumerate(targets) if k >= 0
        )
        terms.append(above / sum(float(weight[k]) for k in targets if k >= 0))
    loss = mixed_loss(logits, y, other, 0.7, weight=weight)
    assert float(loss) == pytest.approx(0.7 * terms[0] + 0.3 * terms[1], rel=1e-12)
    each = mixed_loss(logits, y, other, torch.full((6,), 0.7, dtype=torch.float64), weight=weight)
    torch.testing.assert_close(each, loss)


def test_half_precision_logits_lose_nothing_in_the_loss():
    logits = torch.randn(9, 6, generator=seeded()).bfloat16()
    y, other = torch.randint(0, 6, (2, 9), generator=seeded(1))
    loss = mixed_loss(logits, y, other, 0.6)
    assert loss.dtype == torch.float32 and torch.equal(loss, mixed_loss(logits.float(), y, other, 0.6))
    model = torch.nn.Linear(12, 6)
    x = torch.rand(9, 12, generator=seeded(2))
    plain = mixed_loss(model(x), y, other, 0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(mixed_loss(model(x), y, other, 0.6), plain, rtol=1e-2, atol=1e-2)


def test_compiled_once_for_all_boxes():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    weight = torch.randn(48, 5, generator=seeded())

    def step(x, partners, boxes, y, other, lam):
        return mixed_loss(paste_masked(x, partners, boxes).flatten(1) @ weight, y, other, lam)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    draw = seeded(3)
    for _ in range(5):
        x, y = torch.rand(4, 3, 4, 4, generator=draw), torch.randint(0, 5, (4,), generator=draw)
        partners, boxes, lams = CutMix().draw(4, 4, 4, generator=draw)
        given = x, partners, torch.tensor(boxes), y, y[partners], torch.tensor(lams[0])
        torch.testing.assert_close(compiled(*given), step(*given), rtol=1e-6, atol=1e-6)
    assert counter.frame_count == 1


# --- bad input ------------------------------------------------------------------------------------------------

GOOD = torch.zeros(4, 3, 8, 8)
BAD = {
    "one sample": (GOOD[:1], torch.zeros(1).long(), r"batch must be at least two samples.*, got 1"),
    "no sample": (GOOD[:0], torch.zeros(0).long(), r"batch must be at least two samples.*, got 0"),
    "no batch": (GOOD[0], torch.zeros(3).long(), r"images must be a batch \[N, C, H, W\], got \[3, 8, 8\]"),
    "float labels": (GOOD, torch.zeros(4), r"labels must be class indices \[4\].*, got 'float32 \[4\]'"),
    "bool labels": (GOOD, torch.zeros(4).bool(), r"labels must be class indices \[4\].*, got 'bool \[4\]'"),
    "other count": (GOOD, torch.zeros(3).long(), r"labels must be class indices \[4\].*, got 'int64 \[3\]'"),
    "indices in a matrix": (GOOD, torch.zeros(4, 2).long(), r"labels must be .*, got 'int64 \[4, 2\]'"),
    "too large": (GOOD, torch.tensor([0, 1, 3, 2]), r"labels must be class indices in \[0, 3\), got 3"),
    "negative": (GOOD, torch.tensor([0, -1, 2, 2]), r"labels must be class indices in \[0, 3\), got -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_batch_is_one_clear_error(case):
    x, y, text = BAD[case]
    with pytest.raises(ParameterError, match=text):
        CutMix()(x, y, classes=3)


def test_a_bad_label_in_the_loss_is_one_clear_error():
    y, bad = torch.tensor([0, 1]), torch.tensor([0, 7])
    for labels in ((y, bad), (bad, y)):
        with pytest.raises(ParameterError, match=r"labels must be class indices in \[0, 3\), got 7"):
            mixed_loss(torch.zeros(2, 3), *labels, 0.5)
    with pytest.raises(ParameterError, match=r"labels must be class indices in \[0, 3\), got 7"):
        mixed_targets(y, bad, 0.5, 3)
    with pytest.raises(ParameterError, match=r"labels must be soft targets \[N, 3\], got \[2, 4\]"):
        mixed_targets(torch.zeros(2, 4), torch.zeros(2, 4), 0.5, 3)


# --- collate --------------------------------------------------------------------------------------------------


def pairs(count=8):
    return [(sample["pixel_values"], sample["labels"]) for sample in images(count)]


@pytest.mark.parametrize("named", [False, True])
def test_collate_gives_soft_or_index_targets(named):
    samples = images(6) if named else pairs(6)
    soft, index = (CutMix().collate(targets=kind, classes=3, seed=5)(samples) for kind in ("soft", "index"))
    if named:
        assert set(soft) == {"pixel_values", "labels"}
        assert set(index) == {"pixel_values", "labels", "partner_labels", "lam"}
        soft, index = list(soft.values()), list(index.values())
    else:
        assert len(soft) == 2
    pixels, y, other, lam = index
    assert torch.equal(soft[0], pixels) and 0 <= lam < 1
    assert torch.equal(soft[1], mixed_targets(y, other, lam, 3)) and soft[1].dtype == torch.float32
    logits = pixels.flatten(1)[:, :3]
    torch.testing.assert_close(F.cross_entropy(logits, soft[1]), sal.mixed_loss(logits, y, other, lam))
    given = torch.stack([one["pixel_values"] if named else one[0] for one in samples])
    assert torch.equal(given, torch.stack([one["pixel_values"] for one in images(6)])), (
        "a sample was written to"
    )
    assert not torch.equal(pixels, given)


def test_collate_takes_soft_labels():
    samples = [(torch.rand(3, 8, 8), torch.eye(3)[i % 3]) for i in range(4)]
    _, targets = CutMix().collate(classes=3)(samples)
    assert targets.shape == (4, 3)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_collate_draws_anew_each_batch_and_repeats_with_its_seed():
    runs = []
    state = torch.get_rng_state()
    for seed in (1, 1, 2):
        collate = CutMix().collate(classes=3, seed=seed)
        runs.append([collate(pairs()) for _ in range(3)])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0][1][0], runs[1][1][0]) and not torch.equal(runs[0][1][0], runs[2][1][0])
    assert not torch.equal(runs[0][0][1], runs[0][1][1])


def test_workers_and_epochs_draw_differently():
    loader = DataLoader(
        pairs(8),
        batch_size=4,
        num_workers=2,
        collate_fn=CutMix().collate(classes=3),
        generator=seeded(7),
        multiprocessing_context="fork",
    )
    epochs = [[targets for _, targets in loader] for _ in range(2)]
    shares = {round(float(t.max(1).values.min()), 6) for epoch in epochs for t in epoch}
    assert len(shares) >= 3, "workers or epochs share their draws"


def test_collate_says_what_is_wrong():
    with pytest.raises(
        ParameterError, match=r"batch must be at least two samples to mix \(drop_last=True\), got 1"
    ):
        CutMix().collate(classes=3)(pairs(1))
    with pytest.raises(ParameterError, match=r"labels must be class indices in \[0, 2\), got 2"):
        CutMix().collate(classes=2)(pairs(4))
    with pytest.raises(ParameterError, match=r"labels must be class indices \[2\].*, got 'float64 \[2\]'"):
        CutMix().collate(classes=2)([(torch.zeros(3, 8, 8), 0.5), (torch.zeros(3, 8, 8), 1.0)])
    with pytest.raises(ParameterError, match=r"classes must be an integer >= 1, got None"):
        CutMix().collate()
    with pytest.raises(ParameterError, match=r"targets must be one of soft, index, got 'hard'"):
        CutMix().collate(targets="hard")
    with pytest.raises(ParameterError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        CutMix().collate(classes=3, label_smoothing=1.0)


# --- in a training loop ---------------------------------------------------------------------------------------


class Classifier(torch.nn.Module):
    """Any module that returns logits and a loss, in float64."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(192, 16).double()
        self.drop = torch.nn.Dropout(0.0)
        self.head = torch.nn.Linear(16, classes).double()

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.drop(self.body(pixel_values.flatten(1).double()).tanh()))
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}


def replayed(model, batches, method, *, seed=0, step=0, rank=0):
    """The sum over samples of the mixed loss, from the same draws, and the number of samples."""
    total, count = 0.0, 0
    for micro, batch in enumerate(batches):
        x, y = batch["pixel_values"], batch["labels"]
        count += len(x)
        other, lam = y, 1.0
        if len(x) > 1:
            mixed = method(x, y, generator=draws.generator(seed, rank, step, micro))
            x, other, lam = mixed.images, mixed.partner_labels, mixed.lam
        output = model(pixel_values=x)
        logits = output["logits"] if isinstance(output, dict) else output.logits
        first, second = (F.cross_entropy(logits, one, reduction="none") for one in (y, other))
        total = total + (lam * first + (1 - lam) * second).sum()
    return total, count


@pytest.mark.parametrize("cuts", [(8,), (4, 4), (3, 4, 1), (1, 7)], ids=str)
@pytest.mark.parametrize("method", [CutMix(), CutMix(per_sample=True), CutMix(prob=0.5)], ids=str)
def test_the_loops_gradient_is_the_mixed_losses(cuts, method):
    batches = [pictures(images(size, seed=number)) for number, size in enumerate(cuts)]
    kept = copy.deepcopy(batches)
    model, plain = Classifier(), Classifier()
    loop = sal.loop(model, method, shifted=False)
    loop.begin()
    for step in range(3):  # the same batches again: what was mixed in step 0 must not be mixed twice
        loop.start_step(batches)
        for batch in batches:
            loop.loss(batch).backward()
        loop.finish_step()
        total, count = replayed(plain, kept, method, step=step)
        (total / count).backward()
        assert loop.reported_loss() == pytest.approx(float(total.detach()) / count, rel=1e-9)
        for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)
        model.zero_grad()
        plain.zero_grad()
        for batch, same in zip(batches, kept):
            assert torch.equal(batch["pixel_values"], same["pixel_values"])
    loop.end()


def test_label_smoothing_is_of_both_labels():
    batch, model = pictures(images(6)), Classifier()
    mixed = CutMix()(batch["pixel_values"], batch["labels"], generator=draws.generator(0, 0, 0, 0))
    loop = sal.loop(model, CutMix(), shifted=False, smoothing=0.2)
    loop.begin()
    loop.start_step([batch])
    loss = loop.loss(batch)
    assert torch.equal(mixed.images, batch["pixel_values"])
    logits = model(pixel_values=mixed.images)["logits"]
    torch.testing.assert_close(loss, mixed.loss(logits, label_smoothing=0.2))
    loop.record.undo()


def test_a_method_that_weights_samples_sees_the_mixed_losses():
    class Squared(Part):
        def __init__(self):
            super().__init__()
            self.weights_samples = True

        def sample_weights(self, batch, loop):
            return batch.losses.detach().squeeze(-1) ** 2

    @dataclass(frozen=True, kw_only=True)
    class Weighs(Method):
        unit: ClassVar[str] = "sample"

        def attach_trainer(self, site, record):
            return Squared()

    batch, model = pictures(images(6)), Classifier()
    mixed = CutMix()(batch["pixel_values"], batch["labels"], generator=draws.generator(0, 0, 0, 0))
    loop = sal.loop(model, [Weighs(), CutMix()], shifted=False)
    loop.begin()
    loop.start_step([batch])
    found = loop.loss(batch)
    logits = model(pixel_values=mixed.images)["logits"]
    both = (F.cross_entropy(logits, one, reduction="none") for one in (mixed.labels, mixed.partner_labels))
    first, second = both
    losses = mixed.lam * first + (1 - mixed.lam) * second
    torch.testing.assert_close(found, (losses * losses.detach() ** 2).sum() / (losses.detach() ** 2).sum())


@pytest.mark.parametrize("order", [False, True])
def test_with_multi_sample_dropout_in_either_order(order):
    batch, model = pictures(images(6)), Classifier()
    methods = [CutMix(), sal.MultiSampleDropout(num_samples=3)]
    with pytest.warns(UserWarning, match="p = 0"):
        loop = sal.loop(model, methods[::-1] if order else methods, shifted=False)
    loop.begin()
    loop.start_step([batch])
    loss = loop.loss(batch)
    loss.backward()
    loop.finish_step()
    loop.end()
    loop.record.undo()
    total, count = replayed(Classifier(), [batch], CutMix())
    torch.testing.assert_close(loss.detach(), (total / count).detach())


@pytest.mark.parametrize("accumulation, count, sizes", [(1, 8, (4,)), (2, 7, (4, 3)), (3, 9, (4, 4, 1))])
def test_a_trainers_step_is_the_mixed_loss(accumulation, count, sizes, tmp_path):
    model = pictures_model()
    plain = copy.deepcopy(model)
    trainer = picture_trainer(
        tmp_path,
        model,
        count=count,
        max_steps=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
    )
    handle = sal.focus(trainer, sal.CutMix())
    trainer.train()
    rows, batches = images(count), []
    for size in sizes:
        batches.append(pictures(rows[:size]))
        rows = rows[size:]
    total, seen = replayed(plain, batches, CutMix(), seed=3)
    assert losses_of(trainer)[0] == pytest.approx(float(total.detach()) / seen, abs=2e-4)
    assert handle.spent["cutmix"] == {"batches": len(sizes), "mixed": sum(size > 1 for size in sizes)}


def test_a_trainer_refuses_what_cannot_work(tmp_path):
    with pytest.raises(ConflictError, match=r"per_device_train_batch_size must be >= 2 for CutMix .*, got 1"):
        sal.focus(picture_trainer(tmp_path, per_device_train_batch_size=1), sal.CutMix())
    with pytest.raises(
        ConflictError, match=r"model must classify images for CutMix, got a causal language model"
    ):
        sal.focus(tiny_trainer(tmp_path), sal.CutMix())


@pytest.mark.parametrize(
    "change, text",
    [
        ({"labels": torch.tensor([0, 1, 3])}, r"labels must be class indices in \[0, 3\), got 3"),
        ({"labels": torch.tensor([0, 1, -100])}, r"labels must be class indices in \[0, 3\), got -100"),
        (
            {"labels": torch.zeros(3)},
            r"labels must be class indices \[3\] of an integer dtype, got torch.float32",
        ),
        ({"pixel_values": torch.zeros(3, 8)}, r"images must be a batch \[N, C, H, W\], got \[3, 8\]"),
    ],
    ids=["too large", "ignored", "float", "no image"],
)
def test_a_bad_batch_in_training(change, text):
    batch = {**pictures(images(3)), **change}
    model = Classifier()
    model.config = type("Config", (), {"num_labels": 3})()
    loop = sal.loop(model, CutMix(), shifted=False)
    loop.begin()
    loop.start_step([batch])
    with pytest.raises(ParameterError, match=text):
        loop.loss(batch)


def test_a_batch_without_images_is_refused():
    loop = sal.loop(Classifier(), CutMix(), shifted=False)
    loop.begin()
    batch = {"features": torch.zeros(3, 4), "labels": torch.zeros(3).long()}
    loop.start_step([batch])
    text = r"batch must hold one tensor of images \[N, C, H, W\], got \['features', 'labels'\]"
    with pytest.raises(ParameterError, match=text):
        loop.loss(batch)


def test_ranks_steps_and_micro_batches_draw_their_own():
    numbers = [(3, 0, 0, 0), (3, 1, 0, 0), (3, 0, 1, 0), (3, 0, 0, 1), (4, 0, 0, 0)]
    drawn = {CutMix().draw(2, 224, 224, generator=draws.generator(*one))[2][0] for one in numbers}
    assert len(drawn) == len(numbers)


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_the_formula(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
    from test_distributed import launch

    cases = ("4,1,8", "2,2,8", "3,2,11")
    launch("cutmix.py", tmp_path, *cases, ranks=2)
    for case in cases:
        found, wanted = (load_file(tmp_path / case / f"{name}.safetensors") for name in ("found", "wanted"))
        lams = [load_file(tmp_path / case / f"lam-{rank}.safetensors")["lam"] for rank in range(2)]
        assert not torch.equal(*lams), "both ranks cut the same box"
        for name, grad in found.items():
            torch.testing.assert_close(
                grad, wanted[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=f"{case} {name}": f"{n}: {m}"
            )


def test_the_loops_of_the_page_run():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names = {}
    run = [block for block in blocks if not block.startswith("# not run")]
    for block in run:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(run) == 2 and torch.isfinite(names["loss"]) and names["targets"].shape == (16, 10)


def test_text_samples_become_pictures():
    batch = pictures(ragged_samples(3))
    assert batch["pixel_values"].shape == (3, 3, 8, 8) and len(Listed(images(2))) == 2


@pytest.mark.parametrize("way", ["autocast", "compiled"])
def test_a_loop_under_autocast_and_compile_gives_what_it_gives_without(way):
    losses = []
    for changed in (False, True):
        model, batch = pictures_model(), pictures(images(6))
        call = torch.compile(model, backend="eager") if changed and way == "compiled" else None
        loop = sal.loop(model, CutMix(), shifted=False, call=call)
        loop.begin()
        loop.start_step([batch])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=changed and way == "autocast"):
            loss = loop.loss(batch)
        loss.backward()
        loop.finish_step()
        losses.append((loss.detach(), model.classifier.weight.grad))
    close = {"rtol": 3e-2, "atol": 2e-2} if way == "autocast" else {"rtol": 1e-6, "atol": 1e-7}
    for mine, plain in zip(losses[1], losses[0], strict=True):
        torch.testing.assert_close(mine, plain, **close)


def test_the_examples_of_the_docstrings_run():
    for shown in (sal.CutMix,):
        names = {**vars(sys.modules[shown.__module__]), **vars(sys.modules[sal.CutMix.__module__])}
        (test,) = doctest.DocTestFinder(recurse=False).find(shown, shown.__name__, globs=names)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0
