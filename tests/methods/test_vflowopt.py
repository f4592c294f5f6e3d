"""VFlowOpt: the worked example, the map against the tower's own attention, recycling, and what is kept."""

import itertools
import math

import pytest
import torch
from conftest import llava_batch, tiny_llava
from vision_families import FAMILIES

import salience as sal
from salience.core.errors import ConflictError, ParameterError
from salience.hosts.attention import AttentionCall
from salience.methods.tokens._vflowopt_map import entropy, grid_cells, importance, measure
from salience.methods.tokens.vflowopt import recycle, spend, taken

CONTRACT = {
    "method": sal.VFlowOpt(ratios=(0.5, 0.7, 0.6), t=1.0, alpha=0.2, cell=2.0),
    "keep_all": sal.VFlowOpt(ratios=(1.0, 1.0, 1.0), cell=1.0),
    "model": tiny_llava,
    "inputs": llava_batch,
    "bad": {
        "ratios": ((0.5, 0.0, 1.0), r"ratios must be in \(0, 1\], got \(0.5, 0.0, 1.0\)"),
        "ratios:2": ((1.5, 1.0, 1.0), r"ratios must be in \(0, 1\], got"),
        "ratios:3": ((), r"ratios must be in \(0, 1\], got \(\)"),
        "layers": ((4, 2), r"layers must be rising and >= 1, got \(4, 2\)"),
        "layers:2": ((0, 2), r"layers must be rising and >= 1, got \(0, 2\)"),
        "layers:3": ((3,), r"layers must be one for each of 2 later ratios, got \(3,\)"),
        "t": (-1.0, "t must be finite and >= 0, got -1.0"),
        "t:2": (math.nan, "t must be finite and >= 0, got nan"),
        "alpha": (math.inf, "alpha must be finite, got inf"),
        "cell": (0.0, "cell must be finite and > 0, got 0.0"),
        "over": ("max", "over must be one of mean, sum, got 'max'"),
        "slot_score": ("low", "slot_score must be one of own, sum, got 'low'"),
        "pixel_mean": ((0.5, 0.5, 0.5), "pixel_mean and pixel_std must be given together"),
        "search": (-1, "search must be >= 0 evaluations, got -1"),
        "budget": (0.0, r"budget must be in \(0, 1\], got 0.0"),
        "seed": (-1, "seed must be >= 0, got -1"),
    },
}


def grid_of(rows, columns):
    """[rows * columns, 3] places of the tokens of one picture."""
    lines = torch.arange(rows), torch.arange(columns)
    return torch.cartesian_prod(torch.zeros(1, dtype=torch.int64), *lines).double()


def call_of(attention, **options):
    """A call whose probabilities are this attention [V, H, N, N]."""
    keys = torch.eye(attention.shape[-1], dtype=attention.dtype).expand_as(attention)
    return AttentionCall(None, attention.log(), keys, None, None, 1.0, {"is_causal": False, **options})


# --- the map --------------------------------------------------------------------------------------------------------


def test_worked_example():
    attention = torch.tensor(
        [[0.1, 0.6, 0.2, 0.1], [0.1, 0.7, 0.1, 0.1], [0.2, 0.5, 0.2, 0.1], [0.25] * 4], dtype=torch.float64
    )[None, None]
    parts = {t: measure(call_of(attention), t, classed=False)[0] for t in (1.0, 0.7, 9.0)}
    torch.testing.assert_close(parts[1.0][:, 0] / 4, torch.tensor([0.1625, 0.5125, 0.1875, 0.1375]).double())
    assert parts[1.0][:, 1].tolist() == [0, 1, 0, 0] and parts[0.7][:, 1].tolist() == [0, 1, 1, 0]

    def close(values, expected):
        torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))

    close(importance(parts[1.0], None), [0.1, 0.7, 0.1, 0.1])
    close(importance(parts[0.7], None), [0.15, 0.6, 0.15, 0.1])
    close(importance(parts[0.7], None, over="sum"), [0.3, 1.2, 0.3, 0.2])
    # nobody asks: all do
    close(importance(parts[9.0], None), [0.1625, 0.5125, 0.1875, 0.1375])
    flat = torch.zeros(4, dtype=torch.float64)
    close(importance(parts[1.0], flat, 0.4), [0.2, 0.8, 0.2, 0.2])


@pytest.mark.parametrize("classed", [False, True])
def test_measuring_in_chunks_equals_the_formula(classed):
    draw = torch.Generator().manual_seed(0)
    attention = torch.randn(2, 3, 300, 300, generator=draw).double().mul(2).softmax(-1)
    parts = measure(call_of(attention), 1.1, classed=classed)
    first = int(classed)
    for view, own in zip(attention.mean(1)[:, first:, first:], parts[:, first:], strict=True):
        received = view.mean(0)
        asks = received > 1.1 * received.mean()
        assert 0 < int(asks.sum()) < len(asks)
        torch.testing.assert_close(importance(own, None), view[asks].mean(0))
    assert not classed or not bool(parts[:, 0].any())


