"""The parts of a model are found by structure: every family below is checked against numbers written by hand."""

from dataclasses import dataclass, field

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama
from torch import nn

from salience.core.errors import StructureError
from salience.hosts.transformers import (
    activation_modules,
    adapter_layers,
    layer_index,
    loss_kind,
    structure,
    unwrap,
)

TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TEXT, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN2_VL_VISION = {"depth": 3, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
SPARSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, "n_positions": 64, "eos_token_id": 2}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
T5["decoder_start_token_id"] = 0
ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}


def build(name):
    """A tiny model of the family, from its config class."""
    import transformers as t

    recipes = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**GROUPED)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**GROUPED)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**GROUPED, head_dim=16)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, head_dim=16)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**GROUPED, head_dim=16)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**GROUPED)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, bos_token_id=1)),
        "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TEXT)),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**OPT, max_position_embeddings=64)),
        "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**TEXT)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
        "qwen3-moe": lambda: t.Qwen3MoeForCausalLM(
            t.Qwen3MoeConfig(
                **GROUPED, head_dim=8, num_experts=4, moe_intermediate_size=16, mlp_only_layers=[0]
            )
        ),
        "deepseek-v3": lambda: t.DeepseekV3ForCausalLM(
            t.DeepseekV3Config(
                **TEXT, **LATENT, **SPARSE, num_key_value_heads=4, moe_intermediate_size=16, topk_group=1
            )
        ),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99)
        ),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**TEXT)),
        "roberta": lambda: t.RobertaForTokenClassification(t.RobertaConfig(**TEXT)),
        "llama-classifier": lambda: t.LlamaForSequenceClassification(t.LlamaConfig(**GROUPED, num_labels=5)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
        "t5-gated": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5, feed_forward_proj="gated-gelu")),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=5)),
        "swin": lambda: t.SwinForImageClassification(
            t.SwinConfig(
                image_size=32, patch_size=4, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4
            )
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(vision_config=t.CLIPVisionConfig(**VISION), text_config=t.LlamaConfig(**GROUPED))
        ),
        "qwen2-vl": lambda: t.Qwen2VLForConditionalGeneration(
            t.Qwen2VLConfig(text_config={**GROUPED, "rope_parameters": ROPE}, vision_config=QWEN2_VL_VISION)
        ),
        "gemma3-vlm": lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(text_config={**GROUPED, "head_dim": 16}, vision_config=VISION)
        ),
    }
    return recipes[name]()


@dataclass(frozen=True)
class Expected:
    """What a person reads in the printed model. Numbers and places of the last layer of the main stack."""

    stacks: dict  # name -> (path, layers)
    heads: tuple | None  # query heads, key/value heads, width of a query; None without attention
    projections: str  # those that exist
    mlps: tuple  # (kind, path in the layer, activation in the layer)
    embeddings: str
    head: str | None
    tied: bool
    loss: str
    main: tuple = ("decoder",)
    cross: tuple = field(default=(False,))


def decoder(path="model.layers", **changes):
    """A Llama, with what is different in others."""
    usual = {
        "stacks": {"decoder": (path, 2)},
        "heads": (4, 2, 8),
        "projections": "q k v o",
        "mlps": (("gated", "mlp", "mlp.act_fn"),),
        "embeddings": "model.embed_tokens",
        "head": "lm_head",
        "tied": False,
        "loss": "causal",
    }
    return Expected(**{**usual, **changes})


def t5(kind):
    mlp = ((kind, "layer.2.DenseReluDense", "layer.2.DenseReluDense.act"),)
    return Expected(
        {"encoder": ("encoder.block", 2), "decoder": ("decoder.block", 2)},
        (4, 4, 16),
        "q k v o",
        mlp,
        "shared",
        "lm_head",
        True,
        "seq2seq",
        ("encoder", "decoder"),
        (False, True),
    )


def vlm(vision_path, **changes):
    path = "model.language_model.layers"
    stacks = {"vision": (vision_path, 3), "decoder": (path, 2)}
    return decoder(path, **{"stacks": stacks, "embeddings": "model.language_model.embed_tokens", **changes})


def bert(base, loss, head, tied):
    return decoder(
        stacks={"encoder": (f"{base}.encoder.layer", 2)},
        heads=(4, 4, 8),
        mlps=(("dense", "", "intermediate.intermediate_act_fn"),),
        embeddings=f"{base}.embeddings.word_embeddings",
        head=head,
        tied=tied,
        loss=loss,
        main=("encoder",),
    )


