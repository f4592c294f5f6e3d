"""Corpora in files: every form that is read, every fault that is named, and shards that can be read in any order."""

import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from salience.core.documents import Reading
from salience.core.errors import ParameterError
from salience.hosts.corpus_files import data_files, open_source

ROWS = [{"id": f"d{place}", "text": f"text {place} é", "n": place} for place in range(25)]


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def packed(content, ending):
    if ending == ".gz":
        return gzip.compress(content)
    if ending == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as out:
            out.write(content)
        return sink.getvalue().to_pybytes()
    return content


def write(folder, ending):
    folder.mkdir(parents=True)
    for number, rows in enumerate((ROWS[:9], ROWS[9:20], ROWS[20:])):
        if ending == ".parquet":
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, folder / f"{number}.parquet", row_group_size=4)
        else:
            (folder / f"{number}.jsonl{ending}").write_bytes(packed(lines(rows), ending))
    return folder


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".parquet"])
def test_every_document_is_in_one_shard_and_shards_are_read_in_any_order(ending, tmp_path):
    source = write(tmp_path / "data", ending)
    corpus = open_source(source, Reading(shard_documents=4))
    shards = list(corpus.shards())
    assert [shard.count for shard in shards] == [4, 4, 1, 4, 4, 3, 4, 1]
    assert [shard.first for shard in shards] == [0, 4, 8, 9, 13, 17, 20, 24]
    found = {shard.number: [row.values for row in corpus.read(shard)] for shard in shards}
    assert [row for number in sorted(found) for row in found[number]] == ROWS
    random.Random(1).shuffle(shards)
    other = open_source(source, Reading(shard_documents=4))
    for shard in shards:
        assert [row.values for row in other.read(shard)] == found[shard.number]


@pytest.mark.parametrize("ending", ["", ".gz", ".zst", ".parquet"])
def test_what_is_kept_is_written_with_all_its_columns(ending, tmp_path):
    corpus = open_source(write(tmp_path / "data", ending), Reading(shard_documents=4))
    kept = np.zeros(25, np.uint8)
    kept[[0, 8, 21, 24]] = 1
    (tmp_path / "out").mkdir()
    names = corpus.write(list(corpus.shards()), kept, tmp_path / "out")
    assert len(names) == 2, "a file of which nothing is kept is not written"
    read = [
        row
        for name in names
        for row in (
            pq.read_table(tmp_path / "out" / name).to_pylist()
            if name.endswith("parquet")
            else [json.loads(line) for line in (tmp_path / "out" / name).read_text().splitlines()]
        )
    ]
    assert read == [ROWS[place] for place in (0, 8, 21, 24)]


