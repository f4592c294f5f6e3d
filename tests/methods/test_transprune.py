"""TransPrune: the worked example, scores against a float64 transcription with hand-made hooks, stages and batches."""

import math

import pytest
import torch
from conftest import llava_batch, tiny_llava
from torch import nn
from vision_families import FAMILIES

import salience as sal
from salience.core.attach import Attachment
from salience.core.errors import ParameterError, StructureError
from salience.hosts.branches import follow
from salience.hosts.transformers import structure
from salience.methods.tokens.transprune import scaled, score, spend, transition

CONTRACT = {
    "method": sal.TransPrune(ratios=(0.75, 0.5, 0.2)),
    "keep_all": sal.TransPrune(ratios=(1.0, 1.0, 1.0)),
    "model": tiny_llava,
    "inputs": llava_batch,
    "bad": {
        "ratios": ((0.5, 0.75, 0.1), r"ratios must be in \[0, 1\] and not rising, got \(0.5, 0.75, 0.1\)"),
        "ratios:2": ((1.5,), r"ratios must be in \[0, 1\] and not rising, got \(1.5,\)"),
        "ratios:3": ((0.5,), "prune must be one for each of the 1 ratios, got None"),
        "prune": ((0, 1, 2), r"prune must be rising and >= 1, got \(0, 1, 2\)"),
        "prune:2": ((1, 2), r"prune must be one for each of the 3 ratios, got \(1, 2\)"),
        "accumulate": ((), r"accumulate must be rising and >= 1, got \(\)"),
        "alpha": (1.5, r"alpha must be in \[0, 1\], got 1.5"),
        "direction": ("up", "direction must be one of abs, signed, got 'up'"),
        "softmax_over": ("text", "softmax_over must be one of image, all, got 'text'"),
        "transition": ("none", "transition must be one of both, length, turn, got 'none'"),
        "positions": ("shift", "positions must be one of auto, renumber, keep, got 'shift'"),
    },
}
ONE = {"ratios": (0.25,), "prune": (3,)}


def test_worked_example():
    """Lengths 2, 1, 1 and cosines 0, 1, -1: the sign decides which of the last two is first."""
    before = torch.tensor([[[1.0, 0]] * 3])
    after = torch.tensor([[[0.0, 2], [1, 0], [-1, 0]]])
    every = torch.ones(1, 3, dtype=torch.bool)
    signed = transition(before, after, every, direction="signed")
    assert signed[0].tolist() == pytest.approx([0.4895, 0.0900, 0.6652], abs=5e-5)
    plain = transition(before, after, every)
    assert plain[0].tolist() == pytest.approx([1.1522, 0.2119, 0.2119], abs=5e-5)
    assert transition(before, after, every, factors="length")[0].tolist() == [2, 1, 1]


def written_out(b, a, among, direction="abs"):
    """One token after another in float64."""
    length, turn = {}, {}
    for j in among:
        nb, na = b[j].norm(), a[j].norm()
        length[j] = float(na / nb)
        cosine = float(a[j] @ b[j] / na / nb)
        turn[j] = math.exp(1 - (abs(cosine) if direction == "abs" else cosine))
    whole = sum(turn.values())
    return {j: length[j] * turn[j] / whole for j in among}


