"""Mixtures of experts: found by structure, recorded in one pass, cut so that the rest is an ordinary model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from mixture_families import FAMILIES, demonstrations, logits_of, tiny_mixture
from safetensors.torch import load_file, save_file

import salience as sal
from salience.core import distributed
from salience.core.errors import ConflictError, ParameterError, StructureError, TargetError
from salience.hosts._experts_pass import run
from salience.hosts.experts import find_mixtures, kept_of, measure, select
from salience.methods.experts.easy_ep import score

WORKER = Path(__file__).parent.parent / "workers" / "experts.py"
GROUPED = [name for name, (_, own, _) in FAMILIES.items() if own.get("n_group", 1) > 1]


def focused(model, data=None, **settings):
    return sal.focus(model, sal.EasyEP(**{"keep": 0.5, **settings}), data=data or [demonstrations()])


# structure


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_routers_and_experts(family):
    model = tiny_mixture(family)
    found = find_mixtures(model)
    assert (len(found.layers), found.experts, found.top_k) == (FAMILIES[family][2], 8, 2)
    own = FAMILIES[family][1]
    assert found.groups == own.get("n_group", 1)
    assert getattr(found.config, found.config_name) == 8 and found.config_name in vars(found.config)
    for one in found.layers:
        assert one.router.weight.shape == (8, 32) and one.experts.down_proj.shape[0] == 8


def test_refuses_models_without_experts_and_weights_that_are_no_floats():
    with pytest.raises(
        StructureError, match="model must have layers with a router and experts, got LlamaForC"
    ):
        find_mixtures(tiny_llama())
    model = tiny_mixture()
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj = torch.nn.Parameter(experts.gate_up_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(
        TargetError, match=r"floating point weights, got torch.int8 in .*experts.gate_up_proj"
    ):
        focused(model)
    model = tiny_mixture()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(TargetError, match="got a quantised one"):
        focused(model)


# the pass


@pytest.mark.parametrize("family", FAMILIES)
def test_the_pass_sees_what_the_model_computes(family):
    """Weights, ids, norms and cosines against the router's own output and each expert run on every token."""
    model, batch = tiny_mixture(family), demonstrations()
    found, seen, inside = find_mixtures(model), {}, {}
    one = found.layers[-1]
    real = batch["attention_mask"].bool().flatten()
    hooks = [
        one.router.register_forward_hook(lambda m, args, out: inside.update(router=out, normed=args[0])),
        one.layer.post_attention_layernorm.register_forward_hook(
            lambda m, args, out: inside.update(stream=args[0])
        ),
    ]
    rows, tokens = run(found, batch, lambda layer, routed: seen.update({layer: routed}))
    for hook in hooks:
        hook.remove()
    routed = seen[len(found.layers) - 1]
    assert (rows, tokens) == (3, 25) and sorted(seen) == list(range(len(found.layers)))
    _, weights, ids = inside["router"]
    assert torch.equal(routed.ids, ids[real])
    torch.testing.assert_close(routed.weights, weights[real].float())
    normed, stream = (inside[name].reshape(30, 32)[real] for name in ("normed", "stream"))
    gate_up, down = one.experts.gate_up_proj, one.experts.down_proj
    gate, up = torch.einsum("td,eid->tei", normed, gate_up).chunk(2, -1)
    each = torch.einsum("tei,edi->ted", one.experts.act_fn(gate) * up, down)
    chosen = each.gather(1, routed.ids[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(routed.norms, chosen.norm(dim=-1).float())
    added = (chosen * weights[real][..., None]).sum(1)
    expected = torch.nn.functional.cosine_similarity(stream, stream + added)
    torch.testing.assert_close(routed.cosine, expected.float())


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_pass_does_not_change_what_the_model_says(implementation):
    model, batch = tiny_mixture("qwen2"), demonstrations()
    model.set_experts_implementation(implementation)
    inner = []
    before = logits_of(model, batch)
    hook = model.model.norm.register_forward_hook(lambda m, args, out: inner.append(out))
    run(find_mixtures(model), batch, lambda layer, routed: None)
    hook.remove()
    torch.testing.assert_close(model.lm_head(inner[0])[batch["attention_mask"].bool()], before)
    assert torch.equal(logits_of(model, batch), before)


def test_padding_batching_and_order_do_not_count():
    model, batch = tiny_mixture(), demonstrations(rows=4)
    found = find_mixtures(model)

    def scores(*batches):
        return measure(found, {"all": list(batches)}, score)

    whole = scores(batch)
    singles = [
        {
            name: value[row : row + 1, : int(batch["attention_mask"][row].sum())]
            for name, value in batch.items()
        }
        for row in (2, 0, 3, 1)
    ]
    apart = scores(*singles)
    torch.testing.assert_close(apart.scores, whole.scores, rtol=1e-5, atol=1e-7)
    assert torch.equal(apart.hits, whole.hits)
    assert (whole.demonstrations, whole.tokens) == (apart.demonstrations, apart.tokens) == (4, 35)
    left = {name: value.flip(1) for name, value in batch.items()}
    assert scores(left).tokens == 35
    first = measure(found, {"all": [batch]}, score, samples=2)
    assert first.demonstrations == 2
    torch.testing.assert_close(
        first.scores + scores(singles[0], singles[2]).scores, whole.scores, rtol=1e-5, atol=1e-7
    )


def test_ranks_add_up_what_each_has_read(monkeypatch):
    """The second rank's collectives are answered with the tensors that the first one sent."""
    model, batches = tiny_mixture(), [demonstrations(seed=seed) for seed in (3, 4)]
    found, sent = find_mixtures(model), []
    together = measure(found, {"all": batches}, score)

    def keep(value):
        sent.append(value.clone())
        return value

    monkeypatch.setattr(distributed, "all_reduce_sum", keep)
    measure(found, {"all": batches[:1]}, score)
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda value: value + sent.pop(0))
    second = measure(found, {"all": batches[1:]}, score)
    torch.testing.assert_close(second.scores, together.scores)
    assert torch.equal(second.hits, together.hits) and not sent
    assert (second.demonstrations, second.tokens) == (together.demonstrations, together.tokens)


def test_domains_count_alike_however_long():
    model = tiny_mixture()
    code, prose = (
        [demonstrations(seed=3)],
        [demonstrations(rows=9, length=20, seed=4), demonstrations(seed=5)],
    )
    found = find_mixtures(model)
    alone = [measure(found, {"one": batches}, score).scores for batches in (code, prose)]
    expected = sum(one / one.sum(-1, keepdim=True) for one in alone) / 2
    mixed = focused(model, {"code": code, "prose": prose}).scores["easy-ep.experts"]
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"code": []},
        [torch.ones(2, 3)],
        [{"labels": torch.ones(2, 3)}],
        [{"input_ids": torch.ones(0, 3).long()}],
        5,
    ],
)
def test_missing_demonstrations_are_refused_and_nothing_changes(data):
    model = tiny_mixture()
    before = logits_of(model)
    with pytest.raises(ParameterError, match="data must be demonstrations"):
        sal.focus(model, sal.EasyEP(), data=data)
    assert torch.equal(logits_of(model), before) and model.config.num_local_experts == 8


