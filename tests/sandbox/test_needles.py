"""The needles world: texts have the length asked for and hold the notes, and answers come from the notes alone."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch

from salience.core.errors import ParameterError
from salience.sandbox import _needles_training as training
from salience.sandbox import needles
from salience.sandbox._needles_texts import _HIDDEN, KEYS, VALUES, WORDS, body, hidden, hidden_for

_BRIEF = training.Recipe(stages=(training.Stage(2, 2, 48, 6, 1), training.Stage(2, 2, 64, 8, 40)))


@pytest.fixture
def brief(tmp_path, monkeypatch):
    """Training that takes a moment, in a cache of its own."""
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path))
    monkeypatch.setattr(needles, "_recipe", lambda quick: _BRIEF)


@pytest.fixture(scope="module")
def tokenizer():
    return training.new_tokenizer()


@pytest.fixture(scope="module")
def untrained():
    return training.new_model(_BRIEF, 0).eval()


# texts


@pytest.mark.parametrize("kind", needles.KINDS)
@pytest.mark.parametrize("length", [130, 131, 512, 1023])
def test_texts_have_the_length_and_hold_the_notes_where_told(kind, length, tokenizer):
    for text in needles.texts(8, length, kind, 3):
        ids = tokenizer(text.prompt)["input_ids"]
        assert len(ids) == length == text.tokens
        assert tokenizer.unk_token_id not in ids
        words = tokenizer.convert_ids_to_tokens(ids)
        found = [words[place : place + 5] for place in text.places]
        assert all((note[0], note[2], note[4]) == ("note", "=", ".") for note in found)
        mark = "," if kind == "several" else "="
        assert tokenizer.tokenize(text.answer) == [
            part for note in found for part in (note[3], mark)
        ][:-1]  # fmt: skip
        assert words[-1] == ("?" if kind == "several" else "=")
        assert [note[1] for note in found] == {
            "single": [words[-2]],
            "by key": [words[-2]],
            "several": words[-6:-1:2],
            "tracking": [words[-2], *(note[3] for note in found[:-1])],
        }[kind]
        assert text.depths == tuple(place / length for place in text.places)
        blocks = {token // 64 for place in text.places for token in range(place, place + 5)}
        assert text.hides(64) == tuple(sorted(blocks))


@pytest.mark.parametrize("kind", needles.KINDS)
def test_every_note_is_there_once_and_keys_differ(kind, tokenizer):
    alone, chains = _HIDDEN[kind]
    for text in needles.texts(5, 400, kind, 1):
        words = tokenizer.tokenize(text.prompt)
        keys = [words[place + 1] for place, word in enumerate(words) if word == "note"]
        assert len(keys) == len(set(keys)) == alone + 3 * chains
        assert all(key in KEYS for key in keys)


def test_texts_of_a_seed_are_the_same_for_every_count():
    before = random.getstate()
    few, more = needles.texts(2, 300, "tracking", 5), needles.texts(4, 300, "tracking", 5)
    assert few == more[:2]
    assert len({text.prompt for text in more}) == 4
    assert needles.texts(2, 300, "tracking", 6) != few
    assert needles.texts(2, 301, "tracking", 5)[0].answer != few[0].answer
    assert random.getstate() == before


def test_notes_are_at_every_depth_and_in_any_order():
    many = needles.texts(200, 600, "tracking", 0)
    depths = np.array([text.depths for text in many])
    assert np.histogram(depths, bins=4, range=(0, 1))[0].min() > 100
    # of the first two notes of a chain, either may come first
    assert 0.35 < (depths[:, 0] < depths[:, 1]).mean() < 0.65


def test_blocks_of_filler_differ(tokenizer):
    text = needles.texts(1, 2048, "single", 0)[0]
    ids = np.array(tokenizer(text.prompt)["input_ids"]).reshape(-1, 64)
    counts = np.stack([np.bincount(block, minlength=len(tokenizer)) for block in ids])
    assert len({tuple(row) for row in counts}) == len(counts)
    common = [np.minimum(counts[i], counts[j]).sum() for i in range(32) for j in range(i)]
    assert np.mean(common) < 0.6 * 64


def test_chains_lead_from_note_to_note():
    found = hidden(2, 2, random.Random(0))
    assert len(found.notes) == 8
    for first in (2, 5):
        chain = found.notes[first : first + 3]
        assert [chain[0][1], chain[1][1]] == [chain[1][0], chain[2][0]]
        assert chain[2][1] in VALUES
        asked = found.about(first)
        assert asked.words == ["what", "is", chain[0][0], "="]
        assert asked.answer == [chain[1][0], "=", chain[2][0], "=", chain[2][1]]
        assert asked.notes == (first, first + 1, first + 2)
    assert found.about(1).answer == [found.notes[1][1]]
    assert found.about_several([1, 0]).answer == [found.notes[1][1], ",", found.notes[0][1]]


def test_filler_fills_every_length():
    draw = random.Random(1)
    for length in range(4, 120):
        assert len(body(length, [], draw).words) == length
    assert len(body(9, [("otter", "47")], draw).words) == 9


def test_long_text_is_for_a_file_and_its_question_stands_apart(tokenizer):
    text, question, answer = needles.long_text(900, 4)
    assert max(map(len, text.splitlines())) < 1000
    assert text.endswith(".\n")
    assert len(tokenizer(f"{text}{question}")["input_ids"]) == 900
    key = tokenizer.tokenize(question)[2]
    assert f"note {key} = {answer}." in text
    assert needles.long_text(900, 4) == (text, question, answer) != needles.long_text(900, 5)


# tokenizer


def test_tokenizer_writes_what_it_read(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(WORDS) + 4
    for kind in needles.KINDS:
        (text,) = needles.texts(1, 200, kind, 0)
        for written in (text.prompt, text.answer):
            ids = again(written)["input_ids"]
            assert ids[0] == again.bos_token_id
            assert again.decode(ids, skip_special_tokens=True) == written
    assert again("Note Otter=47.")["input_ids"] == again("note otter = 47 .")["input_ids"]
    assert again.unk_token_id in again("note unicorn = 47.")["input_ids"]
    assert set(again("the owl")) == {"input_ids", "attention_mask"}


# model and training


def test_first_layer_starts_with_heads_that_look_back(untrained):
    ids = torch.randint(4, len(WORDS), (1, 40), generator=torch.Generator().manual_seed(0))
    untrained.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            first = untrained(input_ids=ids, output_attentions=True).attentions[0][0]
    finally:
        untrained.set_attn_implementation("sdpa")
    for head, back in enumerate((1, 2, 5)):
        assert first[head, 10:].argmax(-1).tolist() == [place - back for place in range(10, 40)]


@pytest.mark.parametrize("seed", range(10))
def test_second_layer_starts_with_heads_that_find_notes_by_their_keys(seed, tokenizer):
    model = training.new_model(_BRIEF, seed).eval()
    model.set_attn_implementation("eager")
    found = []
    for text in needles.texts(8, 128, "by key", 0):
        ids = torch.tensor([tokenizer(text.prompt)["input_ids"]])
        with torch.no_grad():
            second = model(input_ids=ids, output_attentions=True).attentions[1][0, :2, -1]
        found.append(second[:, text.places[0] + 3])
    # sixteen notes share the attention, with 48 tokens of filler
    assert torch.stack(found).mean() > 0.15


def test_filler_that_stands_for_more_is_as_if_it_were_there_more_often(untrained):
    stage = training.Stage(1, 3, 96, 8, 30)
    made = training.batch(stage, random.Random(0), torch.Generator().manual_seed(0))
    rows, size = made.ids.shape
    assert made.bias.shape == (rows, 1, size, size)
    assert torch.isneginf(made.bias[:, 0].triu(1)[:, *torch.triu_indices(size, size, 1)]).all()
    finite = made.bias[made.bias.isfinite()]
    assert finite.min() == 0
    assert 0 < finite.max() <= np.log(30)
    # what is near, and every note, stands for itself
    near = torch.ones(size, size).tril().triu(-training._NEAR).bool()
    assert made.bias[:, 0][:, near].clamp(min=0).max() == 0
    notes = (made.ids == training._IDS["note"]) & (torch.arange(size) < 96)
    assert made.bias[:, 0, -1][notes].max() == 0


def test_jumps_keep_sentences_whole_and_reach_what_a_text_stands_for():
    stage = training.Stage(1, 4, 128, 8, 50)
    made = training.batch(stage, random.Random(0), torch.Generator().manual_seed(0))
    steps = made.positions[:, :128].diff(dim=1)
    assert steps.min() == 1
    jumped = steps > 1
    assert jumped.any()
    assert (made.ids[:, :127][jumped] == training._IDS["."]).all()
    reached = made.positions[:, 127] + 1
    times = torch.exp(made.bias.masked_fill(made.bias == -torch.inf, 0).amax((1, 2, 3)))
    assert torch.allclose(reached.float(), 128 * times, atol=1, rtol=1e-4)


def test_questions_of_a_batch_see_the_text_and_themselves_only(untrained):
    made = training.batch(training.Stage(1, 1, 80, 8, 1), random.Random(2), torch.Generator().manual_seed(0))
    ends = (made.ids[0] == training._IDS["<eos>"]).nonzero().flatten().tolist()
    begin, end = ends[0] + 1, ends[1] + 1
    alone = torch.cat([made.ids[:, :80], made.ids[:, begin:end]], dim=1)
    with torch.no_grad():
        packed = untrained(input_ids=made.ids, position_ids=made.positions, attention_mask=made.bias).logits[
            :, begin:end
        ]
        single = untrained(input_ids=alone).logits[:, 80:]
    torch.testing.assert_close(packed, single, atol=1e-4, rtol=1e-4)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path, monkeypatch, brief):
    before = torch.get_rng_state(), random.getstate(), torch.get_num_threads()
    digests = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / place))
        whole = (needles.folder(seed) / "model.safetensors").read_bytes()
        digests.append(hashlib.sha256(whole).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), torch.get_num_threads())


def test_folder_is_found_again_and_is_a_stock_checkpoint(brief, monkeypatch):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    place = needles.folder()
    monkeypatch.setattr(training, "train", None)  # another training would fail
    assert needles.folder() == place
    model = AutoModelForCausalLM.from_pretrained(place)
    assert type(model) is LlamaForCausalLM
    assert model.config.max_position_embeddings == 32768
    about = json.loads((place / "about.json").read_text(encoding="utf-8"))
    assert about["parameters"] == model.num_parameters()
    assert about["seed"] == 0
    assert about["seconds"] > 0


def test_accuracy_counts_whole_answers_by_kind(untrained, tokenizer, monkeypatch):
    some = [*needles.texts(2, 130, "several", 0), *needles.texts(2, 130, "single", 0)]
    said = [some[0].answer, some[1].answer[:6], some[2].answer + " ", "47, 47"]
    monkeypatch.setattr(
        tokenizer, "batch_decode", lambda rows, **_: [said.pop(0) for _ in rows], raising=False
    )
    assert needles.accuracy(untrained, tokenizer, some, batch_size=3) == {
        "all": 0.5, "single": 0.5, "several": 0.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: needles.folder(-1), "seed must be >= 0, got -1"),
        (lambda: needles.texts(0, 512, "single"), "count must be >= 1, got 0"),
        (lambda: needles.texts(1, 512, "single", -1), "seed must be >= 0, got -1"),
        (
            lambda: needles.texts(1, 512, "double"),
            "kind must be one of single, several, by key, tracking, got 'double'",
        ),
        (lambda: needles.texts(1, 13, "single"), r"length must be in \[14, 32000\] for 'single', got 13"),
        (
            lambda: needles.texts(1, 32001, "by key"),
            r"length must be in \[89, 32000\] for 'by key', got 32001",
        ),
        (lambda: needles.long_text(10), r"tokens must be in \[89, 32000\] for 'by key', got 10"),
        (lambda: needles.long_text(900, -2), "seed must be >= 0, got -2"),
        (lambda: needles.long_text(900, 0, "two"), "kind must be one of single, .*, got 'two'"),
        (lambda: needles.texts(1, 99, "single")[0].hides(0), "block must be >= 1, got 0"),
        (lambda: needles.accuracy(None, None, []), "texts must be at least one, got"),
        (
            lambda: needles.accuracy(None, None, needles.texts(1, 99, "single"), 0),
            "batch_size must be >= 1, got 0",
        ),
    ],
)
def test_bad_values_are_refused(call, message):
    with pytest.raises(ParameterError, match=message):
        call()


@pytest.mark.parametrize("kind", needles.KINDS)
def test_shortest_text_is_there(kind):
    found = hidden_for(kind, random.Random(0))
    least = 1 + 5 * len(found.notes) + 4 + len(found.asked(kind).words)
    assert needles.texts(1, least, kind)[0].tokens == least
    with pytest.raises(ParameterError):
        needles.texts(1, least - 1, kind)


# what training reaches


def _hidden_from_the_question(ids, text, block=64, later=256):
    """A mask that hides the blocks of the asked notes from all tokens more than `later` behind them."""
    size = len(ids)
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    for number in text.hides(block):
        seen[(number + 1) * block + later :, number * block : (number + 1) * block] = False
    return seen[None, None]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALIENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield needles.load(seed=1, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["single", "by key"])
def test_quick_model_answers_and_fails_without_the_block_of_the_note(quick, kind):
    model, tokenizer = quick
    some = needles.texts(40, 512, kind, 0)
    assert needles.accuracy(model, tokenizer, some)["all"] >= 0.8
    some = [text for text in needles.texts(80, 512, kind, 1) if text.places[0] < 512 - 4 - 256 - 64 - 64]
    right = {"seen": 0, "hidden": 0, "replaced": 0}
    for text in some:
        ids = tokenizer(text.prompt)["input_ids"]
        (answer,) = tokenizer(text.answer, add_special_tokens=False)["input_ids"]
        (place,) = text.places
        filler = tokenizer("the cook hums.", add_special_tokens=False)["input_ids"]
        replaced = [*ids[:place], filler[0], *filler, *ids[place + 5 :]]
        with torch.no_grad():
            for name, given, mask in (
                ("seen", ids, None),
                ("hidden", ids, _hidden_from_the_question(ids, text)),
                ("replaced", replaced, None),
            ):
                said = model(input_ids=torch.tensor([given]), attention_mask=mask).logits[0, -1].argmax()
                right[name] += int(said == answer)
    assert len(some) > 15
    assert right["seen"] >= 0.8 * len(some)
    assert right["hidden"] <= 0.2 * len(some)
    assert right["replaced"] <= 0.2 * len(some)


@pytest.mark.world
def test_trained_model_answers_every_kind_far_beyond_what_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path))
    # a seed on which an earlier start of the weights failed to learn the look-up by key
    model, tokenizer = needles.load(seed=3)
    for length, count in ((1024, 40), (4096, 10)):
        for kind in needles.KINDS:
            reached = needles.accuracy(model, tokenizer, needles.texts(count, length, kind, 0))
            assert reached["all"] >= 0.9, (length, reached)
