"""The branches of a decoder layer, attention and feed-forward: what goes in and what is added to the residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import StructureError
from salience.hosts.transformers import Layer


def follow(layer: Layer, record: Attachment, see: Callable[[Tensor, Tensor], None]) -> None:
    """Call `see(before, after)` for both branches of a layer each time that it runs.

    `before` is what the branch's module is given, `after` what it gives; where another module of the layer (a second
    norm) takes that up before it is added, what that one gives. Nothing is kept once `see` returns.

    Args:
        layer (Layer): of a decoder.
        record (Attachment): undoes it.
        see (Callable): runs without graph, once for each branch, at the latest when the layer has run.

    Raises:
        StructureError: if attention or feed-forward network is not one module of the layer.
    """
    modules = [_branch(layer, [found.path for found in layer.attentions if not found.is_cross], "attention")]
    modules.append(_branch(layer, [found.path for found in layer.mlps], "feed-forward network"))
    waiting: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def flush() -> None:
        while waiting:
            see(*waiting.pop())

    def begin(module: nn.Module, args: Any) -> None:
        waiting.clear()  # of a run that an exception ended

    def ran(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        flush()
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        waiting.append((before.detach(), after))

    def went_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = args[0] if args else kwargs.get("hidden_states")
        if waiting and given is waiting[-1][1] and isinstance(output, Tensor):
            waiting[-1] = (waiting[-1][0], output)

    def end(module: nn.Module, args: Any, output: Any) -> None:
        flush()

    record.hook(layer.module.register_forward_pre_hook(begin))
    for child in layer.module.children():
        hook = ran if child in modules else went_on
        record.hook(child.register_forward_hook(hook, with_kwargs=True))
    record.hook(layer.module.register_forward_hook(end))


def _branch(layer: Layer, paths: list[str], what: str) -> nn.Module:
    """The direct child of the layer that holds everything at these paths."""
    names = {path.removeprefix(layer.path).strip(".").partition(".")[0] for path in paths}
    if len(names) != 1 or names == {""}:
        raise StructureError(
            f"{what} of {layer.path} ({type(layer.module).__name__}) must be one module of the layer, got "
            f"{', '.join(sorted(paths)) or 'none'}"
        )
    return layer.module.get_submodule(names.pop())
