"""The page of `salience shrink`, from results that were never measured."""

import copy
import json

import pytest

from salience.core.errors import ParameterError
from salience.report.shrink import build_shrink, headline, rows, share_bars, themed


def arm(label, share=1.0, loss=2.0, **more):
    return {
        "label": label, "methods": [], "slugs": [], "class": "LlamaForCausalLM", "trained": False, "lora": False,
        "quality": {"overall": loss, "loss": loss, "perplexity": 7.0}, "spent": {},
        "parameters": round(1e6 * share), "bytes_on_disk": round(4e6 * share), "peak_bytes": round(5e6 * share),
        "prefill_tokens_per_second": 1000.0 / share, "decode_tokens_per_second": 50.0, "dtype": "float32",
        "prefill_seconds": [1.0, 1.01, 0.99], "decode_seconds": [1.0, 1.0, 1.0], "logits_difference": 2e-7, **more,
    }  # fmt: skip


@pytest.fixture
def result():
    half = arm("Half <b>", 0.5, 2.5, methods=["half:keep=0.5"], slugs=["half"], spent={"half": {"bytes": 2048}},
               trained=True, lora=True)  # fmt: skip
    return {
        "title": "Shrinking it", "untouched": "untouched", "arms": {"untouched": arm("untouched"), "half": half},
        "model": {"name": "it", "parameters": 10**6, "layers": 2, "source": ""},
        "data": {"name": "texts", "train": 90, "test": 10, "description": "of people"},
        "quality": {"name": "held-out loss", "higher_is_better": False, "unit": "nats/token"},
        "tuned": {"lora-alone": {"label": "LoRA, nothing removed", "lora": True, "quality": {"overall": 1.5},
                                 "steps": 100, "seconds": 9.0}},
        "prompt_tokens": 480, "new_tokens": 32, "repeats": 3, "tolerance": 1e-5,
        "about": {"torch": "2", "device": "cpu"},
    }  # fmt: skip


@pytest.fixture
def built(tmp_path):
    def build(result):
        (tmp_path / "result.json").write_text(json.dumps(result))
        (tmp_path / "recipe.json").write_text(json.dumps({"seed": 0}))
        return build_shrink(tmp_path).read_text(encoding="utf-8")

    return build


def test_a_trained_arm_is_compared_with_as_much_training(result, built):
    said = headline(result, "half")
    assert said == (
        "Half <b>: 50 % fewer parameters, 50 % less memory, held-out loss 2.5 against 1.5 nats/token with as much "
        "training and nothing removed."
    ).replace("2.5 against 1.5", "2.500 against 1.500")
    page = built(result)
    assert "Half &lt;b&gt;" in page and "Half <b>" not in page
    assert "+1.00" in page and "2.00 KiB" in page
    untouched = copy.deepcopy(result)
    untouched["tuned"] = {}
    assert "2.500 against 2.000 nats/token." in headline(untouched, "half")
    assert "with nothing removed" not in built(untouched)


def test_what_is_saved_is_green_and_what_is_lost_is_not(result):
    table = {row["name"]: row["cells"] for row in rows(result)}
    assert table["parameters"][1] == {"text": "500,000", "small": "0.50×", "tone": "less"}
    assert table["reading"][1]["small"] == "2.00×" and table["reading"][1]["tone"] == "less"
    assert table["writing"][1]["small"] == "1.00×" and table["writing"][1]["tone"] == ""
    assert table["parameters"][0]["small"] == ""
    assert (
        table["held-out loss"][0]["text"] == "2.000"
        and rows(result)[0]["note"] == "nats/token, lower is better"
    )
    result["arms"]["half"]["prefill_tokens_per_second"] = 500.0
    assert {row["name"]: row["cells"] for row in rows(result)}["reading"][1]["tone"] == "more"
    # slower, but by less than what the rounds lie apart
    result["arms"]["half"]["prefill_seconds"] = [1.0, 2.0, 3.0]
    assert {row["name"]: row["cells"] for row in rows(result)}["reading"][1]["tone"] == ""


def test_rounds_that_lie_apart_are_told(result, built):
    assert "lie up to" not in built(result)
    result["arms"]["half"]["decode_seconds"] = [1.0, 1.5, 2.0]
    assert "The rounds lie up to" in built(result)


def test_a_model_that_writes_nothing_and_data_that_were_not_given(result, built):
    for one in result["arms"].values():
        one |= {"decode_tokens_per_second": None, "decode_seconds": [], "quality": {}}
    result |= {"quality": None, "data": {}, "tuned": {}}
    page = built(result).replace("\u00a0", " ")
    assert "new tokens a second" not in page and "held-out" not in page
    assert "50 % fewer parameters" in page
    assert len(share_bars(result).axes[0].get_yticks()) == 4


def test_pictures_of_methods_take_the_theme_of_the_page(result, built, tmp_path):
    home = tmp_path / "arms" / "half"
    home.mkdir(parents=True)
    svg = '<svg viewBox="0 0 1 1"><path style="stroke: #000000"/><text>heads</text></svg>'
    (home / "pictures.json").write_text(json.dumps([{"slug": "half", "wide": svg, "narrow": ""}]))
    page = built(result)
    assert 'class="only"' in page and "stroke: var(--ink)" in page
    assert themed(svg).startswith('<svg fill="var(--ink)" ')


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ParameterError, match=r"folder must be a run of salience shrink, got .*result\.json"):
        build_shrink(tmp_path)
