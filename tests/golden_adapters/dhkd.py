"""Feeds the stored logits of the official losses and of `ga_backward` to salience's own."""

import torch

from salience.claims._distillation import soft_targets
from salience.methods.classes.dhkd import BinaryKLLoss, DualHead, aligned_backward

INPUTS = ("x", "y", "teacher", "backbone_w", "head_main_w", "head_aux_w")
SKIPS = {"student_logits", "teacher_logits", *(f"ga_{name}" for name in INPUTS)}
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}


def run(tensors, parameters):
    given = parameters["params"]
    teacher, tau = tensors["teacher_logits"], given["binary_T"]
    losses = {
        "bkl": BinaryKLLoss(tau, form="binary_kl"),
        "bkln": BinaryKLLoss(tau),
        "kd": lambda student, teacher: soft_targets(student, teacher, given["kd_T"]),
    }
    out = {}
    for name, function in losses.items():
        student = tensors["student_logits"].clone().requires_grad_()
        loss = function(student, teacher)
        out |= {f"{name}_loss": loss.detach(), f"{name}_grad": torch.autograd.grad(loss, student)[0]}
    return out | aligned(tensors, given)


def aligned(tensors, given):
    """The gradients of both losses on one backbone and two heads without biases."""
    weights = {name: tensors[f"ga_{name}_w"].clone() for name in ("backbone", "head_main", "head_aux")}
    (width, inputs), (classes, _) = weights["backbone"].shape, weights["head_main"].shape
    backbone = torch.nn.Linear(inputs, width, bias=False, dtype=torch.float64)
    heads = DualHead(torch.nn.Linear(width, classes, bias=False, dtype=torch.float64))
    heads.auxiliary.outer = torch.nn.Linear(width, classes, bias=False, dtype=torch.float64)
    parameters = dict(
        zip(weights, (backbone.weight, heads.main.weight, heads.auxiliary.outer.weight), strict=True)
    )
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    main, auxiliary = heads(torch.tanh(backbone(tensors["ga_x"])))
    first = given["gamma"] * torch.nn.functional.cross_entropy(main, tensors["ga_y"])
    second = given["alpha"] * BinaryKLLoss(given["binary_T"])(auxiliary, tensors["ga_teacher"])
    raw = [torch.autograd.grad(loss, backbone.weight, retain_graph=True)[0] for loss in (first, second)]
    aligned_backward(first, second, parameters.values(), scope="all")
    return {
        "ga_dot_backbone": (raw[0] * raw[1]).sum(),
        "ga_losses": torch.stack([first, second]).detach(),
        **{f"ga_grad_{name}": parameter.grad for name, parameter in parameters.items()},
    }