@pytest.mark.parametrize("direction", ["abs", "signed"])
def test_transition_equals_the_formula_and_its_invariants(direction):
    draw = torch.Generator().manual_seed(3)
    b, a = (torch.randn(2, 13, 7, generator=draw).double() for _ in range(2))
    among = torch.zeros(2, 13, dtype=torch.bool)
    among[0, 2:12] = among[1, 0:5] = True
    found = transition(b, a, among, direction=direction)
    for row in range(2):
        places = among[row].nonzero().flatten().tolist()
        expected = written_out(b[row], a[row], places, direction)
        assert found[row, places].tolist() == pytest.approx(list(expected.values()), abs=1e-12)
        assert not bool(found[row][~among[row]].any())
    assert float(found.min()) >= 0
    torch.testing.assert_close(transition(b, 3 * a, among, direction=direction), 3 * found)
    # every cosine alike: the softmax is even
    even = transition(b, -2 * b, among, direction=direction)
    assert even[0, 2:12].tolist() == pytest.approx([0.2] * 10) and even[1, :5].tolist() == pytest.approx(
        [0.4] * 5
    )
    together = transition(b, a, among, direction=direction, together=True)
    parts = transition(b, a, among, direction=direction, together=True, factors="turn")
    assert float(parts.sum()) == pytest.approx(1.0)
    ratio = (together / found)[among].view(-1)
    assert ratio[:10].std() < 1e-12 and ratio[10:].std() < 1e-12 and not ratio[0].isclose(ratio[-1])


def test_zero_rows_and_rows_without_image_have_finite_scores():
    b, a = torch.zeros(2, 4, 3), torch.ones(2, 4, 3)
    b[0, 1] = 1.0
    among = torch.tensor([[True] * 4, [False] * 4])
    for together in (False, True):
        found = transition(b.bfloat16(), a.bfloat16(), among, together=together)
        assert found.dtype == torch.float32 and bool(found.isfinite().all())
        assert (found > 0).nonzero().tolist() == [[0, 1]]


def test_scores_are_shares_and_the_transition_decides_where_no_one_asks():
    moved, guided = torch.tensor([[9.0, 1, 3, 7], [5, 1, 3, 7]]), torch.tensor([[5.0, 0.3, 0.1, 4], [0] * 4])
    vision = torch.tensor([[False, True, True, False]] * 2)
    found = score(moved, guided, vision, 0.25)
    assert found[0].tolist() == pytest.approx([0, 0.25 * 0.25 + 0.75 * 0.75, 0.25 * 0.75 + 0.75 * 0.25, 0])
    assert found[1].tolist() == pytest.approx([0, 0.25, 0.75, 0])
    assert spend(torch.tensor([576, 10, 0]), 0.3).tolist() == [172, 3, 0]


def test_layers_follow_the_papers_share_of_the_depth():
    assert scaled(32) == (7, 9, 12) and scaled(4) == (1, 2, 3) and scaled(64) == (14, 18, 24)
    assert sal.TransPrune().plan(32) == ((7, 8, 9, 10, 11, 12), (7, 9, 12))
    assert all(scaled(depth)[-1] < depth for depth in range(4, 100))
    with pytest.raises(ParameterError, match="prune must be given for a decoder of 3 layers, got None"):
        scaled(3)
    with pytest.raises(ParameterError, match=r"accumulate must be with all of prune \(3,\) and none behind"):
        sal.TransPrune(**ONE, accumulate=(1, 2))
    with pytest.raises(ParameterError, match="accumulate must be with all of prune"):
        sal.TransPrune(**ONE, accumulate=(3, 4))
    with pytest.raises(ParameterError, match="accumulate must be with all of prune"):
        sal.focus(tiny_llava(), sal.TransPrune(accumulate=(1, 2)))
    with pytest.raises(
        ParameterError, match=r"prune must be in \[1, 5\] for a decoder of 6 layers, got \(6,\)"
    ):
        sal.focus(tiny_llava(), sal.TransPrune(ratios=(0.5,), prune=(6,)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "qwen3_vl_moe"])
