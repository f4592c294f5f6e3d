"""The official detector's scores, and an independent reference's masked attention and relative losses."""

import torch

from salience.hosts.attention import AttentionCall
from salience.hosts.head_masks import attend
from salience.methods.samples.attention_influence import important, retrieval_score, score


def run(tensors, parameters):
    rules = parameters["params"]
    heads = retrieval_score(
        tensors["attn"], tensors["prompt_ids"], tensors["generated"], tuple(rules["needle"])
    )
    call = AttentionCall(
        torch.nn.Identity(),
        tensors["q"],
        tensors["k"],
        tensors["v"],
        None,
        tensors["q"].shape[-1] ** -0.5,
        {},
    )
    visible = ~tensors["pad_left"]
    return {
        "retrieval_score": heads,
        "n_important": torch.tensor([len(important(heads, rules["top"]))]),
        "out_base": attend(call, attended=visible),
        "out_masked": attend(call, off=rules["heads_masked"], attended=visible),
        "score": score(tensors["loss_base"], tensors["loss_ref"]),
    }


SKIPS = {"prompt_ids", "generated", "attn", "q", "k", "v", "pad_left", "loss_base", "loss_ref"}
TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
