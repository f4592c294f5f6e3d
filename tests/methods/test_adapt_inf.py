"""AdaptInf: worked examples and invariants of its decisions, and its pool between calls."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from corpora import small_corpus, tiny_reader

import salience as sal
from salience.core.errors import ConflictError, ParameterError
from salience.methods.samples._adapt_inf_clusters import cluster, groups
from salience.methods.samples._adapt_inf_spend import (
    choose_expert,
    cover,
    priorities,
    prune,
    redundancy,
    spread,
    water_fill,
)
from salience.methods.samples.adapt_inf import choose


def rows(count, seed, **columns):
    from datasets import Dataset

    texts = small_corpus(count, seed)
    made = {"prompt": texts, "completion": [f" {text[::-1]}" for text in texts]}
    return Dataset.from_dict({**made, **{name: values[:count] for name, values in columns.items()}})


def named(count, seed):
    return rows(count, seed, id=[f"{seed}-{place}" for place in range(count)])


def _picks():
    return sal.AdaptInf(model=tiny_reader(), keep=9, clusters=3, dim=32)


CONTRACT = {
    "method": sal.AdaptInf(keep=0.5, clusters=(2, 4), experts=("el2n",), state="pool"),
    "picks": _picks,
    "dataset": lambda: rows(20, 1),
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0.0"),
        "pool_limit": (0, "pool_limit must be >= 1, got 0"),
        "clusters": (0, "clusters must be >= 1, got 0"),
        "clusters:2": ((), r"clusters must be >= 1, got \(\)"),
        "vectors": ("loss", "vectors must be one of gradient, hidden, got 'loss'"),
        "layer": (0.5, "layer must be an int, got 0.5"),
        "dim": (0, "dim must be >= 1, got 0"),
        "experts": ((), "experts must be at least one of perplexity, grounding, el2n, entropy, grand"),
        "experts:2": (("luck",), "experts must be at least one of perplexity"),
        "bins": (0, "bins must be >= 1, got 0"),
        "tail": (0.5, r"tail must be in \[0, 0.5\), got 0.5"),
        "seed": (-1, "seed must be >= 0, got -1"),
    },
}


def draws(size, seed=0):
    return torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_worked_budgets():
    assert water_fill([40, 12, 75, 28], 60) == [16, 12, 16, 16]
    assert water_fill([40, 12, 75, 28], 100) == [30, 12, 30, 28]
    assert water_fill([3, 0, 2], 100) == [3, 0, 2] and water_fill([], 5) == [] and water_fill([4], 0) == [0]


@pytest.mark.parametrize("total", [1, 7, 60, 154, 155, 1000])
def test_budgets_are_exact_and_nobody_is_below_another_unless_exhausted(total):
    sizes = [40, 12, 75, 28, 0]
    shares = water_fill(sizes, total)
    assert sum(shares) == min(total, sum(sizes))
    assert all(share <= size for share, size in zip(shares, sizes))
    for share, size in zip(shares, sizes):
        assert share == size or share >= max(shares) - 1


def test_the_choice_of_an_expert_does_not_depend_on_units():
    scores = torch.stack([draws(60, 1).pow(4), draws(60, 2), draws(60, 3).exp()])
    best, bits = choose_expert(scores)
    scaled = scores * torch.tensor([[1e-3], [40.0], [7.0]]) + torch.tensor([[5.0], [-100.0], [0.0]])
    again, others = choose_expert(scaled)
    assert best == again and others == pytest.approx(bits, abs=1e-9)


def test_spread_is_the_entropy_of_the_cells_that_hold_something():
    # standardised: two values, half of the samples each: one bit
    assert spread(torch.tensor([1.0, 1.0, 3.0, 3.0])) == pytest.approx(1.0)


def test_experts_that_are_constant_or_not_finite_are_not_asked():
    values = draws(9)
    broken = values.clone()
    broken[3] = torch.nan
    assert choose_expert(torch.stack([torch.full((9,), 0.1), values * 0 + 3, broken, values]))[0] == 3
    best, bits = choose_expert(torch.stack([torch.ones(9), broken]))
    assert best is None and bits == [-torch.inf, -torch.inf]
    assert choose_expert(torch.empty(2, 0))[0] is None


@pytest.mark.parametrize("budget", [0, 1, 10, 50, 90, 99, 100, 400])
def test_cover_gives_exactly_the_budget_of_distinct_samples(budget):
    scores = draws(100).pow(3)
    found = cover(scores, budget, priorities([str(n) for n in range(100)], 0))
    assert len(found) == min(budget, 100) == len(found.unique()) and found.tolist() == sorted(found.tolist())


def test_cover_serves_every_bin_and_takes_the_tails_last():
    scores = torch.arange(100.0)
    order = priorities([str(n) for n in range(100)], 3)
    found = cover(scores, 10, order, bins=10)
    # (5, 95]: ten bins of nine scores, one of each
    assert sorted(((95 - scores[found]) // 9).int().tolist()) == list(range(10))
    inside = cover(scores, 90, order, bins=10)
    assert inside.tolist() == list(range(6, 96))
    assert set(range(6, 96)) < set(cover(scores, 95, order, bins=10).tolist())


def test_cover_of_equal_scores_is_a_random_draw():
    found = cover(torch.ones(20), 5, priorities([str(n) for n in range(20)], 0))
    other = cover(torch.ones(20), 5, priorities([str(n) for n in range(20)], 1))
    assert len(found) == len(other) == 5 and found.tolist() != other.tolist()


def test_a_draw_does_not_depend_on_what_stands_beside_a_sample():
    ids = [f"sample {n}" for n in range(8)]
    whole = priorities(ids, 4)
    assert torch.equal(whole[[6, 2]], priorities([ids[6], ids[2]], 4))
    assert not torch.equal(whole, priorities(ids, 5)) and len(set(whole.tolist())) == 8


def test_worked_redundancy_and_pruning():
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.2, 0.96**0.5])
    vectors = torch.stack([first, 3 * first, second])
    torch.testing.assert_close(redundancy(vectors), torch.tensor([0.0, 1.0, 0.2]))
    kept, _ = prune(vectors, torch.zeros(3, dtype=torch.int64), 2)
    assert kept.tolist() == [0, 2]


def test_redundancy_in_blocks_is_the_whole_matrix():
    vectors = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    units = vectors / vectors.norm(dim=1, keepdim=True)
    expected = (units @ units.T).triu(1).amax(0).clamp_min(0)
    torch.testing.assert_close(redundancy(vectors, block=8), expected)


def test_one_of_identical_samples_stays_and_a_limit_of_all_keeps_all():
    vectors = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 2, 3])]
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    kept, _ = prune(vectors, labels, 4)
    assert sorted(kept.tolist()) == [0, 3, 5, 6]
    assert sorted(prune(vectors, labels, 7)[0].tolist()) == list(range(7))


def test_clusters_are_seeded_numbered_and_leave_what_has_no_direction_apart():
    directions = np.repeat(np.eye(6, dtype=np.float16)[:3], 10, axis=0)
    directions[[4, 17]] = 0
    labels = cluster(directions, 3, 0)
    assert np.array_equal(labels, cluster(directions, 3, 0))
    assert labels[4] == labels[17] == 3 and len(set(labels)) == 4
    for start in range(0, 30, 10):
        own = [labels[place] for place in range(start, start + 10) if place not in (4, 17)]
        assert len(set(own)) == 1
    # more clusters than samples, several numbers to choose from, nothing with a direction
    assert len(set(cluster(directions[:3], 10, 0))) <= 3
    assert len(set(cluster(directions[[0, 1, 2, 10, 11, 12, 20, 21, 22]], (2, 3), 0))) == 3
    assert cluster(np.zeros((4, 2), np.float16), 3, 0).tolist() == [0] * 4
    taking_part = np.arange(30) % 2 == 0
    some = cluster(directions, 3, 0, valid=taking_part)
    assert ((some == -1) == ~taking_part).all() and set(some[taking_part]) == {0, 1, 2, 3}


def test_samples_without_a_loss_are_neither_chosen_nor_kept():
    method = sal.AdaptInf(keep=4, clusters=2, pool_limit=5, experts=("el2n",))
    loss = torch.tensor([1.0, torch.nan, 2.0, 1.0, torch.nan, 1.0, 3.0, 2.0])
    vectors = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float16)
    made = choose(method, [str(n) for n in range(8)], {"loss": loss, "el2n": draws(8).float()}, vectors)
    assert int(made.train.sum()) == 4 and int(made.pool.sum()) == 5
    for place in (1, 4):
        assert not made.train[place] and not made.pool[place] and made.labels[place] == -1
    # skills that are known stand in for clusters
    known = choose(
        replace(method, keep=1.0), [str(n) for n in range(8)], {"loss": loss, "el2n": loss}, vectors,
        skills=torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]),
    )  # fmt: skip
    assert known.shares == [3, 3] and int(known.train.sum()) == 6


def test_vectors_are_mapped_from_a_file_and_small(tmp_path):
    from salience.hosts.sample_pool import SamplePool

    state = tmp_path / "pool"
    sal.focus(named(12, 0), replace(_picks(), state=str(state)))
    shared = {"vectors": "gradient", "layer": -1, "dim": 32, "seed": 0, "experts": list(_picks().experts)}
    pool = SamplePool(state, shared)
    mapped = pool.vectors
    while mapped is not None and not isinstance(mapped, np.memmap):
        mapped = mapped.base
    assert mapped is not None and pool.vectors.dtype == np.float16 and pool.vectors.shape == (12, 32)
    assert (state / "release-0001" / "vectors.f16").stat().st_size == 12 * 32 * 2


def test_large_clusters_are_cut_into_groups_of_their_own():
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float16)
    labels = np.repeat([0, 1], [30, 10])
    found = groups(vectors, labels, 0, largest=10)
    assert not set(found[:30]) & set(found[30:]) and 1 < len(set(found[:30])) <= 3


def test_one_release_chooses_exactly_and_the_scores_say_why():
    method = _picks()
    handle = sal.focus(rows(20, 1), method)
    table = handle.parts[0].decisions.to_pydict()
    assert len(handle.dataset) == 9 == table["decision"].count("keep")
    assert set(table) >= {"id", "score", "decision", "pool", "cluster", "expert", "redundancy", "perplexity"}
    assert table["pool"] == [True] * 20
    chosen = [text for text, said in zip(rows(20, 1)["prompt"], table["decision"]) if said == "keep"]
    assert list(handle.dataset["prompt"]) == chosen
    for place, expert in enumerate(table["expert"]):
        if expert is not None:
            assert table["score"][place] == table[expert][place]


def test_asking_for_more_than_there_is_takes_all(tmp_path):
    assert len(sal.focus(rows(6, 0), replace(_picks(), keep=25_000)).dataset) == 6


def test_the_picture_and_the_files(tmp_path):
    handle = sal.focus(rows(12, 0), replace(_picks(), keep=5))
    handle.plot(tmp_path / "picture.png")
    handle.save(tmp_path / "out")
    about = json.loads((tmp_path / "out" / "salience.json").read_text())
    assert about["selection"] == ["data/part-000000.parquet"]
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "out" / "data" / "part-000000.parquet").num_rows == 5
    assert pq.read_table(tmp_path / "out" / "scores.parquet").num_rows == 12


def counting(reader):
    """The reader, and a list that grows by the samples of every forward pass."""
    seen = []
    reader[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    return reader, seen


def test_a_pool_lasts_stays_within_its_limit_and_is_scored_again_only_for_a_new_model(tmp_path):
    reader, seen = counting(tiny_reader())
    method = sal.AdaptInf(
        model=reader, keep=6, clusters=2, dim=32, pool_limit=15, state=str(tmp_path / "pool")
    )
    spent = []
    for release in range(3):
        seen.clear()
        spent.append(sal.focus(named(12, release), method).spent["adapt-inf"])
        assert sum(seen) == 12, "the old samples were scored again by the same model"
    assert [one["samples"] for one in spent] == [12, 24, 27]
    assert [one["pool"] for one in spent] == [12, 15, 15] and [one["pruned"] for one in spent] == [0, 9, 12]
    with torch.no_grad():
        reader[0].lm_head.weight.mul_(1.5)
    seen.clear()
    last = sal.focus(named(12, 3), method)
    assert sum(seen) == 27 and last.spent["adapt-inf"]["scored again"] == 15
    held = last.parts[0].decisions["perplexity"].to_numpy()
    assert np.isfinite(held).all() and len(held) == 27
    folders = sorted(path.name for path in (tmp_path / "pool").iterdir())
    assert folders == ["pool.json", "release-0004"]


def test_the_same_release_again_gives_the_same_choice_without_work(tmp_path):
    reader, seen = counting(tiny_reader())
    method = sal.AdaptInf(model=reader, keep=6, clusters=2, dim=32, state=str(tmp_path / "pool"))
    sal.focus(named(12, 0), method)
    first = sal.focus(named(12, 1), method)
    seen.clear()
    again = sal.focus(named(12, 1), method)
    assert not seen and again.dataset.to_list() == first.dataset.to_list()
    assert again.spent == first.spent


def test_a_release_that_was_broken_off_goes_on_with_what_it_had(tmp_path, monkeypatch):
    from salience.core.documents import Reading
    from salience.hosts.sample_pool import SamplePool

    reader, seen = counting(tiny_reader())
    state = tmp_path / "pool"
    method = sal.AdaptInf(model=reader, keep=6, clusters=2, dim=32, state=str(state))
    whole = sal.focus(named(12, 0), replace(method, state=str(tmp_path / "whole")))
    with monkeypatch.context() as patched:
        patched.setattr(SamplePool, "commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sal.focus(named(12, 0), method)
    assert not (state / "pool.json").exists() and (state / "work").is_dir()
    seen.clear()
    resumed = sal.focus(named(12, 0), method)
    assert not seen, "scores that were on the disk were made again"
    assert resumed.dataset.to_list() == whole.dataset.to_list()
    # other data after a kill: nothing of the work is taken over
    shutil.rmtree(state)
    with monkeypatch.context() as patched:
        patched.setattr(SamplePool, "commit", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sal.focus(named(12, 5), method)
    other = sal.focus(named(12, 0), method, data=Reading())
    assert other.dataset.to_list() == whole.dataset.to_list()


def test_ids_that_the_pool_knows_are_refused_before_anything_is_scored(tmp_path):
    reader, seen = counting(tiny_reader())
    method = sal.AdaptInf(
        model=reader, keep=6, clusters=2, dim=32, pool_limit=4, state=str(tmp_path / "pool")
    )
    first = sal.focus(named(12, 0), method).parts[0].decisions
    sal.focus(named(12, 1), method)
    seen.clear()
    with pytest.raises(ParameterError, match=r"ids must be new to the pool, got '0-\d+', which"):
        sal.focus(named(12, 0), method)
    assert not seen and first.num_rows == 12


def test_samples_without_ids_are_numbered_by_release(tmp_path):
    method = replace(_picks(), state=str(tmp_path / "pool"))
    sal.focus(rows(8, 0), method)
    ids = sal.focus(rows(8, 1), method).parts[0].decisions["id"].to_pylist()
    assert ids[0] == "1:0" and ids[8] == "2:0" and len(set(ids)) == 16


def test_a_stream_is_a_dataset_that_arrives_row_by_row(tmp_path):
    method = _picks()
    stream = rows(20, 1).to_iterable_dataset()
    assert sal.focus(stream, method).dataset.to_list() == sal.focus(rows(20, 1), method).dataset.to_list()


def test_other_settings_broken_files_and_foreign_folders_are_refused(tmp_path):
    method = replace(_picks(), state=str(tmp_path / "pool"))
    sal.focus(named(8, 0), method)
    with pytest.raises(ConflictError, match=r"state must be a pool of the same settings, got .* with dim=32"):
        sal.focus(named(8, 1), replace(method, dim=16))
    (tmp_path / "pool" / "pool.json").write_text("{")
    with pytest.raises(ParameterError, match=r"state must hold a readable pool\.json"):
        sal.focus(named(8, 1), method)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ParameterError, match=r"state must be a new folder or one with pool\.json"):
        sal.focus(named(8, 1), replace(method, state=str(tmp_path / "mine")))


def test_bad_input_is_refused(tmp_path):
    from datasets import Dataset

    method = _picks()
    with pytest.raises(ParameterError, match="model must be a causal language model"):
        sal.focus(rows(4, 0), sal.AdaptInf())
    with pytest.raises(ParameterError, match="layer must be one of the 2 layers"):
        sal.focus(rows(4, 0), replace(method, layer=2))
    with pytest.raises(ParameterError, match="dataset must hold at least one document, got none"):
        sal.focus(rows(4, 0).select([]), method)
    with pytest.raises(ParameterError, match="ids must differ, got 'a'"):
        sal.focus(rows(2, 0, id=["a", "a"]), method)
    with pytest.raises(ParameterError, match="row 2"):
        sal.focus(Dataset.from_dict({"prompt": ["a", None], "completion": ["b", "c"]}), method)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    import sys

    from salience.core.errors import SalienceError

    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(SalienceError, match=r"pip install 'salience\[cluster\]'"):
        cluster(np.eye(4, dtype=np.float16), 2, 0)


@pytest.mark.slow
def test_a_killed_process_leaves_a_pool_that_goes_on_to_the_same_choice(tmp_path):
    """kill -9 in the third of five shards of the second release; then the same call again."""
    import signal
    import subprocess
    import sys
    from pathlib import Path

    worker = Path(__file__).parent.parent / "workers" / "adapt_inf.py"
    outs = {}
    for name, dies in (("whole", 0), ("killed", 3)):
        state = tmp_path / name
        runs = [["0,1", dies]] + ([["1", 0]] if dies else [])
        for releases, shards in runs:
            done = subprocess.run(
                [sys.executable, str(worker), str(state), releases, str(shards)],
                capture_output=True, text=True, check=False, timeout=120,
            )  # fmt: skip
            assert done.returncode == (-signal.SIGKILL if shards else 0), done.stderr[-2000:]
        outs[name] = json.loads(done.stdout.splitlines()[-1])
    assert outs["killed"]["picked"] == outs["whole"]["picked"] and len(outs["whole"]["picked"]) == 7
    assert outs["whole"]["passed"] == 20 and outs["killed"]["passed"] == 12
    assert not (tmp_path / "killed" / "work").exists()
