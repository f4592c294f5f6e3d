"""Layers made of the weights that golden files store, for the adapters."""


def llama_layer(tensors, parameters):
    """A decoder layer and a rotary embedding of transformers with the stored norm, query and key weights."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=tensors["features"].shape[-1],
        num_attention_heads=parameters["num_heads"],
        num_key_value_heads=parameters["num_key_value_heads"],
        head_dim=parameters["head_dim"],
        rms_norm_eps=parameters["rms_norm_eps"],
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0)
    layer.load_state_dict(
        {
            "input_layernorm.weight": tensors["ln_weight"],
            "self_attn.q_proj.weight": tensors["q_weight"],
            "self_attn.k_proj.weight": tensors["k_weight"],
        },
        strict=False,
    )
    return layer.eval(), LlamaRotaryEmbedding(config)
