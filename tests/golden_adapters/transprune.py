"""Feeds the golden module's input and output, and the golden hidden states through a Llama layer with the stored
weights, to salience.
"""

import torch

from salience.hosts.attention import ask, received
from salience.hosts.choices import View, keep_best
from salience.hosts.sequences import gathering, renumbered, rows_at
from salience.methods.tokens.transprune import score, transition


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


def run(tensors, parameters):
    parameters = parameters["params"]
    before = tensors["ttv_before"]
    everything = torch.ones(before.shape[:2], dtype=torch.bool)
    ttv = transition(before, tensors["ttv_after"], everything, direction="signed", together=True)

    layer, rotary = llama_layer(tensors, parameters)
    hidden = tensors["features"]
    places = torch.arange(hidden.shape[1])[None]
    first, present = parameters["image_start"], parameters["image_tokens_now"]
    vision = (places >= first) & (places < first + present)
    view = View(
        parameters["rank_layer_0based"],
        hidden,
        vision,
        torch.ones_like(vision),
        places,
        vision.sum(-1),
        None,
        {},
        lambda: ask(layer, layer.self_attn, hidden, rotary(hidden, places)),
    )
    moved = tensors["acc_ttv"].sum(0, keepdim=True)
    guided = received(view.attention(), view.behind(), view.valid)
    # the number that the prompt had is not stored, the number that is kept is
    choice = keep_best(view, score(moved, guided, vision, 0.5), torch.tensor([parameters["keep"]]))
    order, kept = gathering(choice.keep | ~vision, None, left=False)
    return {
        "ttv": ttv,
        "out_features": rows_at(hidden, order),
        "out_position_ids": renumbered(kept),
        "kept_index": order[0],
        "acc_ttv_after": rows_at(tensors["acc_ttv"].T[None], order)[0].T,
    }


SKIPS = (
    "ttv_before", "ttv_after", "features", "acc_ttv", "ln_weight", "q_weight", "k_weight",
)  # fmt: skip
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}
