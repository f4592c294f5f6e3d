"""Teachers beside students: device, dtype and modes; logits on disk, resumed, and checked against the data."""

import copy

import pytest
import torch
from conftest import Listed, collate, ragged_samples
from picture_models import FlatTeacher, images, pictures, vit

from salience.core.errors import ConflictError, ParameterError
from salience.hosts.teachers import (
    LogitCache,
    Teacher,
    cache_logits,
    check_pair,
    open_teacher,
    row_digests,
    training_rows,
    weights_digest,
)

LIKE = torch.empty(0)


class Counted(Listed):
    """Says which rows were read."""

    def __init__(self, samples):
        super().__init__(samples)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


class Stops(FlatTeacher):
    """Dies after so many batches."""

    def forward(self, pixels):
        if self.calls >= 3:
            raise KeyboardInterrupt
        return super().forward(pixels)


def filled(folder, teacher=None, samples=None, **settings):
    settings = {"batch_size": 2, "part_size": 4, **settings}
    return cache_logits(
        teacher or FlatTeacher(), Listed(samples or images(10)), folder, collate=pictures, **settings
    )


# --- a teacher that runs --------------------------------------------------------------------------------------


def test_it_says_the_same_in_every_context_and_keeps_its_mode():
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(192, 3)).train()
    batch = pictures(images(4))
    wanted = copy.deepcopy(teacher).eval()(batch["pixel_values"])
    found = Teacher(teacher).logits(batch, LIKE)
    assert torch.equal(found, wanted) and not found.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(Teacher(teacher).logits(batch, LIKE), wanted)
    assert all(module.training for module in teacher.modules())


def test_another_dtype_and_device():
    teacher, batch = FlatTeacher().bfloat16(), pictures(images(4))
    found = Teacher(teacher).logits(batch, LIKE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, FlatTeacher()(batch["pixel_values"]).detach(), rtol=5e-2, atol=5e-2)
    double = {**batch, "pixel_values": batch["pixel_values"].double()}
    assert torch.equal(
        Teacher(FlatTeacher()).logits(double, LIKE), Teacher(FlatTeacher()).logits(batch, LIKE)
    )
    assert Teacher(FlatTeacher().double()).logits(batch, LIKE).dtype == torch.float64
    moved = Teacher(FlatTeacher()).logits(batch, torch.empty(0, device="meta"))
    assert moved.device.type == "meta", "logits must come to the student's device"


def test_labels_are_not_shown_and_strangers_are_left_out():
    batch = {**pictures(images(4)), "index": torch.arange(4)}
    with pytest.raises(
        ParameterError, match=r"teacher must take what the batch holds \(\['index', 'pixel_values'\]\)"
    ):
        Teacher(FlatTeacher()).logits(batch, LIKE)
    model = vit(seed=1)
    wanted = model.eval()(pixel_values=batch["pixel_values"]).logits.detach()
    assert torch.equal(Teacher(model).logits(batch, LIKE), wanted)


def test_logits_that_are_not_finite_or_of_another_shape_are_refused():
    batch = pictures(images(4))
    with pytest.raises(ParameterError, match=r"teacher must be a model whose logits are finite, got nan"):
        Teacher(FlatTeacher(scale=float("nan"))).logits(batch, LIKE)
    flat = torch.nn.Conv2d(3, 2, 1)
    with pytest.raises(
        ParameterError, match=r"teacher must be a model that gives logits \[B, C\], got \[4, 2, 8, 8\]"
    ):
        Teacher(flat).logits(batch, LIKE)
    with pytest.raises(ParameterError, match=r"teacher must be a model of 5 classes like the student, got 3"):
        check_pair(torch.zeros(4, 5), torch.zeros(4, 3))
    with pytest.raises(ParameterError, match=r"teacher must be a model that gives logits of 5 rows, got 4"):
        check_pair(torch.zeros(5, 3), torch.zeros(4, 3))
    twice = check_pair(torch.zeros(4, 3), torch.arange(6.0).view(2, 3))
    assert torch.equal(twice[:2], twice[2:]) and len(twice) == 4


def test_a_checkpoints_folder_is_a_teacher(tmp_path):
    student, model, batch = vit(), vit(seed=4).eval(), pictures(images(4))
    model.save_pretrained(tmp_path / "teacher")
    found = open_teacher(str(tmp_path / "teacher"), student)
    torch.testing.assert_close(
        found.logits(batch, LIKE), model(pixel_values=batch["pixel_values"]).logits.detach()
    )
    assert found.classes == 3 and found.passes == 1
    vit(classes=5).save_pretrained(tmp_path / "other")
    with pytest.raises(ParameterError, match=r"teacher must be a model of 3 classes like the student, got 5"):
        open_teacher(tmp_path / "other", student)
    for wrong in (tmp_path, 5, None):
        with pytest.raises(ParameterError, match=r"teacher must be a model, a checkpoint's folder, or"):
            open_teacher(wrong, student)


# --- logits on disk -------------------------------------------------------------------------------------------