def vision(path, heads, embeddings):
    return Expected(
        {"vision": (path, 3)},
        heads,
        "q k v o",
        (("dense", "mlp", "mlp.activation_fn"),),
        embeddings,
        "classifier",
        False,
        "sequence",
        ("vision",),
    )


EXPECTED = {
    "llama": decoder(),
    "mistral": decoder(),
    "qwen2": decoder(),
    "qwen3": decoder(heads=(4, 2, 16)),
    "gemma2": decoder(heads=(4, 2, 16), tied=True),
    "gemma3": decoder(heads=(4, 2, 16), tied=True),
    "phi3": decoder(projections="o qkv", mlps=(("gated", "mlp", "mlp.activation_fn"),)),
    "gpt2": decoder(
        "transformer.h",
        heads=(4, 4, 8),
        projections="o qkv",
        mlps=(("dense", "mlp", "mlp.act"),),
        embeddings="transformer.wte",
        tied=True,
    ),
    "gpt-neox": decoder(
        "gpt_neox.layers",
        heads=(4, 4, 8),
        projections="o qkv",
        mlps=(("dense", "mlp", "mlp.act"),),
        embeddings="gpt_neox.embed_in",
    ),
    "opt": decoder(
        "model.decoder.layers",
        heads=(4, 4, 8),
        mlps=(("dense", "", "activation_fn"),),
        embeddings="model.decoder.embed_tokens",
        tied=True,
    ),
    "falcon": decoder(
        "transformer.h",
        heads=(4, 1, 8),
        projections="o qkv",
        mlps=(("dense", "mlp", "mlp.act"),),
        embeddings="transformer.word_embeddings",
        tied=True,
    ),
    "mixtral": decoder(mlps=(("experts", "mlp", "mlp.experts.act_fn"),)),
    "qwen3-moe": decoder(mlps=(("experts", "mlp", "mlp.experts.act_fn"),)),
    "deepseek-v3": decoder(
        heads=(4, 4, 12),
        projections="o q_a q_b kv_a kv_b",
        mlps=(
            ("experts", "mlp", "mlp.experts.act_fn"),
            ("gated", "mlp.shared_experts", "mlp.shared_experts.act_fn"),
        ),
    ),
    "mamba": decoder("backbone.layers", heads=None, mlps=(), embeddings="backbone.embeddings", tied=True),
    "bert": bert("bert", "masked", "cls.predictions.decoder", True),
    "roberta": bert("roberta", "token", "classifier", False),
    "llama-classifier": decoder(head="score", loss="sequence"),
    "t5": t5("dense"),
    "t5-gated": t5("gated"),
    "vit": vision("vit.layers", (2, 2, 16), "vit.embeddings.patch_embeddings"),
    "swin": vision("swin.encoder.layers", (2, 2, 8), "swin.embeddings.patch_embeddings"),
    "llava": vlm("model.vision_tower.encoder.layers"),
    "qwen2-vl": vlm("model.visual.blocks"),
    "gemma3-vlm": vlm("model.vision_tower.encoder.layers", heads=(4, 2, 16), tied=True),
}


def present(attention):
    roles = ["q", "k", "v", "o", "qkv", "kv", "q_a", "q_b", "kv_a", "kv_b"]
    return " ".join(role for role in roles if getattr(attention, role) is not None)


def inside(layer, place):
    return place.path.removeprefix(layer.path).lstrip(".")


@pytest.mark.parametrize("name", EXPECTED)
def test_finds_every_part_of(name):
    model, expected = build(name), EXPECTED[name]
    found = structure(model)

    assert {stack.name: (stack.path, len(stack.layers)) for stack in found.stacks} == expected.stacks
    assert found.main == expected.main
    assert found.embeddings.path == expected.embeddings
    assert (found.head.path if found.head else None) == expected.head
    assert found.tied is expected.tied
    assert loss_kind(model) == expected.loss

    layer = found.layers[-1]
    if expected.heads is None:
        assert layer.attentions == ()
    for attention in layer.attentions:
        assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == expected.heads
        assert present(attention) == expected.projections
        assert attention.o.module is model.get_submodule(attention.o.path)
    if expected.heads is not None:
        assert tuple(attention.is_cross for attention in layer.attentions) == expected.cross
    assert (
        tuple(
            (mlp.kind, inside(layer, mlp), inside(layer, mlp.activation) if mlp.activation else None)
            for mlp in layer.mlps
        )
        == expected.mlps
    )


