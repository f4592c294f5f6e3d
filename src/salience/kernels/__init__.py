"""Attention over chosen keys: which keys (`KeyBlocks`), the specification (`naive`), and kernels in order of speed.

On a GPU `attend` takes the Triton kernel, else torch's flex_attention, else gathered keys; on a CPU gathered keys.
Gradients always go through gathered keys. `which` says what will run and why not something faster.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from salience.core.errors import ParameterError, require
from salience.kernels import dense, flex, gather, naive
from salience.kernels.blocks import KeyBlocks

__all__ = ["BACKENDS", "KeyBlocks", "attend", "dense", "flex", "gather", "naive", "which"]

BACKENDS = ("auto", "triton", "flex", "gather")
# modules that are imported when they are first asked for: not everybody has what they need
_MODULES = {"triton": "triton_attend", "flex": "flex", "gather": "gather"}


def which(
    query: Tensor, key: Tensor, value: Tensor, blocks: KeyBlocks, backend: str = "auto"
) -> tuple[str, str]:
    """The kernel that `attend` runs for these inputs, and why it is not a faster one (empty if it is the fastest).

    Raises:
        ParameterError: if a backend is named that cannot serve them, with the reason.
    """
    require(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    grad = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    reasons: list[str] = []
    order = BACKENDS[1:] if query.device.type == "cuda" else ("gather",)
    for name in order if backend == "auto" else (backend,):
        if name == "gather":
            return name, "; ".join(reasons)
        reason = "gradients are needed" if grad else _kernel(name).unfit(query, key, value, blocks)
        if reason is None:
            return name, "; ".join(reasons)
        reasons.append(reason)
    raise ParameterError(f"backend must be one that serves these inputs, got {backend!r}: {reasons[0]}")


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: KeyBlocks,
    *,
    scaling: float,
    softcap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of each row to the keys that `blocks` lets it see; see `naive.attend` for the formula.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D], Hkv divides H.
        value (Tensor): [B, Hkv, K, Dv].
        blocks (KeyBlocks): for these Q and K.
        scaling (float): factor of the logits.
        softcap (float | None): soft cap of the logits.
        backend (str): one of `BACKENDS`.

    Returns:
        Tensor: [B, H, Q, Dv] in the query's dtype; 0 in rows that see nothing.

    Raises:
        ParameterError: if the lists were made for other lengths, or a named backend cannot serve them.
    """
    lengths = (query.shape[2], key.shape[2])
    require((blocks.queries, blocks.keys) == lengths, "blocks", f"of {lengths} queries and keys", blocks)
    pieces = []
    if blocks.rows:
        end = blocks.keys - blocks.tail
        part = replace(blocks, queries=blocks.rows, keys=end, tail=0) if blocks.tail else blocks
        inputs = query[:, :, : blocks.rows], key[:, :, :end], value[:, :, :end]
        name, _ = which(*inputs, part, backend)
        pieces.append(_kernel(name).attend(*inputs, part, scaling=scaling, softcap=softcap))
    if blocks.tail:
        rest = query[:, :, blocks.rows :]
        pieces.append(dense.attend(rest, key, value, scaling=scaling, softcap=softcap))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def _kernel(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{_MODULES[name]}")
