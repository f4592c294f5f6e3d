"""The official selection and token scores, and the corrected choice of experts, from salience's own functions."""

import random

import torch

from salience.core.sample_scores import entropies, error_norms, gradient_norms, perplexities
from salience.methods.samples._adapt_inf_official import (
    official_choice,
    official_cover,
    official_prune,
    official_shares,
)
from salience.methods.samples._adapt_inf_spend import choose_expert


def run(tensors, parameters):
    parameters, names = parameters["params"], parameters["score_rows"]
    sizes, cluster, scores = tensors["sizes"].tolist(), tensors["cluster"], tensors["scores"]
    kept, most = official_prune(tensors["emb"], cluster, parameters["keep"])
    out = {
        "budget_per_cluster": torch.tensor(official_shares(sizes, parameters["budget"])),
        "prune_budget_per_cluster": torch.tensor(official_shares(sizes, parameters["keep"])),
        "pruned_keep_idx": kept,
        "max_sim_upper": most,
    }
    for name, choose in (("", official_choice), ("_fixed", choose_expert)):
        chosen = [choose(scores[:, cluster == index]) for index in range(len(sizes))]
        out[f"picked_expert{name}"] = torch.tensor([expert for expert, _ in chosen])
        out[f"entropy_bits{name}"] = torch.tensor([bits for _, bits in chosen], dtype=torch.float64)
    grounding = scores[names.index("ig")]
    draw = random.Random(parameters["pyseed"])
    out["ccs_idx_ig"] = torch.tensor(
        official_cover(grounding, parameters["budget"], parameters["bins"], draw)
    )
    logits, labels = tensors["tok.logits"], tensors["tok.labels"]
    return out | {
        "tok.entropy": entropies(logits, labels, everywhere=True),
        "tok.el2n": error_norms(logits, labels),
        "tok.ppl_official": perplexities(logits, labels, of_tokens=True),
        "tok.ppl_true": perplexities(logits, labels),
        "tok.grand": gradient_norms(tensors["tok.grad_vec"][None]),
    }


SKIPS = {"cluster", "emb", "scores", "sizes", "tok.grad_vec", "tok.labels", "tok.logits"}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
TOLERANCES = {"max_sim_upper": {"rtol": 1e-6, "atol": 1e-6}, "tok.entropy": {"rtol": 1e-8, "atol": 1e-8}}
