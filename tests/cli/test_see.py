"""`salience see` from the command to the page, and one line for whatever a user gets wrong, with nothing written."""

import json
import re
import shlex

import pytest
from PIL import Image

from salience.hosts.checkpoints import load_model

METHODS = ("pyramiddrop", "pyramiddrop:ratios=(0.25,),layers=(2,)")


@pytest.fixture
def see(cli, seeing_checkpoint, picture, tmp_path):
    """`salience see` on the tiny LLaVA with some options replaced; None leaves one out."""

    def run(**options):
        given = {
            "model": seeing_checkpoint,
            "image": picture,
            "prompt": "the cat sits ?",
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
        return cli("see", *arguments)

    return run


@pytest.fixture
def refused(see, tmp_path):
    def run(**options):
        code, out, err = see(**options)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err and not out, err
        assert not (tmp_path / "out").exists()
        return lines[0]

    return run


def test_from_the_command_to_the_page(see, tmp_path):
    code, out, err = see(prompt="the [bold]cat[/bold] <script> sits ?")
    assert code == 0, err
    folder = tmp_path / "out"
    assert {path.name for path in folder.iterdir()} == {"report.html", "kept.png", "result.json"}
    result = json.loads((folder / "result.json").read_text())
    plain, dropped, later = result["arms"].values()
    assert list(result["arms"]) == ["plain", "pyramiddrop", "pyramiddrop:ratios=(0.25),layers=(2)"]
    assert plain["image_tokens"] == [16] * 6 and later["image_tokens"] == [16, 16, 4, 4, 4, 4]
    assert dropped["image_tokens"] == [16, 8, 8, 4, 2, 2] and dropped["share_of_token_layers"] == 40 / 96
    text = result["prompt_tokens"] - 16
    assert plain["kv_bytes"] == 128 * 6 * (16 + text) and dropped["kv_bytes"] == 128 * (40 + 6 * text)
    assert dropped["kv_ratio"] == dropped["kv_bytes"] / plain["kv_bytes"] < 1
    assert all(
        len(arm["prefill_each"]) == 2 and arm["prefill_seconds"] > 0 for arm in result["arms"].values()
    )
    for shown in (
        "[bold]cat[/bold] <script>",
        "16, from layer 1: 8, from layer 3: 4, from layer 4: 2",
        "report:",
    ):
        assert shown in out, out
    assert f"({dropped['kv_ratio']:.2f}x)" in out and f"({dropped['prefill_ratio']:.2f}x)" in out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt; sits ?" in page
    assert not re.search(r'(?:src|href)="(?!#|data:)', page) and "@import" not in page
    assert page.count("<svg") == 4 and "data:image/png;base64," in page
    assert "12 tokens" not in page and f"{result['prompt_tokens']} tokens, 16 of them of images" in page
    for name in result["arms"]:
        assert name in page
    with Image.open(folder / "kept.png") as image:
        image.load()
        assert image.width > 1000


def test_the_command_on_the_page_does_the_same(see, cli, tmp_path):
    assert see()[0] == 0
    path = tmp_path / "out" / "result.json"
    first = json.loads(path.read_text())
    program, *arguments = shlex.split(first["command"])
    assert program == "salience" and cli(*arguments)[0] == 0
    again = json.loads(path.read_text())
    assert again["command"] == first["command"]
    for name, arm in first["arms"].items():
        for key in ("answer", "image_tokens", "kv_bytes", "spent"):
            assert again["arms"][name][key] == arm[key]


def test_several_pictures_and_bfloat16(see, picture, tmp_path):
    code, _, err = see(image=[picture, picture], dtype="bfloat16", method="pyramiddrop", repeats=1)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["model"]["dtype"] == "bfloat16" and result["image_tokens"] == 32
    assert [one["name"] for one in result["pictures"]] == ["picture.png", "picture.png (2)"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What was kept of the pictures" in page and "one reading after a warm-up" in page


def test_the_sandbox_asks_about_a_scene_of_its_own(see, seeing_checkpoint, tmp_path, monkeypatch):
    from salience.sandbox import vision

    asked = []

    def load(seed, quick):
        asked.append((seed, quick))
        return load_model(seeing_checkpoint, kind="vision", dtype="float32")

    monkeypatch.setattr(vision, "load", load)
    code, out, err = see(model=None, image=None, prompt=None, seed=2)
    assert code == 0, err
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert asked == [(2, False)] and result["pictures"] == [{"name": "scene 2", "width": 96, "height": 96}]
    assert "<image>" not in result["prompt"] and f"the right answer: {result['right']}" in out
    assert see(model=None, prompt="the cat ?")[0] == 0
    assert json.loads((tmp_path / "out" / "result.json").read_text())["right"] is None


@pytest.mark.slow
def test_the_quick_sandbox_as_it_is(see, tmp_path):
    code, _, err = see(model=None, image=None, prompt=None, quick=True, method="pyramiddrop")
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "result.json").read_text())["image_tokens"] == 144