@pytest.mark.parametrize("name", EXPECTED)
def test_every_path_leads_to_its_module(name):
    model = build(name)
    for stack in structure(model).stacks:
        for layer in stack.layers:
            assert model.get_submodule(layer.path) is layer.module
            places = [getattr(mlp, role) for mlp in layer.mlps for role in ("up", "gate", "down", "router")]
            for place in [*layer.attentions, *layer.mlps, *(place for place in places if place)]:
                assert model.get_submodule(place.path) is place.module


def test_gate_up_and_down_are_told_apart():
    llama = structure(build("llama")).layers[0].mlps[0]
    assert [place.path.rpartition(".")[2] for place in (llama.gate, llama.up, llama.down)] == [
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    gated = structure(build("t5-gated")).layers[0].mlps[0]  # act(wi_0) * wi_1
    assert [place.path[-4:] for place in (gated.gate, gated.up, gated.down)] == ["wi_0", "wi_1", "e.wo"]
    fused = structure(build("phi3")).layers[0].mlps[0]
    assert fused.gate == fused.up
    bert = structure(build("bert")).layers[0].mlps[0]
    assert bert.up.path.endswith("0.intermediate.dense") and bert.down.path.endswith("0.output.dense")


def test_bert_output_projection_lies_beside_the_attention():
    attention = structure(build("bert")).layers[1].attentions[0]
    assert attention.path == "bert.encoder.layer.1.attention.self"
    assert attention.o.path == "bert.encoder.layer.1.attention.output.dense"


def test_gpt2_conv1d_counts_as_a_projection():
    layer = structure(build("gpt2")).layers[0]
    assert type(layer.attentions[0].qkv.module).__name__ == "Conv1D"
    assert (layer.mlps[0].up.path, layer.mlps[0].down.path) == (
        "transformer.h.0.mlp.c_fc",
        "transformer.h.0.mlp.c_proj",
    )


def test_gpt2_cross_attention_has_fused_keys_and_values():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, add_cross_attention=True))
    own, cross = structure(model).layers[0].attentions
    assert (present(own), own.is_cross) == ("o qkv", False)
    assert (present(cross), cross.is_cross, cross.num_kv_heads) == ("q o kv", True, 4)


def test_experts_and_their_router():
    for name in ("mixtral", "qwen3-moe", "deepseek-v3"):
        mlp = structure(build(name)).layers[-1].mlps[0]
        assert mlp.num_experts == 4
        assert mlp.experts.path == "model.layers.1.mlp.experts"
        assert mlp.router.path == "model.layers.1.mlp.gate"
    dense, sparse = structure(build("qwen3-moe")).layers
    assert (dense.mlps[0].kind, sparse.mlps[0].kind) == ("gated", "experts")


def test_experts_in_a_list_need_a_router():
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    class Experts(nn.Module):
        def __init__(self, routed):
            super().__init__()
            self.experts = nn.ModuleList(Mlp(8, 16) for _ in range(3))
            self.gate = nn.Linear(8, 3 if routed else 2)

    class Block(nn.Module):
        def __init__(self, routed):
            super().__init__()
            self.moe = Experts(routed)

    (mlp,) = structure(Deep([Block(True), Block(True)])).layers[0].mlps
    assert (mlp.kind, mlp.num_experts, len(mlp.activations)) == ("experts", 3, 3)
    assert (mlp.path, mlp.router.path) == ("blocks.0.moe", "blocks.0.moe.gate")
    assert [mlp.kind for mlp in structure(Deep([Block(False)])).layers[0].mlps] == ["dense"] * 3

    config = SwitchTransformersConfig(**T5, num_experts=4, encoder_sparse_step=2, num_sparse_encoder_layers=1)
    switch = structure(SwitchTransformersForConditionalGeneration(config)).stack("encoder").layers
    sparse = [mlp for layer in switch for mlp in layer.mlps if mlp.kind == "experts"]
    assert sparse and all(mlp.num_experts == 4 and mlp.router.path.endswith("router") for mlp in sparse)


