"""Feeds the golden inputs of the official Maestro layers to salience's own public functions."""

import torch
import torch.nn.functional as F
from torch import nn

import salience as sal
from salience.methods.ranks.maestro import importance, keep_mask, split


def linear_of(weight, bias):
    """A factored layer in training mode: in eval mode an untrained one answers with its dense weight."""
    model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0]).to(weight.dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight)
        model[0].bias.copy_(bias)
    sal.decompose(model)
    return model[0]


def run(tensors, parameters):
    t, p = tensors, parameters
    layer = linear_of(t["lin.weight"], t["lin.bias"])
    U, V = split(t["lin.weight"])
    torch.testing.assert_close(U @ V, t["svd.U"] @ t["svd.V"], rtol=0, atol=1e-10)
    with torch.no_grad():
        layer.U.copy_(t["U"])
        layer.V.copy_(t["V"])
    out = {}
    full = layer.U.shape[1]
    for rank in p["ranks"]:
        layer.cut = rank
        out[f"y.{rank}"] = layer(t["x"]).detach()
    layer.cut = None
    out["y.full"] = layer(t["x"]).detach()
    for kind, lasso in (("hier", sal.hierarchical_lasso), ("plain", sal.group_lasso)):
        values = lasso(layer.U, layer.V)
        out[f"gl.{kind}"] = values.detach()
        grads = torch.autograd.grad(values.sum(), (layer.U, layer.V))
        out[f"gl_gradU.{kind}"], out[f"gl_gradV.{kind}"] = grads
        scores = importance(layer.U, layer.V, hierarchical=kind == "hier")
        kept = keep_mask(scores, p["threshold"])
        out[f"imp.{kind}"], out[f"keep.{kind}"] = scores, kept
        out[f"y.after_{kind}"] = layer.run(t["x"], layer.U[:, kept], layer.V[kept]).detach()
    layer.cut = p["ranks"][0]
    loss = (
        F.mse_loss(layer(t["x"]), t["target"])
        + p["lambda_gl"] * sal.hierarchical_lasso(layer.U, layer.V).sum()
    )
    out["loss"] = loss.detach().reshape(1)
    out["loss_gradU"], out["loss_gradV"] = torch.autograd.grad(loss, (layer.U, layer.V))
    sal.shrink({"linear": layer}, p["threshold"], hierarchical=False)
    out["y.after_physical_prune"] = layer.factors()(t["x"]).detach()
    assert layer.U.shape[1] == full
    out.update(convolution(t, p["conv"]))
    # the order of a pass is numpy's: each stored pair has to be among the drawn ones, as often as it is stored
    draws = sal.OrderedRanks(t["sampler.widths"].tolist(), seed=p["numpy_seed_sampler"])
    drawn = [draws.at(step) for step in range(len(draws))]
    stored = list(zip(t["sampler.layer"].tolist(), t["sampler.rank"].tolist()))
    matched = [drawn.pop(drawn.index(pair)) for pair in stored]
    assert not drawn
    out["sampler.layer"] = torch.tensor([layer for layer, _ in matched])
    out["sampler.rank"] = torch.tensor([rank for _, rank in matched])
    return out


def convolution(t, p):
    model = nn.Sequential(nn.Conv2d(p["cin"], p["cout"], p["k"], padding=p["k"] // 2).to(t["conv.x"].dtype))
    with torch.no_grad():
        model[0].weight.copy_(t["conv.weight"])
        model[0].bias.copy_(t["conv.bias"])
    sal.decompose(model)
    layer = model[0]
    out = {"conv.y_full": layer(t["conv.x"]).detach()}
    layer.cut = layer.rank // 2
    out["conv.y_half"] = layer(t["conv.x"]).detach()
    out["conv.gl_hier"] = sal.hierarchical_lasso(layer.U, layer.V).detach()
    return out


SKIPS = {"x", "target", "U", "V", "lin.weight", "lin.bias", "svd.U", "svd.V", "conv.weight", "conv.bias", "conv.x",
         "sampler.widths"}  # fmt: skip
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
