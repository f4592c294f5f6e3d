"""Feeds the golden inputs of the official reweighting code to salience's own functions."""

import torch

from salience.core.losses import sample_losses, token_losses
from salience.methods.samples.loss_reweighting import rank_loss, scaled_losses, score, spend

STRATEGIES = ("linupper", "quadratic", "extremes")


def run(tensors, parameters):
    p = parameters["params"]
    ranks, per_rank = p["W"], p["B"]
    logits = tensors["logits"].clone().requires_grad_()
    losses, active = token_losses(logits.flatten(0, 1), tensors["labels"].flatten(0, 1))
    means, counts = sample_losses(losses, active)
    out = {"sample_loss": means.view(ranks, per_rank), "num_active": counts.view(ranks, per_rank).long()}
    present = counts > 0
    out["h"] = scaled_losses(means.detach(), present, delta=p["delta"])
    for strategy in STRATEGIES:
        out[f"{strategy}.f"] = score(out["h"], strategy, delta=p["delta"])
        for r in p["rs"]:
            weights = spend(out[f"{strategy}.f"], present, temperature=r)
            name = f"{strategy}.r{r}"
            out[f"{name}.weights"] = weights
            for form, per in (("fsdp", "sequence"), ("gpt2", "token")):
                rows = zip(weights.view(ranks, -1), means.view(ranks, -1), counts.view(ranks, -1))
                out[f"{name}.loss_rank_{form}"] = torch.stack(
                    [rank_loss(*row, ranks, per=per) for row in rows]
                )
    out["linupper.grad_logits_fsdp"] = torch.autograd.grad(
        out[f"linupper.r{p['rs'][0]}.loss_rank_fsdp"].mean(), logits, retain_graph=True
    )[0]
    return {name: value.detach() for name, value in out.items()}


# the official "upper" strategy is linear without a cap; the paper's LinUpper is the capped one, and the name is
# used for both in the official repositories, so salience does not offer it
SKIPS = {"logits", "labels"}
SKIP_PREFIXES = ("upper.",)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