@torch.no_grad()
def test_stages_equal_a_transcription_on_the_masked_model(name, alpha):
    """Sums, guidance and kept sets of two stages, from hooks of the test's own and the eager attention maps.

    The second stage sees what is left: it is checked on a run that drops nothing at it.
    """
    family = FAMILIES[name]
    model, batch = family.make(), family.inputs((1,), only=0)
    if "moe" not in name:
        model.double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    layers = model.model.language_model.layers
    vision = family.placeholders(batch)[0]
    places = vision.nonzero().flatten().tolist()
    seen, handles = {}, []
    for number in (0, 1):
        for kind in ("self_attn", "mlp"):

            def hook(module, args, kwargs, output, key=(number, kind)):
                before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                seen[key] = (
                    before[0].double(),
                    (output[0] if isinstance(output, tuple) else output)[0].double(),
                )

            handles.append(getattr(layers[number], kind).register_forward_hook(hook, with_kwargs=True))
    model.set_attn_implementation("eager")
    maps = model(**batch, output_attentions=True).attentions
    for handle in handles:
        handle.remove()
    model.set_attn_implementation("sdpa")
    total = dict.fromkeys(places, 0.0)
    for before, after in seen.values():
        for place, value in written_out(before, after, places).items():
            total[place] += value
    behind = range(places[-1] + 1, len(vision))
    guided = {j: float(maps[2][0, :, list(behind), j].double().mean()) for j in places}
    whole, asked = sum(total.values()) + 1e-8, sum(guided.values()) + 1e-8
    expected = [alpha * total[j] / whole + (1 - alpha) * guided[j] / asked for j in places]
    with sal.focus(
        model, sal.TransPrune(ratios=(0.4,), prune=(2,), accumulate=(1, 2), alpha=alpha)
    ) as handle:
        model(**batch)
        stage = handle.parts[0].stages[0]
    assert stage.scores[0][vision].tolist() == pytest.approx(expected, abs=1e-6)
    best = sorted(places, key=lambda j: -expected[places.index(j)])[: int(0.4 * len(places))]
    assert stage.kept[0].nonzero().flatten().tolist() == sorted(best)


@torch.no_grad()
def test_sums_stay_with_their_tokens_after_a_stage():
    """With the transition alone, the second stage's sum is the first's plus what the layers between did."""
    model, batch = tiny_llava(), llava_batch((1, 2))
    both = sal.TransPrune(ratios=(0.5, 0.25), prune=(2, 4), accumulate=(1, 2, 4), alpha=1.0)
    found, sums = [], []
    with sal.focus(model, both) as handle:
        run = handle.parts[0]._decide[2].func.__self__
        for layer in (2, 4):
            decide = handle.parts[0]._decide[layer]

            def noted(view, decide=decide):
                sums.append(run._sum.clone())
                return decide(view)

            handle.parts[0]._decide[layer] = noted
        model(**batch)
        found = handle.parts[0].stages
    dropped = found[0].scores.isfinite() & ~found[0].kept
    assert torch.equal(sums[0][dropped], sums[1][dropped]), "tokens that left add nothing"
    assert bool((sums[1][found[0].kept] > sums[0][found[0].kept]).all())
    assert not bool(sums[1][~found[0].scores.isfinite()].any())
    assert bool((found[1].scores.isfinite() == found[0].kept).all())
    # the scores of the second stage are the sums' shares of what was left, at the same places
    left = torch.where(found[0].kept, sums[1], 0.0)
    shares = left / (left.sum(-1, keepdim=True) + 1e-8)
    torch.testing.assert_close(found[1].scores[found[0].kept], shares[found[0].kept])
    assert not bool((found[1].kept & ~found[0].kept).any())


@torch.no_grad()
def test_rows_influence_each_other_only_in_the_official_softmax():
    model, batch = tiny_llava(), llava_batch((1, 2, 0))
    places = batch["attention_mask"][0].bool()
    one = {k: v[:1, places] for k, v in batch.items() if k != "pixel_values"}
    one["pixel_values"] = batch["pixel_values"][:1]
    for over, equal in (("image", True), ("all", False)):
        method = sal.TransPrune(**ONE, accumulate=(1, 3), alpha=1.0, softmax_over=over)
        with sal.focus(model, method) as handle:
            run = handle.parts[0]._decide[3].func.__self__
            model(**batch)
            together = run._sum[0, places]
            model(**one)
            assert torch.allclose(together, run._sum[0], rtol=1e-4) is equal


