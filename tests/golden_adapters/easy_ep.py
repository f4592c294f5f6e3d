"""The official script's scores and masks, and the official server's routing, from salience's own functions."""

import torch

from salience.hosts.experts import Routed, select
from salience.methods.experts._easy_ep_routing import route
from salience.methods.experts.easy_ep import score


def _layer(tensors, layer, experts):
    return Routed(*(tensors[name][layer] for name in ("idx", "weight", "norm", "cos")), experts)


def _set(weights, ids, stored_ids):
    """Rows are sets: put each row in the order of the stored one where it is the same set, else leave it."""
    order = (stored_ids[:, :, None] == ids[:, None, :]).int().argmax(-1)
    return weights.gather(1, order), ids.gather(1, order)


def run(tensors, parameters):
    scores = torch.stack(
        [score(_layer(tensors, i, parameters["experts"])) for i in range(parameters["layers"])]
    )
    hits = torch.stack(
        [torch.bincount(ids.flatten().long(), minlength=parameters["experts"]) for ids in tensors["idx"]]
    )
    mask = torch.zeros_like(scores, dtype=torch.uint8)
    mask.scatter_(1, select(scores, hits, parameters["target_number"]), 1)
    out = {"scores": scores.float(), "mask_bits": mask}
    rules = parameters["route"]
    for name, ids_name, keep in (
        ("route.weights", "route.ids_local", tensors["route.keep"].bool()),
        ("route.weights_full", "route.ids_full", torch.ones(rules["n_experts"], dtype=torch.bool)),
    ):
        weights, ids = route(
            tensors["route.gate_logits"],
            tensors["route.bias"],
            keep,
            groups=rules["n_group"],
            chosen=rules["topk_group"],
            top_k=rules["top_k"],
            renormalize=rules["renormalize"],
            official=True,
        )
        out[name], out[ids_name] = _set(weights, ids, tensors[ids_name].long())
    return out


SKIPS = {"lens", "cos", "norm", "weight", "idx", "route.bias", "route.gate_logits", "route.keep"}
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
TOLERANCES = {name: {"rtol": 0, "atol": 0} for name in ("mask_bits", "route.ids_local", "route.ids_full")}
