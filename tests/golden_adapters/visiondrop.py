"""Feeds the golden tensors of both official stages to salience: a Llama layer with the stored weights, and a tower's
attention as the queries and keys that give it.
"""

import torch
from golden_layers import llama_layer

from salience.hosts.attention import AttentionCall, ask
from salience.hosts.choices import View
from salience.hosts.sequences import gathering, renumbered, rows_at
from salience.methods.tokens._merging import choose
from salience.methods.tokens.visiondrop import head_keys, measure, score


def view_of(hidden, vision, call):
    valid = torch.ones_like(vision)
    source = torch.arange(vision.shape[1]).expand_as(vision)
    return View(1, hidden, vision, valid, source, vision.sum(-1), None, {}, call)


def decoder_stage(tensors, parameters):
    layer, rotary = llama_layer(tensors, parameters)
    hidden = tensors["features"]
    places = torch.arange(hidden.shape[1])[None]
    first, count = parameters["image_start"], parameters["image_tokens_now"]
    vision = (places >= first) & (places < first + count)
    view = view_of(hidden, vision, lambda: ask(layer, layer.self_attn, hidden, rotary(hidden, places)))
    call = view.attention()
    scores = score(call, vision, view.valid & ~view.behind(), causal=True)
    counts = parameters["dominant"], parameters["contextual"]
    choice = choose(view, torch.zeros_like(places), scores, head_keys(call), counts)
    order, kept = gathering(choice.keep | ~vision, choice.order, left=False)
    return {
        "out_features": rows_at(choice.hidden, order),
        "kept_index": order.masked_fill(choice.merged.gather(1, order), -1)[0],
        "out_position_ids": renumbered(kept),
    }


def encoder_stage(tensors, parameters):
    attention, hidden = tensors["enc_attention"], tensors["enc_hidden"]
    # queries whose softmax against unit keys is the stored attention
    keys = torch.eye(attention.shape[-1]).expand_as(attention)
    call = AttentionCall(None, attention.log(), keys, None, None, 1.0, {"is_causal": False})
    scores = measure(call, classed=True)[..., 0]
    view = view_of(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool), None)
    counts = parameters["enc_dominant_incl_cls"], parameters["enc_contextual"]
    one_picture = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    choice = choose(view, one_picture, scores, tensors["enc_key_mean"], counts)
    order, _ = gathering(choice.keep, choice.order, left=False)
    ranked = scores.masked_fill(~choice.keep | choice.merged, -1.0).argsort(-1, descending=True)
    return {
        "enc_out": rows_at(choice.hidden, order),
        "enc_dominant_index": ranked[:, : counts[0]],
    }


def run(tensors, parameters):
    parameters = parameters["params"]
    return decoder_stage(tensors, parameters) | encoder_stage(tensors, parameters)


SKIPS = (
    "features", "ln_weight", "q_weight", "k_weight", "enc_attention", "enc_hidden", "enc_key_mean",
)  # fmt: skip
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