@torch.no_grad()
def test_no_text_behind_the_image_leaves_it_to_the_transition():
    model = tiny_llava()
    batch = {"input_ids": torch.tensor([[1, 5, 6, *[63] * 16]]), "attention_mask": torch.ones(1, 19)}
    batch["pixel_values"] = llava_batch((1,))["pixel_values"]
    kept = []
    for alpha in (0.0, 1.0):
        with sal.focus(model, sal.TransPrune(**ONE, alpha=alpha)) as handle:
            assert bool(model(**batch).logits.isfinite().all())
            kept.append(handle.parts[0].stages[0].kept)
    assert torch.equal(*kept) and int(kept[0].sum()) == 4


@torch.no_grad()
def test_the_transition_alone_knows_nothing_of_the_question_and_answers_do_not_ask():
    model, batch = tiny_llava(), llava_batch((1,), labels=True)
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, -5:] = torch.tensor([9, 8, 7, 6, 5])
    longer = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    scores = {}
    for alpha in (0.0, 1.0):
        with sal.focus(model, sal.TransPrune(**ONE, alpha=alpha)) as handle:
            for name, inputs in (("this", batch), ("other", other), ("longer", longer)):
                model(**inputs)
                scores[alpha, name] = handle.parts[0].stages[0].scores.nan_to_num()
    assert torch.equal(scores[1.0, "this"], scores[1.0, "other"])
    assert not torch.allclose(scores[0.0, "this"], scores[0.0, "other"], rtol=1e-3)
    assert not torch.equal(scores[0.0, "this"], scores[0.0, "longer"])


class Block(nn.Module):
    """A layer with norms inside its branches, as GLM-4V has them."""

    def __init__(self, wide=8):
        super().__init__()
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

        sizes = LlamaConfig(
            hidden_size=wide, intermediate_size=16, num_attention_heads=2, attn_implementation="sdpa"
        )
        self.self_attn, self.mlp = LlamaAttention(sizes, 0), LlamaMLP(sizes)
        self.first, self.second, self.third, self.fourth = (nn.LayerNorm(wide) for _ in range(4))

    def forward(self, x):
        turn = torch.ones(1, x.shape[1], 4), torch.zeros(1, x.shape[1], 4)
        x = x + self.second(self.self_attn(self.first(x), position_embeddings=turn, attention_mask=None)[0])
        return x + self.fourth(self.mlp(self.third(x)))


@torch.no_grad()
def test_a_branch_ends_where_it_is_added():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([Block()])
    layer = structure(model, layers="layers").layers[0]
    record, seen = Attachment(), []
    follow(layer, record, lambda before, after: seen.append((before, after)))
    x = torch.randn(1, 5, 8)
    block, out = layer.module, layer.module(x)
    assert len(seen) == 2
    middle = x + seen[0][1]
    assert torch.equal(seen[0][0], block.first(x)) and torch.equal(middle + seen[1][1], out)
    assert torch.equal(seen[1][0], block.third(middle))
    record.undo()
    layer.module(x)
    assert len(seen) == 2


def test_layers_whose_branches_are_not_modules_are_refused():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=20, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
    layer = structure(OPTForCausalLM(config)).layers[0]
    with pytest.raises(
        StructureError, match=r"feed-forward network of .*layers.0 \(OPTDecoderLayer\) must be one"
    ):
        follow(layer, Attachment(), lambda before, after: None)


@torch.no_grad()
def test_prompts_that_fail_leave_nothing_and_bfloat16_is_finite():
    model, batch = tiny_llava().bfloat16(), llava_batch((1, 2, 0))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with sal.focus(model, CONTRACT["method"]) as handle:
        model(**batch)
        first = handle.parts[0].stages[-1].scores.nan_to_num()
        layer = model.model.language_model.layers[1]
        fails = layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**batch)
        fails.remove()
        assert bool(model(**batch).logits.isfinite().all())
        assert torch.equal(handle.parts[0].stages[-1].scores.nan_to_num(), first)
