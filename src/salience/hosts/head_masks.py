"""Runs a batch through a model as it is, and again with some heads switched off.

What the layers below the first masked one compute is the same in both passes, so it is computed once: the intact pass
keeps what enters that layer, the other one starts there. Nothing of the model is edited; hooks do it, for as long as
a pass lasts. A head that is switched off attends to every visible key alike ("uniform": its query becomes 0 after
rotary and norms, so all its logits are 0) or puts out nothing ("zero").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


class Fork:
    """Two passes of a model over the same batch: intact, then without some heads.

    Args:
        model (nn.Module): a decoder; called with right-padded ids and without a mask or a cache.
        heads (Mapping): layer -> query heads that are switched off; empty gives the same pass twice.
        mode (str): of `MODES`.

    Example:
        >>> fork = Fork(model, {1: [2]})  # doctest: +SKIP
        >>> with fork.intact():
        ...     plain = model(input_ids=ids)
        >>> with fork.weakened():
        ...     weak = model(input_ids=ids)
    """

    def __init__(self, model: nn.Module, heads: Mapping[int, Sequence[int]], mode: str = "uniform") -> None:
        layers = structure(model).layers
        first = min(heads, default=0)
        self._below = [layer.module for layer in layers[:first]]
        self._first = layers[first].module
        self._attentions = [
            (next(one.module for one in layers[index].attentions if not one.is_cross), list(switched))
            for index, switched in heads.items()
        ]
        self._mode = mode
        self._entered: Tensor | None = None
        self._tuples = False

    @contextmanager
    def intact(self) -> Iterator[None]:
        """The model computes what it always does; what enters the first masked layer is kept."""
        self._entered = None
        if not self._below:
            yield
            return

        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._tuples = isinstance(output, tuple)

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # a copy: a layer may add to what it is given in place
            self._entered = _hidden(args, kwargs).clone()

        record = Attachment()
        try:
            record.hook(self._below[-1].register_forward_hook(see))
            record.hook(self._first.register_forward_pre_hook(keep, with_kwargs=True))
            yield
        finally:
            record.undo()

    @contextmanager
    def weakened(self) -> Iterator[None]:
        """The model computes without the heads, for the batch of the last intact pass and no other.

        Raises:
            StructureError: if there was no intact pass, or the model is given a batch of another shape.
        """
        if self._below and self._entered is None:
            raise StructureError("the weakened pass must follow an intact one, got none")
        record = Attachment()
        try:
            for module in self._below:
                record.set(module, "forward", self._skip)
            if self._below:
                record.hook(self._first.register_forward_pre_hook(self._enter, with_kwargs=True))
            for attention, switched in self._attentions:
                intercept(attention, record, _switch(switched, self._mode))
            yield
        finally:
            record.undo()

    def _skip(self, *args: Any, **kwargs: Any) -> Any:
        hidden = _hidden(args, kwargs)
        return (hidden,) if self._tuples else hidden

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kept, given = self._entered, _hidden(args, kwargs)
        if kept is None or kept.shape != given.shape:
            raise StructureError(
                f"the weakened pass must be of the intact one's batch, got {list(given.shape)} where "
                f"{None if kept is None else list(kept.shape)} were kept"
            )
        if args:
            return (kept.clone(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kept.clone()}


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


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


def _switch(heads: list[int], mode: str) -> Callable[[AttentionCall, Callable[[], Any]], Any]:
    """Stands in for a layer's attention function, which goes without the heads."""

    def act(call: AttentionCall, original: Callable[[], Any]) -> Any:
        if mode == "uniform" and not _biased(call):
            # the tensor is this call's own; nothing else reads it
            call.query[:, heads] = 0
            return original()
        output = original()
        mixed = output[0]  # [B, Q, H, Dv]
        if mode == "zero":
            mixed[:, :, heads] = 0
        else:
            mixed[:, :, heads] = attend(call, off=heads)[:, heads].transpose(1, 2).to(mixed.dtype)
        return output

    return act


def _biased(call: AttentionCall) -> bool:
    """Whether logits are more than query times key, so that a query of 0 would not attend evenly."""
    return any(call.options.get(name) is not None for name in ("s_aux", "position_bias"))
