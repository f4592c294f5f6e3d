"""Feeds the golden module's input and output, and the golden hidden states through a Llama layer with the stored
weights, to salience.
"""

import torch
from golden_layers import llama_layer

from salience.hosts.attention import ask, received
from salience.hosts.choices import View, keep_best
from salience.hosts.sequences import gathering, renumbered, rows_at
from salience.methods.tokens.transprune import score, transition


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
