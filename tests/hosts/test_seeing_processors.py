"""Processors with dynamic resolution and tiles make the inputs by themselves, and what is told is what was held."""

import pytest
import torch
from PIL import Image
from vision_families import FAMILIES, IMAGE, PATCH, PINPOINTS, TILE, VIDEO, VISION_END, VISION_START, VOCAB

import salience as sal
from salience.hosts import seeing
from salience.hosts.vision import cache_of

TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<|vision_start|> <|image_pad|> <|vision_end|>' if part.type == 'image' else part.text }} "
    "{% endfor %}{% endfor %}w9"
)


def tokenizer(marks):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCAB))]
    for number, mark in marks.items():
        names[number] = mark
    raw = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="w99"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "w99"}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, additional_special_tokens=list(marks.values()), **special
    )


def qwen(monkeypatch):
    from transformers import ProcessorMixin, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    whole = ProcessorMixin.check_argument_for_proper_class
    # its video part needs torchvision and has no say in pictures
    monkeypatch.setattr(
        ProcessorMixin,
        "check_argument_for_proper_class",
        lambda self, name, value: None if name == "video_processor" else whole(self, name, value),
    )
    marks = {IMAGE: "<|image_pad|>", VIDEO: "<|video_pad|>"}
    marks |= {VISION_START: "<|vision_start|>", VISION_END: "<|vision_end|>"}
    images = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=4096
    )
    return Qwen2VLProcessor(
        image_processor=images, tokenizer=tokenizer(marks), video_processor=None, chat_template=TEMPLATE
    )


def llava_next(monkeypatch):
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = {"height": TILE, "width": TILE}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size=side, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer({IMAGE: "<image>"}),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.mark.parametrize(
    ("family", "make", "shapes"),
    [
        ("qwen2_vl", qwen, [(24, 40), (48, 24)]),
        ("qwen2_5_vl", qwen, [(24, 40), (48, 24)]),
        ("qwen3_vl", qwen, [(24, 40), (48, 24)]),
        ("llava_next", llava_next, [(16, 16), (32, 32), (16, 16), (32, 16)]),
    ],
)
def test_pictures_of_different_sizes_in_one_prompt(family, make, shapes, monkeypatch):
    model, processor = FAMILIES[family].make(), make(monkeypatch)
    pictures = [Image.new("RGB", (40, 24), (200, 10, 10)), Image.new("RGB", (24, 48), (20, 100, 10))]
    question = seeing.ask_about(model, processor, pictures, "w5 w6 w7", max_new_tokens=4)
    count = question.image_tokens
    plain = seeing.look(model, processor, question, max_new_tokens=4)
    method = sal.PyramidDrop(ratios=(0.5,), layers=(2,))
    found = seeing.look(model, processor, question, method, max_new_tokens=4)
    assert plain.image_tokens == (count,) * 4 and found.image_tokens == (count, count, count // 2, count // 2)
    with sal.focus(model, method), torch.no_grad():
        cache = cache_of(model(**question.inputs, use_cache=True))
    assert [layer.keys.shape[-2] for layer in cache.layers] == [
        question.tokens - count + kept for kept in found.image_tokens
    ]
    assert found.kv_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert found.kv_bytes < plain.kv_bytes and not found.unseen
    assert [tuple(picture.shape[1:]) for picture in found.pictures.pictures] == shapes
