"""Feeds the golden layer to peft's LoRA layer, focused by ALLoRA, and reads what autograd leaves."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import salience as sal
from salience.methods.weights.allora import row_norms, scales


def _layer(tensors):
    """A peft LoRA layer of the file's sizes, float64, holding its W, A and B."""
    weight, A, B = tensors["W"], tensors["A"], tensors["B"]
    plain = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False).double())
    model = get_peft_model(plain, LoraConfig(r=len(A), lora_alpha=len(A), target_modules=["0"])).double()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.copy_(weight)
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)
    return model, layer


def _pass(tensors, method):
    model, layer = _layer(tensors)
    if method is not None:
        sal.focus(model, method)
    x = tensors["x"].clone().requires_grad_()
    y = model(x)
    y.backward(tensors["dy"])
    return {
        "y": y.detach(),
        "grad_A": layer.lora_A["default"].weight.grad,
        "grad_B": layer.lora_B["default"].weight.grad,
        "grad_x": x.grad,
    }


def run(tensors, parameters):
    eta = parameters["parameters"]["eta"]
    norms = row_norms(tensors["A"], tensors["B"])
    out = {"row_norm": norms, "scale": scales(norms, eta), **_pass(tensors, sal.ALLoRA(eta=eta))}
    plain = _pass(tensors, None)
    out |= {"plain_grad_A": plain["grad_A"], "plain_grad_B": plain["grad_B"]}
    output_dependent = _pass(tensors, sal.ALLoRA(eta=eta, variant="output"))
    out |= {"od_grad_A": output_dependent["grad_A"], "od_grad_B": output_dependent["grad_B"]}
    return out | {"asf_y": _pass(tensors, sal.ALLoRA(eta=eta, variant="asf"))["y"]}


SKIPS = {"W", "A", "B", "x", "dy"}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
