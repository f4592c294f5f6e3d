"""Feeds the stored inputs to DHSA's labels, predictor, scores, lists and fixed blocks."""

from salience.methods.keys import _dhsa_boundaries as borders
from salience.methods.keys import _dhsa_fixed as fixed
from salience.methods.keys import _dhsa_official as official
from salience.methods.keys.dhsa import score


def run(tensors, parameters):
    given = parameters["parameters"]
    query, key, value = (tensors[name] for name in "qkv")
    window, block = given["boundary_window"], given["query_block"]
    choice = {
        "chunks": given["num_chunks"],
        "nms": 8,
        "instruction_tokens": given["instruction_tokens"],
    }
    ratio = borders.mass_ratio(query, key, window=window)
    bounds = [borders.select_boundaries(row, threshold=1.1, **choice) for row in ratio]
    bounds = borders.stacked(bounds, key.shape[2])

    sizes = given["predictor"]
    predictor = borders.BoundaryPredictor(
        sizes["channel_in"], hidden=sizes["hidden"], heads=sizes["heads"], window=window
    )
    prefix = "predictor."
    predictor.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    logits = predictor(borders.features_of(key)).detach()
    found = [borders.select_boundaries(row, threshold=-0.5, **choice) for row in logits]

    rows = query.shape[2] - given["instruction_tokens"]
    last = official.ends(rows, key.shape[2], block)
    scores = score(query[:, :, :rows], key, bounds, q_block=block)[:, 0]
    before = official.chosen(scores, bounds, last, budget=given["budget_tokens"], local=given["local_tokens"])
    index = official.with_first(before, last, given["global_tokens"])
    out = official.attend(
        query, key, value, index, q_block=block, instruction_tokens=given["instruction_tokens"]
    )
    return {
        "mass_ratio": ratio,
        "label_boundaries": bounds,
        "pred_logits": logits,
        "pred_boundaries": borders.stacked(found, key.shape[2]),
        "token_topk_before_global": before,
        "token_topk": index,
        "out": out,
        "focal_loss": borders.focal_loss(
            *(tensors[f"focal_{name}"] for name in ("logits", "targets", "mask"))
        ).view(1),
        "soft_label_out": borders.soft_label(tensors["soft_label_in"]),
        **_fixed(query, key, tensors["v2_topk_mask"].shape, given),
    }


def _fixed(query, key, shape, given):
    """Masks of fixed blocks, on the first tokens that fill whole blocks."""
    length = shape[-1] * given["v2_k_block"]
    query, key = query[:, :, :length], key[:, :, :length]
    grid = fixed.Grid(length, length, given["query_block"], given["v2_k_block"], given["v2_topk_blocks"])
    return {
        "v2_topk_mask": fixed.top_k(query, key, grid, causal=False).to_mask(),
        "v2_a_shape_mask": fixed.a_shape(query, key, grid).to_mask(),
        "v2_vertical_slash_mask": fixed.vertical_slash(
            query, key, grid, ratio=given["v2_vertical_ratio"]
        ).to_mask(),
    }


SKIPS = ("q", "k", "v", "focal_logits", "focal_targets", "focal_mask", "soft_label_in")
SKIP_PREFIXES = ("predictor.",)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TOLERANCES = {"mass_ratio": {"rtol": 1e-4, "atol": 1e-9}}