def test_text_lines_become_rows(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufefffirst\r\n\n  \nsecond\n".encode())
    corpus = open_source(path, Reading())
    (shard,) = corpus.shards()
    rows = list(corpus.read(shard))
    assert [(row.values, row.where) for row in rows] == [
        ({"text": "first"}, "line 1 of a.txt"), ({"text": "second"}, "line 4 of a.txt"),
    ]  # fmt: skip
    assert corpus.write([shard], np.array([0, 1]), tmp_path) == ["part-000000.jsonl"]
    assert (tmp_path / "part-000000.jsonl").read_text() == '{"text": "second"}\n'


def test_a_look_is_kept_and_found_again(tmp_path, monkeypatch):
    source = write(tmp_path / "data", "")
    first = open_source(source, Reading(shard_documents=4))
    first.keep_plan(tmp_path / "shards.json")
    before = first.fingerprint()
    again = open_source(source, Reading(shard_documents=4))
    monkeypatch.setattr(type(again), "_look", lambda self: pytest.fail("was looked at already"))
    again.keep_plan(tmp_path / "shards.json")
    assert list(again.shards()) == list(first.shards())
    assert again.fingerprint() == before
    with (source / "1.jsonl").open("ab") as file:
        file.write(lines([{"id": "new", "text": "more"}]))
    assert open_source(source, Reading()).fingerprint() != before


def broken(folder, name="1.jsonl", content=b"", ending=""):
    source = write(folder / "data", ending)
    (source / name).write_bytes(content)
    return source


BAD = {
    "no JSON": (
        lines(ROWS[9:11]) + b"{not json\n" + lines(ROWS[11:20]),
        "data must be documents with one JSON object a line, got Expecting property name enclosed in double quotes "
        "(column 2) at line 3 of 1.jsonl (skip_bad leaves such out)",
        25, ["one JSON object a line, got Expecting property name enclosed in double quotes (column 2) at line 3 of"],
    ),
    "not an object": (
        b'["a"]\n' + lines(ROWS[9:20]),
        "data must be documents with one JSON object a line, got list at line 1 of 1.jsonl "
        "(skip_bad leaves such out)",
        25, ["one JSON object a line, got list at line 1 of 1.jsonl"],
    ),
    "not UTF-8": (
        lines(ROWS[9:20]) + b'{"text": "\xff"}\n',
        "data must be documents with UTF-8 text, got byte 0xff at line 12 of 1.jsonl (skip_bad leaves such out)",
        25, ["UTF-8 text, got byte 0xff at line 12 of 1.jsonl"],
    ),
    "no text": (
        lines([*ROWS[9:19], {"id": "x", "n": 3}]),
        "data must be documents with text in column text, got nothing at line 11 of 1.jsonl "
        "(skip_bad leaves such out)",
        24, ["text in column text, got nothing at line 11 of 1.jsonl"],
    ),
    "an empty file": (
        b"", "data must be files with documents, got none in 1.jsonl (skip_bad leaves such out)",
        14, ["files with documents, got none in 1.jsonl"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_faults_are_named_with_file_and_line_or_left_out_and_listed(case, tmp_path):
    content, text, left, listed = BAD[case]
    source = broken(tmp_path, content=content)
    with pytest.raises(ParameterError) as caught:
        open_source(source, Reading()).check()
    assert str(caught.value) == text
    corpus = open_source(source, Reading(skip_bad=True, shard_documents=4))
    shards = list(corpus.shards())
    good = [row.values["text"] for shard in shards for row in corpus.read(shard)]
    assert sum(shard.count for shard in shards) == len(good) == left
    assert len(corpus.bad) == len(listed) == corpus.bad_count
    assert all(found.startswith(wanted) for found, wanted in zip(corpus.bad, listed))
    assert all(isinstance(one, str) for one in good) and good[:9] == [row["text"] for row in ROWS[:9]]


@pytest.mark.parametrize("ending", [".gz", ".zst", ".parquet"])
def test_a_file_that_breaks_off_is_left_out_whole(ending, tmp_path):
    source = write(tmp_path / "data", ending)
    name = f"1{'' if ending == '.parquet' else '.jsonl'}{ending}"
    content = (source / name).read_bytes()
    (source / name).write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(ParameterError, match=f"data must be readable files, got {name} "):
        open_source(source, Reading()).check()
    corpus = open_source(source, Reading(skip_bad=True))
    good = [row.values["id"] for shard in corpus.shards() for row in corpus.read(shard)]
    assert good == [row["id"] for row in ROWS[:9] + ROWS[20:]] and corpus.bad_count == 1


def test_ids_that_stand_twice_are_refused_with_both_places(tmp_path):
    source = broken(tmp_path, content=lines([*ROWS[9:19], ROWS[3]]))
    with pytest.raises(ParameterError) as caught:
        open_source(source, Reading()).check()
    assert str(caught.value) == (
        "ids must differ, got 'd3' in column id at line 4 of 0.jsonl and at line 11 of 1.jsonl: name another column "
        "(id_column), or number the documents (id_column='#')"
    )
    open_source(source, Reading(id_column="#")).check()


def test_what_is_no_corpus_is_refused(tmp_path):
    def refusal(source, **reading):
        with pytest.raises(ParameterError) as caught:
            open_source(source, Reading(**reading)).check()
        return str(caught.value)

    assert refusal(tmp_path / "none") == (
        f"data must be an existing file, folder or datasets name, got {tmp_path / 'none'}"
    )
    assert refusal(tmp_path).startswith(
        "data must be a folder with .jsonl[.gz|.zst], .txt[.gz|.zst], .parquet files"
    )
    (tmp_path / "a.csv").write_text("x")
    assert refusal(tmp_path / "a.csv").startswith("data must be a .jsonl[.gz|.zst]")
    source = write(tmp_path / "data", "")
    pq.write_table(pa.table({"text": ["a"]}), source / "3.parquet")
    assert refusal(source) == f"data must be files of one kind, got lines and parquet in {source}"
    (source / "3.parquet").unlink()
    assert "column text must be one of id, text, n, got 'body'" in refusal(source, columns={"text": "body"})
    assert refusal(source, source_column="web") == "source_column must be one of id, text, n, got 'web'"


def test_a_selection_is_read_as_what_it_kept(tmp_path):
    source = write(tmp_path / "data", "")
    (source / "salience.json").write_text(json.dumps({"selection": ["1.jsonl"]}))
    assert data_files(source) == [source / "1.jsonl"]
    (source / "salience.json").write_text(json.dumps({"selection": ["4.jsonl"]}))
    with pytest.raises(ParameterError, match=r"data must be a whole selection, got .* without 4.jsonl"):
        data_files(source)
