"""What an attention layer computes is seen, whatever the implementation, and nothing is left behind."""

import copy

import pytest
import torch
from conftest import collate, ragged_samples, tiny_gpt2, tiny_llama, with_lora
from transformers import modeling_utils

from salience.core.attach import Attachment
from salience.core.errors import ParameterError, StructureError
from salience.hosts.attention import AttentionCall, attention_mass, attention_module, observe

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def mistral_window():
    from transformers import MistralConfig, MistralForCausalLM

    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))


def gemma2_softcap():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    kinds = ["full_attention", "sliding_attention"]
    config = Gemma2Config(**SIZES, sliding_window=4, layer_types=kinds, attn_logit_softcapping=0.5)
    return Gemma2ForCausalLM(config)


def gpt_oss_sinks():
    from transformers import GptOssConfig, GptOssForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = GptOssForCausalLM(
        GptOssConfig(
            **SIZES, sliding_window=4, num_local_experts=2, num_experts_per_tok=1, rope_parameters=rope
        )
    )
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def nested():
    """A vision-language model: its text settings are a config inside of the config."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "image_size": 8}
    vision |= {"patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "llama", **SIZES}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    )


def peft():
    return with_lora(tiny_llama())


MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "mistral-window": mistral_window,
    "gemma2-softcap": gemma2_softcap,
    "gpt-oss-sinks": gpt_oss_sinks,
    "qwen3": qwen3,
    "nested": nested,
    "peft": peft,
}


def made(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def entries():
    table = modeling_utils.ALL_ATTENTION_FUNCTIONS
    return dict(table._local_mapping), dict(table._global_mapping)


def seen_in(model, batch, index=-1, see=None):
    """Logits of the observed model and what was seen."""
    record, calls = Attachment(), []
    observe(attention_module(model, index), record, see or calls.append)
    try:
        with torch.no_grad():
            return model(**batch).logits, calls
    finally:
        record.undo()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_the_mass_is_that_of_the_whole_map(name, implementation, side):
    model, batch = made(name), collate(ragged_samples(5, seed=3), side=side)
    keys = (batch["labels"] == -100) & batch["attention_mask"].bool()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(**batch, output_attentions=True).attentions[-1].mean(1)
    want = (maps * keys[:, None]).sum(-1)
    if implementation == "sdpa" and name in ("gemma2-softcap", "gpt-oss-sinks"):
        pytest.skip("the model refuses sdpa")
    model.set_attn_implementation(implementation)
    before, config = entries(), repr(model.config)
    with torch.no_grad():
        plain = model(**batch).logits
    logits, (call,) = seen_in(model, batch)
    assert torch.equal(logits, plain), "observing changed the outputs"
    assert entries() == before and repr(model.config) == config
    for chunk in (None, 3):
        mass = attention_mass(call, keys, attended=batch["attention_mask"], chunk=chunk)
        there = batch["attention_mask"].bool()
        torch.testing.assert_close(mass[there], want[there], rtol=0, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_heads_and_odd_lengths(groups):
    torch.manual_seed(0)
    heads, length, width = 4, 63, 8
    q = torch.randn(2, heads, length, width, dtype=torch.float64)
    k = torch.randn(2, groups, length, width, dtype=torch.float64)
    keys = torch.rand(2, length) < 0.4
    module = torch.nn.Module()
    call = AttentionCall(module, q, k, k, None, 0.3, {})
    logits = (q @ k.repeat_interleave(heads // groups, 1).transpose(-1, -2)) * 0.3
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    maps = logits.masked_fill(future, -torch.inf).softmax(-1)
    want = (maps * keys[:, None, None]).sum(-1).mean(1)
    torch.testing.assert_close(attention_mass(call, keys, chunk=5), want)
    some = torch.arange(length) > 40
    got = attention_mass(call, keys, rows=some, chunk=7)
    torch.testing.assert_close(got[:, 41:], want[:, 41:])
    assert (got[:, :35] == 0).all()
    # without graph, and half precision is computed in fp32
    half = AttentionCall(module, q.bfloat16().requires_grad_(), k.bfloat16(), k, None, 0.3, {})
    low = attention_mass(half, keys)
    assert low.dtype == torch.float32 and not low.requires_grad
    torch.testing.assert_close(low, want.float(), rtol=0, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            attention_mass(AttentionCall(module, q.float(), k.float(), k, None, 0.3, {}), keys), want.float()
        )


def test_keys_must_be_those_that_the_layer_sees():
    q = torch.randn(2, 2, 5, 4)
    call = AttentionCall(torch.nn.Module(), q, q, q, None, 1.0, {})
    with pytest.raises(StructureError, match=r"keys must be \[2, 5\] as the layer sees them, got \[2, 4\]"):
        attention_mass(call, torch.ones(2, 4, dtype=torch.bool))


def masks(length, window):
    """The same causal, windowed mask with two padded keys in the forms that layers are given."""
    from torch.nn.attention.flex_attention import create_block_mask

    padding = torch.ones(2, length, dtype=torch.bool)
    padding[1, :2] = False
    i, j = torch.arange(length)[:, None], torch.arange(length)
    allowed = (j <= i) & (j > i - window) & padding[:, None, None]
    block = create_block_mask(
        lambda b, h, q, k: (k <= q) & (k > q - window) & padding[b, k], 2, None, length, length, device="cpu"
    )
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    options = {"sliding_window": window}
    return allowed, {
        "bool": (allowed, {}, None),
        "additive": (additive, {}, None),
        "flash": (padding.long(), options, None),
        "none": (None, options, padding),
        "flex": (block, {}, None),
    }


@pytest.mark.parametrize("kind", ["bool", "additive", "flash", "none", "flex"])
def test_every_form_of_mask_means_the_same(kind):
    torch.manual_seed(0)
    length = 13
    q, k = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8)
    allowed, forms = masks(length, 5)
    mask, options, attended = forms[kind]
    keys = torch.rand(2, length) < 0.5
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)).masked_fill(~allowed, -torch.inf)
    want = (logits.softmax(-1).nan_to_num(0.0) * keys[:, None, None]).sum(-1).mean(1)
    call = AttentionCall(torch.nn.Module(), q, k, k, mask, 1.0, options)
    got = attention_mass(call, keys, attended=attended, chunk=4)
    rows = allowed.any(-1)[:, 0]
    torch.testing.assert_close(got[rows], want[rows])
    if kind != "additive":  # there a row of padding attends to everything alike
        assert (got[~rows] == 0).all()


def test_attention_that_is_not_causal_and_a_cached_key():
    q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    everything = torch.ones(1, 5, dtype=torch.bool)
    first = torch.tensor([[True, False, False, False, False]])
    two_way = AttentionCall(torch.nn.Module(), q, k, k, None, 1.0, {"is_causal": False})
    torch.testing.assert_close(attention_mass(two_way, everything), torch.ones(1, 5))
    assert (attention_mass(two_way, first) < 1).all()
    newest = AttentionCall(torch.nn.Module(), q[:, :, -1:], k, k, None, 1.0, {})
    want = (q[:, :, -1:] @ k.transpose(-1, -2)).softmax(-1)[..., 0].mean(1)
    torch.testing.assert_close(attention_mass(newest, first), want)


def test_what_is_seen_comes_after_rotary_and_without_graph():
    model, batch = tiny_llama(), collate(ragged_samples(2))
    shapes = []

    def see(call):
        shapes.append((call.query.shape[1:2], call.key.shape[1:2], call.scaling, torch.is_grad_enabled()))
        assert call.module is model.model.layers[0].self_attn

    model.train()
    record = Attachment()
    observe(attention_module(model, 0), record, see)
    model(**batch).loss.backward()
    assert shapes == [((4,), (2,), 8**-0.5, False)]
    record.undo()
    model(**batch)
    assert len(shapes) == 1
    with torch.no_grad():
        model.set_attn_implementation("eager")
        _, (call,) = seen_in(model, batch)
        maps = model(**batch, output_attentions=True).attentions[-1]
    torch.testing.assert_close(call.logits(0, call.query.shape[2]).softmax(-1), maps)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    batch = collate(ragged_samples(3))
    plain, model = tiny_llama().train(), tiny_llama().train()
    plain(**batch).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    before, calls, record = entries(), [], Attachment()
    observe(attention_module(model, -1), record, calls.append)
    loss = model(**batch).loss
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2 and entries() == before
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_other_models_and_other_layers_are_not_seen():
    first, second, batch = tiny_llama(), tiny_llama(seed=1), collate(ragged_samples(2))
    calls, record = [], Attachment()
    observe(attention_module(first, 0), record, calls.append)
    second(**batch)
    assert not calls
    first(**batch)
    assert len(calls) == 1
    # a copy of an observed model is a model of its own
    copied = copy.deepcopy(first)
    copied.load_state_dict(second.state_dict())
    assert torch.equal(copied(**batch).logits, second(**batch).logits)
    assert len(calls) == 1


def test_two_observers_of_one_layer_see_it_and_leave_in_any_order():
    model, batch = tiny_llama(), collate(ragged_samples(2))
    calls, first, second = [], Attachment(), Attachment()
    module = attention_module(model, -1)
    observe(module, first, lambda call: calls.append("first"))
    observe(module, second, lambda call: calls.append("second"))
    model(**batch)
    assert sorted(calls) == ["first", "second"]
    first.undo()
    model(**batch)
    assert calls[2:] == ["second"]
    second.undo()
    model(**batch)
    assert len(calls) == 3 and not module._forward_hooks and not module._forward_pre_hooks


def test_a_function_of_the_users_own_and_a_local_entry_are_kept():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    table = modeling_utils.ALL_ATTENTION_FUNCTIONS
    used = []

    def own(*args, **kwargs):
        used.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    batch = collate(ragged_samples(2))
    AttentionInterface.register("test_own", own)
    table["sdpa"] = own
    try:
        for name in ("test_own", "sdpa"):
            used.clear()
            model = tiny_llama()
            model.config._attn_implementation = name
            _, calls = seen_in(model, batch)
            assert len(used) == 2 and len(calls) == 1
            assert table["sdpa"] is own
    finally:
        del table["sdpa"], AttentionInterface._global_mapping["test_own"]


def test_an_exception_inside_leaves_nothing():
    model, batch, before = tiny_llama(), collate(ragged_samples(2)), entries()

    def fails(call):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        seen_in(model, batch, see=fails)
    assert entries() == before


def test_attention_that_bypasses_the_interface_is_refused():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(
        StructureError,
        match="must go through transformers' ALL_ATTENTION_FUNCTIONS to be observed, but BloomAtt",
    ):
        observe(attention_module(model, -1), Attachment(), print)
    # looks the function up for every name but its own one
    odd = tiny_gpt2()
    odd.set_attn_implementation("eager")
    odd.transformer.h[-1].attn.reorder_and_upcast_attn = True
    with pytest.raises(
        StructureError, match=r"attention of GPT2Attention .* ran 'eager' without looking it up"
    ):
        seen_in(odd.float(), collate(ragged_samples(2)))


def test_layers_are_counted_among_those_with_attention():
    model = with_lora(tiny_llama(layers=3))
    inner = model.base_model.model.model.layers
    assert attention_module(model, 1) is inner[1].self_attn
    assert attention_module(model, -3) is inner[0].self_attn
    with pytest.raises(
        ParameterError, match=r"attention_layer must be in \[-3, 2\] for 3 layers with attention, got 3"
    ):
        attention_module(model, 3)
    from transformers import MambaConfig, MambaForCausalLM

    bare = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=4))
    with pytest.raises(
        StructureError, match="attention must be found in the layers, got a MambaForCausalLM without"
    ):
        attention_module(bare, 0)
