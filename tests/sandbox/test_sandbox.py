"""The sandbox: made in place, once, the same every time, with noise exactly where it says."""

import errno
import hashlib
import multiprocessing
import os
import random
import re
import sys

import pytest
import torch

from salience.core.errors import ParameterError, SalienceError
from salience.sandbox import _language, scoring, text
from salience.sandbox.cache import cache_folder, cached
from salience.sandbox.digits import ResidualMLP, accuracy, digits, trained
from salience.sandbox.instructions import instruction_world
from salience.sandbox.tasks import BASE_TASKS, TUNING_TASKS, questions
from salience.sandbox.text import text_world


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """One cache for the module, so that the tiny model is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALIENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


@pytest.fixture(scope="module")
def world(shared_cache):
    return instruction_world(size="tiny")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# cache


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("SALIENCE_CACHE")
    assert cache_folder() == tmp_path / "b" / "salience"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "salience"


def test_cached_makes_once_for_each_key(own_cache):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")

    first = cached("thing", {"version": 1}, make)
    assert cached("thing", {"version": 1}, make) == first
    assert (first / "sub" / "file").read_text() == "x"
    assert cached("thing", {"version": 2}, make) != first
    assert len(made) == 2
    assert re.fullmatch(r"thing-[0-9a-f]{16}", first.name)
    assert sorted(p.name for p in own_cache.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_interrupted_make_leaves_nothing(own_cache, error):
    def broken(folder):
        (folder / "half").write_text("x")
        raise error

    with pytest.raises(error):
        cached("thing", {}, broken)
    assert list(own_cache.iterdir()) == []
    assert (cached("thing", {}, lambda folder: (folder / "whole").write_text("y")) / "whole").is_file()


def _die_while_making(root):
    os.environ["SALIENCE_CACHE"] = str(root)

    def make(folder):
        (folder / "half").write_text("x")
        os._exit(9)

    cached("thing", {}, make)


def _race(root, barrier, found):
    os.environ["SALIENCE_CACHE"] = str(root)

    def make(folder):
        (folder / "file").write_text("same")
        barrier.wait(timeout=30)  # both have begun before either ends

    found.put(cached("thing", {}, make))


@pytest.mark.skipif(sys.platform == "win32", reason="starts processes by fork")
def test_killed_make_is_not_used(own_cache):
    killed = multiprocessing.get_context("fork").Process(target=_die_while_making, args=(own_cache,))
    killed.start()
    killed.join()
    assert killed.exitcode == 9
    whole = cached("thing", {}, lambda folder: (folder / "whole").write_text("y"))
    assert {p.name for p in whole.iterdir()} == {"whole", "made.json"}


@pytest.mark.skipif(sys.platform == "win32", reason="starts processes by fork")
def test_two_processes_that_race_both_succeed(own_cache):
    fork = multiprocessing.get_context("fork")
    barrier, found = fork.Barrier(2), fork.Queue()
    racers = [fork.Process(target=_race, args=(own_cache, barrier, found)) for _ in range(2)]
    for racer in racers:
        racer.start()
    folders = {found.get(timeout=30) for _ in racers}
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert len(folders) == 1
    assert [p.name for p in own_cache.iterdir()] == [folders.pop().name]


@pytest.mark.parametrize("harm", ["missing", "short", "no manifest"])
def test_damaged_folder_is_made_again(own_cache, harm):
    def make(folder):
        (folder / "file").write_text("whole")

    folder = cached("thing", {}, make)
    if harm == "missing":
        (folder / "file").unlink()
    elif harm == "short":
        (folder / "file").write_text("w")
    else:
        (folder / "made.json").unlink()
    assert cached("thing", {}, make) == folder
    assert (folder / "file").read_text() == "whole"
    assert [p.name for p in own_cache.iterdir()] == [folder.name]


def test_old_leftovers_are_removed_and_young_ones_are_not(own_cache):
    folder = cached("thing", {}, lambda folder: None)
    old, young = (own_cache / f".{folder.name}.{age}" for age in ("old", "young"))
    old.mkdir()
    young.mkdir()
    os.utime(old, (0, 0))
    (folder / "made.json").unlink()
    cached("thing", {}, lambda folder: None)
    assert not old.exists()
    assert young.exists()


def test_unwritable_cache_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SalienceError, match=r"cannot write to the cache folder .* set SALIENCE_CACHE"):
        cached("thing", {}, lambda folder: None)


def test_full_disk_says_what_to_do(own_cache):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(SalienceError, match="No space left on device"):
        cached("thing", {}, full)


def test_cached_refuses_names_that_are_paths():
    with pytest.raises(ParameterError, match=r"name must be letters, digits, - and _, got '\.\./x'"):
        cached("../x", {}, lambda folder: None)


# tasks


@pytest.mark.parametrize(
    ("name", "asked", "answer"),
    [
        ("reverse", "abc", "cba"), ("rotate", "abcd", "bcda"), ("swap", "abcd", "dbca"), ("skip", "abcde", "ace"),
        ("strip", "abcd", "bc"), ("lower", "AbC", "abc"), ("vowels", "badge", "b*dg*"), ("copy", "ab", "ab"),
        ("upper", "ab", "AB"), ("next", "az", "ba"), ("before", "ba", "az"), ("first", "abc", "ab"),
        ("last", "abc", "bc"), ("twice", "ab", "aabb"), ("flip", "123", "321"), ("turn", "123", "231"),
    ],
)  # fmt: skip
def test_tasks_by_example(name, asked, answer):
    task = {**BASE_TASKS, **TUNING_TASKS}[name]
    assert "".join(task.answer(list(asked))) == answer


def test_questions_are_spread_evenly_and_repeatable():
    asked = questions(TUNING_TASKS, 63, random.Random(1))
    assert asked == questions(TUNING_TASKS, 63, random.Random(1))
    counts = [sum(one.task == name for one in asked) for name in TUNING_TASKS]
    assert sum(counts) == 63
    assert max(counts) - min(counts) <= 1


# text world


def test_text_world_is_an_ordinary_checkpoint(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, line = world.base.folder, "def f(x): return 'é'  # 漢\n"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(line, return_tensors="pt")
    assert set(ids) == {"input_ids", "attention_mask"}
    assert ids["input_ids"].tolist()[0] == world.tokenizer()(line)["input_ids"]
    assert ids["input_ids"][0, 0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids["input_ids"][0], skip_special_tokens=True) == line
    with torch.no_grad():
        assert torch.equal(model(**ids).logits, world.model()(**ids).logits)


def test_training_in_place_reaches_a_sensible_loss(world):
    about = world.base.about
    loss = scoring.text_loss(world.model(), world.tokenizer(), world.base.held_out_texts)
    assert loss == pytest.approx(world.base.held_out_loss, abs=1e-4)
    uniform = torch.tensor(float(about["vocabulary"])).log()
    assert loss < 0.75 * uniform
    known = scoring.exact_match(world.model(), world.tokenizer(), _rows(BASE_TASKS, ("copy", "first")))
    assert known["all"] > 0.5


def _rows(tasks, names):
    asked = questions({name: tasks[name] for name in names}, 60, random.Random(7))
    return [{"prompt": one.prompt, "completion": one.answer, "task": one.task} for one in asked]


def test_train_and_held_out_texts_are_apart(world):
    train, held_out = world.base.train_texts, world.base.held_out_texts
    assert len(train) > 5 * len(held_out) > 0
    assert not set(train) & set(held_out)
    assert train == text_world(size="tiny").train_texts


@pytest.fixture
def brief(monkeypatch):
    """A world that is made in a moment: a few steps of a very small model on a few made-up files."""
    recipe = text._Recipe(
        layers=2, width=32, inner=64, vocabulary=400, files=10, steps=3, text_rows=(2, 2), question_rows=(4, 4),
        tasks=("copy",),
    )  # fmt: skip
    files = [f"def twice_{number}(x):\n    return x + x + {number}\n" * 40 for number in range(12)]
    monkeypatch.setitem(text._RECIPES, "tiny", recipe)
    monkeypatch.setattr(text, "library_texts", lambda *, held_out: files)


def test_same_seed_gives_the_same_bytes_and_another_seed_others(brief, tmp_path, monkeypatch):
    digests = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / place))
        torch.rand(1)
        folder = text_world(size="tiny", seed=seed).folder
        whole = b"".join((folder / name).read_bytes() for name in ("model.safetensors", "tokenizer.json"))
        digests.append(hashlib.sha256(whole).hexdigest())
    assert digests[0] == digests[1] != digests[2]


def test_global_random_states_stay_as_they_were(brief, own_cache):
    numpy = pytest.importorskip("numpy")
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    world = instruction_world(size="tiny", train_samples=20, test_samples=6)
    scoring.exact_match(world.model(), world.tokenizer(), world.test)
    trained(ResidualMLP(blocks=1), digits(), steps=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == numpy.random.get_state()[1]).all()
    assert threads == torch.get_num_threads()


def test_python_without_its_sources_is_refused(tmp_path, own_cache, monkeypatch):
    monkeypatch.setattr(_language.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SalienceError, match="Python's library must be there as sources, found 0 files"):
        text_world(size="tiny")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": "large"}, "size must be one of small, tiny, got 'large'"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"noisy_tokens": 1.5}, r"noisy_tokens must be in \[0, 1\], got 1.5"),
        ({"noisy_samples": -0.1}, r"noisy_samples must be in \[0, 1\], got -0.1"),
        ({"train_samples": 0}, "train_samples must be >= 1, got 0"),
        ({"test_samples": 0}, "test_samples must be >= 1, got 0"),
    ],
)
def test_bad_values_are_refused_before_anything_is_made(settings, message):
    with pytest.raises(ParameterError, match=message):
        instruction_world(**settings)


# instruction world


def test_planted_noise_restores_to_the_clean_answer(world):
    for row in world.train:
        said, clean = row["completion"], row["clean"]
        assert len(said) == len(clean)
        restored, changed = list(said), set()
        for start, end in row["noise"]:
            assert 0 <= start < end <= len(said)
            assert said[start:end] != clean[start:end]
            restored[start:end] = clean[start:end]
            changed |= set(range(start, end))
        assert "".join(restored) == clean
        assert all(said[at] == clean[at] for at in range(len(said)) if at not in changed)
        if row["noisy"]:
            assert row["noise"] == [[0, len(said)]]
            assert said != clean


def test_right_answers_are_right(world):
    for row in [*world.train, *world.test]:
        asked = row["prompt"].removeprefix(f"{row['task']}: ").removesuffix(" ->").split(" ")
        assert row["clean"] == "".join(f" {symbol}" for symbol in TUNING_TASKS[row["task"]].answer(asked))


def test_noise_has_the_size_that_was_asked_for(world):
    rows = list(world.train)
    assert sum(row["noisy"] for row in rows) == round(0.1 * len(rows))
    right = [row for row in rows if not row["noisy"]]
    symbols = sum(len(row["completion"]) // 2 for row in right)
    replaced = sum(len(row["noise"]) for row in right)
    assert replaced / symbols == pytest.approx(0.15, abs=0.03)
    assert any(row["noise"] for row in right)
    assert not any(row["noise"] == [[0, 0]] for row in rows)


def test_test_split_is_clean_and_apart(world):
    assert world.test["completion"][:] == world.test["clean"][:]
    assert not any(world.test["noisy"])
    assert not any(world.test["noise"])
    assert not set(world.test["prompt"]) & set(world.train["prompt"])


def test_worlds_of_one_seed_are_equal_and_noise_does_not_move_the_questions(world):
    again, other = instruction_world(size="tiny"), instruction_world(size="tiny", seed=1)
    clean = instruction_world(size="tiny", noisy_tokens=0, noisy_samples=0)
    assert again.train.to_list() == world.train.to_list()
    assert other.train["prompt"][:] != world.train["prompt"][:]
    assert other.base.folder == world.base.folder
    assert clean.train["prompt"][:] == world.train["prompt"][:]
    assert clean.train["completion"][:] == clean.train["clean"][:] == world.train["clean"][:]


def test_every_symbol_of_an_answer_is_one_token(world):
    tokenizer = world.tokenizer()
    for row in world.test:
        ids = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        assert [tokenizer.decode(token) for token in ids] == re.findall(r" \S", row["completion"])


def test_encoded_marks_prompt_answer_and_noise(world):
    tokenizer, rows = world.tokenizer(), world.train.select(range(40))
    for row, tokens in zip(rows, world.encoded(rows)):
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert tokens["input_ids"] == [*whole, tokenizer.eos_token_id]
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        assert tokens["labels"] == [-100] * prompt + tokens["input_ids"][prompt:]
        assert tokens["attention_mask"] == [1] * len(tokens["input_ids"])
        noise = [0] * prompt
        for match in re.finditer(r" \S", row["completion"]):
            noise.append(int(any(start <= match.start() < end for start, end in row["noise"])))
        assert tokens["noise"] == [*noise, 0]


# scoring


def test_score_is_exact():
    rows = [
        {"completion": " a b c", "task": "x"},
        {"completion": " d e", "task": "x"},
        {"completion": " f", "task": "y"},
    ]
    scored = scoring.score([" a b c", "d x", "f g h"], rows)
    assert scored == {"exact": 1 / 3, "characters": 5 / 8, "exact.x": 0.5, "exact.y": 0.0}
    assert scoring.score(["", "", ""], rows)["characters"] == 0
    with pytest.raises(ParameterError, match="predictions must be one for each of 3 rows, got 1"):
        scoring.score(["a"], rows)
    with pytest.raises(ParameterError, match="rows must be at least one"):
        scoring.score([], [])


def test_world_scores_its_own_answers_as_right(world):
    scored = world.score(world.test["completion"])
    assert set(scored.values()) == {1.0}


def test_answers_do_not_depend_on_the_batch_and_leave_the_model_as_it_was(world):
    model, tokenizer = world.model().train(), world.tokenizer()
    prompts = world.test["prompt"][:20]
    together = scoring.answers(model, tokenizer, prompts)
    assert together == [scoring.answers(model, tokenizer, [prompt])[0] for prompt in prompts]
    assert model.training
    assert tokenizer.padding_side == "right"


# tuning


def _tune(world, steps, rate, rows):
    """Plain LoRA on the first `steps` batches of `rows`; the tuned model."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq

    tokenizer = world.tokenizer()
    torch.manual_seed(0)
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(world.model(), settings).train()
    encoded = world.encoded(rows).remove_columns("noise").to_list()
    collate = DataCollatorForSeq2Seq(tokenizer)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        batch = collate(encoded[16 * step : 16 * step + 16])
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _loss(model, world):
    from transformers import DataCollatorForSeq2Seq

    rows = world.encoded(world.test).remove_columns("noise").to_list()
    with torch.no_grad():
        return model(**DataCollatorForSeq2Seq(world.tokenizer())(rows)).loss.item()