def test_latent_attention_has_values_of_their_own_width():
    attention = structure(build("deepseek-v3")).layers[0].attentions[0]
    assert (attention.head_dim, attention.value_dim) == (12, 8)


def test_shapes_win_over_the_config_after_heads_were_pruned():
    model = build("llama")
    attention = model.model.layers[0].self_attn
    attention.q_proj, attention.o_proj = nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False)
    attention.k_proj, attention.v_proj = nn.Linear(32, 8, bias=False), nn.Linear(32, 8, bias=False)
    first, second = (layer.attentions[0] for layer in structure(model).layers)
    assert (first.num_heads, first.num_kv_heads) == (2, 1)
    assert (second.num_heads, second.num_kv_heads) == (4, 2)


def test_stages_are_laid_end_to_end():
    found = structure(build("swin"))
    assert [layer.path.removeprefix("swin.encoder.layers.") for layer in found.layers] == [
        "0.blocks.0",
        "1.blocks.0",
        "1.blocks.1",
    ]
    assert [layer.attentions[0].num_heads for layer in found.layers] == [1, 2, 2]


def test_encoder_decoder_layers_are_encoder_then_decoder():
    model = build("t5")
    found = structure(model)
    assert len(found.layers) == 4
    assert layer_index(found, "decoder.block.1.layer.0.SelfAttention.q.weight") == 3
    assert found.layers[3].index == 1
    with pytest.raises(StructureError, match="stack must be one of encoder, decoder, got 'vision'"):
        found.stack("vision")


# activations


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 2), ("opt", 2), ("t5", 4), ("llava", 5), ("deepseek-v3", 3)]
)
def test_activation_modules_in_layer_order(name, count):
    model = build(name)
    modules = activation_modules(model)
    assert len(modules) == count
    assert all(model.get_submodule(path) is module for path, module in modules)
    assert len({id(module) for _, module in modules}) == count


def test_found_activations_are_the_ones_that_run():
    model = tiny_llama()
    seen = []
    for path, module in activation_modules(model):
        module.register_forward_hook(
            lambda _module, _inputs, output, path=path: seen.append((path, output.shape))
        )
    model(input_ids=torch.arange(6)[None])
    assert seen == [(f"model.layers.{index}.mlp.act_fn", (1, 6, 64)) for index in range(2)]


def test_functional_activations_are_an_error_that_says_what_to_do():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    layer = structure(model).layers[1]
    assert (layer.attentions[0].num_heads, layer.attentions[0].head_dim) == (2, 4)
    assert layer.attentions[0].o.path == "layers.1.self_attn.out_proj"
    assert (layer.mlps[0].kind, layer.mlps[0].activation) == ("dense", None)
    with pytest.raises(StructureError, match=r"(?s)must be modules, got none in the 2 layers .*nn\.GELU\(\)"):
        activation_modules(model)


# wrapped models


def lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **settings)
    )


def test_peft_wrapped_llama_has_the_same_structure_under_its_own_paths():
    bare, wrapped = structure(tiny_llama()), structure(model := lora(tiny_llama()))
    prefix = "base_model.model."
    assert wrapped.embeddings.path == prefix + bare.embeddings.path
    assert wrapped.head.path == prefix + bare.head.path
    assert [layer.path for layer in wrapped.layers] == [prefix + layer.path for layer in bare.layers]
    for ours, theirs in zip(wrapped.layers, bare.layers, strict=True):
        assert ours.attentions[0].heads == theirs.attentions[0].heads
        assert ours.attentions[0].q.path == prefix + theirs.attentions[0].q.path
        assert type(ours.attentions[0].q.module).__module__.startswith("peft.")
        assert [mlp.kind for mlp in ours.mlps] == ["gated"]
        assert ours.mlps[0].down.path == prefix + theirs.mlps[0].down.path
    assert loss_kind(model) == "causal"
    assert unwrap(model) is model.get_base_model()


def test_adapters_by_layer():
    model = lora(tiny_llama(layers=3), layers_to_transform=[0, 2])
    grouped = adapter_layers(model)
    assert list(grouped) == [0, 2]
    for index, adapters in grouped.items():
        assert [path.rpartition(".")[2] for path, _ in adapters] == ["q_proj", "v_proj", "down_proj"]
        assert all(
            f".layers.{index}." in path and model.get_submodule(path) is module for path, module in adapters
        )
        assert all(module.scaling["default"] for _, module in adapters)


