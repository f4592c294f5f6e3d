"""Tiny mixtures of experts of transformers: 8 experts, 2 for each token, with what sets each family apart."""

import torch

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "moe_intermediate_size": 24,
}
SHARED = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
# family -> class names, settings, and the layers that have experts
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 8}, 2),
    "qwen2": ("Qwen2Moe", {"num_experts": 8, **SHARED}, 2),
    "qwen2-renormalised": ("Qwen2Moe", {"num_experts": 8, "norm_topk_prob": True, **SHARED}, 2),
    "qwen3": ("Qwen3Moe", {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8}, 2),
    "olmoe": ("Olmoe", {"num_experts": 8}, 2),
    "deepseek2": ("DeepseekV2", {"n_routed_experts": 8, "routed_scaling_factor": 2.0, **LATENT}, 2),
    "deepseek2-groups": (
        "DeepseekV2",
        {
            "n_routed_experts": 8,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
            **LATENT,
        },
        2,
    ),
    "deepseek3": (
        "DeepseekV3",
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, **LATENT},
        2,
    ),
}


def tiny_mixture(family="mixtral", seed=0, **settings):
    """A model in eval mode whose router has opinions, and a correction bias where it can have one."""
    import transformers

    name, own, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **own, **settings})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("gate.weight", "e_score_correction_bias")):
                value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    return model


def demonstrations(rows=3, length=10, seed=0):
    """One batch whose last row is padded, on the right."""
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def logits_of(model, batch=None):
    """[rows, length, vocabulary], at places that are not padding."""
    batch = demonstrations(seed=1) if batch is None else batch
    with torch.no_grad():
        return model(**batch).logits[batch["attention_mask"].bool()]
