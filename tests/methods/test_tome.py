"""ToMe in a decoder: a float64 transcription with loops, what merging preserves, pictures, and batches."""

import pytest
import torch
from conftest import llava_batch, tiny_llava
from vision_families import FAMILIES

import salience as sal
from salience.core.errors import ParameterError
from salience.methods.tokens.tome import merge, spend

CONTRACT = {
    "method": sal.ToMe(keep=0.3),
    "keep_all": sal.ToMe(keep=1.0),
    "model": tiny_llava,
    "inputs": llava_batch,
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0.0"),
        "keep:2": (1.5, r"keep must be a share in \(0, 1\] or a count >= 1, got 1.5"),
        "layer": (-1, "layer must be an integer >= 0, got -1"),
        "positions": ("shift", "positions must be one of auto, renumber, keep, got 'shift'"),
    },
}


def written_out(x, key, count):
    """Groups of original tokens, one pair after another: place of each -> its members."""
    groups = {j: [j] for j in range(len(x))}
    while len(groups) > count:
        places = sorted(groups)
        key_of = {j: sum(key[i] for i in groups[j]) / len(groups[j]) for j in places}
        first, second = places[::2], places[1::2]
        pairs = []
        for a in first:
            cosines = [float(key_of[a] @ key_of[b] / key_of[a].norm() / key_of[b].norm()) for b in second]
            pairs.append((-max(cosines), a, second[cosines.index(max(cosines))]))
        most = min(len(groups) - count, len(groups) // 2)
        for _, a, b in sorted(pairs)[:most]:
            groups[b] = groups[b] + groups.pop(a)
    return groups


@pytest.mark.parametrize(("n", "count"), [(16, 9), (17, 3), (12, 1), (9, 4), (2, 1), (5, 5)])
def test_merging_equals_the_rule_written_out(n, count):
    draw = torch.Generator().manual_seed(n)
    x, key = (torch.randn(n, width, generator=draw).double() for width in (6, 4))
    places, rows, sizes = merge(x, key, torch.zeros(n, dtype=torch.int64), count)
    groups = written_out(x, key, count)
    assert places.tolist() == sorted(groups) and len(places) == count
    assert sizes.tolist() == [len(groups[j]) for j in sorted(groups)]
    expected = torch.stack([sum(x[i] for i in groups[j]) / len(groups[j]) for j in sorted(groups)])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)
    # nothing is lost: the weighted sum is that of all tokens
    torch.testing.assert_close((rows * sizes[:, None]).sum(0), x.sum(0), rtol=0, atol=1e-12)


def test_worked_example():
    """Keys: 0 is 3, 2 is nearly 1; one merge takes the first pair, two take both."""
    x = torch.arange(1.0, 5)[:, None]
    key = torch.tensor([[1, 0], [0, 1], [0.1, 1], [1, 0.0]])
    one = torch.zeros(4, dtype=torch.int64)
    places, rows, sizes = merge(x, key, one, 3)
    assert places.tolist() == [1, 2, 3] and rows[:, 0].tolist() == [2, 3, 2.5] and sizes.tolist() == [1, 1, 2]
    places, rows, _ = merge(x, key, one, 2)
    assert places.tolist() == [1, 3] and rows[:, 0].tolist() == [2.5, 2.5]


def test_pictures_are_not_mixed_and_keep_one_token_each():
    draw = torch.Generator().manual_seed(0)
    x, key = torch.randn(11, 6, generator=draw), torch.randn(11, 4, generator=draw)
    pictures = torch.tensor([0] * 4 + [1] + [2] * 6)
    for count in (6, 3, 1):
        places, rows, sizes = merge(x, key, pictures, count)
        assert len(places) == max(count, 3)
        for picture in range(3):
            own = pictures[places] == picture
            assert int(sizes[own].sum()) == int((pictures == picture).sum())
            total = (rows[own] * sizes[own, None]).sum(0)
            torch.testing.assert_close(total, x[pictures == picture].sum(0))


def test_counts_are_cut():
    assert spend(torch.tensor([576, 10, 0]), 0.3).tolist() == [172, 3, 0]
    assert spend(torch.tensor([576, 10, 0]), 12).tolist() == [12, 10, 0]


@torch.no_grad()
def test_the_decoder_goes_on_with_the_means():
    """Layer by layer by hand: keys from the layer's own projections, the means in their places."""
    model, batch = tiny_llava(), llava_batch((1,))
    text = model.model.language_model
    with sal.focus(model, sal.ToMe(keep=5, layer=2, positions="keep")) as handle:
        focused = model(**batch).logits[0, -1]
        stage = handle.parts[0].stages[0]
    held = {}
    take = text.layers[2].register_forward_pre_hook(
        lambda module, args, kwargs: held.update(x=args[0], turn=kwargs["position_embeddings"]),
        with_kwargs=True,
    )
    model(**batch)
    take.remove()
    x, (cos, sin) = held["x"], held["turn"]
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = text.layers[2].self_attn
    key = attention.k_proj(text.layers[2].input_layernorm(x)).view(1, x.shape[1], 2, 8).transpose(1, 2)
    key = apply_rotary_pos_emb(key, key, cos, sin)[1].mean(1)[0].double()
    (places,) = (batch["input_ids"][0] == 63).nonzero(as_tuple=True)
    groups = written_out(x[0, places].double(), key[places], 5)
    left = [int(places[j]) for j in sorted(groups)]
    assert stage.kept[0].nonzero().flatten().tolist() == left
    assert stage.merged[0].nonzero().flatten().tolist() == [
        int(places[j]) for j in sorted(groups) if len(groups[j]) > 1
    ]
    short = x.clone()
    for j, members in groups.items():
        short[0, places[j]] = x[0, places[members]].mean(0)
    order = [place for place in range(x.shape[1]) if place in left or place not in places.tolist()]
    hidden, turn = short[:, order], (cos[:, order], sin[:, order])
    for layer in text.layers[2:]:
        hidden = layer(hidden, position_embeddings=turn, attention_mask=None)
    torch.testing.assert_close(focused, model.lm_head(text.norm(hidden))[0, -1], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_question_changes_nothing_and_layers_are_checked():
    model, batch = tiny_llava(), llava_batch((1, 2))
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, -2:] = torch.tensor([9, 8])
    kept = []
    with sal.focus(model, sal.ToMe(keep=0.25)) as handle:
        for inputs in (batch, other):
            model(**inputs)
            kept.append(handle.parts[0].stages[0].kept)
    assert torch.equal(*kept) and kept[0].sum(-1).tolist() == [4, 8]
    with pytest.raises(ParameterError, match=r"layers must be in \[0, 5\] for 6 layers of Llava\w+, got 6"):
        sal.focus(model, sal.ToMe(layer=6))


@torch.no_grad()
def test_tiles_and_videos_are_merged_within_themselves():
    for name in ("llava_next", "qwen2_vl"):
        family = FAMILIES[name]
        model = family.make().bfloat16()
        batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in family.inputs((1, 2, 0)).items()}
        with sal.focus(model, sal.ToMe(keep=0.2, layer=0)) as handle:
            assert bool(model(**batch).logits.isfinite().all())
            kept = handle.parts[0].stages[0].kept.sum(-1)
        counts = (batch["input_ids"] == model.config.image_token_id).sum(-1)
        assert kept.tolist() == spend(counts, 0.2).tolist()