def test_adapters_on_fused_experts():
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    model = get_peft_model(build("mixtral"), config)
    mlp = structure(model).layers[1].mlps[0]
    assert (mlp.kind, mlp.num_experts) == ("experts", 4)
    assert mlp.router.path == "base_model.model.model.layers.1.mlp.gate"
    assert {index: len(adapters) for index, adapters in adapter_layers(model).items()} == {0: 2, 1: 2}


def test_no_adapters_is_an_error():
    with pytest.raises(StructureError, match=r"must carry PEFT adapters .* got none in LlamaForCausalLM"):
        adapter_layers(tiny_llama())


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["bare", "peft"])
def test_every_parameter_knows_its_layer(wrap):
    model = wrap(tiny_llama(layers=11))  # layers.1 is not layers.10
    found = structure(model)
    for name, _ in model.named_parameters():
        pieces = name.split(".")
        expected = int(pieces[pieces.index("layers") + 1]) if "layers" in pieces else None
        assert layer_index(found, name) == expected, name
    assert layer_index(found, found.layers[10].path) == 10


def test_names_of_the_wrapped_and_of_the_bare_model_both_work():
    bare, wrapped = structure(tiny_llama()), structure(lora(tiny_llama()))
    assert layer_index(wrapped, "model.layers.1.mlp.up_proj.weight") == 1
    assert layer_index(bare, "module.base_model.model.model.layers.1.mlp.up_proj.weight") == 1
    assert layer_index(bare, "model.norm.weight") is None


def test_vision_layers_are_in_no_layer_of_the_main_stack():
    found = structure(build("llava"))
    assert layer_index(found, "model.vision_tower.encoder.layers.0.mlp.fc1.weight") is None
    assert layer_index(found, "model.language_model.layers.0.mlp.up_proj.weight") == 0


@pytest.mark.parametrize("child", ["module", "_orig_mod"], ids=["distributed", "compiled"])
def test_wrappers_are_seen_through(child):
    wrapper = nn.Module()
    wrapper.add_module(child, lora(tiny_llama()))
    prefix = f"{child}.base_model.model."
    found = structure(wrapper)
    assert found.layers[1].path == prefix + "model.layers.1"
    assert layer_index(found, prefix + "model.layers.1.mlp.up_proj.weight") == 1
    assert list(adapter_layers(wrapper)) == [0, 1]
    assert loss_kind(wrapper) == "causal"


@pytest.mark.slow
def test_real_compiled_model_is_seen_through():
    model = tiny_llama()
    compiled = torch.compile(model)
    assert unwrap(compiled) is model
    assert structure(compiled).layers[0].path == "_orig_mod.model.layers.0"


# models that are not from transformers


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width)