def test_tuning_the_tiny_base_lowers_the_held_out_loss(world):
    before = _loss(world.model(), world)
    after = _loss(_tune(world, 40, 1e-2, world.train), world)
    assert after < 0.6 * before


@pytest.mark.world
def test_tuning_the_small_base_teaches_new_tasks(shared_cache):
    clean, noisy = instruction_world(noisy_tokens=0, noisy_samples=0), instruction_world()
    tokenizer = clean.tokenizer()
    assert clean.base.held_out_loss < 3.6
    known = scoring.exact_match(clean.model(), tokenizer, _rows(BASE_TASKS, BASE_TASKS))
    assert known["all"] > 0.75
    before = scoring.exact_match(clean.model(), tokenizer, clean.test)["all"]
    after = [
        scoring.exact_match(_tune(world, 200, 8e-3, world.train), tokenizer, clean.test)["all"]
        for world in (clean, noisy)
    ]
    assert before < 0.2
    assert 0.5 < after[1] < 0.97
    assert after[0] > 0.7


# digits


def test_digits_are_split_and_scaled():
    upright, transposed = digits(), digits(transposed=True)
    assert upright.train_images.shape == (1437, 64)
    assert upright.test_images.shape == (360, 64)
    assert upright.train_images.min() == 0
    assert upright.train_images.max() == 1
    assert torch.equal(upright.train_labels, transposed.train_labels)
    turned = transposed.test_images.view(-1, 8, 8).mT.reshape(-1, 64)
    assert torch.equal(turned, upright.test_images)
    assert not torch.equal(digits(seed=1).train_labels, upright.train_labels)


def test_digits_without_scikit_learn_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SalienceError, match="digits need scikit-learn: pip install scikit-learn"):
        digits()


def test_residual_network_learns_the_digits():
    data = digits()
    first, second = (trained(ResidualMLP(), data, steps=120) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert len(first.blocks) == 8
    assert accuracy(first, data) > 0.9
    assert first(data.test_images[:3]).loss is None
    assert first(data.test_images[:3], data.test_labels[:3]).loss.ndim == 0