def test_pictures_in_one_packed_row_are_measured_as_if_alone():
    draw = torch.Generator().manual_seed(1)
    query, key = (torch.randn(1, 2, 9, 4, generator=draw).double() for _ in range(2))
    block = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).bool()[None, None]
    packed = measure(AttentionCall(None, query, key, None, block, 1.5, {}), 1.05, classed=False)[0]
    for part in (slice(0, 4), slice(4, 9)):
        call = AttentionCall(None, query[:, :, part], key[:, :, part], None, None, 1.5, {"is_causal": False})
        torch.testing.assert_close(packed[part], measure(call, 1.05, classed=False)[0])


def test_entropy_in_bits():
    picture = torch.zeros(3, 14, 42)
    picture[:, :7, 14:28] = 1.0
    picture[:, :, 28:] = (torch.arange(196.0) / 255).view(14, 14)
    expected = torch.tensor([0.0, 1.0, math.log2(196)], dtype=torch.float64)
    torch.testing.assert_close(entropy(picture, 1, 3), expected)
    # normalising and back leaves whole grey values a hair off: cutting them would move many of them
    mean, std = (
        torch.tensor([0.48145466, 0.4578275, 0.40821073]),
        torch.tensor([0.26862954, 0.26130258, 0.2757771]),
    )
    draw = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (3, 28, 28), generator=draw)
    there = (bytes_ / 255 - mean[:, None, None]) / std[:, None, None]
    back = there * std[:, None, None] + mean[:, None, None]
    torch.testing.assert_close(entropy(back, 2, 2), entropy(bytes_ / 255, 2, 2), rtol=0, atol=0)
    assert not torch.equal(entropy(back, 2, 2, cast=True), entropy(back, 2, 2))