class Deep(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(8, 3)


def test_residual_mlp_has_layers_and_no_attention():
    model = Deep([Mlp(8, 16) for _ in range(3)])
    found = structure(model)
    assert (found.stacks[0].name, found.stacks[0].path, len(found.layers)) == ("layers", "blocks", 3)
    assert found.layers[2].attentions == ()
    assert (found.layers[2].mlps[0].up.path, found.layers[2].mlps[0].down.path) == (
        "blocks.2.up",
        "blocks.2.down",
    )
    assert [path for path, _ in activation_modules(model)] == ["blocks.0.act", "blocks.1.act", "blocks.2.act"]
    assert (found.embeddings, found.head.path, found.tied) == (None, "out", False)
    with pytest.raises(
        StructureError, match="model must have a loss on labels, got Deep with loss_type None"
    ):
        loss_kind(model)


def test_the_larger_of_two_lists_without_attention_is_the_stack():
    model = Deep([Mlp(8, 16) for _ in range(3)])
    model.heads = nn.ModuleList(Mlp(8, 4) for _ in range(3))
    assert [stack.path for stack in structure(model).stacks] == ["blocks"]


def test_square_layers_in_a_sequence_are_not_a_gate():
    block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    mlp = structure(Deep([nn.ModuleDict({"f": block})])).layers[0].mlps[0]
    assert (mlp.kind, mlp.gate, mlp.up.path, mlp.down.path) == ("dense", None, "blocks.0.f.2", "blocks.0.f.4")


def test_bare_list_of_linears_is_a_stack_where_there_is_nothing_better():
    found = structure(Deep([nn.Linear(8, 8) for _ in range(3)]))
    assert [layer.path for layer in found.layers] == ["blocks.0", "blocks.1", "blocks.2"]
    assert found.layers[0].mlps == ()


def test_no_repeated_blocks_is_an_error_that_shows_the_tree():
    model = nn.Module()
    model.first, model.last = Mlp(4, 8), nn.Linear(4, 2)
    with pytest.raises(StructureError) as raised:
        structure(model)
    text = str(raised.value)
    assert (
        'must hold its blocks in a ModuleList, got none in Module; say where they are with layers="' in text
    )
    assert "  first: Mlp\n  first.up: Linear\n" in text and "  last: Linear" in text


# by hand


def test_layers_by_hand():
    model = build("llava")
    found = structure(model, layers="model.vision_tower.encoder.layers")
    assert (found.main, len(found.layers), found.layers[0].attentions[0].num_heads) == (("vision",), 3, 2)
    assert (
        structure(lora(tiny_llama()), layers="model.layers").layers[1].path
        == "base_model.model.model.layers.1"
    )


def test_layers_by_hand_may_be_a_sequential():
    model = nn.Module()
    model.body = nn.Sequential(Mlp(8, 16), nn.LayerNorm(8), Mlp(8, 16))
    found = structure(model, layers="body")
    assert [layer.path for layer in found.layers] == ["body.0", "body.1", "body.2"]
    assert [len(layer.mlps) for layer in found.layers] == [1, 0, 1]


@pytest.mark.parametrize("path", ["model.layer", "model.layers.0", "model.norm", ""])
def test_wrong_path_by_hand_names_near_ones_and_collapses_the_tree(path):
    with pytest.raises(StructureError) as raised:
        structure(tiny_llama(layers=4), layers=path)
    text = str(raised.value)
    assert text.startswith("layers must be the dotted path of a ModuleList in LlamaForCausalLM")
    assert f", got {path!r}; near paths: model.layers\n" in text
    assert "  model.layers.[0-3]: LlamaDecoderLayer\n" in text
    assert "  model.layers.[0-3].self_attn.q_proj: Linear\n" in text


def test_unknown_heads_do_not_hide_the_layers():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    found = structure(Deep([nn.ModuleDict({"mix": Attention()}) for _ in range(2)]))
    attention = found.layers[1].attentions[0]
    with pytest.raises(
        StructureError, match=r"the heads of blocks\.1\.mix must be known, got neither num_heads"
    ):
        _ = attention.num_heads
    attention.module.num_heads = 2
    found = structure(Deep([nn.ModuleDict({"mix": attention.module})]))
    assert (found.layers[0].attentions[0].head_dim, found.layers[0].attentions[0].num_kv_heads) == (4, 2)


# losses


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "roberta", "t5", "vit"])
def test_loss_kind_is_what_the_models_own_loss_does(name):
    model = build(name).eval()
    tokens = torch.randint(3, 99, (2, 7))
    kind = loss_kind(model)
    if name == "vit":
        inputs, labels = {"pixel_values": torch.rand(2, 3, 16, 16)}, torch.tensor([1, 4])
    else:
        inputs, labels = {"input_ids": tokens}, tokens % 2 if kind == "token" else tokens
    with torch.no_grad():
        output = model(**inputs, labels=labels)
    logits = output.logits
    if kind == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    expected = nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_loss_kind_of_question_answering_and_of_an_encoder_decoder_with_a_classifier():
    from transformers import (
        BertConfig,
        BertForQuestionAnswering,
        BertModel,
        T5Config,
        T5ForTokenClassification,
    )

    assert loss_kind(BertForQuestionAnswering(BertConfig(**TEXT))) == "question"
    assert loss_kind(T5ForTokenClassification(T5Config(**T5))) == "token"
    with pytest.raises(StructureError, match="got BertModel with loss_type None; load it with a head"):
        loss_kind(BertModel(BertConfig(**TEXT)))


def test_tied_follows_the_tensors_and_not_the_config():
    assert structure(tiny_gpt2()).tied
    model = tiny_llama()
    assert not structure(model).tied
    model.lm_head.weight = model.model.embed_tokens.weight
    assert structure(model).tied
    assert structure(lora(model)).tied
