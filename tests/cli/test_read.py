"""`salience read` from the command to the page, and one line for whatever a user gets wrong, with nothing written."""

import json
import re
import shlex
import shutil

import pytest
import torch
from conftest import WORDS, tiny_llama

METHODS = ("block-top-k:keep=0.2,q_block=16,k_block=8", "streaming-llm:sinks=2,window=16,q_block=16")
TOKENS = 200


@pytest.fixture(scope="session")
def reader(tmp_path_factory, checkpoint):
    """A folder with a tiny Llama of four layers and 512 positions, and the word tokenizer."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("reader") / "tiny-reader"
    model = tiny_llama(layers=4, initializer_range=0.2)
    model.config.max_position_embeddings = 512
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


@pytest.fixture
def long_file(tmp_path):
    draw = torch.Generator().manual_seed(3)
    words = [WORDS[i] for i in torch.randint(0, len(WORDS), (TOKENS - 4,), generator=draw).tolist()]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(" ".join(words[start : start + 20]) for start in range(0, TOKENS, 20)) + "\n")
    return path


@pytest.fixture
def read(cli, reader, long_file, tmp_path):
    """`salience read` on the tiny Llama with some options replaced; None leaves one out."""

    def run(**options):
        given = {
            "model": reader,
            "file": long_file,
            "ask": "the cat sits ?",
            "method": list(METHODS),
            "out": tmp_path / "out",
            "device": "cpu",
            "repeats": 2,
            "max_new_tokens": 6,
            **options,
        }
        arguments = []
        for name, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    arguments += [f"--{name.replace('_', '-')}", *([] if one is True else [str(one)])]
        return cli("read", *arguments)

    return run


@pytest.fixture
def refused(read, tmp_path):
    def run(**options):
        code, out, err = read(**options)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err and not out, err
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


@pytest.fixture
def result(tmp_path):
    return lambda: json.loads((tmp_path / "out" / "result.json").read_text())


def test_from_the_command_to_the_page(read, result, tmp_path):
    code, out, err = read(ask="the [bold]cat[/bold] <script> sits ?")
    assert code == 0, err
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {"report.html", "result.json"}
    found = result()
    plain, top, stream = found["arms"].values()
    assert list(found["arms"]) == ["plain", *METHODS]
    assert found["positions"] == 512 and found["chat"] is False and found["chunk"] is None
    # the sink, and the row itself with 15 keys before it
    tokens = found["prompt_tokens"]
    seen = sum(min(row + 1, 18) for row in range(tokens))
    pairs = tokens * (tokens + 1) / 2
    assert stream["kept_share"] == pytest.approx(seen / pairs)
    assert [one["layer"] for one in top["layers"]] == [0, 1, 2, 3]
    for one in top["layers"]:
        assert len(one["share"]) == len(one["recall"]) == 4 and one["kernel"] == "gather"
        assert 0.2 < min(one["share"]) <= max(one["share"]) < 0.6 and 0.0 < min(one["recall"]) < 1.0
    mean = sum(sum(one["share"]) for one in top["layers"]) / 16
    assert top["kept_share"] == pytest.approx(mean) and top["kernel"] == "gather"
    assert plain["kept_share"] == plain["recall"] == plain["first_token_ratio"] == 1.0
    for arm in found["arms"].values():
        assert len(arm["first_token_each"]) == 2 and arm["first_token_seconds"] > 0
        assert arm["first_token_ratio"] == arm["first_token_seconds"] / plain["first_token_seconds"]
        assert sum(arm["seconds"].values()) == pytest.approx(arm["first_token_seconds"])
        assert arm["seconds"]["attending"] > 0 and (arm["seconds"]["choosing"] > 0) == (arm is not plain)
    for shown in ("[bold]cat[/bold] <script>", f"{tokens} tokens", "report:", *METHODS):
        assert shown in out, out
    assert f"({top['first_token_ratio']:.2f}x)" in out and f"{top['recall']:.3f}" in out
    assert f"{100 * stream['kept_share']:.1f} %" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt; sits ?" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "@import" not in page
    # times, shares, recall and the maps of two methods, each wide and narrow
    assert page.count("<svg") == 10 and "data:image/png;base64," in page
    assert f"{tokens} tokens of 512 positions, without a chat template" in page
    for name in METHODS:
        assert name in page


def test_the_command_on_the_page_does_the_same(read, cli, result):
    assert read(chunk=64)[0] == 0
    first = result()
    program, *arguments = shlex.split(first["command"])
    assert program == "salience" and "--chunk 64" in first["command"]
    assert cli(*arguments)[0] == 0
    again = result()
    assert again["command"] == first["command"]
    for name, arm in first["arms"].items():
        for key in ("answer", "kept_share", "recall", "layers"):
            assert again["arms"][name][key] == arm[key]


def test_dense_attention_is_the_plain_model(read, result):
    assert read(method="dense-attention:listed=true,block=16", repeats=1)[0] == 0
    plain, dense = result()["arms"].values()
    assert dense["answer"] == plain["answer"] and dense["kept_share"] == 1.0
    assert dense["recall"] == pytest.approx(1.0, abs=1e-5)


def test_in_pieces_and_bfloat16(read, result, tmp_path):
    assert read(method=METHODS[1], repeats=1)[0] == 0
    whole = result()["arms"]
    code, _, err = read(method=METHODS[1], repeats=1, chunk=48)
    assert code == 0, err
    for name, arm in result()["arms"].items():
        assert arm["answer"] == whole[name]["answer"]
        assert arm["kept_share"] == pytest.approx(whole[name]["kept_share"])
    code, _, err = read(method=METHODS[1], repeats=1, dtype="bfloat16")
    assert code == 0, err
    page = (tmp_path / "out" / "report.html").read_text()
    assert result()["model"]["dtype"] == "bfloat16" and "one reading after a warm-up" in page


def test_a_chat_template_makes_a_users_message(read, reader, result, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "chat"
    shutil.copytree(reader, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "<s> Question {% for one in messages %}{{ one.content }}{% endfor %} Answer"
    tokenizer.save_pretrained(folder)
    assert read(model=folder, method=METHODS[1], repeats=1)[0] == 0
    found = result()
    assert found["chat"] and found["text"].startswith("<s> Question ")
    assert found["text"].endswith("\n\nthe cat sits ? Answer")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "as a user&#39;s message of the chat template" in page


def test_usual_methods_leave_something_out_at_every_length(read, result):
    from salience.core.spec import parse_method
    from salience.jobs.read import usual_methods

    for tokens in (16, 500, 4096, 9000, 131072):
        for depth in (1, 2, 32, 80):
            for device in ("cpu", "cuda"):
                names = [parse_method(one).slug() for one in usual_methods(tokens, depth, device)]
                assert names == ["hip", "block-top-k"]
    assert parse_method(usual_methods(32768, 32)[0]) == parse_method("hip")
    assert parse_method(usual_methods(32768, 32)[1]) == parse_method("block-top-k")


def test_the_sandbox_asks_about_a_text_of_its_own(read, reader, result, long_file, monkeypatch):
    from salience.hosts.checkpoints import load_model
    from salience.sandbox import needles

    asked = []

    def load(seed, quick):
        asked.append((seed, quick))
        return load_model(reader, kind="causal", dtype="float32")

    def long_text(tokens, seed):
        asked.append((tokens, seed))
        return long_file.read_text(), "the cat ?", "47"

    monkeypatch.setattr(needles, "load", load)
    monkeypatch.setattr(needles, "long_text", lambda *given: needles.LongText(*long_text(*given)))
    code, out, err = read(model=None, file=None, ask=None, seed=2, repeats=1)
    assert code == 0, err
    found = result()
    assert asked == [(4096, 2), (2, False)]
    assert found["prompt"] == "the cat ?" and found["right"] == "47" and "the right answer: 47" in out
    assert found["file"]["name"] == "text 2"
    assert read(model=None, repeats=1, quick=True)[0] == 0
    assert asked[2:] == [(0, True)] and result()["right"] is None and result()["file"]["name"] == "long.txt"


@pytest.mark.slow
def test_the_quick_sandbox_as_it_is(read, result):
    code, _, err = read(model=None, file=None, ask=None, quick=True, method=METHODS[1])
    assert code == 0, err
    found = result()
    assert found["prompt_tokens"] == 512 and found["arms"]["plain"]["answer"] == found["right"]


def test_layers_that_slide_are_not_asked(read, reader, result, tmp_path):
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    folder = tmp_path / "sliding"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=32, **sizes)
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(reader).save_pretrained(folder)
    code, _, err = read(model=folder, method=METHODS[1], repeats=1)
    assert code == 0, err
    plain, stream = result()["arms"].values()
    assert stream["layers"] == [] and stream["kept_share"] is None and stream["answer"] == plain["answer"]
    assert "chose nothing: every layer looks" in (tmp_path / "out" / "report.html").read_text()


def test_files_that_cannot_be_read(refused, long_file, tmp_path, monkeypatch):
    from salience.hosts import longtext

    assert "file must be an existing file, got" in refused(file=tmp_path / "missing.txt")
    assert "file must be an existing file, got" in refused(file=tmp_path)
    path = tmp_path / "other.txt"
    path.write_bytes("the café".encode("latin-1"))
    assert "file must be UTF-8 text, got" in refused(file=path)
    assert "with byte 0xe9 at 7" in refused(file=path)
    for nothing in ("", " \n\t\n"):
        path.write_text(nothing)
        assert "file must hold text, got" in refused(file=path)
    monkeypatch.setattr(longtext, "MOST_BYTES", 100)
    assert "file must have at most 100 bytes, got" in refused()


def test_what_belongs_together(refused):
    assert "file must be given together with model, got none: --file FILE" in refused(file=None)
    assert "ask must be given together with file, got none: --ask TEXT" in refused(ask=None)
    assert "ask must be given together with file" in refused(model=None, ask=None)
    assert "ask must be a text, got '  '" in refused(ask="  ")


def test_prompts_longer_than_the_model(refused, read, tmp_path, long_file):
    long_file.write_text(3 * long_file.read_text())
    text = refused()
    assert "must fit the model's 512 positions, got 592 and 6 tokens: cut the file to about its first" in text
    keep = int(re.search(r"first ([\d,]+) of ([\d,]+) characters", text).group(1).replace(",", ""))
    # what the text advises is right, and wastes little
    long_file.write_text(long_file.read_text()[:keep])
    assert read(method=METHODS[1], repeats=1)[0] == 0
    tokens = json.loads((tmp_path / "out" / "result.json").read_text())["prompt_tokens"]
    assert 480 < tokens <= 506


def test_models_that_do_not_complete_text(refused, seeing_checkpoint, tmp_path):
    assert "model must be an existing folder" in refused(model=tmp_path / "nowhere" / "model")
    assert "model must be a checkpoint that transformers can load, got" in refused(model=seeing_checkpoint)


def test_methods(refused):
    assert "did you mean block-top-k" in refused(method="block-topk")
    assert "parameter of block-top-k must be one of" in refused(method="block-top-k:kept=1")
    assert "keep must be" in refused(method="block-top-k:keep=1.5")
    assert "method must choose key blocks for read, got pyramiddrop" in refused(method="pyramiddrop")
    assert "method must choose key blocks for read, got deft" in refused(method="deft")
    assert "got streaming-llm twice" in refused(method=["streaming-llm", "streaming-llm"])


def test_a_model_that_cannot_be_served(refused, reader, tmp_path):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(reader).save_pretrained(folder)
    assert "attention must" in (text := refused(model=folder)) and "BloomAttention" in text


def test_what_a_method_refuses_comes_before_any_reading(refused, monkeypatch):
    from salience.core.errors import StructureError
    from salience.hosts import longtext
    from salience.methods.keys.streaming_llm import StreamingLLM

    def attach(self, model, record, data=None):
        raise StructureError("attention must be such, got another")

    monkeypatch.setattr(StreamingLLM, "attach_model", attach)
    monkeypatch.setattr(longtext, "answer", lambda *_, **__: pytest.fail("read"))
    assert "attention must be such" in refused()


def test_options(refused):
    assert "max_new_tokens must be >= 1, got 0" in refused(max_new_tokens=0)
    assert "repeats must be >= 1, got 0" in refused(repeats=0)
    assert "chunk must be >= 1, got 0" in refused(chunk=0)
    assert "seed must be >= 0, got -1" in refused(seed=-1)
    assert "dtype must be one of auto, float32, bfloat16, got 'int8'" in refused(dtype="int8")
    assert "device must be one of" in refused(device="abacus")


def test_help_teaches(cli):
    code, out, _ = cli("read", "--help")
    assert code == 0 and "salience read --model" in out and "--chunk" in out
    assert "[default: hip and block-top-k" in out and "[default: all at once]" in out


def test_places_that_cannot_be_written(read, tmp_path, long_file):
    code, _, err = read(out=long_file)
    assert code == 2 and "out must be a writable folder" in err
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    code, _, err = read(out=folder)
    assert code == 2 and "out must be a folder of its own" in err
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]
