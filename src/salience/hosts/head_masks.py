"""Runs a batch through a model and, from the first masked layer on, a second time with some heads switched off.

What the layers below compute is the same for both, so it is computed once: in front of the first masked layer the
rows are doubled, and the second half goes on without the heads. Nothing of the model is edited; hooks do it, for as
long as `forked` lasts. A head that is switched off attends to every visible key alike ("uniform": its query becomes 0
after rotary and norms, so all its logits are 0) or puts out nothing ("zero").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import ParameterError, StructureError
from salience.hosts.attention import AttentionCall, intercept
from salience.hosts.transformers import Layer, structure

MODES = ("uniform", "zero")
# a layer and one of its query heads, both from 0
Head = tuple[int, int]

_CHUNK_ELEMENTS = 1 << 24


def decoder_heads(model: nn.Module) -> list[tuple[Layer, int]]:
    """The layers of a decoder with the number of query heads of each.

    Raises:
        StructureError: if a layer has no attention or does not tell its heads.
    """
    found = []
    for layer in structure(model).layers:
        own = [attention for attention in layer.attentions if not attention.is_cross]
        if not own:
            raise StructureError(
                f"every layer must have self-attention to find its heads, got none in {layer.path}"
            )
        found.append((layer, own[0].num_heads))
    return found


def check_heads(model: nn.Module, heads: Sequence[Head]) -> dict[int, list[int]]:
    """Heads by layer, rising; refuses those that the model does not have.

    Raises:
        ParameterError: naming the first.
    """
    layers = decoder_heads(model)
    grouped: dict[int, list[int]] = {}
    for layer, head in sorted({(int(layer), int(head)) for layer, head in heads}):
        if not (0 <= layer < len(layers) and 0 <= head < layers[layer][1]):
            raise ParameterError(
                f"heads must be (layer, head) of a model of {len(layers)} layers with {layers[0][1]} heads, "
                f"got ({layer}, {head})"
            )
        grouped.setdefault(layer, []).append(head)
    return grouped


@contextmanager
def forked(model: nn.Module, heads: Mapping[int, Sequence[int]], mode: str = "uniform") -> Iterator[int]:
    """Inside the block the model gives twice as many rows as it is given: [intact rows; rows without the heads].

    Args:
        model (nn.Module): a decoder; called with right-padded ids and without a mask or a cache.
        heads (Mapping): layer -> query heads that are switched off; empty gives two equal halves.
        mode (str): of `MODES`.

    Yields:
        int: how many times as many rows come out, 2.
    """
    record = Attachment()
    layers = structure(model).layers
    first = min(heads, default=0)
    rows: list[int] = []
    try:
        for layer in layers[first:]:
            double = _doubling(rows, start=layer.index == first)
            record.hook(layer.module.register_forward_pre_hook(double, with_kwargs=True))
        for index, switched in heads.items():
            own = next(one for one in layers[index].attentions if not one.is_cross)
            intercept(own.module, record, _switch(rows, list(switched), mode))
        yield 2
    finally:
        record.undo()


def attend(call: AttentionCall, *, off: Sequence[int] = (), attended: Tensor | None = None) -> Tensor:
    """What attention puts out, computed openly, some heads uniform over the keys that each row may see.

    Args:
        call (AttentionCall): of one layer.
        off (Sequence[int]): query heads that attend to all visible keys alike, sinks and biases or not.
        attended (Tensor | None): [B, K] bool, keys that are no padding, for a call without a mask of its own.

    Returns:
        Tensor: [B, H, Q, Dv] in at least fp32; 0 in rows that see nothing.
    """
    batch, heads, length, _ = call.query.shape
    value = call.value.to(torch.promote_types(call.value.dtype, torch.float32))
    value = value.repeat_interleave(heads // value.shape[1], dim=1)
    chosen = torch.zeros(heads, dtype=torch.bool, device=value.device)
    chosen[list(off)] = True
    chunk = max(1, _CHUNK_ELEMENTS // (batch * heads * call.key.shape[2]))
    parts = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        share = call.probabilities(start, stop, attended)
        if off:
            visible = call.logits(start, stop, attended) > -torch.inf
            alike = visible / visible.sum(-1, keepdim=True).clamp_min(1)
            share = torch.where(chosen[:, None, None], alike.to(share.dtype), share)
        parts.append(share @ value)
    return torch.cat(parts, 2)


def _doubling(rows: list[int], *, start: bool) -> Callable[..., Any]:
    """A hook in front of a layer that doubles what enters; the first one says how many rows there were."""

    def double(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if start:
            rows[:] = [len(hidden)]
        elif len(hidden) != 2 * rows[0]:
            raise StructureError(f"layers must keep the rows of a batch, got {len(hidden)} for {2 * rows[0]}")
        return _doubled(args, rows[0]), _doubled(kwargs, rows[0])

    return double


def _doubled(value: Any, rows: int) -> Any:
    """Tensors with one entry for each row get two, nested ones as well; what one entry serves all stays."""
    if isinstance(value, Tensor):
        # [T] positions have no rows
        return torch.cat((value, value)) if value.dim() >= 2 and len(value) == rows else value
    if isinstance(value, tuple) and type(value) is tuple:
        return tuple(_doubled(one, rows) for one in value)
    if isinstance(value, dict):
        return {name: _doubled(one, rows) for name, one in value.items()}
    if hasattr(value, "mask_mod") and value.shape[0] not in (1, None):
        raise StructureError("attention masks must be tensors to be doubled, got a BlockMask: load with sdpa")
    return value


def _switch(
    rows: list[int], heads: list[int], mode: str
) -> Callable[[AttentionCall, Callable[[], Any]], Any]:
    """Stands in for a layer's attention function: the second half of the rows goes without the heads."""

    def act(call: AttentionCall, original: Callable[[], Any]) -> Any:
        half = slice(rows[0], None)
        if mode == "uniform" and not _biased(call):
            # the tensor is this call's own; nothing else reads it
            call.query[half, heads] = 0
            return original()
        output = original()
        mixed = output[0]  # [B, Q, H, Dv]
        if mode == "zero":
            mixed[half, :, heads] = 0
        else:
            second = replace(
                call,
                query=call.query[half],
                key=call.key[half],
                value=call.value[half],
                mask=call.mask[half] if isinstance(call.mask, Tensor) and len(call.mask) > 1 else call.mask,
            )
            mixed[half, :, heads] = attend(second, off=heads)[:, heads].transpose(1, 2).to(mixed.dtype)
        return output

    return act


def _biased(call: AttentionCall) -> bool:
    """Whether logits are more than query times key, so that a query of 0 would not attend evenly."""
    return any(call.options.get(name) is not None for name in ("s_aux", "position_bias"))
