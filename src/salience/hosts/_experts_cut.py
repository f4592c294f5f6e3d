"""Taking experts out of routers, tensors and config, each with its inverse."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.hosts._experts_tree import Mixture, Mixtures, rows


def cut_routers(found: Mixtures, kept: Tensor, own: Attachment) -> None:
    """Leave each router the rows of its layer's kept experts [M], and tell whoever counts what it gives."""
    for one, ids in zip(found.layers, kept, strict=True):
        _keep_rows(one.router, ids, own)
        _say_number(one.router, found.experts, len(ids), own)
        for module in _around(found.core, one):
            # the loss that balances experts reads the number from the model
            _say_number(module, found.experts, len(ids), own)


def cut_tensors(found: Mixtures, kept: Tensor, own: Attachment) -> None:
    """Leave each layer the tensors of its kept experts, and the config their number."""
    for one, ids in zip(found.layers, kept, strict=True):
        _keep_rows(one.experts, ids, own)
        _say_number(one.experts, found.experts, len(ids), own)
    own.set(found.config, found.config_name, kept.shape[1])


def translate_ids(found: Mixtures, kept: Tensor, own: Attachment) -> Attachment:
    """Let cut routers speak to whole tensors: their ids in [0, M) become those of the kept experts in [0, E).

    Returns:
        Attachment: of the translation alone; `own` undoes it too.
    """
    hooks = Attachment()
    own.on_undo(hooks.undo)

    for one, ids in zip(found.layers, kept, strict=True):

        def before(module: nn.Module, args: tuple[Any, ...], ids: Tensor = ids) -> tuple[Any, ...]:
            hidden, chosen, *rest = args
            return (hidden, ids.to(chosen.device)[chosen], *rest)

        hooks.hook(one.experts.register_forward_pre_hook(before))
    return hooks


def drop_removed(found: Mixtures, kept: Tensor, own: Attachment) -> None:
    """Leave the routers whole, and give removed experts the weight 0."""
    for one, ids in zip(found.layers, kept, strict=True):

        def before(module: nn.Module, args: tuple[Any, ...], ids: Tensor = ids) -> tuple[Any, ...]:
            hidden, chosen, weights = args
            stays = (chosen[..., None] == ids.to(chosen.device)).any(-1)
            return hidden, chosen, weights.masked_fill(~stays, 0.0)

        own.hook(one.experts.register_forward_pre_hook(before))


def _keep_rows(module: nn.Module, ids: Tensor, own: Attachment) -> None:
    for name, old in rows(module).items():
        fewer = old.detach().index_select(0, ids.to(old.device))
        held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        if isinstance(old, nn.Parameter):
            fewer = nn.Parameter(fewer, requires_grad=old.requires_grad)
        own.on_undo(partial(held.__setitem__, name, old))
        held[name] = fewer


def _say_number(module: nn.Module, before: int, after: int, own: Attachment) -> None:
    # the model that holds several layers is asked once for each: the second time it says `after` already
    if vars(module).get("num_experts") == before:
        own.set(module, "num_experts", after)


def _around(core: nn.Module, one: Mixture) -> list[nn.Module]:
    """The modules that hold this layer's block, and the block itself."""
    inside = one.router
    return [module for module in core.modules() if any(part is inside for part in module.modules())]
