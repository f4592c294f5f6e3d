"""Image tokens that leave a decoder: every family of models, every method on image tokens.

The oracle of `hosts/pruning.py` is the model itself in float64 with nothing removed: the same decisions are masked
out of the attention of the layers behind them, and positions are put in by hand.
"""

import contextlib
import importlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import llava_batch, tiny_llama, tiny_llava
from vision_families import FAMILIES

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError
from salience.core.registry import entries
from salience.hosts import pruning
from salience.hosts.attention import observe
from salience.hosts.vision import vision_language

sys.path.insert(0, str(Path(__file__).parent / "methods"))
NAMES = sorted(FAMILIES)
DROP = sal.PyramidDrop(ratios=(0.5, 0.2), layers=(2, 3))


def _contracts():
    for slug in sorted(entries()):
        case = importlib.import_module(f"test_{slug.replace('-', '_')}").CONTRACT
        if "keep_all" in case and entries()[slug].unit == "token":
            yield slug, case


VISUAL = dict(_contracts())


@contextlib.contextmanager
def masked_out(model, stages, valid, vision, renumber):
    """Nothing is removed: dropped tokens are hidden from every layer behind the decision."""
    found = vision_language(model)
    handles = []

    def before(layer, args, kwargs):
        index = next(i for i, one in enumerate(found.layers) if one.module is layer)
        kept = valid
        for stage in stages:
            if stage.layer <= index:
                kept = valid & (stage.kept | ~vision)
        size = valid.shape[1]
        allowed = torch.ones(size, size, dtype=torch.bool).tril() & kept[:, None, None, :]
        allowed = allowed | torch.eye(size, dtype=torch.bool)  # rows of padding attend to themselves
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = kwargs | {"attention_mask": allowed}
        if renumber and bool((kept != valid).any()):
            places = (kept.cumsum(-1) - 1).clamp_min(0)
            changed["position_embeddings"] = found.text.rotary_emb(hidden, position_ids=places)
        return args, changed

    for layer in found.layers:
        handles.append(layer.module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("positions", ["auto", "keep"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_removing_equals_masking_out(name, positions):
    family = FAMILIES[name]
    model, batch = family.make(), family.inputs()
    exact = "moe" not in name  # grouped matrix products of experts know no float64
    if exact:
        model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with sal.focus(model, sal.PyramidDrop(ratios=(0.5, 0.2), layers=(2, 3), positions=positions)) as handle:
        short = model(**batch).logits
        stages = handle.parts[0].stages
    valid = batch["attention_mask"].bool()
    vision = vision_language(model).image_tokens(batch["input_ids"])
    renumber = positions == "auto" and not vision_language(model).spatial_positions
    with masked_out(model, stages, valid, vision, renumber):
        full = model(**batch).logits
    survive = valid & (stages[-1].kept | ~vision)
    assert int(survive.sum()) < int(valid.sum())
    torch.testing.assert_close(short[survive], full[survive], rtol=0, atol=1e-5 if exact else 1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_generation_in_a_left_padded_batch_equals_each_prompt_alone(name, attention):
    family = FAMILIES[name]
    model = family.make()
    model.set_attn_implementation(attention)
    counts = (1, 2, 0)
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with sal.focus(model, DROP):
        together = model.generate(**family.inputs(counts), **settings)
        for row in range(len(counts)):
            alone = model.generate(**family.inputs(counts, only=row), **settings)
            for one, other in zip(together.logits, alone.logits, strict=True):
                torch.testing.assert_close(one[row], other[0], rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex attention is compiled by g++")
@torch.no_grad()
def test_flex_attention_reads_a_prompt_as_sdpa_does(monkeypatch):
    """Shapes are static: on a CPU torch 2.13 makes C++ that does not compile from dynamic ones, pruned or not."""
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "automatic_dynamic_shapes", False)
    monkeypatch.setattr(torch._dynamo.config, "assume_static_by_default", True)
    batch, read = llava_batch(), llava_batch()["attention_mask"].bool()
    logits = []
    for attention in ("sdpa", "flex_attention"):
        model = tiny_llava(layers=4)
        model.set_attn_implementation({"text_config": attention})
        with sal.focus(model, DROP) as handle:
            logits.append(model(**batch).logits[read])
            assert handle.spent["pyramiddrop"]["share of image token-layers"] < 1
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if FAMILIES[name].video])
@torch.no_grad()
def test_video_frames_are_dropped_too(name):
    family = FAMILIES[name]
    model = family.make()
    batch = family.inputs((1, 0), videos=(1, 1))
    with sal.focus(model, DROP) as handle:
        together = model.generate(**batch, max_new_tokens=3, do_sample=False)
        kept = handle.parts[0].stages[0].kept.sum(-1)
        alone = model.generate(
            **family.inputs((1, 0), videos=(1, 1), only=1), max_new_tokens=3, do_sample=False
        )
    counts = vision_language(model).image_tokens(batch["input_ids"]).sum(-1)
    assert kept.tolist() == (counts // 2).tolist()
    assert together[1, -3:].tolist() == alone[0, -3:].tolist()


@pytest.mark.parametrize("slug", VISUAL)
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_method_on_every_family(name, slug):
    """It runs or is refused with the reason; keeping everything is the model itself, bit for bit."""
    family, case = FAMILIES[name], VISUAL[slug]
    model, batch = family.make(), family.inputs((1, 2, 0))
    plain = model(**batch).logits
    try:
        handle = sal.focus(model, case["keep_all"])
    except ConflictError as refused:
        assert vision_language(model).first_free and "adds image features behind" in str(refused)
        return
    with handle:
        assert torch.equal(model(**batch).logits, plain)
    try:
        with sal.focus(model, case["method"]) as handle:
            answers = model.generate(**batch, max_new_tokens=3, do_sample=False)
            assert answers.shape == (3, batch["input_ids"].shape[1] + 3)
            spent = handle.spent[slug]
            assert (
                spent["share of image token-layers"] < 1
                and spent["KV bytes"] < spent["KV bytes without pruning"]
            )
            assert handle.parts[0].stages
    except ConflictError as refused:
        assert vision_language(model).first_free and "adds image features behind" in str(refused)
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("slug", VISUAL)
@torch.no_grad()
def test_every_method_gives_each_row_of_a_batch_what_it_gives_it_alone(slug):
    model = tiny_llava()
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with sal.focus(model, VISUAL[slug]["method"]):
        both = model.generate(**llava_batch((1, 1)), **settings)
    ids, mask = llava_batch((1, 1))["input_ids"], llava_batch((1, 1))["attention_mask"]
    pixels = llava_batch((1, 1))["pixel_values"]
    for row in range(2):
        places = mask[row].bool()
        one = {
            "input_ids": ids[row : row + 1, places],
            "attention_mask": mask[row : row + 1, places],
            "pixel_values": pixels[row : row + 1],
        }
        # attached anew: random choices start from their seed again
        with sal.focus(model, VISUAL[slug]["method"]):
            alone = model.generate(**one, **settings)
        for a, b in zip(both.logits, alone.logits, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("slug", VISUAL)
@torch.no_grad()
def test_decoding_with_a_cache_equals_reading_everything_again(slug, monkeypatch):
    """The decisions of the prompt are repeated on the longer text, so only the decoding differs."""
    model = tiny_llava()
    batch = llava_batch((1, 2, 0))
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with sal.focus(model, VISUAL[slug]["method"]) as handle:
        first = model(**batch, use_cache=True)
        token = first.logits[:, -1].argmax(-1, keepdim=True)
        grown = torch.cat((batch["attention_mask"], torch.ones_like(token)), 1)
        places = (grown.cumsum(-1) - 1).clamp_min(0)
        second = model(
            input_ids=token,
            attention_mask=grown,
            position_ids=places[:, -1:],
            cache=first.cache,
            use_cache=True,
        )
        keys = [layer.keys.shape[2] for layer in first.cache.layers]
        part = handle.parts[0]
        stages = {stage.layer: stage for stage in part.stages}
    # everything again in one pass: the kept sets are given, so only the new token's own path is compared
    whole = {**batch, "input_ids": torch.cat((batch["input_ids"], token), 1), "attention_mask": grown}
    whole["position_ids"] = places
    monkeypatch.setattr(
        pruning, "observe", lambda module, record, see: observe(module, record, lambda call: see(_cut(call)))
    )
    with sal.focus(model, VISUAL[slug]["method"]) as handle:
        part = handle.parts[0]
        for layer, decide in list(part._decide.items()):
            part._decide[layer] = _without_the_last(decide)
        again = model(**whole)
    assert min(keys) < batch["input_ids"].shape[1] + 1 and stages
    torch.testing.assert_close(second.logits[:, -1], again.logits[:, -1], rtol=0, atol=1e-4)


def _without_the_last(decide):
    """The decision as it was when the newest token was not there yet."""

    def wrapped(view):
        cut = replace(
            view,
            hidden=view.hidden[:, :-1],
            vision=view.vision[:, :-1],
            valid=view.valid[:, :-1],
            source=view.source[:, :-1],
            call=lambda: _cut(view.call()),
        )
        choice = decide(cut)

        def padded(values, filler):
            return None if values is None else torch.cat((values, filler(values)), 1)

        return replace(
            choice,
            keep=padded(choice.keep, lambda v: torch.zeros_like(v[:, :1])),
            scores=padded(choice.scores, lambda v: torch.zeros_like(v[:, :1])),
            merged=padded(choice.merged, lambda v: torch.zeros_like(v[:, :1])),
            hidden=padded(choice.hidden, lambda v: view.hidden[:, -1:]),
            order=padded(choice.order, lambda v: v.amax(1, keepdim=True) + 1),
        )

    return wrapped


def _cut(call):
    """The queries and keys as they were then."""
    return replace(call, query=call.query[:, :, :-1], key=call.key[:, :, :-1], value=call.value[:, :, :-1])


@torch.no_grad()
def test_beams_right_padding_and_no_cache():
    model, batch = tiny_llava(), llava_batch((1, 2, 0))
    plain = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with sal.focus(model, sal.PyramidDrop(ratios=(0.5,), layers=(2,), positions="keep")):
        beams = model.generate(**batch, num_beams=3, **plain)
        for row in range(3):
            places = batch["attention_mask"][row].bool()
            one = {k: v[row : row + 1, places] for k, v in batch.items() if k != "pixel_values"}
            images = {0: batch["pixel_values"][:1], 1: batch["pixel_values"][1:]}
            if row in images:
                one["pixel_values"] = images[row]
            alone = model.generate(**one, num_beams=3, **plain)
            assert beams[row, -4:].tolist() == alone[0, -4:].tolist()
        left = model(**batch).logits
        right_batch = llava_batch((1, 2, 0), side="right")
        right = model(**right_batch).logits
        a, b = batch["attention_mask"].bool(), right_batch["attention_mask"].bool()
        torch.testing.assert_close(left[a], right[b], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_conversation_goes_on_in_the_same_cache():
    """Several new tokens at a time, without images, behind a pruned prompt."""
    model, batch = tiny_llava(), llava_batch((1, 1))
    more = torch.tensor([[7, 8, 9], [10, 11, 12]])
    grown = torch.cat((batch["attention_mask"], torch.ones_like(more)), 1)
    places = grown.cumsum(-1) - 1
    with sal.focus(model, DROP):
        cache = model(**batch, use_cache=True).cache
        at_once = model(
            input_ids=more, attention_mask=grown, position_ids=places[:, -3:], cache=cache, use_cache=True
        ).logits
        cache = model(**batch, use_cache=True).cache
        for step in range(3):
            end = grown.shape[1] - 2 + step
            last = model(
                input_ids=more[:, step : step + 1],
                attention_mask=grown[:, :end],
                position_ids=places[:, end - 1 : end],
                cache=cache,
                use_cache=True,
            ).logits
            torch.testing.assert_close(at_once[:, step], last[:, 0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_bad_input_is_one_clear_error():
    from transformers import StaticCache

    model, batch = tiny_llava(), llava_batch((1, 1))
    with pytest.raises(
        StructureError, match=r"model must be a vision-language model .*, got LlamaForCausalLM"
    ):
        sal.focus(tiny_llama(), DROP)
    with pytest.raises(ParameterError, match=r"layers must be in \[0, 5\] for 6 layers of Llava\w+, got 9"):
        sal.focus(model, sal.PyramidDrop(ratios=(0.5,), layers=(9,)))
    with sal.focus(model, DROP), pytest.raises(ConflictError, match="by one method at a time"):
        sal.focus(model, sal.PyramidDrop(ratios=(0.5,), layers=(1,)))
    qwen = FAMILIES["qwen2_vl"].make()
    with pytest.raises(ConflictError, match="positions must be 'keep' or 'auto' for Qwen2VL"):
        sal.focus(qwen, sal.PyramidDrop(positions="renumber"))
    deep = FAMILIES["qwen3_vl"].make()
    with pytest.raises(ConflictError, match="layers must be >= 1 for Qwen3VL"):
        sal.focus(deep, sal.PyramidDrop(ratios=(0.5,), layers=(1,))) if vision_language(
            deep
        ).first_free > 1 else sal.focus(deep, _at_zero())
    with sal.focus(model, DROP):
        with pytest.raises(StructureError, match=r"prompt must hold an image token \(id 63\)"):
            model(input_ids=torch.tensor([[1, 5, 6]]), pixel_values=batch["pixel_values"])
        with pytest.raises(StructureError, match="input_ids must be given"):
            model(inputs_embeds=torch.zeros(1, 4, 32))
        with pytest.raises(ParameterError, match="attention_mask must be 1 somewhere in each row"):
            model(**{**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])})
        cache = model(**batch, use_cache=True).cache
        with pytest.raises(ConflictError, match="images must come with the first tokens of a cache"):
            model(**batch, cache=cache)
        with pytest.raises(ConflictError, match="cache must be a DynamicCache"):
            model(**batch, cache=StaticCache(config=model.config.text_config, max_cache_len=99))
        text = model(input_ids=torch.tensor([[1, 5, 6]])).logits
    assert torch.equal(model(input_ids=torch.tensor([[1, 5, 6]])).logits, text)


def _at_zero():
    return VISUAL["visiondrop"]["method"]
