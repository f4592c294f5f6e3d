"""The page of `salience read` says what is known, draws what was kept, and leaves out what is not known."""

import re
from types import SimpleNamespace

import pytest
import torch

from salience.core import key_maps
from salience.report.reading import PARTS, build_reading, share_chart, time_bars


def record(layer, share=(0.1, 0.4), recall=(0.9, 0.7)):
    grid = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(layer))
    grid[:, torch.ones(12, 12).triu(1).bool()] = torch.nan
    return SimpleNamespace(
        layer=layer, share=torch.tensor(share), recall=torch.tensor(recall), map=grid.half()
    )


def arm(answer="47", seconds=2.0, records=()):
    layers = [
        {"layer": one.layer, "kernel": "gather", "share": one.share.tolist(), "recall": one.recall.tolist()}
        for one in records
    ]
    return {
        "answer": answer,
        "answer_tokens": 1,
        "first_token_seconds": seconds,
        "first_token_each": [seconds] * 3,
        "first_token_ratio": seconds / 2.0,
        "seconds": {"choosing": 0.25 * seconds, "attending": 0.25 * seconds, "rest": 0.5 * seconds},
        "kept_share": 0.25 if records else None,
        "recall": 0.8 if records else None,
        "kernel": "gather" if records else "",
        "layers": layers,
        "spent": {},
    }


def result(arms, **changes):
    return {
        "prompt": "what is <otter> =",
        "text": "note otter = 47.\n\nwhat is <otter> =\n",
        "right": "47",
        "file": {"name": "long.txt", "characters": 20000},
        "model": {
            "name": "tiny",
            "class": "LlamaForCausalLM",
            "parameters": 1234,
            "layers": 4,
            "dtype": "float32",
            "source": "tiny",
        },
        "prompt_tokens": 4096,
        "unknown_tokens": 0,
        "positions": 32768,
        "chat": False,
        "chunk": None,
        "arms": arms,
        "command": "salience read --out runs/read",
        "about": {"torch": "2.13", "device": "cpu"},
        **changes,
    }


@pytest.fixture
def records():
    return [record(0), record(1), record(3, share=(0.3, 0.3))]


@pytest.fixture
def page(tmp_path, records):
    def build(arms, kept=None, **changes):
        return build_reading(tmp_path, result(arms, **changes), kept or {}).read_text(encoding="utf-8")

    return build


def test_a_page_of_two_methods(page, records):
    arms = {"plain": arm(), "hip": arm("47", 1.0, records), "block-top-k": arm("38 47", 3.0, records[:1])}
    text = page(arms, {"hip": records, "block-top-k": records[:1]}, unknown_tokens=7, chunk=512)
    assert "what is &lt;otter&gt; =" in text and "<otter>" not in text
    assert "<mark>38 </mark>47" in text.replace("</mark> ", " </mark>") or "<mark>38" in text
    assert "the same answer" in text and "another answer" in text and "<b>47</b>" in text
    assert "25.0 % of the pairs, recall 0.800, first token 0.50×" in text.replace("\u00a0", " ")
    assert "Attention takes about 25 % of the plain reading" in text
    # times, shares, recall, and maps of both, each for a page and for a phone
    assert text.count("<svg") == 10
    shown = text.replace("\u00a0", " ")
    assert "10.0 to 40.0 %" in shown and "least 0.700" in shown
    assert "4,096 tokens of 32,768 positions, without a chat template" in shown
    assert "512 tokens at a time" in shown and "7 tokens are none of the tokenizer" in shown
    # ids of one picture must not clash with another's
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))


def test_on_a_gpu_the_page_says_that_layers_were_waited_for(page, records):
    arms = {"plain": arm(), "hip": arm("47", 1.0, records)}
    there = page(arms, {"hip": records}, about={"torch": "2.13", "device": "cuda:0"})
    here = page(arms, {"hip": records})
    assert "the GPU is waited for in each layer" in there and "GPU" not in here
    for text in (there, here):
        # times, shares, recall and maps, and where the time went, on every device
        assert text.count("<svg") == 8 and "Attention takes about 25 %" in text
        assert "250 ms" in text.replace("\u00a0", " ")


def test_a_method_that_was_never_asked(page):
    text = page({"plain": arm(), "hip": arm()})
    assert "hip chose nothing: every layer looks through a sliding window" in text
    assert "Which keys were seen" not in text and "Kept, layer by layer" not in text


def test_the_share_of_each_layer(records):
    arms = {"plain": arm(), "hip": arm(records=records)}
    (axes,) = share_chart(arms, 4).axes
    (line,) = axes.lines
    assert line.get_ydata()[[0, 1, 3]] == pytest.approx([25.0, 25.0, 30.0])
    assert line.get_ydata()[2] != line.get_ydata()[2]  # not asked: a gap
    assert 40.0 < axes.get_ylim()[1] < 45.0


def test_time_is_stacked(records):
    arms = {"plain": arm(), "hip": arm(seconds=1.0, records=records)}
    (axes,) = time_bars(arms).axes
    widths = [bar.get_width() for bar in axes.patches]
    assert widths == pytest.approx([0.5, 0.5, 1.0, 0.25, 0.25, 0.5])
    assert [text.get_text() for text in axes.texts] == ["plain", "2.00 s", "hip", "1.00 s"]
    assert "(s)" in axes.get_xlabel() and len(PARTS) == 3
    (axes,) = time_bars({"plain": arm(seconds=0.2)}).axes
    assert "(ms)" in axes.get_xlabel() and axes.patches[2].get_width() == pytest.approx(100.0)


def test_maps_are_a_few_layers_and_heads(records):
    def maps(records, **options):
        return len(key_maps.draw(records, points=False, **options).axes)

    assert maps(records) == 6
    assert maps([record(layer) for layer in range(12)], width=370) == 8
    assert maps(records[:1]) == 2
    assert len(key_maps.draw(records).axes) == 7
