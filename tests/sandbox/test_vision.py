"""The vision world: scenes say what is in them, the checkpoint is a stock one, and its first layers read no image."""

import dataclasses
import hashlib
import random

import numpy as np
import pytest
import torch

from salience.core.errors import ParameterError
from salience.sandbox import shapes, vision
from salience.sandbox._llava_training import packed


def _brief(patch, place):
    """Training that takes a moment, in a cache of its own."""
    recipe = dataclasses.replace(
        vision._RECIPES["quick"], scenes=8, tower_steps=2, steps=3, first_steps=2, batch=4
    )
    patch.setenv("SALIENCE_CACHE", str(place))
    patch.setitem(vision._RECIPES, "quick", recipe)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model that was trained for three steps, and its processor, as they come back from the disk."""
    with pytest.MonkeyPatch.context() as patch:
        _brief(patch, tmp_path_factory.mktemp("cache"))
        yield vision.load(quick=True)


# scenes


def test_scenes_of_a_seed_are_the_same_for_every_count():
    few, more = shapes.scenes(3, 5), shapes.scenes(6, 5)
    assert few == more[:3]
    assert shapes.scenes(3, 6) != few
    assert few[0].image.tobytes() == more[0].image.tobytes()
    assert few[0].image.mode == "RGB"
    assert few[0].image.size == (96, 96)
    assert not set(shapes.drawn(50, "train 5")) & set(shapes.scenes(50, 5))


def test_answers_follow_from_the_shapes():
    for scene in shapes.scenes(60, 1):
        places = {(shape.row, shape.column) for shape in scene.shapes}
        letters = {(scene.sign[0], scene.sign[1] + step) for step in range(3)}
        assert len(places) == len(scene.shapes)
        assert not places & letters
        assert [question.kind for question in scene.questions] == list(shapes.KINDS)
        colour, count, position, word = scene.questions
        name = colour.prompt.removeprefix("<image> what colour is the ").removesuffix("?")
        (asked,) = [shape for shape in scene.shapes if shape.name == name]
        assert asked.colour == colour.answer
        plural = count.prompt.removeprefix("<image> how many ").removesuffix("?")
        (name,) = [one for one in shapes.SHAPES if plural.startswith(one)]
        assert shapes.COUNTS.index(count.answer) + 1 == sum(shape.name == name for shape in scene.shapes)
        name = position.prompt.removeprefix("<image> where is the ").removesuffix("?")
        (asked,) = [shape for shape in scene.shapes if shape.name == name]
        assert position.answer == ("top", "middle", "bottom")[asked.row * 8 // 32]
        assert word.answer == scene.word


def test_foreground_is_where_the_questions_look():
    for scene in shapes.scenes(40, 2):
        marked = {kind: scene.foreground(kind) for kind in shapes.KINDS}
        assert all(mask.shape == (144,) and mask.dtype == torch.bool for mask in marked.values())
        assert marked["colour"].sum() == marked["position"].sum() == 1
        assert marked["count"].sum() == 1 + shapes.COUNTS.index(scene.questions[1].answer)
        assert marked["word"].nonzero().flatten().tolist() == [
            12 * scene.sign[0] + scene.sign[1] + step for step in range(3)
        ]
        (shape,) = [one for one in scene.shapes if one.name == scene.single[0]]
        assert marked["colour"].nonzero().item() == 12 * shape.row + shape.column


def test_painted_colours_and_letters_are_those_of_the_scene():
    scene = shapes.scenes(1, 3)[0]
    pixels = np.asarray(scene.image).astype(float)
    for shape in scene.shapes:
        middle = pixels[8 * shape.row + 3 : 8 * shape.row + 5, 8 * shape.column + 3 : 8 * shape.column + 5]
        nearest = min(
            shapes.COLOURS, key=lambda name: np.abs(middle.mean((0, 1)) - shapes.COLOURS[name]).sum()
        )
        assert nearest == shape.colour
    row, column = scene.sign
    drawn = [
        pixels[8 * row : 8 * row + 7, 8 * (column + i) + 1 : 8 * (column + i) + 6].mean(-1) for i in range(3)
    ]
    for letter, cell in zip(scene.word, drawn):
        rows = [f"{byte:05b}" for byte in bytes.fromhex(shapes._LETTERS[letter])]
        assert ["".join("01"[int(value < 130)] for value in line) for line in cell] == rows


def test_contrast_does_not_find_the_foreground():
    found = total = 0
    for scene in shapes.scenes(40, 4):
        cells = np.asarray(scene.image).astype(float).reshape(12, 8, 12, 8, 3).transpose(0, 2, 1, 3, 4)
        contrast = cells.reshape(144, 64, 3).std(1).mean(1)
        kept = torch.zeros(144, dtype=torch.bool)
        kept[np.argsort(-contrast)[:36].copy()] = True
        matters = torch.stack([scene.foreground(kind) for kind in shapes.KINDS]).any(0)
        found, total = found + int((matters & kept).sum()), total + int(matters.sum())
    assert found / total < 0.1  # a random quarter finds 0.25


def test_answers_are_spread_and_no_letter_tells_a_word():
    asked = [scene.questions for scene in shapes.scenes(600, 7)]
    for place, most in enumerate((0.23, 0.32, 0.4, 0.13)):
        answers = [questions[place].answer for questions in asked]
        assert max(answers.count(answer) for answer in set(answers)) / len(answers) < most
    for place in range(3):
        for letter in {word[place] for word in shapes.WORDS}:
            assert sum(word[place] == letter for word in shapes.WORDS) >= 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes.scenes(0, 0), "count must be >= 1, got 0"),
        (lambda: shapes.scenes(1, -1), "seed must be >= 0, got -1"),
        (
            lambda: shapes.scenes(1, 0)[0].foreground("size"),
            "kind must be one of colour, count, position, word, got 'size'",
        ),
        (lambda: vision.folder(-1), "seed must be >= 0, got -1"),
        (lambda: vision.batch(None, [], "word"), "scenes must be at least one, got"),
        (
            lambda: vision.batch(None, shapes.scenes(2, 0), ["word"]),
            "which must be one kind for each of 2 scenes, got",
        ),
        (lambda: vision.batch(None, shapes.scenes(1, 0), "size"), "which must be of colour, .*, got 'size'"),
        (lambda: vision.accuracy(None, None, [], 10), "scenes must be at least one, got"),
        (lambda: vision.accuracy(None, None, shapes.scenes(1, 0), 0), "batch_size must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ParameterError, match=message):
        call()


# checkpoint


def test_checkpoint_is_a_stock_one(tiny):
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    model, processor = tiny
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    scene = shapes.scenes(1, 0)[0]
    inputs = processor(images=scene.image, text=scene.questions[0].prompt, return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 144
    assert inputs["input_ids"][0, 0] == processor.tokenizer.bos_token_id
    made = model.generate(**inputs)
    assert 1 <= made.shape[1] - inputs["input_ids"].shape[1] <= 4


def test_pixels_reach_the_model_unchanged(tiny):
    scene = shapes.scenes(1, 0)[0]
    pixels = tiny[1].image_processor(scene.image, return_tensors="pt")["pixel_values"][0]
    there = torch.from_numpy(np.asarray(scene.image).copy()).permute(2, 0, 1) / 255
    torch.testing.assert_close(pixels, (there - 0.5) / 0.25)


def test_every_word_of_the_world_is_known(tiny):
    tokenizer = tiny[1].tokenizer
    for scene in shapes.scenes(40, 0):
        for question in scene.every_question:
            ids = tokenizer(f"{question.prompt} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
            assert len(answer) == 1
            assert tokenizer.decode(answer) == question.answer


def test_batch_pads_on_the_left(tiny):
    some = shapes.scenes(3, 0)
    inputs = vision.batch(tiny[1], some, ["colour", "count", "word"])
    assert inputs.pop("answers") == [some[0].questions[0].answer, some[1].questions[1].answer, some[2].word]
    assert inputs["pixel_values"].shape == (3, 3, 96, 96)
    assert inputs["attention_mask"].sum(1).tolist() == [151, 149, 151]
    assert inputs["attention_mask"][1, :2].tolist() == [0, 0]
    assert tiny[0].generate(**inputs).shape[0] == 3


def _read_from_the_image(model, processor):
    """Most that any row of the first two layers gives to the image, and most that the last row of another gives."""
    inputs = vision.batch(processor, shapes.scenes(2, 0), ["count", "word"])
    inputs.pop("answers")
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            layers = model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    real, picture = inputs["attention_mask"].bool(), inputs["input_ids"] == model.config.image_token_id
    shares = [
        [layer[row][:, real[row]][..., picture[row]].sum(-1) for row in range(2)] for layer in layers
    ]  # [heads, tokens] each
    early = max(float(share.max()) for layer in shares[:2] for share in layer)
    return early, max(float(share[:, -1].max()) for layer in shares[2:] for share in layer)


@pytest.mark.parametrize("grown", [1, 20])
def test_first_layers_cannot_read_the_image(tiny, grown):
    model, processor = tiny
    weight = model.model.multi_modal_projector.linear_2.weight
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(grown)  # larger image features leave less of the flag behind the norm
        early, late = _read_from_the_image(model, processor)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert early < 1e-6
    assert late > 0.1


def test_image_still_reaches_the_answer(tiny):
    model, processor = tiny
    inputs = vision.batch(processor, shapes.scenes(1, 0), "word")
    inputs.pop("answers")
    with torch.no_grad():
        seen = model(**inputs).logits[:, -1]
        other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits[:, -1]
    assert not torch.allclose(seen, other, atol=1e-3)


def test_training_packs_questions_as_if_each_were_alone(tiny):
    tokenizer = tiny[1].tokenizer
    asked = shapes.scenes(1, 0)[0].every_question
    ids, segments, positions, answered = packed(tokenizer, asked)
    for number, question in enumerate(asked, start=1):
        places = [place for place, segment in enumerate(segments) if segment == number]
        whole = tokenizer(f"{question.prompt} {question.answer}")["input_ids"][2:]
        assert [ids[place] for place in places] == [*whole, tokenizer.eos_token_id]
        assert [positions[place] for place in places] == list(range(145, 145 + len(places)))
        told = [ids[place] for place in places if place in answered]
        assert tokenizer.decode(told, skip_special_tokens=True) == question.answer


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, monkeypatch):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    digests = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        _brief(monkeypatch, tmp_path / place)
        whole = (vision.folder(seed, quick=True) / "model.safetensors").read_bytes()
        digests.append(hashlib.sha256(whole).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_accuracy_counts_whole_answers(tiny, monkeypatch):
    model, processor = tiny
    some = shapes.scenes(4, 0)
    said = {kind: [f"{kind} wrong"] * 4 for kind in shapes.KINDS}
    said["position"] = [some[0].questions[2].answer, "top", "", some[3].questions[2].answer + " "]
    queue = [text for kind in shapes.KINDS for text in said[kind]]
    monkeypatch.setattr(
        processor, "batch_decode", lambda rows, **_: [queue.pop(0) for _ in rows], raising=False
    )
    assert vision.accuracy(model, processor, some, batch_size=3) == {
        "all": 0.125, "colour": 0.0, "count": 0.0, "position": 0.5, "word": 0.0,
    }  # fmt: skip


# what training reaches


@pytest.mark.world
def test_trained_model_answers_held_out_questions_and_reads_late(tmp_path, monkeypatch):
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path))
    model, processor = vision.load(seed=1)
    reached = vision.accuracy(model, processor, shapes.scenes(250, 0))
    assert all(reached[kind] > 0.9 for kind in shapes.KINDS), reached
    early, late = _read_from_the_image(model, processor)
    assert early < 1e-6
    assert late > 0.1
