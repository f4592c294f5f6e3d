"""Feeds the golden pixels to a SigLIP tower's picture layout, its attention as queries and keys that give it."""

import torch

from salience.core.budget import top_indices
from salience.hosts.attention import AttentionCall
from salience.hosts.image_grid import views
from salience.methods.tokens._vflowopt_map import entropy, grid_cells, importance, measure
from salience.methods.tokens.vflowopt import recycle, spend, taken


def seen(pixels, parameters):
    """The pictures as the tower of a LLaVA sees them."""
    from transformers import LlavaConfig, LlavaModel

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = LlavaConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": parameters["image"],
            "patch_size": parameters["patch"],
            **small,
        },
        text_config={"model_type": "llama", "vocab_size": 9, **small},
        image_token_id=8,
    )
    half = (0.5, 0.5, 0.5)
    return views(LlavaModel(config), {"pixel_values": pixels}, mean=half, std=half)


def places(parameters):
    """Canvas, row and column of the tokens of both grids."""
    rows = []
    for canvas, key in enumerate(("base_grid", "local_grid")):
        height, width = parameters[key]
        lines = [torch.arange(count, dtype=torch.float64) for count in (height, width)]
        rows.append(torch.cartesian_prod(torch.tensor([float(canvas)], dtype=torch.float64), *lines))
    return torch.cat(rows)


def run(tensors, parameters):
    parameters = parameters["params"]
    pictures = seen(tensors["pixel_values"], parameters)
    out = {}
    # the official code casts pixels to bytes as they are normalised
    for name, shown in (
        ("entropy_unit_range", [one.picture for one in pictures]),
        ("entropy_official", tensors["pixel_values"]),
    ):
        bits = [
            entropy(one, view.rows, view.columns, cast=True)
            for one, view in zip(shown, pictures, strict=True)
        ]
        out[name] = torch.stack(bits)

    attention = tensors["attention"]
    keys = torch.eye(attention.shape[-1]).expand_as(attention)
    call = AttentionCall(None, attention.log(), keys, None, None, 1.0, {"is_causal": False})
    parts = measure(call, parameters["t"], classed=False)
    out["importance"] = torch.stack(
        [
            importance(part, bits, parameters["alpha"])
            for part, bits in zip(parts, out["entropy_official"], strict=True)
        ]
    )

    scores = tensors["recycle_importance"]
    low = taken(scores, parameters["recycle_ratio"], parameters["cell"])
    cells = grid_cells(places(parameters), parameters["cell"])
    features, slots, _ = recycle(tensors["recycle_features"], scores, low, cells)
    keep = ~low | slots
    out["recycle_keep_mask"] = keep.to(torch.uint8)
    out["recycle_out_features"] = features[keep]
    left = scores[keep]
    out["recycle_out_importance"] = left
    kept = torch.arange(len(left))
    for stage, ratio in enumerate(parameters["llm_ratios"], 1):
        kept = kept[top_indices(left[kept], spend(len(kept), ratio))]
        out[f"llm_keep_{stage}"] = kept
    return out


SKIPS = ("pixel_values", "attention", "recycle_features", "recycle_importance")
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
