"""Feeds the golden draws of the official training loop to salience's own functions."""

import torch

from salience.methods.samples.cutmix import cut_box, kept_share, mixed_loss, paste


def run(tensors, parameters):
    out = {}
    for case in parameters["parameters"]:
        for batch in range(case["batches"]):
            name = f"{case['case']}.{batch}"
            x, y = tensors[f"{name}.x"], tensors[f"{name}.y"]
            mixed, partner, lam = x, y, 1.0
            if tensors[f"{name}.applied"]:
                perm = tensors[f"{name}.perm"]
                size = tuple(x.shape[2:])
                center = tuple(tensors[f"{name}.center"].tolist())
                box = cut_box(float(tensors[f"{name}.lam_raw"]), center, *size)
                mixed, partner, lam = paste(x, perm, box), y[perm], kept_share(box, *size)
                top, bottom, left, right = box
                out[f"{name}.box"] = torch.tensor([top, left, bottom, right])
                out[f"{name}.lam"] = torch.tensor(lam, dtype=torch.float64)
            logits = mixed.flatten(1) @ tensors[f"{case['case']}.w"]
            out |= {f"{name}.x_mixed": mixed, f"{name}.logits": logits}
            out[f"{name}.loss"] = mixed_loss(logits, y, partner, lam)
    SKIPS.update(name for name in tensors if name.rpartition(".")[2] in INPUTS)
    exact = ("x_mixed", "box", "lam")
    TOLERANCES.update({k: {"rtol": 0, "atol": 1e-12} for k in tensors if k.rpartition(".")[2] in exact})
    rows = []
    for row in tensors["bbox_table"].tolist():
        height, width, row_at, column_at = int(row[0]), int(row[1]), int(row[3]), int(row[4])
        top, bottom, left, right = box = cut_box(row[2], (row_at, column_at), height, width)
        corrected = kept_share(box, height, width)
        rows.append([height, width, row[2], row_at, column_at, top, left, bottom, right, corrected])
    TOLERANCES["bbox_table"] = {"rtol": 0, "atol": 1e-12}
    out["bbox_table"] = torch.tensor(rows, dtype=torch.float64)
    return out


# what is fed, by the last part of its name; `run` fills SKIPS, whatever the file calls its cases
INPUTS = ("x", "y", "perm", "center", "lam_raw", "applied", "coin", "w")
SKIPS = set()
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
TOLERANCES = {}
