"""Feeds the golden hidden states to a Llama layer with the stored weights, and its queries and keys to salience."""

import torch
from golden_layers import llama_layer

from salience.core.losses import IGNORE
from salience.hosts.attention import ask
from salience.hosts.choices import View, keep_best, questions
from salience.hosts.sequences import gathering, renumbered, rows_at
from salience.methods.tokens.pyramiddrop import score, spend


def run(tensors, parameters):
    parameters = parameters.get("params", parameters)
    layer, rotary = llama_layer(tensors, parameters)
    hidden, valid = tensors["features"], tensors["attention_mask"].bool()
    places = torch.arange(hidden.shape[1])
    first, count = (torch.tensor(parameters[name]) for name in ("image_start", "image_tokens_now"))
    vision = (places >= first[:, None]) & (places < (first + count)[:, None])
    out = {}
    for mode, labels in (("eval", None), ("train", tensors["labels"])):
        view = View(
            parameters["rank_layer_0based"],
            hidden,
            vision,
            valid,
            places.expand_as(valid),
            torch.tensor(parameters["image_tokens_initial"]),
            labels,
            {},
            lambda: ask(layer, layer.self_attn, hidden, rotary(hidden, tensors["position_ids"])),
        )
        ratio = parameters["ratio_list_with_leading_1"][parameters["stage_index"] + 1]
        scores = score(view.attention(), questions(view), valid)
        choice = keep_best(view, scores, spend(view.count, ratio))
        order, kept = gathering(
            valid & (choice.keep | ~vision), None, left=parameters["padding_side"] == "left"
        )
        out[f"{mode}_features"] = rows_at(hidden, order).masked_fill(~kept.unsqueeze(-1), 0.0)
        out[f"{mode}_mask"] = kept.to(torch.uint8)
        out[f"{mode}_position_ids"] = renumbered(kept).masked_fill(~kept, 0)
        out[f"{mode}_kept_index"] = order.masked_fill(~kept, -1)
        if labels is not None:
            out["train_labels"] = labels.gather(1, order).masked_fill(~kept, IGNORE)
    return out


SKIPS = ("features", "attention_mask", "position_ids", "labels", "ln_weight", "q_weight", "k_weight")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