def test_pictures_that_cannot_be_read(refused, picture, tmp_path):
    assert "image must be an existing file, got" in refused(image=tmp_path / "missing.png")
    path = tmp_path / "broken.png"
    path.write_bytes(picture.read_bytes()[:-900])
    assert "image must be a whole picture, got" in refused(image=path)
    path.write_text("no picture")
    assert "image must be a picture (PNG, JPEG" in refused(image=path)
    assert "image must have at most 1000 pixels (--max-pixels), got" in refused(max_pixels=1000)


def test_what_belongs_together(refused):
    assert "image must be given together with model, got none: --image FILE" in refused(image=None)
    assert "prompt must be given together with image, got none: --prompt TEXT" in refused(prompt=None)
    assert "prompt must be given together with image" in refused(model=None, prompt=None)
    assert "as often as there are images (1)" in refused(prompt="<image> <image> cat")


def test_models_that_do_not_see(refused, checkpoint, tmp_path):
    assert "must be a vision-language model, got LlamaForCausalLM in" in refused(model=checkpoint)
    assert "model must be an existing folder" in refused(model=tmp_path / "nowhere" / "model")


def test_methods(refused):
    assert "did you mean pyramiddrop" in refused(method="pyramidrop")
    assert "parameter of pyramiddrop must be one of" in refused(method="pyramiddrop:ratio=1")
    assert "ratios must be in [0, 1] and not rising" in refused(method="pyramiddrop:ratios=(0.1,0.5)")
    assert "method must drop image tokens for see, got deft" in refused(method="deft")
    assert "method must drop image tokens for see, got sstoken" in refused(method="sstoken")
    assert "got pyramiddrop twice" in refused(method=["pyramiddrop", "pyramiddrop"])
    assert "layers must be in [0, 5]" in refused(method="pyramiddrop:ratios=(0.5,),layers=(6,)")


def test_a_method_that_the_model_does_not_take(refused, tmp_path, seeing_checkpoint):
    from conftest import tiny_llava
    from transformers import AutoProcessor

    folder = tmp_path / "shallow"
    AutoProcessor.from_pretrained(seeing_checkpoint).save_pretrained(folder)
    tiny_llava(layers=3).save_pretrained(folder)
    assert "ratios must be fewer than the decoder's 3 layers" in refused(model=folder, method="pyramiddrop")


def test_what_the_engine_refuses(refused, monkeypatch):
    from salience.core.errors import ConflictError
    from salience.methods.tokens.pyramiddrop import PyramidDrop

    def attach(self, model, record, data=None):
        raise ConflictError("positions must be 'keep' for Such, got 'renumber'")

    monkeypatch.setattr(PyramidDrop, "attach_model", attach)
    assert "positions must be 'keep' for Such" in refused(method="pyramiddrop")


def test_options(refused):
    assert "max_new_tokens must be >= 1, got 0" in refused(max_new_tokens=0)
    assert "repeats must be >= 1, got 0" in refused(repeats=0)
    assert "seed must be >= 0, got -1" in refused(seed=-1)
    assert "max_pixels must be in [1," in refused(max_pixels=0)
    assert "dtype must be one of auto, float32, bfloat16, got 'int8'" in refused(dtype="int8")
    assert "device must be one of" in refused(device="abacus")


def test_help_teaches(cli):
    code, out, _ = cli("see", "--help")
    assert code == 0 and "salience see --model" in out and "--max-pixels" in out
    shown = " ".join(out.replace("│", " ").split())
    assert "reading all image tokens [default: pyramiddrop and fastv]." in shown


def test_places_that_cannot_be_written(see, tmp_path, picture):
    code, _, err = see(out=picture)
    assert code == 2 and "out must be a writable folder" in err
    folder = tmp_path / "tuned"
    folder.mkdir()
    (folder / "recipe.json").write_text("{}")
    code, _, err = see(out=folder)
    assert code == 2 and "out must be a folder of its own" in err
    assert [path.name for path in folder.iterdir()] == ["recipe.json"]