def test_training_mode_is_put_back_and_not_used():
    model = tiny_mixture(attention_dropout=0.5)
    still = focused(model)
    expected = still.scores["easy-ep.experts"]
    still.undo()
    model.train()
    model.model.layers[1].eval()
    with focused(model) as handle:
        assert torch.equal(handle.scores["easy-ep.experts"], expected)
    assert model.training and not model.model.layers[1].training


# the choice


def test_ties_go_to_more_tokens_then_to_the_lower_index():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0, 2.0]])
    hits = torch.tensor([[1.0, 0.0, 5.0, 5.0, 1.0, 9.0], [0.0] * 6])
    assert select(scores, hits, 4).tolist() == [[0, 2, 4, 5], [0, 1, 2, 3]]
    assert select(scores, hits, 2, groups=2).tolist() == [[0, 4], [0, 3]]


@pytest.mark.parametrize(
    ("family", "keep", "kept"),
    [
        ("mixtral", 0.5, 4), ("mixtral", 0.3, 3), ("mixtral", 2, 2), ("mixtral", 1.0, 8),
        ("deepseek2-groups", 0.5, 4), ("deepseek2-groups", 0.3, 4), ("deepseek3", 0.5, 4), ("deepseek3", 6, 6),
    ],
)  # fmt: skip
def test_how_many_stay(family, keep, kept):
    assert kept_of(find_mixtures(tiny_mixture(family)), keep) == kept


@pytest.mark.parametrize(
    ("family", "keep", "text"),
    [
        ("mixtral", 1, "keep must be for 2 to 8 experts: a token is sent to 2, got 1"),
        ("mixtral", 0.1, r"keep must be for 2 to 8 experts: a token is sent to 2, got '0.1 \(1 experts\)'"),
        ("mixtral", 9, "keep must be for 2 to 8 experts: a token is sent to 2, got 9"),
        ("deepseek3", 2, r"keep must be for 4 to 8 experts and a multiple of 2 .*, got 2"),
        ("deepseek3", 5, r"a multiple of 2 \(one number of experts for each group\).*, got 5"),
        ("deepseek2-groups", 6, r"for 4 to 8 experts and a multiple of 4 .*, got 6"),
    ],
)
def test_too_few_experts_for_the_router_are_refused(family, keep, text):
    model = tiny_mixture(family)
    before = logits_of(model)
    with pytest.raises(ParameterError, match=text):
        focused(model, keep=keep)
    assert torch.equal(logits_of(model), before)


