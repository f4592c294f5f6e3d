"""`salience select`: a corpus in, its best share out, the same whoever scores it and however often it is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

import salience as sal

sys.path.insert(0, str(Path(__file__).parent.parent))
from corpora import small_corpus, tiny_reader

METHOD = "attention-influence:heads=((0,1),),min_tokens=2"
DOCUMENTS, SHARD = 600, 10


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    model, tokenizer = tiny_reader()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        rows = [
            {"id": f"{number}-{place}", "text": text, "source": "ab"[place % 2]}
            for place, text in enumerate(small_corpus(DOCUMENTS // 3, seed=number))
        ]
        (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(source, reader, out, *more):
    return [
        "select", "--data", str(source), "--model", str(reader), "--method", METHOD, "--keep", "0.2",
        "--out", str(out), "--device", "cpu", "--shard-documents", str(SHARD), *more,
    ]  # fmt: skip


def start(words, tmp_path, launcher=(), **environment):
    command = [sys.executable, *launcher, "-m", "salience", *words]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SALIENCE_CACHE": str(tmp_path / "cache"), **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finished(process, seconds=240):
    _, error = process.communicate(timeout=seconds)
    assert process.returncode == 0, error.decode()[-2000:]


def wait_for_parts(out, number, process, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until and process.poll() is None:
        if len(list((out / "parts").glob("part-*.parquet"))) >= number:
            return
        time.sleep(0.005)
    pytest.fail(
        f"no {number} parts: {process.stderr.read().decode()[-2000:]}" if process.poll() else "too slow"
    )


def decisions(out):
    return pq.read_table(out / "scores.parquet")


def kept(out):
    names = json.loads((out / "salience.json").read_text())["selection"]
    return [json.loads(line) for name in names for line in (out / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(source, reader, tmp_path_factory):
    """What an unbroken run of one process writes."""
    folder = tmp_path_factory.mktemp("whole")
    finished(start(arguments(source, reader, folder / "out"), folder))
    return folder / "out"


@pytest.mark.slow
def test_a_run_says_what_it_kept(whole):
    table = decisions(whole).to_pandas()
    assert len(table) == DOCUMENTS and (table["decision"] == "keep").sum() == DOCUMENTS // 5
    best = table.sort_values("score", ascending=False, kind="stable").head(DOCUMENTS // 5)
    assert sorted(best["id"]) == sorted(row["id"] for row in kept(whole))
    result = json.loads((whole / "result.json").read_text())
    assert result["sources"].keys() == {"a", "b"} and len(result["examples"]) == 10
    page = (whole / "report.html").read_text()
    assert "120 of 600 documents" in page and "salience select" in page
    assert len(list((whole / "parts").iterdir())) == DOCUMENTS // SHARD


@pytest.mark.slow
def test_three_kills_of_one_process_change_nothing(source, reader, whole, tmp_path):
    out = tmp_path / "out"
    for parts in (3, 12, 30):
        process = start(arguments(source, reader, out), tmp_path)
        wait_for_parts(out, parts, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "salience.json").exists()
    finished(start(arguments(source, reader, out), tmp_path))
    assert decisions(out).equals(decisions(whole)) and kept(out) == kept(whole)


@pytest.mark.slow
def test_two_ranks_of_torchrun_give_the_same(source, reader, whole, tmp_path):
    out = tmp_path / "out"
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    finished(start(arguments(source, reader, out), tmp_path, launcher))
    assert decisions(out).equals(decisions(whole)) and kept(out) == kept(whole)


@pytest.mark.slow
def test_ray_survives_a_killed_worker_and_a_killed_driver(source, reader, whole, tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "out"
    words = arguments(source, reader, out, "--engine", "ray", "--workers", "2")
    process = start(words, tmp_path)
    wait_for_parts(out, 3, process)
    killed = workers_of(process)[0]
    killed.kill()
    before = len(list((out / "parts").glob("part-*.parquet")))
    wait_for_parts(out, min(before + 4, DOCUMENTS // SHARD), process)
    assert not killed.is_running() or killed.status() == psutil.STATUS_ZOMBIE
    descendants = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # Ray's own processes end with the driver, but in their own time
    _, alive = psutil.wait_procs(descendants, timeout=1)
    for one in alive:
        one.kill()
    assert not (out / "salience.json").exists()
    finished(start(words, tmp_path))
    assert len(list((out / "parts").iterdir())) == DOCUMENTS // SHARD
    assert decisions(out).equals(decisions(whole)) and kept(out) == kept(whole)


@pytest.mark.slow
def test_what_a_worker_of_ray_cannot_read_is_told_in_a_line(source, reader, tmp_path):
    """As on a cluster where a folder is not shared: the driver sees it, a worker does not."""
    pytest.importorskip("ray")
    from salience.core.documents import Reading
    from salience.core.errors import SalienceError
    from salience.hosts.corpus_files import open_source
    from salience.hosts.engines import Work, ray_engine
    from salience.hosts.selecting import select as run

    reading = Reading(folder=tmp_path / "out", device="cpu", shard_documents=100)
    method = sal.Perplexity(model=str(reader))
    work = Work(str(tmp_path / "elsewhere"), method, reading, str(tmp_path / "out"))
    engine = ray_engine(work, address=None, workers=1, timeout=10, gpus=False)
    with pytest.raises(
        SalienceError, match=r"worker on .*: data must be an existing file, folder .*elsewhere"
    ):
        run(open_source(source, reading), method, reading, engine=engine)
    assert not (tmp_path / "out" / "parts").exists() or not list((tmp_path / "out" / "parts").iterdir())


def workers_of(process, seconds=60):
    """Ray's actors that this run started, and no others of this machine."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        children = psutil.Process(process.pid).children(recursive=True)
        found = [one for one in children if one.name().startswith("ray::MapWorker")]
        if found:
            return found
        time.sleep(0.02)
    return pytest.fail("no worker was seen")


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def select(cli, source, reader, tmp_path):
    """The error of a run that is refused."""

    def run(*more, data=source, out=None):
        out = out or tmp_path / "out"
        code, _, err = cli(*arguments(data, reader, out, *more))
        assert code == 2, err
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in err, err
        assert not (out / "parts").exists() and not (out / "salience.json").exists()
        return lines[0]

    return run