def test_cached_logits_are_the_teachers_in_any_order(tmp_path):
    cache, batch = filled(tmp_path), pictures(images(10))
    wanted = FlatTeacher()(batch["pixel_values"]).detach()
    assert len(cache) == 10 and cache.classes == 3 and cache.passes == 0
    order = torch.tensor([7, 0, 9, 3, 3])
    some = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(cache.logits(some, LIKE), wanted[order])
    torch.testing.assert_close(LogitCache(tmp_path).rows(order, some), wanted[order])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "logits-00000.safetensors", "logits-00001.safetensors", "logits-00002.safetensors", "teacher-logits.json",
    ]  # fmt: skip


def test_logits_keep_the_teachers_dtype(tmp_path):
    cache, batch = filled(tmp_path, FlatTeacher().bfloat16()), pictures(images(10))
    torch.testing.assert_close(
        cache.logits(batch, LIKE), Teacher(FlatTeacher().bfloat16()).logits(batch, LIKE)
    )
    assert cache._file(0).get_tensor("logits").dtype == torch.bfloat16


def test_other_data_is_an_error_and_not_an_answer(tmp_path):
    cache, batch = filled(tmp_path), pictures(images(10))
    flipped = {**batch, "pixel_values": batch["pixel_values"].clone()}
    flipped["pixel_values"][2] = flipped["pixel_values"][2].flip(-1)
    with pytest.raises(
        ParameterError, match=r"batch must hold rows of the data .*no augmentation.* got row 2 that"
    ):
        cache.logits(flipped, LIKE)
    swapped = {name: value[[1, 0, 2, 3]] for name, value in batch.items()}
    with pytest.raises(
        ParameterError, match=r"data must be in the order of the cache .*, got another row at 0"
    ):
        cache.rows(torch.arange(4), swapped)


def test_a_killed_run_goes_on_and_runs_no_batch_twice(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, Stops())
    done = tmp_path / "logits-00000.safetensors"
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [done.name]
    with pytest.raises(
        ParameterError, match=r"cache must be complete \(run cache_logits again\), missing logits-00001"
    ):
        LogitCache(tmp_path)
    before, teacher = done.stat().st_mtime_ns, FlatTeacher()
    cache = filled(tmp_path, teacher)
    # one batch says how many classes there are, three make the two parts that were missing
    assert done.stat().st_mtime_ns == before and teacher.calls == 4
    batch = pictures(images(10))
    torch.testing.assert_close(cache.logits(batch, LIKE), FlatTeacher()(batch["pixel_values"]).detach())
    data = Counted(images(10))
    cache_logits(teacher, data, tmp_path, collate=pictures, batch_size=2, part_size=4)
    assert sorted(set(data.read)) == [0, 3, 4, 7, 8, 9], "of finished parts only the ends are read"


def test_another_teacher_order_or_size_is_refused_before_anything_is_written(tmp_path):
    filled(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    cases = (
        (r"must be of this teacher", {"teacher": FlatTeacher(seed=6)}),
        (r"must be of this rows \(12\), got 10", {"samples": images(12)}),
        (r"must be of this part_size \(5\), got 4", {"part_size": 5}),
        (
            r"dataset must be in the order of the cache .*, got another row at 0",
            {"samples": images(10)[::-1]},
        ),
    )
    for text, settings in cases:
        with pytest.raises(ParameterError, match=text):
            filled(tmp_path, **settings)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == stamps


def test_bad_settings(tmp_path):
    for name, settings in (("batch_size", {"batch_size": 0}), ("part_size", {"part_size": 0})):
        with pytest.raises(ParameterError, match=rf"{name} must be >= 1, got 0"):
            filled(tmp_path, **settings)
    with pytest.raises(
        ParameterError, match=r"dataset must be rows with a length and indices, got 'generator'"
    ):
        cache_logits(FlatTeacher(), (row for row in images(2)), tmp_path, collate=pictures)
    with pytest.raises(ParameterError, match=r"teacher must be a model whose logits are finite"):
        filled(tmp_path, FlatTeacher(scale=float("inf")))
    with pytest.raises(ParameterError, match=r"cache must be a folder with teacher-logits.json"):
        LogitCache(tmp_path)

    class Stream:
        callback_handler = type("Handler", (), {"train_dataloader": None})
        train_dataset = iter(())

    with pytest.raises(ConflictError, match=r"train_dataset must have a length to cache"):
        training_rows(Stream())


def test_padding_and_labels_do_not_change_a_rows_digest():
    samples = ragged_samples(4)
    together = row_digests(collate(samples))
    alone = torch.cat([row_digests(collate([sample])) for sample in samples])
    assert torch.equal(together, alone) and len(set(together.tolist())) == 4
    left = row_digests(collate(samples, side="left"))
    assert torch.equal(left, together)
    other = collate(samples)
    other["labels"][:] = -100
    assert torch.equal(row_digests(other), together)
    other["input_ids"][1, 0] += 1
    assert (row_digests(other) == together).tolist() == [True, False, True, True]
    with pytest.raises(
        ParameterError, match=r"batch must be a mapping with at least one tensor besides the labels"
    ):
        row_digests({"labels": torch.arange(3)})


def test_a_digest_of_weights_follows_every_bit():
    teacher = FlatTeacher()
    before = weights_digest(teacher)
    assert weights_digest(FlatTeacher()) == before
    with torch.no_grad():
        teacher.linear.bias[0].add_(1e-6)
    assert weights_digest(teacher) != before