@pytest.mark.parametrize("encoder_layer", [None, 0, -1])
@torch.no_grad()
def test_the_map_is_that_of_the_towers_own_attention(encoder_layer):
    """LLaVA: features come from the second last of three layers; rows and columns of the class token are left out."""
    model, batch = tiny_llava(), llava_batch((1, 2, 0))
    method = sal.VFlowOpt(ratios=(0.5, 0.5), t=1.02, encoder_layer=encoder_layer)
    with sal.focus(model, method) as handle:
        model(**batch)
        stage = handle.parts[0].stages[0]
    model.set_attn_implementation("eager")
    tower = model.model.vision_tower(batch["pixel_values"], output_attentions=True)
    layer = 1 if encoder_layer is None else encoder_layer
    maps = tower.attentions[layer].double().mean(1)[:, 1:, 1:]
    received = maps.mean(1)
    rows = [own[who > 1.02 * who.mean()].mean(0) for own, who in zip(maps, received, strict=True)]
    vision = batch["input_ids"] == 63
    torch.testing.assert_close(stage.scores[vision], torch.cat(rows).float(), rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_entropy_counts_only_with_alpha():
    model, batch = tiny_llava(), llava_batch((1,))
    scores = {}
    for name, settings in {
        "off": {},
        "off, other pixels": {"pixel_mean": (0.1, 0.2, 0.3), "pixel_std": (2.0, 2.0, 2.0)},
        "on": {"alpha": 0.5},
        "on, other pixels": {"alpha": 0.5, "pixel_mean": (0.1, 0.2, 0.3), "pixel_std": (2.0, 2.0, 2.0)},
    }.items():
        with sal.focus(model, sal.VFlowOpt(ratios=(0.5,), t=1.0, **settings)) as handle:
            model(**batch)
            scores[name] = handle.parts[0].stages[0].scores.nan_to_num()
    assert torch.equal(scores["off"], scores["off, other pixels"])
    assert not torch.equal(scores["on"], scores["on, other pixels"])
    gained = (scores["on"] - scores["off"]).sum()
    assert float(gained) == pytest.approx(0.5, abs=1e-5)


# --- recycling ------------------------------------------------------------------------------------------------------


def test_recycling_equals_a_loop_over_the_cells():
    draw = torch.Generator().manual_seed(0)
    features, scores = torch.randn(63, 5, generator=draw).double(), torch.rand(63, generator=draw).double()
    cells = grid_cells(grid_of(7, 9), 2.4)
    low = taken(scores, 0.4, 2.4)
    assert int(low.sum()) == round(63 * 0.6) + int(63 / 2.4**2)
    out, slots, sums = recycle(features, scores, low, cells)
    by_cell = {}
    for token in low.nonzero().flatten().tolist():
        row, column = divmod(token, 9)
        by_cell.setdefault((int(row / 2.4), int(column / 2.4)), []).append(token)
    assert int(slots.sum()) == len(by_cell) <= math.ceil(7 / 2.4) * math.ceil(9 / 2.4)
    for members in by_cell.values():
        weight = scores[members]
        slot = members[int(weight.argmax())]
        assert slots[slot] and float(sums[slot]) == pytest.approx(float(weight.sum()))
        expected = (weight[:, None] * features[members]).sum(0) / weight.sum()
        torch.testing.assert_close(out[slot], expected)
        inside = (out[slot] >= features[members].amin(0) - 1e-12) & (
            out[slot] <= features[members].amax(0) + 1e-12
        )
        assert bool(inside.all())
    assert torch.equal(out[~slots], features[~slots])


def test_scores_that_weigh_nothing_still_merge():
    features = torch.tensor([[1.0], [3.0], [5.0], [9.0]])
    low, cells = torch.tensor([True, True, True, True]), torch.tensor([0, 0, 1, 1])
    out, slots, _ = recycle(features, torch.tensor([-1.0, -2.0, -1.0, 0.5]), low, cells)
    assert slots.tolist() == [True, False, False, True] and out.flatten().tolist() == [2.0, 3.0, 5.0, 9.0]
    out, slots, _ = recycle(features.bfloat16(), torch.zeros(4), low, cells)
    assert slots.tolist() == [True, False, True, False] and out.dtype == torch.float32
    nothing, slots, _ = recycle(features, torch.zeros(4), ~low, cells)
    assert torch.equal(nothing, features) and not bool(slots.any())


def test_cells_are_those_of_each_canvas_and_tokens_without_a_place_have_none():
    nan = math.nan
    canvas = torch.tensor([0.0, 0, 0, 0, nan, 1, 1, 1])
    down = torch.tensor([7.0, 7, 21, 21, nan, 5, 5.001, 5])
    across = torch.tensor([7.0, 21, 7, 21, nan, 4, 12, 20])
    places = torch.stack((canvas, down, across), -1)
    cells = grid_cells(places, 2.0).tolist()
    assert cells[4] == -1 and len(set(cells[:4])) == 1
    assert cells[5] == cells[6] != cells[7] and cells[0] not in cells[4:]
    assert len(set(grid_cells(places, 1.0).tolist())) == 8


def test_counts():
    assert [spend(n, 0.25) for n in (801, 4, 2, 1)] == [200, 1, 0, 0] and spend(10, 1.0) == 10
    scores = torch.tensor([3.0, 1, 1, 2])
    assert taken(scores, 0.75, 9.0).tolist() == [False, False, True, False]
    assert taken(scores, 0.75, 2.0).tolist() == [False, True, True, False]
    assert not bool(taken(scores, 1.0, 1.0).any()) and bool(taken(scores, 0.1, 1.0).all())


@torch.no_grad()
def test_stages_keep_what_the_map_says_and_feed_merged_rows_to_the_decoder():
    model, batch = tiny_llava(), llava_batch((1, 2, 0))
    method = sal.VFlowOpt(ratios=(0.4, 0.5, 0.75), t=1.0, cell=2.0, layers=(2, 4))
    norm = model.model.language_model.layers[0].input_layernorm  # sees what the layer works on
    seen = []
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    with sal.focus(model, method) as handle:
        model(**batch)
        stages = handle.parts[0].stages
    assert [stage.layer for stage in stages] == [0, 2, 4]
    vision = batch["input_ids"] == 63
    for row, count in enumerate((16, 32, 0)):
        own, first = vision[row], stages[0]
        scores = first.scores[row][own]
        assert count == 0 or int(first.kept[row].sum()) >= spend(count, 0.4)
        left = int(first.kept[row].sum())
        for stage, ratio in zip(stages[1:], (0.5, 0.75), strict=True):
            left = spend(left, ratio)
            assert int(stage.kept[row].sum()) == left
            # those with the best scores of the first stage
            best = (
                first.scores[row]
                .masked_fill(~first.kept[row], -1.0)
                .argsort(descending=True, stable=True)[:left]
            )
            assert set(best.tolist()) == set(stage.kept[row].nonzero().flatten().tolist())
        if not count:
            continue
        grid = torch.cat([grid_of(4, 4) + torch.tensor([number, 0, 0]) for number in range(count // 16)])
        low = taken(scores, 0.4, 2.0)
        plain, short = seen
        features, slots, _ = recycle(plain[row][own], scores, low, grid_cells(grid, 2.0))
        assert torch.equal(first.kept[row][own], ~low | slots) and torch.equal(first.merged[row][own], slots)
        survives = first.kept[row] | (~own & batch["attention_mask"][row].bool())
        expected = plain[row].clone()
        expected[own] = features
        torch.testing.assert_close(short[row, -int(survives.sum()) :], expected[survives])
    for outer, inner in itertools.pairwise(stages):
        assert not bool((inner.kept & ~outer.kept).any())


@torch.no_grad()
def test_survivors_keep_their_positions():
    model, batch = tiny_llava(), llava_batch((1,))
    batch["position_ids"] = batch["attention_mask"].cumsum(-1) - 1
    rotary = {}

    def note(name):
        def hook(module, args, kwargs):
            rotary[name] = kwargs["position_embeddings"][0]

        return hook

    layers = model.model.language_model.layers
    with sal.focus(model, sal.VFlowOpt(ratios=(0.5, 0.5), t=1.0, layers=(3,))) as handle:
        for index in (0, 3):
            # behind the pruning's hook
            layers[index].self_attn.register_forward_pre_hook(note(index), with_kwargs=True)
        model(**batch)
        stages = handle.parts[0].stages
    text = batch["input_ids"] != 63
    cosines, _ = model.model.language_model.rotary_emb(torch.zeros(1), position_ids=batch["position_ids"])
    for stage in stages:
        torch.testing.assert_close(rotary[stage.layer], cosines[:, (stage.kept | text)[0]])


@torch.no_grad()
def test_recycling_may_be_left_out_and_merged_tokens_may_keep_their_weight():
    model, batch = tiny_llava(), llava_batch((1,))
    kept = {}
    for name, settings in {
        "plain": {},
        "without": {"recycle": False},
        "summed": {"slot_score": "sum"},
    }.items():
        method = sal.VFlowOpt(ratios=(0.5, 0.5), t=1.0, cell=4.0, layers=(2,), **settings)
        with sal.focus(model, method) as handle:
            model(**batch)
            kept[name] = handle.parts[0].stages
    assert int(kept["without"][0].kept.sum()) == 8 and not bool(kept["without"][0].merged.any())
    merged = kept["plain"][0].merged
    assert int(merged.sum()) == 1
    assert not bool((kept["plain"][1].kept & merged).any()) and bool((kept["summed"][1].kept & merged).any())


@torch.no_grad()
def test_newlines_are_never_dropped():
    family = FAMILIES["llava_next"]
    model, batch = family.make(), family.inputs((1,))
    newline = 0.25
    model.model.image_newline.fill_(newline)
    seen = []
    norm = model.model.language_model.layers[0].input_layernorm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batch)
    with sal.focus(model, sal.VFlowOpt(ratios=(0.1,), t=1.0, cell=1.0)) as handle:
        model(**batch)
        stage = handle.parts[0].stages[0]
    lines = (seen[0] == newline).all(-1)
    assert (
        int(lines.sum()) >= 2
        and not bool((lines & ~stage.kept).any())
        and not bool((lines & stage.merged).any())
    )


@torch.no_grad()
def test_each_picture_and_frame_has_a_grid_of_its_own():
    family = FAMILIES["qwen2_vl"]
    model, batch = family.make(), family.inputs((1, 2), videos=(1, 0))
    with sal.focus(model, sal.VFlowOpt(ratios=(0.1,), t=1.0, cell=100.0)) as handle:
        model(**batch)
        stage = handle.parts[0].stages[0]
    # an image and two frames, two images: a single cell each
    assert stage.merged.sum(-1).tolist() == [3, 2]


@torch.no_grad()
def test_without_a_first_drop_it_starts_later():
    """Models that add image features behind their first layers allow nothing in front of them."""
    family = FAMILIES["qwen3_vl"]
    model, batch = family.make(), family.inputs((1, 2, 0))
    with pytest.raises(ConflictError, match="layers must be >= 1 for Qwen3VL"):
        sal.focus(model, sal.VFlowOpt(ratios=(0.9, 0.5)))
    with sal.focus(model, sal.VFlowOpt(ratios=(1.0, 0.5), layers=(2,), t=1.0)) as handle:
        model(**batch)
        (stage,) = handle.parts[0].stages
    assert stage.layer == 2 and int(stage.kept.sum()) < handle.spent["vflowopt"]["image tokens"]
    with pytest.raises(ParameterError, match=r"encoder_layer must be in \[-3, 2\]"):
        sal.focus(tiny_llava(), sal.VFlowOpt(encoder_layer=3))
    with pytest.raises(ParameterError, match="ratios must be at most as many as the decoder's 2 layers"):
        sal.focus(tiny_llava(layers=2), sal.VFlowOpt())