def test_bad_input_is_one_line_and_leaves_nothing(select, tmp_path):
    assert "data must be an existing file, folder or datasets name" in select(data=tmp_path / "none")
    assert "keep must be in (0, 1], got 1.5" in select("--keep", "1.5")
    assert "engine must be one of local, ray, got 'spark'" in select("--engine", "spark")
    assert "address must be given with engine ray" in select("--address", "auto")
    assert "column must be OURS=THEIRS, got 'text'" in select("--column", "text")
    assert "column text must be one of id, text, source, got 'body'" in select("--column", "text=body")
    assert "domain_column must be one of id, text, source, got 'kind'" in select("--domain-column", "kind")
    assert "max_length must be at most 128" in select("--max-length", "999")
    assert "method must choose samples of a dataset for select, got ist" in select("--method", "ist")
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n')
    assert "at line 2 of a.jsonl (skip_bad leaves such out)" in select(data=bad)
    (bad / "a.jsonl").write_bytes(b"")
    assert "data must be files with documents, got none in a.jsonl" in select(data=bad)


def test_a_cluster_that_does_not_answer_is_told_at_once(select):
    pytest.importorskip("ray")
    started = time.monotonic()
    text = select("--engine", "ray", "--address", f"127.0.0.1:{free_port()}", "--timeout", "2")
    assert "address must be a Ray cluster that answers within 2 s, got 127.0.0.1" in text
    assert time.monotonic() - started < 15


def test_small_runs_skip_bad_rows_and_refuse_other_work(cli, reader, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "abc de"}\n{"body": 1}\n{"text": "xyz a b c"}\n\n{"text": "a b c d e"}\n')
    out = tmp_path / "out"
    code, _, err = cli(*arguments(data, reader, out, "--skip-bad", "--keep", "0.5"))
    assert code == 0, err
    result = json.loads((out / "result.json").read_text())
    assert (
        result["spent"]["skipped"] == 1 and result["spent"]["kept"] == 2 and result["spent"]["documents"] == 3
    )
    assert result["skipped"] == ["text in column text, got nothing at line 2 of data.jsonl"]
    assert "got nothing at line 2 of data.jsonl" in (out / "report.html").read_text()
    # another share of the same scores is no other work
    code, _, err = cli(*arguments(data, reader, out, "--skip-bad", "--keep", "0.1"))
    assert code == 0 and len(kept(out)) == 1, err
    data.write_text('{"text": "abc de"}\n')
    code, _, err = cli(*arguments(data, reader, out, "--skip-bad", "--keep", "0.5"))
    assert code == 2 and "whose documents differ: take another folder" in err


def test_without_a_model_nothing_is_loaded(cli, source, tmp_path):
    out = tmp_path / "out"
    code, _, err = cli(
        "select", "--data", str(source), "--method", "length", "--keep", "0.1", "--out", str(out)
    )
    assert code == 0, err
    rows = kept(out)
    assert len(rows) == 60
    shortest = min(len(row["text"]) for row in rows)
    every = [
        len(json.loads(line)["text"]) for path in source.iterdir() for line in path.read_text().splitlines()
    ]
    assert sorted(every)[-60] == shortest


