"""Writing: whole or not at all, earlier files intact, one clear sentence when the disk refuses."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest

from salience.core import files
from salience.core.errors import ParameterError, SalienceError
from salience.core.files import (
    FileError,
    check_writable,
    folder_atomic,
    write_json_atomic,
    write_text_atomic,
)


@contextmanager
def full_disk(at=4096):
    """Files cannot grow over `at` bytes: the system's own refusal, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize(
    "text", ["", "a", "one\r\ntwo\n", "naïve ∑ 日本\n" * 1000], ids=["empty", "one", "crlf", "long"]
)
def test_text_is_written_as_it_is(tmp_path, text):
    path = tmp_path / "new" / "deep" / "a.txt"
    write_text_atomic(path, text)
    assert path.read_bytes() == text.encode()
    write_text_atomic(str(path), "again")
    assert path.read_text() == "again"
    assert names(path.parent) == ["a.txt"]


def test_a_new_file_has_the_usual_rights(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_json_is_readable_and_round_trips(tmp_path):
    value = {"loss": [0.1, 2], "name": "日本", "none": None}
    write_json_atomic(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "日本" in text and text.endswith("}\n")


def test_json_of_what_json_cannot_hold_writes_nothing(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "a.json", {"new": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with full_disk(), pytest.raises(FileError) as caught:
        write_text_atomic(path, "new" * 10_000)
    assert str(caught.value) == (
        f"cannot write {path} (File too large); what was there before is intact: free some space and run again"
    )
    assert isinstance(caught.value, SalienceError) and isinstance(caught.value, OSError)
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_no_space_at_the_sync_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(FileError, match=r"\(No space left on device\).*: free some space and run again"):
        write_text_atomic(path, "new")
    with pytest.raises(FileError, match="No space left on device"), folder_atomic(tmp_path / "b") as folder:
        (folder / "c").write_text("c")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_parent_that_is_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("kept")
    path = tmp_path / "file" / "a.txt"
    text = re.escape(
        f"cannot write {path} (Not a directory); what was there before is intact: choose another place"
    )
    with pytest.raises(FileError, match=text):
        write_text_atomic(path, "x")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_appears_whole_and_replaces_the_earlier_one(tmp_path):
    for content in ("first", "second"):
        with folder_atomic(tmp_path / "run" / "model") as folder:
            assert folder.parent == tmp_path / "run"
            assert list(folder.iterdir()) == []
            (folder / "deep").mkdir()
            (folder / "deep" / content).write_text(content)
            if content == "second":
                assert names(tmp_path / "run" / "model") == ["deep", "deep/first"]
        assert names(tmp_path / "run") == ["model", "model/deep", f"model/deep/{content}"]


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyboardInterrupt(), FileNotFoundError(errno.ENOENT, "x", "input")]
)
def test_an_exception_in_the_block_leaves_the_earlier_folder(tmp_path, error):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    with pytest.raises(type(error)) as caught, folder_atomic(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
        raise error
    assert caught.value is error
    assert names(tmp_path) == ["model", "model/old"]


def test_a_full_disk_in_the_block_leaves_the_earlier_folder(tmp_path):
    import torch
    from safetensors.torch import save_file

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    text = r"cannot write .*model \(File too large\); what was there before is intact: free some space"
    with full_disk(), pytest.raises(FileError, match=text), folder_atomic(tmp_path / "model") as folder:
        (folder / "new").write_bytes(b"x" * 10_000)
    with full_disk(), pytest.raises(FileError, match=text), folder_atomic(tmp_path / "model") as folder:
        save_file({"weight": torch.zeros(10_000)}, folder / "model.safetensors")
    assert names(tmp_path) == ["model", "model/old"]


def test_a_file_in_the_place_of_a_folder_is_kept(tmp_path):
    (tmp_path / "model").write_text("file")
    with pytest.raises(FileError, match="Not a directory"), folder_atomic(tmp_path / "model"):
        pass
    assert (tmp_path / "model").read_text() == "file"


def test_what_a_killed_process_left_is_cleared_or_put_back(tmp_path):
    (tmp_path / ".model.part").mkdir()
    (tmp_path / ".model.part" / "torn").write_text("")
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "earlier").write_text("")
    with pytest.raises(ValueError), folder_atomic(tmp_path / "model") as folder:
        assert list(folder.iterdir()) == []
        raise ValueError
    assert names(tmp_path) == ["model", "model/earlier"]


def test_a_failed_last_rename_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("old")
    rename = files.Path.rename

    def refuse(self, target):
        if self.name == ".model.part":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(files.Path, "rename", refuse)
    with pytest.raises(FileError, match="Input/output error"), folder_atomic(tmp_path / "model") as folder:
        (folder / "new").write_text("new")
    assert names(tmp_path) == ["model", "model/old"]


def test_kill_in_the_middle_of_writing_leaves_whole_files(tmp_path):
    program = textwrap.dedent("""
        import sys
        from salience.core.files import folder_atomic, write_json_atomic
        number = 0
        while True:
            number += 1
            write_json_atomic(sys.argv[1] + "/a.json", {"number": [number] * 5000})
            with folder_atomic(sys.argv[1] + "/model") as folder:
                for name in "xy":
                    (folder / name).write_text(str(number) * 1000)
            print(number, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert len(set(json.loads((tmp_path / "a.json").read_text())["number"])) == 1
    with pytest.raises(ValueError), folder_atomic(tmp_path / "model"):
        raise ValueError
    x, y = ((tmp_path / "model" / name).read_text() for name in "xy")
    assert x == y and x


def test_a_writable_place_is_accepted_and_left_alone(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "deep", free_bytes=1000)
    assert names(tmp_path) == []


def test_an_unwritable_place_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deep"):
        with pytest.raises(ParameterError) as caught:
            check_writable(path)
        assert (
            str(caught.value) == f"out must be a writable folder, got {path} ({tmp_path / 'file'} is a file)"
        )

    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.Path, "mkdir", refuse)
    with pytest.raises(ParameterError) as caught:
        check_writable(tmp_path, name="cache")
    assert str(caught.value) == f"cache must be a writable folder, got {tmp_path} (Permission denied)"


def test_a_disk_without_room_is_refused(tmp_path):
    with pytest.raises(
        ParameterError, match=r"^out must be a writable folder with 1000000\.0 TB free, got .* with \d"
    ):
        check_writable(tmp_path, free_bytes=10**18)


@pytest.mark.parametrize(
    "count, text", [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2_340_000_000, "2.3 GB")]
)
def test_sizes_are_read_easily(count, text):
    assert files._size(count) == text
