"""Thresholds of SALE for each layer and head: read from a file, and found by halving while a model reads prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from salience import kernels
from salience.core.attach import Attachment
from salience.core.errors import ParameterError, require
from salience.core.files import write_bytes_atomic
from salience.core.loop import evaluating
from salience.core.progress import bar
from salience.hosts.prefill import Prompt, prefill
from salience.hosts.transformers import structure
from salience.kernels import KeyBlocks
from salience.kernels.blocks import lists
from salience.methods.keys._sale_scores import Estimator, spend

if TYPE_CHECKING:
    from salience.methods.keys.sale import SALE

# a threshold at or under this becomes 0
_SMALLEST = 1e-4


def table(model: nn.Module, tau: float | tuple[tuple[float, ...], ...] | str) -> Tensor:
    """Thresholds as [layers, H] fp32, one for all heads repeated.

    Raises:
        ParameterError: if they are not finite and >= 0, or those of another model.
    """
    layers = structure(model).layers
    heads = {attention.heads.num for layer in layers for attention in layer.attentions if attention.heads}
    require(len(heads) == 1, "heads of each layer", "equally many and known", sorted(heads))
    shape = [len(layers), heads.pop()]
    if isinstance(tau, str):
        found = _read(tau)
    else:
        found = torch.tensor(tau, dtype=torch.float32)
        found = found if isinstance(tau, tuple) else found.expand(shape).clone()
    wanted = f"{shape} for the layers and heads of this model"
    require(list(found.shape) == shape, "tau", wanted, list(found.shape))
    valid = bool((found.isfinite() & (found >= 0)).all())
    require(valid, "tau", "finite and >= 0", tau)
    return found


def run_calibration(
    model: nn.Module, data: Iterable[Any], method: SALE, *, path: str | Path | None, progress: bool | None
) -> Tensor:
    """See `sale.calibrate_sale`."""
    named = path is None or Path(path).suffix == ".safetensors"
    require(named, "path", "a .safetensors file", path)
    taus = table(model, method.tau)
    batches = [data] if isinstance(data, Mapping | Tensor) else list(data)
    read: list[int] = []

    def see(prompt: Prompt) -> None:
        advance()
        length, keys = prompt.query.shape[2], prompt.key.shape[2]
        if length == keys > method.dense_below:
            read.append(length)
            for row in range(len(prompt.query)):
                _lower(taus[prompt.layer], method, prompt, row)
        # exact attention goes on

    record = Attachment()
    layers = len(structure(model).layers)
    with (
        bar("sale: layers calibrated", layers * len(batches), progress) as advance,
        evaluating(model),
        torch.no_grad(),
    ):
        try:
            prefill(model, record, see)
            for batch in batches:
                model(**_inputs(model, batch))
        finally:
            record.undo()
    require(bool(read), "data", f"prompts of more than {method.dense_below} tokens (dense_below)", "none")
    if path is not None:
        write_bytes_atomic(path, save({"tau": taus}))
    return taus


def output_error(exact: Tensor, approximate: Tensor) -> Tensor:
    """`sum |O - O'| / tokens` over tokens and channels, [..., T, D] -> [...], in at least fp32."""
    precise = torch.promote_types(exact.dtype, torch.float32)
    return (exact.to(precise) - approximate.to(precise)).abs().sum((-2, -1)) / exact.shape[-2]


def _lower(taus: Tensor, method: SALE, prompt: Prompt, row: int) -> None:
    """Halve the thresholds [H] of one layer, in place, until one prompt's output errors are below theta."""
    groups = prompt.key.shape[1]
    fold = prompt.query.shape[1] // groups
    how: dict[str, Any] = {"scaling": prompt.scaling, "softcap": prompt.softcap}
    for group in range(groups):
        own = taus[group * fold : (group + 1) * fold]
        if not bool((own > 0).any()):
            continue
        query = prompt.query[row : row + 1, group * fold : (group + 1) * fold]
        key, value = (one[row : row + 1, group : group + 1] for one in (prompt.key, prompt.value))
        found = Estimator(query, key, method.grid, bits=method.bits, centre=method.centre, **how)
        # the scores do not depend on the threshold
        scores = torch.cat([found.block_log_ras(*part) for part in found.slices()], 2)
        exact = kernels.dense.attend(query, key, value, **how)
        asked = (own > 0).nonzero().flatten()
        while len(asked):
            mask = spend(scores[:, asked.to(scores.device)], own[asked].to(scores.device), found.ends)
            blocks = KeyBlocks(*lists(mask), method.q_block, method.k_block, query.shape[2], key.shape[2])
            heads = asked.to(query.device)
            made = kernels.attend(query[:, heads], key, value, blocks, **how)
            error = output_error(exact[:, heads], made)[0].cpu()
            asked = asked[error >= method.theta]
            lower = own[asked] / 2
            own[asked] = lower.masked_fill(lower <= _SMALLEST, 0.0)
            asked = asked[own[asked] > 0]


def _read(path: str) -> Tensor:
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ParameterError(f"tau must be a readable .safetensors file, got {path}: {error}") from error
    require("tau" in found, "tau", "a file that holds `tau`", f"{path} with {', '.join(found) or 'nothing'}")
    return found["tau"].float()


def _inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Keywords of one forward pass that computes logits of one token and keeps no cache."""
    given = dict(batch) if isinstance(batch, Mapping) else {"input_ids": torch.as_tensor(batch)}
    given.pop("labels", None)
    device = next(model.parameters()).device
    given = {name: one.to(device) if isinstance(one, Tensor) else one for name, one in given.items()}
    known = inspect.signature(model.forward).parameters
    lean = {"use_cache": False, "logits_to_keep": 1}
    return {**{name: value for name, value in lean.items() if name in known}, **given}
