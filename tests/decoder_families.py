"""Tiny causal decoders of many families, made from config classes: what chosen key blocks have to work in."""

import torch

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _make(config, model, attn="sdpa", **settings):
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, config)(**{**_SIZES, **settings}, attn_implementation=attn)
    return getattr(transformers, model)(made).eval()


# name -> how it is made; sliding windows are shorter than the tests' prompts
FAMILIES = {
    "llama": lambda **k: _make("LlamaConfig", "LlamaForCausalLM", **k),
    "llama, one key head": lambda **k: _make(
        "LlamaConfig", "LlamaForCausalLM", **{"num_key_value_heads": 1, **k}
    ),
    "qwen2": lambda **k: _make("Qwen2Config", "Qwen2ForCausalLM", **k),
    "qwen2, sliding": lambda **k: _make(
        "Qwen2Config",
        "Qwen2ForCausalLM",
        **{"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1, **k},
    ),
    "qwen3": lambda **k: _make("Qwen3Config", "Qwen3ForCausalLM", **k),
    "mistral": lambda **k: _make("MistralConfig", "MistralForCausalLM", **{"sliding_window": None, **k}),
    "mistral, sliding": lambda **k: _make(
        "MistralConfig", "MistralForCausalLM", **{"sliding_window": 40, **k}
    ),
    "gemma2": lambda **k: _make(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        **{
            "sliding_window": 40,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "attn": "eager",
            **k,
        },
    ),
    "gemma3": lambda **k: _make(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        **{
            "sliding_window": 40,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            **k,
        },
    ),
    "phi3": lambda **k: _make("Phi3Config", "Phi3ForCausalLM", **k),
    "gpt_neox": lambda **k: _make("GPTNeoXConfig", "GPTNeoXForCausalLM", **k),
    "mixtral": lambda **k: _make(
        "MixtralConfig", "MixtralForCausalLM", **{"num_local_experts": 3, "num_experts_per_tok": 2, **k}
    ),
    "gpt2": lambda **k: _make(
        "GPT2Config",
        "GPT2LMHeadModel",
        **{"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512, **k},
    ),
}


def prompts(lengths=(96, 61, 83), seed=0, side="left"):
    """Ragged prompts as input_ids and attention_mask."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place] = torch.randint(3, 64, (length,), generator=draw)
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
