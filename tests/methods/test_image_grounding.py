"""ImageGrounding: what a picture is worth to an answer."""

import math

import pytest
import torch
from conftest import tiny_llava

import salience as sal
from salience.core.documents import Reading
from salience.core.errors import ParameterError
from salience.hosts.pictured import Pictured, grounding, without_pictures
from salience.methods.samples.image_grounding import score


def processor():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(59)), "<image>"]
    raw = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size), tokenizer=tokenizer, patch_size=4,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip


def picture(seed):
    from PIL import Image

    draw = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (20, 16, 3), generator=draw, dtype=torch.uint8).numpy())


def dataset(count=6, without=()):
    from datasets import Dataset, Image

    rows = [
        {
            "prompt": f"<image> w{n} w{n + 1}" if n not in without else f"w{n}",
            "completion": " ".join(f"w{(3 * n + k) % 50}" for k in range(1 + n % 3)),
            "image": picture(n) if n not in without else None,
        }
        for n in range(count)
    ]
    return Dataset.from_list(rows).cast_column("image", Image())


def _picks():
    return sal.ImageGrounding(model=tiny_llava(layers=2), processor=processor(), keep=2, pictures=2)


CONTRACT = {
    "method": sal.ImageGrounding(keep=0.5, prefer="low"),
    "picks": _picks,
    "dataset": dataset,
    "bad": {
        "keep": (0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0"),
        "prefer": ("most", "prefer must be one of high, low, got 'most'"),
        "pictures": (0, "pictures must be >= 1, got 0"),
    },
}


def test_the_logarithm_is_the_difference_of_two_losses_and_padding_changes_nothing():
    model, rows = tiny_llava(layers=2), list(dataset())
    inputs = Pictured(processor()).inputs(rows)
    found = grounding(model, inputs)
    plain = without_pictures(model, inputs)
    assert not (plain["input_ids"] == 63).any() and "pixel_values" not in plain
    for place, row in enumerate(rows):
        alone = Pictured(processor()).inputs([row])
        assert int((alone["labels"] != -100).sum()) == len(row["completion"].split()) + 1
        bare = without_pictures(model, alone)
        with torch.no_grad():
            expected = model(**bare).loss - model(**alone).loss
        torch.testing.assert_close(found[place], expected, rtol=1e-4, atol=1e-5)
    known, nothing = torch.arange(6.0), torch.zeros(6)
    torch.testing.assert_close(grounding(model, inputs, known), grounding(model, inputs, nothing) - known)


def test_a_picture_without_effect_is_worth_nothing():
    model = tiny_llava(layers=2)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = grounding(model, Pictured(processor()).inputs(list(dataset())))
    torch.testing.assert_close(found, torch.zeros(6), rtol=0, atol=1e-5)


def test_rows_without_a_picture_have_no_score_and_are_not_kept():
    picked = sal.focus(dataset(without=(1, 4)), _picks())
    scores = picked.scores["image-grounding.score"]
    assert [math.isnan(value) for value in scores.tolist()] == [False, True, False, False, True, False]
    assert len(picked.dataset) == 2 and all(image is not None for image in picked.dataset["image"])


def test_a_dataset_without_a_picture_column_is_refused_before_anything_is_scored():
    renamed = dataset().rename_column("image", "photo")
    for rows in (renamed, renamed.to_iterable_dataset()):
        with pytest.raises(ParameterError, match=r"dataset must have a column image or images .*photo"):
            sal.focus(rows, _picks(), data=Reading(columns={"image": "photo"}))


def test_low_is_the_other_end():
    gains = torch.tensor([0.5, math.nan, -0.25])
    assert score(gains, "low")[[0, 2]].tolist() == [-0.5, 0.25] and score(gains, "low")[1].isnan()


def test_a_model_without_a_processor_and_several_images_are_refused():
    with pytest.raises(ParameterError, match="model must be a vision-language model, with its processor="):
        sal.focus(dataset(), sal.ImageGrounding(model=tiny_llava(layers=2)))
    with pytest.raises(ParameterError, match="images must be one for each row, got 2"):
        Pictured(processor()).has({"images": [picture(0), picture(1)]})
    with pytest.raises(ParameterError, match="data must be rows with prompt and completion beside an image"):
        Pictured(processor()).inputs([{"text": "w1", "image": picture(0)}])


def test_adapt_inf_asks_grounding_where_all_of_a_cluster_have_pictures():
    method = sal.AdaptInf(
        model=(tiny_llava(layers=2), processor()), keep=4, clusters=1, dim=32, experts=("grounding",)
    )
    seeing = sal.focus(dataset(8), method).parts[0].decisions
    assert set(seeing["expert"].to_pylist()) == {"grounding"}
    mixed = sal.focus(dataset(8, without=(2,)), method).parts[0].decisions.to_pydict()
    assert set(mixed["expert"]) == {None} and math.isnan(mixed["grounding"][2])
    assert mixed["decision"].count("keep") == 4
