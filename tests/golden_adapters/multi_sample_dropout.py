"""Feeds the golden masks to salience's own head and loss."""

import torch
from torch import nn

from salience.methods.features.multi_sample_dropout import MultiSampleHead, dropped, multi_sample_loss


class Masks(nn.Dropout):
    """A Dropout whose masks are given: [M, B, D] for a batch that is repeated M times."""

    def __init__(self, keep, p):
        super().__init__(p)
        self.keep = keep

    def forward(self, features):
        return dropped(features, self.keep.flatten(0, 1), self.p) if self.training else features


def linear(weight, bias):
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


def run(tensors, parameters):
    p, labels = parameters["parameters"], tensors["y"]
    layers = linear(tensors["W1"], tensors["b1"]), linear(tensors["W2"], tensors["b2"])
    first, second = Masks(tensors["keep1"], p["p1"]), Masks(tensors["keep2"], p["p2"])
    head = MultiSampleHead(nn.Sequential(first, layers[0], nn.ReLU(), second, layers[1]), p["M"])
    features = tensors["feat"].clone().requires_grad_()
    logits = head(features)
    loss = multi_sample_loss(logits, labels)
    loss.backward()
    out = {
        "logits": logits,
        "loss_per_sample": torch.stack([multi_sample_loss(one, labels) for one in logits]),
        "loss": loss,
        "loss_of_mean_logits": multi_sample_loss(logits, labels, reduce="logits"),
        "eval_logits": head.eval()(features),
        "grad_feat": features.grad,
    }
    for number, layer in enumerate(layers, 1):
        out |= {f"grad_W{number}": layer.weight.grad, f"grad_b{number}": layer.bias.grad}
    return {name: value.detach() for name, value in out.items()}


SKIPS = {"feat", "W1", "b1", "W2", "b2", "y", "keep1", "keep2"}
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