# the cut


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_and_pruned_agree_and_undo_brings_all_back(family):
    model = tiny_mixture(family)
    whole = logits_of(model)
    with focused(model, mode="mask") as handle:
        masked = logits_of(model)
        assert handle.spent["easy-ep"]["experts"] == 4
        kept = handle.parts[0].kept
    assert torch.equal(logits_of(model), whole)
    with focused(model) as handle:
        torch.testing.assert_close(logits_of(model), masked)
        assert torch.equal(handle.parts[0].kept, kept)
        assert not torch.allclose(masked, whole)
    assert torch.equal(logits_of(model), whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_changes_nothing(family):
    model = tiny_mixture(family)
    whole, before = logits_of(model), dict(model.named_parameters())
    handle = focused(model, keep=1.0).finish()
    assert torch.equal(logits_of(model), whole)
    assert all(before[name] is parameter for name, parameter in model.named_parameters())
    assert handle.spent["easy-ep"]["experts"] == 8


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_router_only_finds_survivors(family):
    """The cut router, asked directly, against the whole one with the others' logits out of reach."""
    model = tiny_mixture(family)
    one = find_mixtures(model).layers[0]
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(7))
    calls = []
    with focused(model, mode="mask") as handle:
        hook = one.experts.register_forward_hook(lambda m, args, out: calls.append(args[1]))
        logits_of(model)
        hook.remove()
        _, weights, ids = one.router(hidden)
        kept = handle.parts[0].kept[0]
    assert torch.isin(calls[0], kept).all()
    assert ids.max() < 4 and weights.shape == (50, 2)
    if "norm_topk_prob" in vars(model.config) and model.config.norm_topk_prob:
        scale = getattr(model.config, "routed_scaling_factor", 1.0)
        torch.testing.assert_close(weights.sum(-1), torch.full((50,), scale))


@pytest.mark.parametrize("mode", ["prune", "mask"])
@pytest.mark.parametrize("family", FAMILIES)
def test_finish_leaves_an_ordinary_smaller_model(family, mode, tmp_path):
    model = tiny_mixture(family)
    names = set(model.state_dict())
    handle = focused(model, mode=mode)
    smaller = logits_of(model)
    handle.save(tmp_path)
    handle.undo()
    assert torch.allclose(logits_of(model), smaller, atol=1e-6) and set(model.state_dict()) == names
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(again), smaller, rtol=0, atol=1e-5)
    found = find_mixtures(again)
    assert found.experts == 4 and again.num_parameters() < tiny_mixture(family).num_parameters()
    assert sum(p.numel() for p in again.parameters()) == handle.spent["easy-ep"]["parameters"]


@pytest.mark.slow
def test_checkpoints_load_where_salience_cannot_be_imported(tmp_path):
    batch, cut = demonstrations(seed=2), {}
    for family in FAMILIES:
        cut[family] = focused(tiny_mixture(family))
        cut[family].save(tmp_path / family)
        save_file(batch, tmp_path / family / "batch.st")
    done = subprocess.run(
        [sys.executable, WORKER, *(tmp_path / family for family in FAMILIES)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    parameters = json.loads(done.stdout.splitlines()[-1])
    for family, handle in cut.items():
        assert parameters[family] == handle.spent["easy-ep"]["parameters"]
        elsewhere = load_file(tmp_path / family / "logits.st")["logits"]
        torch.testing.assert_close(elsewhere, logits_of(handle.target, batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3", "deepseek3"])
def test_the_smaller_model_trains_and_generates(family):
    model = tiny_mixture(family)
    batch = demonstrations()
    with focused(model, mode="mask"):
        settings = {} if family == "deepseek3" else {"output_router_logits": True}
        model(**batch, labels=batch["input_ids"], **settings).loss.backward()
        model.zero_grad()
    focused(model).finish()
    loss = model(**batch, labels=batch["input_ids"], **settings).loss
    loss.backward()
    assert torch.isfinite(loss) and all(
        p.grad is not None for n, p in model.named_parameters() if "experts" in n
    )
    assert model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False).shape[1] > 10


def test_frozen_weights_stay_frozen_and_half_precision_stays_half():
    model = tiny_mixture().to(torch.bfloat16).requires_grad_(False)
    focused(model).finish()
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


def test_without_rerouting_removed_experts_are_left_out():
    model = tiny_mixture("qwen2")
    whole = logits_of(model)
    handle = focused(model, mode="mask", reroute=False)
    kept = handle.parts[0].kept
    silenced = logits_of(model)
    with pytest.raises(ConflictError, match="reroute must be True for a smaller model"):
        handle.save("nowhere")
    handle.undo()
    assert torch.equal(logits_of(model), whole)
    with torch.no_grad():
        for one, ids in zip(find_mixtures(model).layers, kept, strict=True):
            gone = [index for index in range(8) if index not in ids]
            one.experts.down_proj[gone] = 0.0
    torch.testing.assert_close(logits_of(model), silenced)
    assert not Path("nowhere").exists()


def test_the_picture_shows_layers_and_experts(tmp_path):
    model = tiny_mixture()
    figure = focused(model).plot(tmp_path / "experts.png")
    axes = figure.axes[0]
    assert axes.images[0].get_array().shape == (2, 8)
    assert len(axes.collections[0].get_offsets()) == 8
    assert (tmp_path / "experts.png").stat().st_size > 5000
