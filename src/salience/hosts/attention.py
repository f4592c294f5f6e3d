"""Sees what an attention layer of a transformers model computes, whichever implementation computes it.

Attention modules of transformers ask `ALL_ATTENTION_FUNCTIONS` for the function of `config._attn_implementation`
(sdpa, eager, flash, flex, one of the user's own). While an observed module runs, and only then, that entry is
replaced by one that is handed the queries and keys after rotary and then calls the function in force. The name in
the config stays what it is: models compare it, build their masks for it and refuse names that they do not know.
Nothing is registered between two forward passes, and modules that are not observed never see the difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import StructureError, require
from salience.core.loop import evaluating
from salience.hosts.attention_call import AttentionCall
from salience.hosts.transformers import structure

__all__ = [
    "AttentionCall",
    "ask",
    "attention_mass",
    "attention_module",
    "intercept",
    "observe",
    "received",
]

Function = Callable[..., tuple[Tensor, Tensor | None]]
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
# logits held at a time, in elements: 64 MiB in fp32
_CHUNK_ELEMENTS = 1 << 24


def attention_module(model: nn.Module, index: int) -> nn.Module:
    """The self-attention of one layer.

    Args:
        model (nn.Module): may be wrapped by PEFT or DistributedDataParallel.
        index (int): counted among the layers that have self-attention; negative from the end.

    Raises:
        StructureError: if the model has none.
        ParameterError: if there are fewer.
    """
    found = [
        attention.module
        for layer in structure(model).layers
        for attention in layer.attentions
        if not attention.is_cross
    ]
    if not found:
        raise StructureError(
            f"attention must be found in the layers, got a {type(model).__name__} without any"
        )
    wanted = f"in [-{len(found)}, {len(found) - 1}] for {len(found)} layers with attention"
    require(-len(found) <= index < len(found), "attention_layer", wanted, index)
    return found[index]


def observe(module: nn.Module, record: Attachment, see: Callable[[AttentionCall], None]) -> None:
    """Call `see` each time that an attention module runs, before its own attention function runs unchanged.

    `see` runs without graph, inside the forward pass, so that sharded parameters are not needed again. It is called
    once more for each layer that gradient checkpointing runs again in the backward pass.

    Args:
        module (nn.Module): the attention module, as `structure(model).layers[i].attention.module`.
        record (Attachment): undoes it.
        see (Callable): is handed the call; what it returns is ignored.

    Raises:
        StructureError: if the module's attention does not go through transformers' attention interface.

    Example:
        >>> observe(model.model.layers[-1].self_attn, record, lambda call: print(call.query.shape))  # doctest: +SKIP
    """

    def watched(call: AttentionCall, original: Callable[[], Any]) -> Any:
        with torch.no_grad():
            see(call)
        return original()

    intercept(module, record, watched)


@torch.no_grad()
def attention_mass(
    call: AttentionCall,
    keys: Tensor,
    *,
    rows: Tensor | None = None,
    attended: Tensor | None = None,
    chunk: int | None = None,
) -> Tensor:
    """The share of each query's attention that goes to some keys, averaged over heads; no [Q, K] map is kept.

    `mean_h exp(lse_{j in keys} z_h[t, j] - lse_j z_h[t, j])` with the layer's own logits z, mask and sinks.

    Args:
        call (AttentionCall): what the layer was called with.
        keys (Tensor): [B, K] bool, the keys whose share is taken.
        rows (Tensor | None): [Q] bool, the rows that are wanted, the others give 0; None wants all.
        attended (Tensor | None): [B, K] bool, keys that are not padding, for layers without a mask.
        chunk (int | None): rows computed at a time; None bounds the memory to 64 MiB of logits.

    Returns:
        Tensor: [B, Q] in [0, 1], at least fp32; 0 for rows that attend to nothing.

    Raises:
        StructureError: if `keys` has another shape: something was put before the tokens of the batch.
    """
    batch, heads, length, _ = call.query.shape
    expected = [batch, call.key.shape[2]]
    if list(keys.shape) != expected:
        raise StructureError(f"keys must be {expected} as the layer sees them, got {list(keys.shape)}")
    chunk = chunk or max(1, _CHUNK_ELEMENTS // (batch * heads * call.key.shape[2]))
    wanted = [True] * length if rows is None else rows.tolist()
    mass = call.query.new_zeros(batch, length, dtype=torch.promote_types(call.query.dtype, torch.float32))
    sinks = call.options.get("s_aux")
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        if not any(wanted[start:stop]):
            continue
        logits = call.logits(start, stop, attended)
        part = logits.masked_fill(~keys[:, None, None, :], -torch.inf).logsumexp(-1)
        whole = logits.logsumexp(-1)
        if sinks is not None:
            whole = torch.logaddexp(whole, sinks.to(whole.dtype).view(1, -1, 1))
        # a row that attends to nothing is -inf minus -inf
        mass[:, start:stop] = (part - whole).exp().nan_to_num(nan=0.0).mean(1)
    return mass


@torch.no_grad()
def ask(layer: nn.Module, attention: nn.Module, hidden: Tensor, position_embeddings: Any) -> AttentionCall:
    """The queries and keys that a layer would compute from these hidden states, without running its attention.

    The layer's own norm, projections and rotary embedding run, whatever they are; nothing behind them, and no cache
    is touched. Dropout is off. The call's mask is None.

    Args:
        layer (nn.Module): the decoder layer.
        attention (nn.Module): its self-attention.
        hidden (Tensor): [B, T, C] that would enter the layer.
        position_embeddings (Any): as the model hands them to the layer: cosines and sines of the T positions.

    Raises:
        StructureError: if the layer's attention does not go through transformers' attention interface.
    """

    def stop(call: AttentionCall, original: Callable[[], Any]) -> Any:
        raise _ReachedError(call)

    config: Any = attention.config
    entry = _Entry(
        attention, _interface_of(attention), config._attn_implementation, _eager_of(attention), stop
    )
    try:
        # forward() and not the call: hooks and checkpointing belong to the pass that counts
        with evaluating(layer):
            layer.forward(hidden.detach(), attention_mask=None, position_embeddings=position_embeddings)
    except _ReachedError as reached:
        return reached.call
    finally:
        entry.remove()
    raise StructureError(
        f"{type(layer).__name__} must run {type(attention).__name__} by {_INTERFACE}, got none"
    )


@torch.no_grad()
def received(
    call: AttentionCall, rows: Tensor, present: Tensor, *, causal: bool = True, chunk: int | None = None
) -> Tensor:
    """The attention that each key receives from some queries, averaged over heads and over those queries.

    `mean_{t in rows} mean_h softmax_j(z_h[t, j])` over all keys that row t may attend to. Only the rows that are
    asked for are computed, a chunk at a time, in at least fp32.

    Args:
        call (AttentionCall): queries and keys of one layer; its own mask is not used.
        rows (Tensor): [B, Q] bool, the queries that are asked.
        present (Tensor): [B, K] bool, keys that are no padding; Q = K.
        causal (bool): a row attends to itself and to what is before it.
        chunk (int | None): rows computed at a time; None bounds the memory to 64 MiB of logits.

    Returns:
        Tensor: [B, K], 0 where no row is asked.
    """
    batch, heads, length, width = call.query.shape
    counts = rows.sum(-1)
    most = int(counts.max())
    # the asked rows of each sample first, in order; the others fill up and weigh nothing
    index = (~rows).int().argsort(dim=-1, stable=True)[:, :most]
    asked = rows.gather(-1, index)
    mass = call.query.new_zeros(batch, length, dtype=torch.promote_types(call.query.dtype, torch.float32))
    places = torch.arange(length, device=rows.device)
    chunk = chunk or max(1, _CHUNK_ELEMENTS // max(1, batch * heads * length))
    for start in range(0, most, chunk):
        taken = index[:, start : start + chunk]
        query = call.query.gather(2, taken[:, None, :, None].expand(-1, heads, -1, width))
        allowed = present[:, None, None, :]
        if causal:
            allowed = allowed & (places <= taken[:, None, :, None])
        part = replace(call, query=query, mask=allowed)
        share = part.probabilities(0, taken.shape[1])
        weight = asked[:, start : start + chunk].to(share.dtype)
        mass += torch.einsum("bhrk,br->bk", share, weight) / heads
    return mass / counts.clamp_min(1).unsqueeze(-1)


def intercept(
    module: nn.Module, record: Attachment, act: Callable[[AttentionCall, Callable[[], Any]], Any]
) -> None:
    """While `module` runs, `act(call, original)` stands in for its attention function; `original()` runs that."""
    interface, eager = _interface_of(module), _eager_of(module)
    running: list[_Entry] = []

    def enter(entered: nn.Module, args: Any) -> None:
        if entered is module:  # a deep copy of it carries this hook as well
            config: Any = module.config
            running.append(_Entry(module, interface, config._attn_implementation, eager, act))

    def leave(left: nn.Module, args: Any, output: Any) -> None:
        if left is module and running:
            entry = running.pop()
            entry.remove()
            # without output there was an exception
            if output is not None and not entry.calls:
                raise StructureError(
                    f"attention of {type(module).__name__} must go through {_INTERFACE}, but it ran "
                    f"{entry.name!r} without looking it up: load the model with attn_implementation='sdpa'"
                )

    record.hook(module.register_forward_pre_hook(enter))
    # of several interceptions the last to enter is the first to leave
    record.hook(module.register_forward_hook(leave, always_call=True, prepend=True))


class _ReachedError(Exception):
    """Ends a forward pass at its attention function."""

    def __init__(self, call: AttentionCall) -> None:
        super().__init__("attention reached")
        self.call = call


class _Entry:
    """A local entry of the interface, for one run of one module; removing it puts the user's own back."""

    def __init__(
        self,
        module: nn.Module,
        interface: MutableMapping[str, Function],
        name: str,
        eager: Function | None,
        act: Callable[[AttentionCall, Callable[[], Any]], Any],
    ) -> None:
        self.name, self.calls = name, 0
        self._interface, self._module, self._act = interface, module, act
        self._before = interface.get(name)
        # eager stands in no table: each model file has its own
        in_force = self._before or eager
        if in_force is None:
            raise StructureError(
                f"attention of {type(module).__name__} must be looked up in {_INTERFACE}, got {name!r} without an "
                "entry there"
            )
        self._in_force = in_force
        try:
            del interface[name]
            self._local = True
        except KeyError:
            self._local = False
        interface[name] = self

    def remove(self) -> None:
        """Leave the interface as it was."""
        del self._interface[self.name]
        if self._local and self._before is not None:
            self._interface[self.name] = self._before

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        def original() -> Any:
            return self._in_force(module, query, key, value, attention_mask, **options)

        if module is not self._module:
            return original()
        self.calls += 1
        scaling = options.get("scaling")
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self._act(AttentionCall(module, query, key, value, attention_mask, scaling, options), original)


def _forward_of(module: nn.Module) -> Any:
    # the class's own: other libraries put wrappers on the instance
    return inspect.unwrap(type(module).forward)


def _interface_of(module: nn.Module) -> MutableMapping[str, Function]:
    found = getattr(_forward_of(module), "__globals__", {}).get(_INTERFACE)
    if found is None or not hasattr(getattr(module, "config", None), "_attn_implementation"):
        raise StructureError(
            f"attention must go through transformers' {_INTERFACE} to be observed, but {type(module).__name__} "
            "computes it by itself"
        )
    interface: MutableMapping[str, Function] = found
    return interface


def _eager_of(module: nn.Module) -> Function | None:
    """The function that a model file falls back on for "eager": the one that its forward names."""
    forward = _forward_of(module)
    named = [name for name in forward.__code__.co_names if name.endswith(_EAGER)]
    found: Function | None = forward.__globals__.get(named[0] if named else _EAGER)
    return found
