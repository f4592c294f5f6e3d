"""Feeds the golden inputs of the official filter to salience's own functions."""

from salience.core.losses import token_losses
from salience.methods.tokens.sstoken import mean_loss, prompt_share, selected_labels


def run(tensors, parameters):
    out = {}
    for index, case in enumerate(parameters["cases"]):
        name = f"c{index}"
        labels, logits, history, attention = (
            tensors[f"{name}.{field}"].unsqueeze(0)
            for field in ("labels", "logits", "history_loss", "attn_mean")
        )
        current, _ = token_losses(logits, labels)
        kept = selected_labels(
            history, current, prompt_share(attention, labels), labels, keep=case["rho"], mix=case["gamma"]
        )
        out[f"{name}.new_labels"] = kept.squeeze(0)
        out[f"{name}.loss"] = mean_loss(*token_losses(logits, kept)).unsqueeze(0)
    return out


SKIPS = ()
# inputs
SKIP_PREFIXES = tuple(
    f"c{i}.{field}" for i in range(1000) for field in ("labels", "logits", "history_loss", "attn_mean")
)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
