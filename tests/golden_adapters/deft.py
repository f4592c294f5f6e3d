"""Feeds the official functions' activations to DEFT's penalty and density."""

import torch

from salience.methods.features.deft import density, smooth_density, total_density


def run(tensors, parameters):
    names = sorted((name for name in tensors if name.startswith("act_")), key=lambda name: int(name[4:]))
    out = {"density": torch.stack([density(tensors[name]) for name in names], dim=1)}
    for which, eps in enumerate(parameters["parameters"]["eps"]):
        leaves = [tensors[name].clone().requires_grad_() for name in names]
        values = [smooth_density(leaf, eps=eps) for leaf in leaves]
        loss = total_density(values, [False] * len(values)).mean()
        out[f"penalty_{which}"] = torch.stack(values, dim=1).detach()
        out[f"loss_{which}"] = loss.detach().reshape(1)
        for layer, grad in enumerate(torch.autograd.grad(loss, leaves)):
            out[f"grad64_{which}_{layer}"] = grad
    return out


SKIPS: set[str] = set()
# the inputs, and the official fp32 gradients, which are noise where a^2 is much larger than eps
SKIP_PREFIXES = ("act_", "grad_")
TOLERANCE = {"rtol": 1e-4, "atol": 1e-9}
TOLERANCES = {
    name: {"rtol": 0.0, "atol": 1e-6} for name in ("density", "penalty_0", "penalty_1", "loss_0", "loss_1")
}
