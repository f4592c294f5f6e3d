"""Feeds the golden reference and model logits to salience's own functions."""

from salience.core.losses import token_losses
from salience.methods.tokens.prior import score, segments, spend


def run(tensors, parameters):
    alpha = parameters["params"]["alpha"]
    labels, logits = tensors["labels"], tensors["logits"].clone().requires_grad_()
    losses, active = token_losses(logits, labels)
    reference, _ = token_losses(tensors["ref_logits"], labels)
    weights = score(-reference, active, alpha)
    normalised = spend(weights, segments(active))
    plain = spend(score(-reference, active, 0.0), segments(active))
    tokens = active.sum()
    mean = (normalised * losses).sum() / tokens
    mean.backward()
    return {
        "w": weights[:, 1:],
        "w_normalised": normalised[:, 1:],
        "loss_sum_per_caption": (normalised * losses).sum(-1).detach(),
        "loss_token_mean": mean.detach().view(1),
        "ntp_token_mean": ((plain * losses).sum() / tokens).detach().view(1),
        "dloss_dlogits": logits.grad,
    }


SKIPS = {"logits", "ref_logits", "labels"}
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
