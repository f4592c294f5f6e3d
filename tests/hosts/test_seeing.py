"""Pictures are opened with care, the processor alone makes the inputs, and what is told is what was held."""

import io
import json
import shutil
import struct
import zlib

import pytest
import torch
from PIL import Image

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError
from salience.hosts import seeing
from salience.hosts.checkpoints import load_model
from salience.hosts.vision import cache_of

TEMPLATE = (
    "<s> {% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }} {% endfor %}{% endfor %}Answer"
)


@pytest.fixture
def loaded(seeing_checkpoint):
    return load_model(seeing_checkpoint, kind="vision", dtype="float32")


@pytest.fixture
def photo(picture):
    return seeing.open_picture(picture)


def png(width, height, rows=b""):
    """A PNG file whose header says one thing and whose data may say another."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_pictures_become_rgb_and_upright(tmp_path):
    image = Image.new("RGB", (4, 2), (255, 0, 0))
    image.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    opened = seeing.open_picture(tmp_path / "turned.png")
    assert opened.size == (2, 4) and opened.getpixel((1, 0)) == (0, 0, 255)
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'tiff' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (5, 3)).convert(mode).save(path)
        assert seeing.open_picture(path).mode == "RGB", mode


def test_the_pixel_limit_is_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(png(9000, 9000))
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self.size))
    with pytest.raises(ParameterError, match=r"at most 40000000 pixels \(--max-pixels\), got .* 9000 x 9000"):
        seeing.open_picture(path)
    path.write_bytes(png(100_000, 100_000))
    with pytest.raises(ParameterError, match=r"at most 50000000 pixels \(--max-pixels\)"):
        seeing.open_picture(path, 50_000_000)
    assert not decoded


def test_the_pixel_limit_is_exact(picture):
    assert seeing.open_picture(picture, 1200).size == (40, 30)
    with pytest.raises(ParameterError, match="at most 1199 pixels"):
        seeing.open_picture(picture, 1199)
    for wrong in (0, -1, seeing.MOST_PIXELS + 1):
        with pytest.raises(ParameterError, match=f"max_pixels must be in .* got {wrong}"):
            seeing.open_picture(picture, wrong)


def test_files_that_are_no_whole_pictures(tmp_path, picture):
    path = tmp_path / "file.png"
    with pytest.raises(ParameterError, match="image must be an existing file"):
        seeing.open_picture(path)
    with pytest.raises(ParameterError, match="image must be an existing file"):
        seeing.open_picture(tmp_path)
    whole = picture.read_bytes()
    jpeg = io.BytesIO()
    Image.open(picture).save(jpeg, "JPEG")
    for content, text in (
        (b"", "of another kind"),
        (b"not a picture", "of another kind"),
        # Pillow would run Ghostscript
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "of another kind"),
        (whole[: len(whole) // 2], "a whole picture"),
        (jpeg.getvalue()[:400], "a whole picture"),
        (whole[:60] + b"\xff" * 40 + whole[100:], "a whole picture"),
        (png(8, 8, b"\0\1"), "a whole picture"),
    ):
        path.write_bytes(content)
        with pytest.raises(ParameterError, match=text) as caught:
            seeing.open_picture(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_image_tokens_go_in_front_or_stay_where_they_are(loaded, photo):
    model, processor = loaded
    question = seeing.ask_about(model, processor, [photo], "the cat ?")
    ids = question.inputs["input_ids"][0].tolist()
    assert ids == [63] * 16 + [4, 6, 20] and (question.tokens, question.image_tokens) == (19, 16)
    question = seeing.ask_about(model, processor, [photo, photo], "the <image> cat <image> ?")
    ids = question.inputs["input_ids"][0].tolist()
    assert ids == [4] + [63] * 16 + [6] + [63] * 16 + [20] and question.image_tokens == 32
    assert question.inputs["pixel_values"].shape == (2, 3, 16, 16)


def test_a_chat_template_is_used(loaded, photo):
    model, processor = loaded
    processor.chat_template = TEMPLATE
    question = seeing.ask_about(model, processor, [photo], "the cat ?")
    assert question.text == "<s> <image> the cat ? Answer"
    # one start token, though the tokenizer would add its own
    assert question.inputs["input_ids"][0].tolist() == [1] + [63] * 16 + [4, 6, 20, 27]
    assert seeing.ask_about(model, processor, [photo], "the <image> cat").text == "<s> the <image> cat Answer"


def test_prompts_that_do_not_fit(loaded, photo):
    model, processor = loaded
    for pictures, prompt, text in (
        ([photo], "<image> <image> cat", r"as often as there are images \(1\) or not at all, got it 2 times"),
        ([photo, photo], "<image> cat", r"as there are images \(2\) or not at all, got it 1 times"),
        ([], "cat", "image must be given at least once"),
        ([photo], "  ", "prompt must be a text"),
        ([photo], "cat " * 300, r"fit the model's 256 positions, got 316 and 32 tokens"),
    ):
        with pytest.raises(ParameterError, match=text):
            seeing.ask_about(model, processor, pictures, prompt)
    processor.chat_template = TEMPLATE.replace("'<image>' if", "'' if")
    with pytest.raises(
        ParameterError, match=r"image and prompt must be what LlavaProcessor reads, got .* 0 <image>"
    ):
        seeing.ask_about(model, processor, [photo], "the cat ?")
    processor.chat_template = "{{ raise_exception('only one picture') }}"
    with pytest.raises(ParameterError, match="chat template of LlavaProcessor takes, got only one picture"):
        seeing.ask_about(model, processor, [photo], "the cat ?")
    processor.chat_template, model.model.config.image_token_id = None, 62
    with pytest.raises(ParameterError, match=r"must hold an image token \('word62', id 62\).* got none"):
        seeing.ask_about(model, processor, [photo], "the cat ?")


def test_a_processor_that_counts_other_tokens_than_the_model(seeing_checkpoint, tmp_path, photo):
    folder = tmp_path / "other"
    shutil.copytree(seeing_checkpoint, folder)
    about = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({**about, "patch_size": 8}))
    model, processor = load_model(folder, kind="vision", dtype="float32")
    question = seeing.ask_about(model, processor, [photo], "the cat ?")
    assert question.image_tokens == 4
    with pytest.raises(ParameterError, match=r"model must take what its processor makes .* tokens") as caught:
        seeing.look(model, processor, question)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method", [None, sal.PyramidDrop(), sal.PyramidDrop(ratios=(0.4, 0.0), layers=(1, 4))], ids=str
)
def test_what_is_told_is_what_the_cache_holds(loaded, photo, method):
    model, processor = loaded
    question = seeing.ask_about(model, processor, [photo, photo], "the <image> cat <image> ?")
    found = seeing.look(model, processor, question, method, max_new_tokens=5)
    handle = sal.focus(model, method) if method is not None else None
    with torch.no_grad():
        cache = cache_of(model(**question.inputs, use_cache=True))
        made = model.generate(**question.inputs, max_new_tokens=5, do_sample=False)
    if handle is not None:
        handle.undo()
    text = question.tokens - question.image_tokens
    assert [layer.keys.shape[-2] - text for layer in cache.layers] == list(found.image_tokens)
    # two key heads of 8 numbers of 4 bytes, keys and values
    assert found.kv_bytes == sum(2 * 2 * 8 * 4 * (count + text) for count in found.image_tokens)
    answer = processor.tokenizer.decode(made[0, question.tokens :], skip_special_tokens=True)
    assert found.answer == answer.strip() and found.answer_tokens <= 5
    assert (found.pictures is None) == (method is None) and not found.unseen


def test_keeping_all_changes_nothing_and_nothing_stays(loaded, photo):
    model, processor = loaded
    question = seeing.ask_about(model, processor, [photo], "the cat ?")
    with torch.no_grad():
        before = model(**question.inputs).logits
    plain = seeing.look(model, processor, question)
    same = seeing.look(model, processor, question, sal.PyramidDrop(ratios=(1.0,)))
    assert (same.answer, same.image_tokens, same.kv_bytes) == (plain.answer, (16,) * 6, plain.kv_bytes)
    seconds = seeing.prefill_seconds(model, question, sal.PyramidDrop(), repeats=2)
    assert len(seconds) == 2 and min(seconds) > 0
    with torch.no_grad():
        assert torch.equal(model(**question.inputs).logits, before)


def test_pictures_have_their_colours(loaded):
    model, processor = loaded
    image = Image.new("RGB", (32, 32), (200, 30, 60))
    image.paste((20, 120, 250), (0, 0, 16, 32))
    question = seeing.ask_about(model, processor, [image], "the cat ?")
    shown = seeing.look(model, processor, question, sal.PyramidDrop()).pictures
    assert [stage.title for stage in shown.stages] == ["layer 1", "layer 3", "layer 4"]
    (picture,) = shown.pictures
    assert torch.allclose(255 * picture[:, 8, 2], torch.tensor([20.0, 120.0, 250.0]), atol=1)
    assert torch.allclose(255 * picture[:, 8, 13], torch.tensor([200.0, 30.0, 60.0]), atol=1)


def test_methods_that_cannot_act(loaded, photo):
    model, _ = loaded
    with pytest.raises(ParameterError, match="layers must be in"):
        seeing.check_method(model, sal.PyramidDrop(ratios=(0.5,), layers=(6,)))
    model.model.language_model.layers = model.model.language_model.layers[:3]
    with pytest.raises(ParameterError, match="ratios must be fewer than the decoder's 3 layers"):
        seeing.check_method(model, sal.PyramidDrop())
    with sal.focus(model, sal.PyramidDrop(ratios=(0.5,))), pytest.raises(ConflictError, match="one method"):
        seeing.check_method(model, sal.PyramidDrop(ratios=(0.5,)))
    from conftest import tiny_llama

    with pytest.raises(StructureError, match="got LlamaForCausalLM with decoder only"):
        seeing.check_method(tiny_llama(), sal.PyramidDrop())


def test_checkpoints_that_see_nothing(checkpoint, seeing_checkpoint, tmp_path):
    with pytest.raises(ParameterError, match="must be a vision-language model, got LlamaForCausalLM in"):
        load_model(checkpoint, kind="vision")
    folder = tmp_path / "alone"
    shutil.copytree(seeing_checkpoint, folder)
    (folder / "processor_config.json").unlink()
    with pytest.raises(ParameterError, match="must be a checkpoint with its processor, got"):
        load_model(folder, kind="vision")
