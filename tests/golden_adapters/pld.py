"""Feeds the stored logits of the reference to salience's Plackett-Luce loss."""

import torch

from salience.methods.classes.pld import PlackettLuceLoss, rank_weights, teacher_order

SKIPS = {"student_logits", "teacher_logits", "labels"}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def run(tensors, parameters):
    tau = parameters["params"]["tau"]
    student = tensors["student_logits"].clone().requires_grad_()
    teacher, labels = tensors["teacher_logits"], tensors["labels"]
    loss = PlackettLuceLoss(tau)(student, teacher, labels)
    order = teacher_order(teacher, labels)
    return {
        "loss_per_row": PlackettLuceLoss(tau, reduction="none")(student, teacher, labels).detach(),
        "loss_mean": loss.detach(),
        "grad_mean": torch.autograd.grad(loss, student)[0],
        "teacher_optimal_perm": order,
        "alpha_in_rank_order": rank_weights(teacher, order, tau),
        "loss_per_row_uniform_alpha": PlackettLuceLoss(tau, weights="uniform", reduction="none")(
            student, teacher, labels
        ).detach(),
    }
