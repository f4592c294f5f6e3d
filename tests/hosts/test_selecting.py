"""The engine of the dataset target: scores that shards, streams and resuming do not change, and honest files."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_dataset

import salience as sal
from salience.core.documents import Reading
from salience.core.errors import ConflictError, ParameterError, StructureError, TargetError

sys.path.insert(0, str(Path(__file__).parent.parent))
from corpora import small_corpus, tiny_reader


@pytest.fixture(scope="module")
def reader():
    return tiny_reader()


def corpus(count=23, **columns):
    return Dataset.from_dict({"text": small_corpus(count), "n": list(range(count)), **columns})


def test_scores_are_the_models_losses_and_the_best_are_kept(reader):
    model, tokenizer = reader
    data = corpus()
    handle = sal.focus(data, sal.Perplexity(model=(model, tokenizer), keep=5))
    wanted = []
    for text in data["text"]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            wanted.append(-float(model(input_ids=ids, labels=ids).loss))
    torch.testing.assert_close(handle.scores["perplexity.score"], torch.tensor(wanted), rtol=1e-4, atol=1e-5)
    best = sorted(np.argsort(wanted)[-5:].tolist())
    assert handle.dataset["n"] == best
    assert handle.spent["perplexity"]["kept"] == 5 and handle.spent["perplexity"]["documents"] == 23
    handle.undo()


def test_shards_batches_and_streams_change_nothing(reader):
    data = corpus()
    whole = sal.focus(data, sal.Perplexity(model=reader, keep=0.3))
    for reading, target in (
        (Reading(shard_documents=4), data),
        (Reading(shard_documents=4, batch_tokens=1), data),
        (Reading(shard_documents=5), data.to_iterable_dataset()),
    ):
        other = sal.focus(target, sal.Perplexity(model=reader, keep=0.3), data=reading)
        torch.testing.assert_close(
            other.scores["perplexity.score"], whole.scores["perplexity.score"], rtol=1e-5, atol=1e-6
        )
        assert [row["n"] for row in other.dataset] == whole.dataset["n"]


def test_random_scores_belong_to_documents_not_to_shards():
    data = corpus(50)
    first = sal.focus(data, sal.RandomSamples(seed=4), data=Reading(shard_documents=7))
    second = sal.focus(data, sal.RandomSamples(seed=4))
    assert torch.equal(first.scores["random-samples.score"], second.scores["random-samples.score"])
    assert len(first.dataset) == 10
    other = sal.focus(data, sal.RandomSamples(seed=5))
    assert not torch.equal(other.scores["random-samples.score"], second.scores["random-samples.score"])


def test_what_is_saved_can_be_read_without_salience(reader, tmp_path):
    data = corpus(source=["ab"[place % 2] for place in range(23)])
    handle = sal.focus(data, sal.Perplexity(model=reader, keep=5))
    folder = handle.save(tmp_path / "picked")
    table = pq.read_table(folder / "scores.parquet").to_pandas()
    assert list(table.columns[:4]) == ["number", "id", "score", "decision"]
    assert (table["score"].to_numpy() == handle.scores["perplexity.score"].numpy()).all()
    assert table.query("decision == 'keep'")["number"].tolist() == handle.dataset["n"]
    about = json.loads((folder / "salience.json").read_text())
    files = [str(folder / name) for name in about["selection"]]
    again = load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert again["text"] == handle.dataset["text"] and again.column_names == data.column_names
    assert handle.parts[0].sources == {"a": [12, sum(one == "a" for one in handle.dataset["source"])],
                                       "b": [11, sum(one == "b" for one in handle.dataset["source"])]}  # fmt: skip


def test_streams_save_the_same_rows(reader, tmp_path):
    data = corpus()
    folders = [
        sal.focus(target, sal.Perplexity(model=reader, keep=5)).save(tmp_path / name)
        for name, target in (("rows", data), ("stream", data.to_iterable_dataset()))
    ]
    rows, stream = (pq.read_table(folder / "data" / "part-000000.parquet").to_pylist() for folder in folders)
    assert rows == stream and len(rows) == 5


def test_plot_draws_scores_sources_and_both_ends(reader, tmp_path):
    handle = sal.focus(corpus(), sal.Perplexity(model=reader, keep=5))
    figure = handle.plot(tmp_path / "picked.png")
    assert (tmp_path / "picked.png").stat().st_size > 10_000
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "scores of the documents",
        "share kept of each source",
        "the highest scores, and the lowest",
    ]
    scores = [one["score"] for one in handle.parts[0].examples]
    assert len(scores) == 10 and scores == sorted(scores, reverse=True)
    assert scores[0] == float(handle.scores["perplexity.score"].max())


def test_each_domain_keeps_its_share(reader):
    data = corpus(20, domain=["web"] * 15 + ["code"] * 5)
    handle = sal.focus(data, sal.Perplexity(model=reader, keep=0.4), data=Reading(domain_column="domain"))
    assert handle.dataset["domain"].count("web") == 6 and handle.dataset["domain"].count("code") == 2


def test_a_folder_is_gone_on_with_and_another_works_is_refused(reader, tmp_path):
    data, reading = corpus(), Reading(shard_documents=5, folder=tmp_path / "run")
    first = sal.focus(data, sal.Perplexity(model=reader, keep=5), data=reading)
    parts = sorted((tmp_path / "run" / "parts").iterdir())
    assert [path.name for path in parts] == [f"part-{number:06d}.parquet" for number in range(5)]
    parts[2].unlink()
    times = {path: path.stat().st_mtime_ns for path in parts if path.exists()}
    again = sal.focus(data, sal.Perplexity(model=reader, keep=5), data=reading)
    assert parts[2].exists() and all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert torch.equal(first.scores["perplexity.score"], again.scores["perplexity.score"])
    other, _ = tiny_reader(seed=9)
    for target, method, differs in (
        (data, sal.Perplexity(model=(other, reader[1]), keep=5), "model"),
        (data, sal.RandomSamples(), "max_length and method and model and tokenizer"),
        (data.select(range(20)), sal.Perplexity(model=reader, keep=5), "documents"),
    ):
        with pytest.raises(ConflictError, match=f"whose {differs} differ: take another folder"):
            sal.focus(target, method, data=reading)
    assert sorted((tmp_path / "run" / "parts").iterdir()) == parts


def test_long_documents_are_scored_by_their_beginning_and_counted(reader):
    model, tokenizer = reader
    data = Dataset.from_dict({"text": [small_corpus(1)[0] * 30, small_corpus(2)[1]]})
    handle = sal.focus(data, sal.Perplexity(model=reader, keep=1), data=Reading(max_length=16))
    assert handle.spent["perplexity"]["cut"] == 2
    ids = torch.tensor([tokenizer(data["text"][0])["input_ids"][:16]])
    with torch.no_grad():
        wanted = -float(model(input_ids=ids, labels=ids).loss)
    assert float(handle.scores["perplexity.score"][0]) == pytest.approx(wanted, rel=1e-4)


def test_a_document_without_a_prediction_is_never_kept(reader):
    data = Dataset.from_dict({"text": ["", *small_corpus(3)]})
    handle = sal.focus(data, sal.Perplexity(model=reader, keep=1.0))
    assert handle.spent["perplexity"]["unscored"] == 1 and len(handle.dataset) == 3
    assert torch.isnan(handle.scores["perplexity.score"][0])


def test_only_the_answer_counts_where_there_is_a_prompt(reader):
    data = Dataset.from_dict({"prompt": ["ab ", "xy "], "completion": ["cab", "yxy"]})
    handle = sal.focus(data, sal.Perplexity(model=reader, keep=1))
    swapped = Dataset.from_dict({"prompt": ["ab ", "ab "], "completion": ["cab", "yxy"]})
    other = sal.focus(swapped, sal.Perplexity(model=reader, keep=1))
    first, second = (one.scores["perplexity.score"] for one in (handle, other))
    torch.testing.assert_close(first[0], second[0])
    assert first[1] != second[1]


BAD = {
    "no text column": (
        lambda: Dataset.from_dict({"body": ["a"]}), Reading(), "got columns body: map yours with columns",
    ),
    "a mapped column that is not there": (
        corpus, Reading(columns={"text": "content"}), "column text must be one of text, n, got 'content'",
    ),
    "no column of ids": (corpus, Reading(id_column="key"), "id_column must be one of text, n, got 'key'"),
    "no column of domains": (
        corpus, Reading(domain_column="d"), "domain_column must be one of text, n, got 'd'",
    ),
    "ids twice": (
        lambda: corpus(3, id=["a", "b", "a"]), Reading(),
        "ids must differ, got 'a' in column id at row 1 and at row 3",
    ),
    "nothing": (lambda: Dataset.from_dict({"text": []}), Reading(), "dataset must hold at least one document"),
    "no text": (
        lambda: Dataset.from_dict({"text": ["a", None]}), Reading(),
        "documents with text in column text, got nothing at row 2",
    ),
    "more tokens than positions": (
        corpus, Reading(max_length=1000), "max_length must be at most 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, reader):
    make, reading, text = BAD[case]
    with pytest.raises(ParameterError, match=text.replace("[", r"\[")):
        sal.focus(make(), sal.Perplexity(model=reader), data=reading)


def test_the_model_has_to_be_a_language_model_with_a_tokenizer(reader):
    with pytest.raises(
        ParameterError, match="model must be a causal language model, a checkpoint folder or a hub"
    ):
        sal.focus(corpus(), sal.Perplexity())
    with pytest.raises(
        ParameterError, match="tokenizer must be given with a LlamaForCausalLM that was not loaded"
    ):
        sal.focus(corpus(), sal.Perplexity(model=reader[0]))
    with pytest.raises(StructureError, match="model must have a loss on labels, got Linear"):
        sal.focus(corpus(), sal.Perplexity(model=(torch.nn.Linear(2, 2), reader[1])))
    with pytest.raises(
        ParameterError, match=r"data must be a salience.core.documents.Reading for a dataset, got list"
    ):
        sal.focus(corpus(), sal.RandomSamples(), data=[])
    with pytest.raises(TargetError, match=r"RandomSamples must be a datasets.Dataset"):
        sal.focus(reader[0], sal.RandomSamples())


def test_the_model_is_left_as_it_was(reader):
    model, _ = reader
    model.train()
    before = torch.get_rng_state()
    sal.focus(corpus(), sal.Perplexity(model=reader))
    assert model.training and torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.eval()


def test_methods_pick_one_after_another(reader, tmp_path):
    data = corpus(20)
    handle = sal.focus(data, [sal.RandomSamples(keep=10), sal.Perplexity(model=reader, keep=0.5)])
    assert len(handle.dataset) == 5
    folder = handle.save(tmp_path / "picked")
    assert len(pq.read_table(folder / "scores.parquet")) == 10
    assert len(pq.read_table(folder / "scores-random-samples.parquet")) == 20
    assert len(pq.read_table(folder / "data" / "part-000000.parquet")) == 5


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Numbers of each document are held, less than a hundred bytes; texts are not."""
    import tracemalloc

    from salience.hosts.corpus_files import open_source
    from salience.hosts.selecting import select

    runs = 0

    def peak(count):
        nonlocal runs
        runs += 1
        path, folder = tmp_path / f"{count}.jsonl", tmp_path / f"run{runs}"
        text = "word " * 200
        path.write_text("".join(f'{{"id": {place}, "text": "{text}"}}\n' for place in range(count)))
        reading = Reading(folder=folder, shard_documents=64)
        tracemalloc.start()
        try:
            picked = select(open_source(path, reading), sal.Length(keep=0.2), reading)
            picked.save(folder)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is imported once
    small = peak(1000)
    # twice: Python's own table of strings may double meanwhile, which is megabytes, but not both times
    large = min(peak(5000), peak(5000))
    assert large - small < 100 * 4000


def test_sources_without_end_are_counted_together(monkeypatch):
    import salience.hosts.picked as picked_part

    monkeypatch.setattr(picked_part, "_MOST_SOURCES", 3)
    rows = {"text": ["a " * (place + 1) for place in range(10)], "source": list("abcdefgaab")}
    picked = sal.focus(Dataset.from_dict(rows), sal.Length(keep=0.5)).parts[0]
    assert picked.sources == {"(others)": [4, 2], "a": [3, 2], "b": [2, 1], "c": [1, 0]}
