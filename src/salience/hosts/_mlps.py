"""Feed-forward networks and sets of experts in a block of a network, told by shapes, types and position."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from salience.hosts._parts import Attention, Place, is_recurrent, join, parent, under, walk, width

_ATTENTION = re.compile(r"attn|attention")
_ACTIVATION = re.compile(r"(^|_)act(_|$|iv)|gelu|relu|silu|swish")
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_NOT_ACTIVATIONS = (nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention)


@dataclass(frozen=True)
class Mlp:
    """One feed-forward network, or one set of experts with its router. Shared experts are an `Mlp` of their own.

    Attributes:
        path (str): the smallest module that holds all of it; the layer itself for BERT and OPT.
        module (nn.Module): that module.
        kind (str): "dense" (down(act(up))), "gated" (down(act(gate) * up)) or "experts".
        up, gate, down (Place | None): projections; `gate` is `up` where one matrix makes both. None for experts.
        activations (tuple[Place, ...]): the non-linearities that are modules; empty if it is a function call.
        num_experts (int | None): how many experts, None if there are none.
        router (Place | None): what chooses the experts.
        experts (Place | None): the list of experts, or the module that holds their weights as [E, ., .] tensors.
    """

    path: str
    module: nn.Module = field(repr=False)
    kind: Literal["dense", "gated", "experts"]
    up: Place | None = None
    gate: Place | None = None
    down: Place | None = None
    activations: tuple[Place, ...] = ()
    num_experts: int | None = None
    router: Place | None = None
    experts: Place | None = None

    @property
    def activation(self) -> Place | None:
        """The non-linearity if it is a module, else None."""
        return self.activations[0] if self.activations else None


def find_mlps(layer: Place, attentions: tuple[Attention, ...]) -> tuple[Mlp, ...]:
    """Every feed-forward network in a block: sets of experts first, then the dense and gated ones."""
    taken = [
        part.path
        for attention in attentions
        for part in (attention.q, attention.k, attention.v, attention.qkv, attention.kv, attention.o)
        if part is not None
    ]
    # an attention spelled out in the block itself takes its projections only, not the block
    taken += [attention.path for attention in attentions if attention.path != layer.path]
    parts = [part for part in walk(layer.module, layer.path) if not any(under(part.path, t) for t in taken)]
    found: list[Mlp] = []
    for mlp in _experts(layer, parts):
        found.append(mlp)
        gone = [part.path for part in (mlp.experts, mlp.router) if part]
        # experts that are spelled out in the block itself take their weights only
        parts = [part for part in parts if not any(under(part.path, path) for path in gone)]
    return (*found, *_plain_mlps(layer, parts))


def _plain_mlps(layer: Place, parts: list[Place]) -> list[Mlp]:
    """Dense and gated networks: projections that share a parent, then those that each have their own (BERT)."""
    modules = {part.path: part.module for part in parts}
    families: dict[str, list[Place]] = {}
    for part in parts:
        if width(part.module) and part.path != layer.path:
            families.setdefault(parent(part.path), []).append(part)
    found: list[Mlp] = []
    alone: list[Place] = []
    for path, linears in families.items():
        home = modules.get(path)
        # what is left of an attention of an unknown make is no MLP
        if home is None or is_recurrent(home) or _ATTENTION.search(path.rpartition(".")[2].lower()):
            continue
        triple = _pair(linears, in_sequence=isinstance(home, nn.Sequential))
        if triple:
            found.append(_plain_mlp(layer, modules, path, triple))
        else:
            alone += linears
    while triple := _pair(alone, in_sequence=True):
        shared = _common([part.path for part in triple if part])
        found.append(_plain_mlp(layer, modules, shared, triple))
        alone = [part for part in alone if part not in triple]
    return found


def _pair(linears: list[Place], *, in_sequence: bool) -> tuple[Place, Place | None, Place] | None:
    """(up, gate or None, down): the last projection that undoes the widening of one or two others.

    `in_sequence` says that the projections run one after another, so that a second `up` is another network's.
    """
    sizes = {part.path: size for part in linears if (size := width(part.module))}
    for place in range(len(linears) - 1, -1, -1):
        down = linears[place]
        inner, hidden = sizes[down.path]
        others = linears[:place] if in_sequence else [part for part in linears if part is not down]
        ups = [part for part in others if sizes[part.path] in ((hidden, inner), (hidden, 2 * inner))]
        if in_sequence:
            ups = ups[-1:]
        if not ups:
            continue
        if sizes[ups[0].path][1] == 2 * inner:
            return ups[0], ups[0], down
        if len(ups) == 1:
            return ups[0], None, down
        gate = next((part for part in ups if "gate" in part.path.rpartition(".")[2]), ups[0])
        return next(part for part in ups if part is not gate), gate, down
    return None


def _plain_mlp(
    layer: Place, modules: dict[str, nn.Module], path: str, triple: tuple[Place, Place | None, Place]
) -> Mlp:
    up, gate, down = triple
    return Mlp(
        path,
        modules[path],
        "gated" if gate else "dense",
        up,
        gate,
        down,
        _activations(layer, modules, parent((gate or up).path)),
    )


def _experts(layer: Place, parts: list[Place]) -> Iterator[Mlp]:
    """Sets of experts: weights stacked as [E, ., .] tensors, or a list of networks beside a router."""
    modules = {part.path: part.module for part in parts}
    for part in parts:
        in_attention = _ATTENTION.search(part.path.removeprefix(layer.path).lower())
        count = None if in_attention else _stacked(part.module)
        if count:
            router, home = _router(layer, modules, part, count)
            acts = _activations(layer, modules, part.path)
            yield Mlp(
                home,
                modules[home],
                "experts",
                activations=acts,
                num_experts=count,
                router=router,
                experts=part,
            )
        elif isinstance(part.module, (nn.ModuleList, nn.ModuleDict)) and len(part.module) > 1:
            items = [Place(join(part.path, name), item) for name, item in part.module.named_children()]
            networks = [_plain_mlps(item, list(walk(item.module, item.path))) for item in items]
            router, home = _router(layer, modules, part, len(items))
            if router and all(networks):
                acts = tuple(act for mlps in networks for mlp in mlps for act in mlp.activations)
                yield Mlp(home, modules[home], "experts", None, None, None, acts, len(items), router, part)


def _stacked(module: nn.Module) -> int | None:
    """The number of experts whose weights are stacked as tensors in the module or in its direct children."""
    weights = list(module.parameters(recurse=False))
    convolutions = nn.modules.conv._ConvNd
    children = [child for child in module.children() if not isinstance(child, convolutions)]
    weights += [weight for child in children if (weight := getattr(child, "weight", None)) is not None]
    # a channel scale [C, 1, 1] is no stack of matrices
    counts = Counter(weight.shape[0] for weight in weights if weight.ndim == 3 and min(weight.shape[1:]) > 1)
    (count, times), *_ = counts.most_common(1) or [(0, 0)]
    return count if times > 1 and count > 1 else None


def _router(
    layer: Place, modules: dict[str, nn.Module], experts: Place, count: int
) -> tuple[Place | None, str]:
    """What has one row for each expert, nearest to the experts, and the module that holds both."""
    home = experts.path
    while under(home, layer.path):
        for name, child in modules[home].named_children():
            path = join(home, name)
            if not under(experts.path, path) and _rows(child) == [count]:
                return Place(path, child), home
        if home == layer.path:
            break
        home = parent(home)
    return None, experts.path


def _rows(module: nn.Module) -> list[int]:
    """Output widths of all matrices in the module."""
    rows = []
    for part in walk(module):
        size = width(part.module)
        weight = getattr(part.module, "weight", None)
        if size:
            rows.append(size[1])
        elif weight is not None and weight.ndim == 2:
            rows.append(weight.shape[0])
    return rows


def _activations(layer: Place, modules: dict[str, nn.Module], path: str) -> tuple[Place, ...]:
    """The non-linearities beside a projection, or further out, up to the block itself (OPT)."""
    while under(path, layer.path):
        found = tuple(
            Place(join(path, name), child)
            for name, child in modules[path].named_children()
            if _is_activation(name, child)
        )
        if found or path == layer.path:
            return found
        path = parent(path)
    return ()


def _is_activation(name: str, module: nn.Module) -> bool:
    if isinstance(module, _NOT_ACTIVATIONS) or any(weight.ndim > 1 for weight in module.parameters()):
        return False
    if type(module).__module__ in _ACTIVATION_HOMES:
        return True
    return bool(_ACTIVATION.search(name.lower())) and "drop" not in name.lower()


def _common(paths: list[str]) -> str:
    """The longest path that all of these lie under."""
    pieces = zip(*(path.split(".") for path in paths), strict=False)
    shared = []
    for step in pieces:
        if len(set(step)) > 1:
            break
        shared.append(step[0])
    return ".".join(shared)