def instructions(first, count):
    """Rows with names of their own: of other tools than ours."""
    return [
        {"uid": f"{first}{place}", "instruction": "abc de"[: 2 + place % 4], "output": f"{text} {first}"}
        for place, text in enumerate(small_corpus(count, seed=ord(first)))
    ]


def test_adapt_inf_keeps_a_pool_from_one_command_to_the_next(cli, reader, tmp_path):
    from datasets import Dataset

    lines, table = tmp_path / "a.jsonl", tmp_path / "b.parquet"
    lines.write_text("".join(json.dumps(row) + "\n" for row in instructions("a", 40)) + "not json\n")
    Dataset.from_list(instructions("b", 30)).to_parquet(table)
    names = ("--column", "prompt=instruction", "--column", "completion=output", "--id-column", "uid")
    method = f"adapt-inf:keep=12,pool_limit=25,clusters=3,dim=16,state={tmp_path / 'pool'}"

    def run(data, out, *more):
        return cli(
            "select", "--data", data, "--model", reader, "--method", method, "--device", "cpu",
            "--out", tmp_path / out, *names, *more,
        )  # fmt: skip

    code, _, err = run(lines, "one")
    assert code == 2 and "at line 41 of a.jsonl (skip_bad leaves such out)" in err
    assert not (tmp_path / "one").exists() and not (tmp_path / "pool").exists()
    code, told, err = run(lines, "one", "--skip-bad")
    assert code == 0, err
    assert "12 of 40 samples of a.jsonl" in told and "release 1, pool 25, pruned 15" in told
    page = (tmp_path / "one" / "report.html").read_text()
    assert "25 samples stay in the pool" in " ".join(page.split()) and "at line 41 of a.jsonl" in page
    code, told, err = run(table, "two")
    assert code == 0 and "12 of 55 samples of b.parquet" in told and "release 2" in told, err
    rows = pq.read_table(tmp_path / "two" / "data" / "part-000000.parquet").to_pylist()
    known = {row["uid"]: row for row in instructions("a", 40) + instructions("b", 30)}
    assert len(rows) == 12 and all(row == known[row["uid"]] for row in rows)
    # the same command again finds what it did; ids of the pool are not taken twice
    again = run(table, "two")
    assert again[0] == 0 and again[1] == told
    code, _, err = run(lines, "three", "--skip-bad")
    assert code == 2 and "ids must be new to the pool, got 'a" in err and not (tmp_path / "three").exists()
    code, _, err = run(table, "four", "--engine", "ray")
    assert code == 2 and "engine must be local and without torchrun for adapt-inf, got ray" in err


def test_pictures_go_from_parquet_into_the_pool_as_they_are(tmp_path):
    import numpy as np
    from datasets import Dataset
    from PIL import Image

    from salience.core.documents import Reading
    from salience.hosts.corpus_files import open_dataset
    from salience.hosts.sample_pool import as_dataset

    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (6, 5, 3), np.uint8)) for _ in range(3)]
    rows = {
        "prompt": ["a", "b", "c"],
        "completion": ["x", "y", "z"],
        "image": [None, pictures[1], pictures[2]],
    }
    source = Dataset.from_dict(rows)
    source.to_parquet(tmp_path / "data.parquet")
    found, _ = open_dataset(tmp_path / "data.parquet", Reading(), tmp_path / "rows")
    streamed = as_dataset(source.to_iterable_dataset(), tmp_path / "stream")
    for one in (found, streamed):
        assert one.features == source.features and one[0]["image"] is None
        for place in (1, 2):
            assert np.array_equal(np.asarray(one[place]["image"]), np.asarray(pictures[place]))
    again, _ = open_dataset(tmp_path / "data.parquet", Reading(), tmp_path / "again")
    assert again._fingerprint == found._fingerprint, "the same rows are known again"


def test_a_selection_is_tuned_on_as_it_is(cli, source, reader, tmp_path):
    code, _, err = cli(
        "select", "--data", source, "--method", "length", "--keep", "0.1", "--out", tmp_path / "picked"
    )
    assert code == 0, err
    code, _, err = cli(
        "tune", "--model", reader, "--data", tmp_path / "picked", "--steps", "2", "--batch-size", "2",
        "--max-length", "64", "--truncate", "--device", "cpu", "--method", "loss-reweighting", "--no-baseline",
        "--out", tmp_path / "tuned",
    )  # fmt: skip
    assert code == 0, err
    assert (tmp_path / "tuned" / "result.json").exists()
