"""FastV: its scores against the eager attention of the layer before, counts, and what is not projected twice."""

import pytest
import torch
from conftest import llava_batch, tiny_llava
from vision_families import FAMILIES

import salience as sal
from salience.core.errors import ParameterError
from salience.core.spec import parse_method
from salience.methods.tokens.fastv import spend

CONTRACT = {
    "method": sal.FastV(keep=0.4, layer=2),
    "keep_all": sal.FastV(keep=1.0, layer=1),
    "model": tiny_llava,
    "inputs": llava_batch,
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0.0"),
        "keep:2": (1.5, r"keep must be a share in \(0, 1\] or a count >= 1, got 1.5"),
        "keep:3": (0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0"),
        "layer": (0, "layer must be an integer >= 1, got 0"),
        "layer:2": (1.5, "layer must be an integer >= 1, got 1.5"),
        "query": ("first", "query must be one of last, all, got 'first'"),
        "positions": ("shift", "positions must be one of auto, renumber, keep, got 'shift'"),
    },
}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("query", ["last", "all"])
@torch.no_grad()
def test_scores_are_the_eager_attention_of_the_layer_before(name, query):
    """Each row alone without padding: eager attention gives the maps, float64 loops the mean."""
    family = FAMILIES[name]
    model = family.make().double()
    for row in (0, 1):
        batch = family.inputs((1, 2), only=row)
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        model.set_attn_implementation("eager")
        maps = model(**batch, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
        for layer in (1, 3):
            with sal.focus(model, sal.FastV(keep=0.5, layer=layer, query=query)) as handle:
                model(**batch)
                stage = handle.parts[0].stages[0]
            weights = maps[layer - 1][0]
            heads, length = weights.shape[:2]
            asked = [length - 1] if query == "last" else range(length)
            vision = family.placeholders(batch)[0]
            expected = sum(weights[h, t] for h in range(heads) for t in asked) / heads / len(asked)
            torch.testing.assert_close(stage.scores[0][vision].double(), expected[vision], rtol=0, atol=1e-6)
            assert bool(stage.scores[0][~vision].isnan().all()) and stage.layer == layer
            best = expected[vision].argsort(descending=True)[: int(vision.sum()) // 2].sort().values
            places = vision.nonzero().flatten()[best]
            assert stage.kept[0].nonzero().flatten().tolist() == places.tolist()


@torch.no_grad()
def test_nothing_is_projected_a_second_time():
    model, batch = tiny_llava(), llava_batch()
    runs = []
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, o: runs.append(o.shape[1]))
    model(**batch)
    plain, runs[:] = list(runs), []
    with sal.focus(model, sal.FastV(keep=0.25, layer=2)):
        model(**batch)
    assert len(runs) == len(plain) == 6
    longest = batch["input_ids"].shape[1]
    # the second row loses 24 of 32 image tokens and is the longest of the batch
    assert runs == [longest] * 2 + [longest - 24] * 4


@torch.no_grad()
def test_answers_do_not_ask():
    """With labels the token in front of the answer asks, so the kept set is that of the prompt alone."""
    model = tiny_llava()
    batch = llava_batch((1,), labels=True)
    prompt = {k: v[:, :-2] for k, v in batch.items() if k not in ("pixel_values", "labels")}
    kept = []
    with sal.focus(model, sal.FastV(keep=5)) as handle:
        for inputs in (batch, prompt | {"pixel_values": batch["pixel_values"]}):
            model(**inputs)
            kept.append(handle.parts[0].stages[0].kept.nonzero().tolist())
    assert kept[0] == kept[1] and len(kept[0]) == 5


def test_counts_are_cut():
    assert spend(torch.tensor([576, 10, 0]), 0.3).tolist() == [172, 3, 0]
    assert spend(torch.tensor([576, 10, 0]), 12).tolist() == [12, 10, 0]
    assert parse_method("fastv:keep=64,layer=3") == sal.FastV(keep=64, layer=3)


@torch.no_grad()
def test_survivors_keep_their_positions_unless_told():
    """With one token left of sixteen, numbering anew changes what rotary embeddings say."""
    model, batch = tiny_llava(), llava_batch((1,))
    logits = {}
    for positions in ("keep", "renumber", "auto"):
        with sal.focus(model, sal.FastV(keep=1, layer=1, positions=positions)):
            logits[positions] = model(**batch).logits[0, -1]
    assert torch.equal(logits["auto"], logits["renumber"])
    assert not torch.allclose(logits["keep"], logits["renumber"], atol=1e-6)
    with pytest.raises(ParameterError, match=r"layer must be in \[1, 5\] for 6 layers of Llava\w+, got 6"):
        sal.focus(model, sal.FastV(layer=6))
