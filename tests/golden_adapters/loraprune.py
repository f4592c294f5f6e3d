"""Feeds the golden inputs of the official LoRAPrune code to salience's own functions."""

import torch

from salience.methods.heads.loraprune import (
    importance,
    lora_gradient,
    lowest_masked,
    masked_count,
    moved,
    normalised,
    ratio_at,
    unit_scores,
)

GROUPS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
INPUTS = ("o_proj", "down_proj")


def run(tensors, parameters):
    p = parameters
    units = {"self_attn": p["n_heads"], "mlp": p["d_ffn"]}
    widths = {"self_attn": p["d_model"], "mlp": p["d_ffn"]}
    outputs = {}
    averages = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
    for step in range(p["steps"]):
        for group, names in GROUPS.items():
            index = torch.arange(widths[group]).view(units[group], -1)
            total = torch.zeros_like(averages[group])
            for name in names:
                A, B = tensors[f"A.{name}"], tensors[f"B.{name}"]
                merged = tensors[f"W.{name}"] + p["scaling"] * (B @ A)
                G = lora_gradient(A, B, tensors[f"gA.{step}.{name}"], tensors[f"gB.{step}.{name}"])
                out = name not in INPUTS
                raw = unit_scores(importance(merged, G), index, out=out)
                outputs[f"s.{step}.{name}"] = normalised(raw)
                if step == 0:
                    outputs[f"s_unnormed.{name}"] = raw
                    outputs[f"s_mag.{name}"] = normalised(unit_scores(importance(merged), index, out=out))
                total = total + outputs[f"s.{step}.{name}"]
            averages[group] = moved(averages[group], total)
            outputs[f"ema.{step}.{group}"] = averages[group]
    masks = {name: torch.ones(count, dtype=torch.bool) for name, count in units.items()}
    for number, ratio in enumerate(p["ratios"]):
        for group, names in GROUPS.items():
            count = masked_count(units[group], ratio)
            masks[group] = lowest_masked(averages[group], masks[group], count)
            for name in names:
                if name not in INPUTS:
                    size = widths[group] // units[group]
                    outputs[f"mask.{number}.{name}"] = masks[group].repeat_interleave(size)
    s = p["schedule"]
    outputs["schedule"] = torch.tensor(
        [
            ratio_at(
                step,
                s["total_step"],
                start=s["initial_sparsity"],
                target=s["final_sparsity"],
                warmup=s["initial_warmup"],
                cooldown=s["final_warmup"],
            )
            for step in range(s["total_step"] + 1)
        ],
        dtype=torch.float64,
    )
    return outputs


SKIPS = set()
SKIP_PREFIXES = ("W.", "A.", "B.", "gA.", "gB.")
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
