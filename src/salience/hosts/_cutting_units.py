"""What can be cut out of a layer without touching its neighbours: heads, and channels of feed-forward networks.

A *unit* is the smallest piece that goes as a whole. A head goes with its rows of the query, key and value projections
and its columns of the output projection; under grouped queries the unit is a key/value head with all query heads that
read it. A channel goes with its row of the up (and gate) projection and its column of the down projection. Both live
inside one block, so nothing has to be traced through the rest of the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError
from salience.hosts._parts import Place, width
from salience.hosts.transformers import Attention, Layer, Mlp, structure

Kind = Literal["heads", "channels"]
KINDS: tuple[Kind, ...] = ("heads", "channels")


@dataclass(frozen=True)
class Side:
    """Where the units of a group lie in one projection.

    Attributes:
        role (str): "q", "k", "v", "o", "gate", "up" or "down". A fused projection has several.
        place (Place): the projection; under PEFT its tuner layer.
        out (bool): units are output features (rows of W [out, in]); else input features (columns).
        index (Tensor): [U, width] int64, the features of each unit.
    """

    role: str
    place: Place
    out: bool
    index: Tensor = field(repr=False)


@dataclass(frozen=True)
class Group:
    """The units of one kind in one layer.

    Attributes:
        path (str): of the attention or the feed-forward network.
        owner (nn.Module): that module.
        sides (tuple[Side, ...]): the output or down projection comes last.
    """

    path: str
    owner: nn.Module = field(repr=False)
    sides: tuple[Side, ...] = field(repr=False)


@dataclass(frozen=True)
class Units:
    """All units of one kind.

    Attributes:
        kind (str): "heads" or "channels".
        total (int): U, units in each layer.
        groups (tuple[Group, ...]): one for each layer.
        heads (int): query heads in a unit; 1 for channels.
        dim (int): width of a head; 1 for channels.
    """

    kind: Kind
    total: int
    groups: tuple[Group, ...]
    heads: int = 1
    dim: int = 1


def find_units(model: nn.Module, kind: Kind) -> Units:
    """The units of one kind in the model's main stack, plain or under PEFT.

    Raises:
        StructureError: if a layer has none or another number of them than the first, or if they cannot be cut out.
    """
    layers = structure(model).layers
    found = [(_heads if kind == "heads" else _channels)(layer) for layer in layers]
    first = found[0]
    for layer, other in zip(layers, found):
        if (other.total, other.heads, other.dim) != (first.total, first.heads, first.dim):
            raise StructureError(
                f"every layer must have the same {kind}, got {first.total} in {layers[0].path} and {other.total} in "
                f"{layer.path}"
            )
    _refuse_shared([group for one in found for group in one.groups], kind)
    return Units(kind, first.total, tuple(one.groups[0] for one in found), first.heads, first.dim)


def base_layer(module: nn.Module) -> nn.Module:
    """What a tuner layer wraps, at any depth; the module itself without one."""
    inner = getattr(module, "base_layer", None)
    return base_layer(inner) if isinstance(inner, nn.Module) else module


def is_transposed(module: nn.Module) -> bool:
    """Whether a plain projection keeps its weight as [in, out], as GPT-2's Conv1D does."""
    return not hasattr(module, "out_features") and hasattr(module, "nf")


def dense_weight(module: nn.Module) -> Tensor:
    """[out, in] a view of a projection's base weight."""
    inner = base_layer(module)
    weight: Tensor = inner.weight.detach()  # type: ignore[operator]
    return weight.T if is_transposed(inner) else weight


def dense_gradient(module: nn.Module) -> Tensor | None:
    """[out, in] the gradient of a projection's base weight, None without one."""
    inner = base_layer(module)
    gradient: Tensor | None = inner.weight.grad  # type: ignore[assignment]
    return gradient.T if gradient is not None and is_transposed(inner) else gradient


def _heads(layer: Layer) -> Units:
    if len(layer.attentions) != 1 or layer.attentions[0].is_cross:
        _refuse(layer.path, "one self-attention", f"{len(layer.attentions)} attentions")
    attention = layer.attentions[0]
    known = attention.heads
    if known is None or attention.o is None:
        _refuse(attention.path, "heads and an output projection that can be found", "none")
    _refuse_parts_by_head(attention)
    groups = known.num // known.kv
    sizes = {"q": groups * known.dim, "k": known.dim, "v": known.value_dim}
    sides = tuple(
        Side(role, place, True, _blocks(start, known.kv, sizes[role]))
        for role, place, start in _sources(attention, {role: known.kv * size for role, size in sizes.items()})
    )
    out = Side("o", attention.o, False, _blocks(0, known.kv, groups * known.value_dim))
    group = Group(attention.path, attention.module, (*sides, out))
    _check_widths(group)
    return Units("heads", known.kv, (group,), groups, known.dim)


