"""Feeds the golden queries and keys to HiP's search, and what it finds to the kernels."""

from dataclasses import replace

import torch

from salience import kernels
from salience.methods.keys._hip_search import search


def run(tensors, parameters):
    sizes = parameters.get("parameters", parameters)
    stride, offset = (int(word) for word in _numbers(sizes["query_subsample"]))
    q, k, v = (tensors[name].float() for name in ("q", "k", "v"))
    out = {}
    for name, representative, causal in (("off_first", "first", False), ("ref_center", "center", True)):
        blocks = search(
            q,
            k,
            scaling=q.shape[-1] ** -0.5,
            mask_k=sizes["mask_k"],
            q_block=sizes["bq"],
            q_stride=stride,
            q_offset=offset,
            k_block=sizes["bk"],
            window=sizes["sw"],
            representative=representative,
            head_group=sizes["head_group"],
            causal_scores=causal,
        )
        # the draft attends to what it found alone: the window's keys are then seen by nobody
        seen = blocks if causal else replace(blocks, window=0)
        out[f"{name}_out"] = kernels.attend(q, k, v, seen, scaling=q.shape[-1] ** -0.5)
        out[f"{name}_count"] = blocks.count
        starts = (blocks.index * blocks.k_block).masked_fill(~blocks.listed, -1)
        missing = sizes["mask_k"] // sizes["bk"] - starts.shape[-1]
        out[f"{name}_indices"] = torch.nn.functional.pad(starts, (0, missing), value=-1)
    return out


def _numbers(text):
    """Stride and offset of "rows 1::2 of the query block (stride 2, offset 1)"."""
    words = text.replace(")", " ").replace(",", " ").replace("(", " ").split()
    return words[words.index("stride") + 1], words[words.index("offset") + 1]


SKIPS = ("q", "k", "v")
TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
TOLERANCES = {
    f"{name}_{what}": {"rtol": 0.0, "atol": 0.0}
    for name in ("off_first", "ref_center")
    for what in ("indices", "count")
}
