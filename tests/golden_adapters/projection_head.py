"""The fixed head, the symmetric ReLU, and the supervised contrastive loss with one and two views."""

import salience as sal

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
SKIPS = {"h", "labels"}


def _loss(head, h, labels, temperature):
    h = h.clone().requires_grad_()
    loss = sal.supervised_contrastive(head(h), labels, temperature=temperature)
    loss.backward()
    return loss.detach().reshape(1), h.grad


def run(tensors, parameters):
    p = parameters["parameters"]
    h, labels, temperature = tensors["h"], tensors["labels"], p["temperature"]
    head = sal.make_head("fixed", h.shape[1], kappa=p["kappa"])
    loss, grad = _loss(head, h, labels, temperature)
    two, two_grad = _loss(head, h, labels[: len(h) // 2], temperature)
    bare, _ = _loss(sal.make_head("none", h.shape[1]), h, labels, temperature)
    return {
        "reweights": sal.fixed_weights(h.shape[1], p["kappa"]),
        "z": head(h),
        "loss_supcon": loss,
        "grad_supcon": grad,
        "loss_supcon_two_views": two,
        "grad_supcon_two_views": two_grad,
        "loss_no_head": bare,
        "symmetric_relu": sal.symmetric_relu(h, p["symmetric_relu_b"]),
    }