def _sources(attention: Attention, spans: dict[str, int]) -> Iterator[tuple[str, Place, int]]:
    """(role, projection, first row) of queries, keys and values."""
    if attention.qkv is not None:
        if attention.qkv.path.rpartition(".")[2] == "query_key_value":
            # GPT-NeoX, BLOOM and Falcon lay out each head's query, key and value side by side
            _refuse(
                attention.path, "a fused projection of all queries, then keys, then values", "query_key_value"
            )
        start = 0
        for role, span in spans.items():
            yield role, attention.qkv, start
            start += span
        return
    for role, place in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
        if place is None:
            _refuse(attention.path, "projections q, k, v or one that is all three", f"no {role}")
        yield role, place, 0


def _refuse_parts_by_head(attention: Attention) -> None:
    """Refuse sinks, position biases and norms over all heads: they would have to be cut too, or would change."""
    assert attention.heads is not None
    own = [name for name, _ in attention.module.named_parameters(recurse=False)]
    for name, child in attention.module.named_modules():
        if width(child) is not None or name.startswith("base_layer") or not name:
            continue
        for parameter, value in child.named_parameters(recurse=False):
            inside = any(
                name.startswith(part.path.rpartition(".")[2] + ".") for part in _projections(attention)
            )
            if not inside and value.numel() not in (attention.heads.dim, attention.heads.value_dim):
                own.append(f"{name}.{parameter}")
    if own:
        _refuse(attention.path, "only projections and norms inside of one head", ", ".join(own))


def _projections(attention: Attention) -> list[Place]:
    parts = (attention.q, attention.k, attention.v, attention.qkv, attention.o)
    return [part for part in parts if part is not None]


def _channels(layer: Layer) -> Units:
    dense = [mlp for mlp in layer.mlps if mlp.kind != "experts"]
    if len(layer.mlps) != 1 or not dense:
        got = ", ".join(mlp.kind for mlp in layer.mlps) or "none"
        _refuse(layer.path, "one dense or gated feed-forward network", got)
    mlp: Mlp = dense[0]
    assert mlp.up is not None and mlp.down is not None
    size = width(mlp.down.module)
    assert size is not None
    total = size[0]
    sides = []
    if mlp.gate is not None:
        sides.append(Side("gate", mlp.gate, True, _blocks(0, total, 1)))
    # where one matrix makes both, the gate is its first half and the rest its second
    start = total if mlp.gate is not None and mlp.gate.module is mlp.up.module else 0
    sides.append(Side("up", mlp.up, True, _blocks(start, total, 1)))
    sides.append(Side("down", mlp.down, False, _blocks(0, total, 1)))
    group = Group(mlp.path, mlp.module, tuple(sides))
    _check_widths(group)
    return Units("channels", total, (group,))


def _blocks(start: int, units: int, size: int) -> Tensor:
    return torch.arange(start, start + units * size).view(units, size)


def _check_widths(group: Group) -> None:
    """The units of a projection must be all of its features on that side, or it is laid out in an unknown way."""
    for side in group.sides:
        size = width(side.place.module)
        covered = sum(other.index.numel() for other in group.sides if other.place.path == side.place.path)
        if size is None or covered != size[1 if side.out else 0]:
            _refuse(side.place.path, f"{covered} features for its units", str(size))


def _refuse_shared(groups: list[Group], kind: str) -> None:
    owners: dict[int, str] = {}
    for group in groups:
        for side in group.sides:
            weight = id(getattr(base_layer(side.place.module), "weight", None))
            if owners.setdefault(weight, side.place.path) != side.place.path:
                raise StructureError(
                    f"{kind} must have weights of their own in every layer, got one weight in {owners[weight]} and "
                    f"{side.place.path}"
                )


def _refuse(path: str, wanted: str, got: str) -> NoReturn:
    raise StructureError(f"{path} must have {wanted} to cut units out of it, got {got}")
