"""The official solver's rows, AdamR's trajectories and MergeLM's masks, from salience's own functions."""

import torch

from salience.methods.weights._darex_divisors import phi, row_divisors
from salience.methods.weights._darex_masks import magnitude_mask, random_mask
from salience.methods.weights.darex import AdamR


def _rows(tensors, p, dtype, **settings):
    c = tensors["c"].to(dtype)
    settings = {"stop_share": p["stop_iter"], **settings}
    return row_divisors(
        c.sum(1), (c**2).sum(1), 1 - p["p"], eta=p["eta"], gamma=p["prob"], bias_sign="official", **settings
    )


def _trajectory(tensors, p, norm):
    start = f"adamr.{norm}."
    count = sum(key.startswith(f"{start}init.") for key in tensors)
    weights = [torch.nn.Parameter(tensors[f"{start}init.{i}"].clone()) for i in range(count)]
    optimizer = AdamR(
        weights,
        {weight: tensors[f"{start}pre.{i}"] for i, weight in enumerate(weights)},
        lr=p["lr"],
        betas=tuple(p["betas"]),
        eps=p["eps"],
        decay=p["weight_decay"],
        norm=norm.lower(),
    )
    found = {}
    for step in range(p["steps"]):
        for index, weight in enumerate(weights):
            weight.grad = tensors[f"{start}grad.{step}.{index}"].clone()
        optimizer.step()
        found |= {f"{start}param.{step}.{i}": weight.detach().clone() for i, weight in enumerate(weights)}
    return found


def run(tensors, parameters):
    solver, dare = parameters["q_solver"], parameters["dare"]
    delta, keep = tensors["delta"], 1 - dare["drop_rate"]
    mask = random_mask(delta.shape, keep, torch.Generator().manual_seed(dare["torch_seed"]))
    rate = parameters["magnitude_rate"]
    kept = torch.where(magnitude_mask(delta, 1 - rate), delta, 0.0)
    dropped = torch.where(mask, delta, 0.0)
    out = {
        "q_rows": _rows(tensors, solver, torch.float16),
        "q_rows_nostop": _rows(tensors, solver, torch.float16, stop_share=2.0),
        "q_rows_ref64": _rows(tensors, solver, torch.float64),
        "q_rows_nostop_ref64": _rows(tensors, solver, torch.float64, stop_share=2.0),
        "phi": torch.tensor([phi(p) for p in tensors["phi_p"].tolist()], dtype=torch.float64),
        "dare_keep_mask": mask.to(torch.uint8),
        "dare_random_norescale": dropped,
        "dare_random": dropped / keep,
        "darex_q": dropped / dare["q"],
        "magnitude": kept,
        "magnitude_rescaled": kept / (1 - rate),
    }
    for norm in ("L1", "L2"):
        out |= _trajectory(tensors, parameters["adamr"], norm)
    return out


SKIPS = {"c", "delta", "phi_p"}
SKIP_PREFIXES = tuple(f"adamr.{norm}.{kind}" for norm in ("L1", "L2") for kind in ("init", "pre", "grad"))
TOLERANCE = {"rtol": 1e-6, "atol": 1e-7}
TOLERANCES = {name: {"rtol": 0, "atol": 1e-6} for name in ("q_rows", "q_rows_nostop")}
