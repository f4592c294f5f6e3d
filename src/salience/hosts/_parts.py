"""What one block of a network holds: attentions and MLPs, told by shapes, types and attribute names.

Nothing here imports transformers or peft, and nothing knows a model by its class name. A *projection* is a module
that maps the last dimension to another by a matrix: `nn.Linear` and its kin, the transposed `Conv1D` of GPT-2, and
the tuner layers that PEFT puts around them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from torch import nn

from salience.core.errors import StructureError

_ROLE = re.compile(
    r"(?:to_|w_?|linear_|lin_|attn_)?"
    r"(q_a|q_b|kv_a|kv_b|qkv|query_key_value|q|query|k|key|v|value|kv|c_attn|o|out)"
    r"(?:_?(?:proj|projection|lin|linear|layer|dense|attn|with_mqa))*"
)
_ROLE_OF = {"query": "q", "key": "k", "value": "v", "out": "o", "query_key_value": "qkv", "c_attn": "qkv"}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "heads")
_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head", "d_head")
_ACTIVATION = re.compile(r"(^|_)act(_|$|iv)|gelu|relu|silu|swish")
_ACTIVATION_HOMES = ("torch.nn.modules.activation", "transformers.activations")
_NOT_ACTIVATIONS = (nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention)


class Part(NamedTuple):
    """A module and its dotted path in the model that was given. Under PEFT a projection is its tuner layer."""

    path: str
    module: nn.Module

    def __repr__(self) -> str:
        return f"{self.path}: {type(self.module).__name__}"


@dataclass(frozen=True)
class Attention:
    """One attention. A projection that the model does not have in that form is None.

    Attributes:
        path (str): where the module that computes the attention is.
        module (nn.Module): that module; BERT's output projection lies outside of it.
        num_heads (int): query heads.
        num_kv_heads (int): key and value heads; equal to `num_heads` without grouping and in latent attention.
        head_dim (int): width of one query and one key.
        value_dim (int): width of one value; differs from `head_dim` in latent attention only.
        q, k, v, o (Part | None): separate projections.
        qkv (Part | None): one fused projection; None also where it is a bare parameter (`nn.MultiheadAttention`).
        kv (Part | None): keys and values fused, queries apart.
        q_a, q_b, kv_a, kv_b (Part | None): down and up projections of latent attention.
        is_cross (bool): keys and values come from another sequence.
    """

    path: str
    module: nn.Module = field(repr=False)
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    q: Part | None = None
    k: Part | None = None
    v: Part | None = None
    o: Part | None = None
    qkv: Part | None = None
    kv: Part | None = None
    q_a: Part | None = None
    q_b: Part | None = None
    kv_a: Part | None = None
    kv_b: Part | None = None
    is_cross: bool = False


@dataclass(frozen=True)
class Mlp:
    """One feed-forward network, or one set of experts with its router. Shared experts are an `Mlp` of their own.

    Attributes:
        path (str): the smallest module that holds all of it; the layer itself for BERT and OPT.
        module (nn.Module): that module.
        kind (str): "dense" (down(act(up))), "gated" (down(act(gate) * up)) or "experts".
        up, gate, down (Part | None): projections; `gate` is `up` where one matrix makes both. None for experts.
        activations (tuple[Part, ...]): the non-linearities that are modules; empty if it is a function call.
        num_experts (int | None): how many experts, None if there are none.
        router (Part | None): what chooses the experts.
        experts (Part | None): the list of experts, or the module that holds their weights as [E, ., .] tensors.
    """

    path: str
    module: nn.Module = field(repr=False)
    kind: Literal["dense", "gated", "experts"]
    up: Part | None = None
    gate: Part | None = None
    down: Part | None = None
    activations: tuple[Part, ...] = ()
    num_experts: int | None = None
    router: Part | None = None
    experts: Part | None = None

    @property
    def activation(self) -> Part | None:
        """The non-linearity if it is a module, else None."""
        return self.activations[0] if self.activations else None


def join(path: str, name: str) -> str:
    """`path.name`, where either may be empty."""
    return f"{path}.{name}" if path and name else path or name


def parent(path: str) -> str:
    """The path one step up; "" at the root."""
    return path.rpartition(".")[0]


def under(path: str, root: str) -> bool:
    """Whether `path` is `root` or lies inside of it."""
    return not root or path == root or path.startswith(root + ".")


def width(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) features of a projection, None for anything else."""
    inner = getattr(module, "base_layer", None)
    if isinstance(inner, nn.Module):
        return width(inner)
    if next(module.children(), None) is not None and "weight" not in module._parameters:
        return None  # a block that remembers its own widths is not a projection
    for names in (("in_features", "out_features"), ("nx", "nf")):
        fan_in, fan_out = (getattr(module, name, None) for name in names)
        if isinstance(fan_in, int) and isinstance(fan_out, int):
            return fan_in, fan_out
    return None


def walk(module: nn.Module, path: str = "") -> Iterator[Part]:
    """The module and all below it, parents first; what is inside projections (adapter matrices) is left out."""
    yield Part(path, module)
    inner = getattr(module, "base_layer", None)
    if width(module) is not None:
        return
    children = [("base_layer", inner)] if isinstance(inner, nn.Module) else module.named_children()
    for name, child in children:
        yield from walk(child, join(path, name))


def find_attentions(layer: Part, *, in_decoder: bool = False) -> tuple[Attention, ...]:
    """Every attention in a block, in the order of the module tree.

    Args:
        layer (Part): the block.
        in_decoder (bool): the block belongs to the decoder of an encoder-decoder, where every attention after the
            first reads the encoder.

    Raises:
        StructureError: if an attention says neither its heads nor their width.
    """
    parts = list(walk(layer.module, layer.path))
    holders = [(part, roles) for part in parts if (roles := _attention_roles(part))]
    return tuple(
        _attention(layer, parts, holder, roles, in_decoder and number > 0)
        for number, (holder, roles) in enumerate(holders)
    )


def has_attention(module: nn.Module) -> bool:
    """Whether there is an attention anywhere in the module."""
    return any(_attention_roles(part) for part in walk(module))


def _attention_roles(part: Part) -> dict[str, Part]:
    """The projections directly in `part` by role, if together they make an attention; else nothing."""
    roles: dict[str, Part] = {}
    for name, child in part.module.named_children():
        match = _ROLE.fullmatch(name.lower())
        if match and width(child) is not None:
            role = _ROLE_OF.get(match[1], match[1])
            roles.setdefault(role, Part(join(part.path, name), child))
    if "q" in roles and "qkv" in roles:  # GPT-2 reads another sequence: c_attn then makes keys and values only
        roles["kv"] = roles.pop("qkv")
    # layers that borrow the keys and values of an earlier one have only q and o
    sets = ({"q", "k", "v"}, {"qkv"}, {"q", "kv"}, {"kv_a", "kv_b"}, {"q", "o"})
    known = any(wanted <= roles.keys() for wanted in sets)
    return roles if known or isinstance(part.module, nn.MultiheadAttention) else {}


def _attention(
    layer: Part, parts: list[Part], holder: Part, roles: dict[str, Part], cross_by_position: bool
) -> Attention:
    roles = dict(roles)
    if "o" not in roles and (out := _output_projection(layer, parts, holder, roles)):
        roles["o"] = out
    heads, kv_heads, head_dim, value_dim = _head_numbers(holder, roles)
    stated = getattr(holder.module, "is_cross_attention", None)
    named = "cross" in (holder.path.removeprefix(layer.path) + type(holder.module).__name__).lower()
    cross = stated if isinstance(stated, bool) else named or cross_by_position
    return Attention(
        holder.path, holder.module, heads, kv_heads, head_dim, value_dim, is_cross=cross, **roles
    )


def _output_projection(layer: Part, parts: list[Part], holder: Part, roles: dict[str, Part]) -> Part | None:
    """The last projection back to the hidden width in the attention, or next to it where BERT has it."""
    inputs = [width(part.module) for role, part in roles.items() if role in ("q", "qkv", "q_a")]
    hidden = inputs[0][0] if inputs and inputs[0] else None
    used = {part.path for part in roles.values()}
    for root in (holder.path, parent(holder.path)):
        if root == layer.path or not under(root, layer.path):
            break
        linears = [part for part in parts if under(part.path, root) and part.path not in used]
        fitting = [part for part in linears if (size := width(part.module)) and hidden in (None, size[1])]
        if fitting:
            return fitting[-1]
    return None


def _head_numbers(holder: Part, roles: dict[str, Part]) -> tuple[int, int, int, int]:
    """(query heads, key/value heads, width of a query, width of a value)."""
    size = {role: shape for role, part in roles.items() if (shape := width(part.module))}
    config = getattr(holder.module, "config", None)
    stated = _number(holder.module, _HEADS) or _number(config, _HEADS)
    queries = size.get("q_b") or size.get("q")
    if "kv_b" in size and queries and stated:
        value_dim = size["o"][0] // stated if "o" in size else queries[1] // stated
        return stated, stated, queries[1] // stated, value_dim
    spans = [span for span in (size["o"][0] if "o" in size else None, queries[1] if queries else None) if span]
    head_dim = _number(holder.module, _HEAD_DIMS)
    if head_dim is None and stated and spans:
        head_dim = spans[0] // stated
    # what the shapes say wins over what was configured (heads may have been pruned); where they allow two readings
    # (query projections that also make a gate, values of another width) the configured number decides
    counts = [span // head_dim for span in spans if span % head_dim == 0] if head_dim else []
    heads = stated if stated in counts or not counts else counts[0]
    if not heads or not head_dim:
        raise StructureError(
            f"the number of heads of {holder.path} must be known, got neither num_heads nor head_dim on "
            f"{type(holder.module).__name__}; set one of them on that module"
        )
    value_dim = size["o"][0] // heads if "o" in size else head_dim
    return heads, _kv_heads(holder.module, size, heads, head_dim), head_dim, value_dim


def _kv_heads(module: nn.Module, size: dict[str, tuple[int, int]], heads: int, head_dim: int) -> int:
    if "k" in size:
        return size["k"][1] // head_dim
    if "kv" in size:
        return size["kv"][1] // (2 * head_dim)
    if "qkv" in size:
        return (size["qkv"][1] - heads * head_dim) // (2 * head_dim)
    return heads // (_number(module, ("num_key_value_groups",)) or 1)


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def find_mlps(layer: Part, attentions: tuple[Attention, ...]) -> tuple[Mlp, ...]:
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


def _plain_mlps(layer: Part, parts: list[Part]) -> list[Mlp]:
    """Dense and gated networks: projections that share a parent, then those that each have their own (BERT)."""
    modules = {part.path: part.module for part in parts}
    families: dict[str, list[Part]] = {}
    for part in parts:
        if width(part.module) and part.path != layer.path:
            families.setdefault(parent(part.path), []).append(part)
    found: list[Mlp] = []
    alone: list[Part] = []
    for path, linears in families.items():
        triple = _pair(linears, sequential=isinstance(modules.get(path), nn.Sequential))
        if triple:
            found.append(_plain_mlp(layer, modules, path, triple))
        else:
            alone += linears
    triple = _pair(alone, sequential=False)
    if triple:
        shared = _common([part.path for part in triple if part])
        found.append(_plain_mlp(layer, modules, shared, triple))
    return found


def _pair(linears: list[Part], *, sequential: bool) -> tuple[Part, Part | None, Part] | None:
    """(up, gate or None, down): the last projection that undoes the widening of one or two others."""
    sizes = {part.path: size for part in linears if (size := width(part.module))}
    for down in reversed(linears):
        inner, hidden = sizes[down.path]
        ups = [
            part
            for part in linears
            if part is not down and sizes[part.path] in ((hidden, inner), (hidden, 2 * inner))
        ]
        if not ups:
            continue
        if sizes[ups[0].path][1] == 2 * inner:
            return ups[0], ups[0], down
        if len(ups) == 1 or sequential:
            return ups[0], None, down
        gate = next((part for part in ups if "gate" in part.path.rpartition(".")[2]), ups[0])
        return next(part for part in ups if part is not gate), gate, down
    return None


def _plain_mlp(
    layer: Part, modules: dict[str, nn.Module], path: str, triple: tuple[Part, Part | None, Part]
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


def _experts(layer: Part, parts: list[Part]) -> Iterator[Mlp]:
    """Sets of experts: weights stacked as [E, ., .] tensors, or a list of networks beside a router."""
    modules = {part.path: part.module for part in parts}
    for part in parts:
        count = _stacked(part.module)
        if count:
            router, home = _router(layer, modules, part, count)
            acts = _activations(layer, modules, part.path)
            yield Mlp(
                home, modules[home], "experts", activations=acts, num_experts=count, router=router, experts=part
            )
        elif isinstance(part.module, (nn.ModuleList, nn.ModuleDict)) and len(part.module) > 1:
            items = [Part(join(part.path, name), item) for name, item in part.module.named_children()]
            networks = [_plain_mlps(item, list(walk(item.module, item.path))) for item in items]
            router, home = _router(layer, modules, part, len(items))
            if router and all(networks):
                acts = tuple(act for mlps in networks for mlp in mlps for act in mlp.activations)
                yield Mlp(home, modules[home], "experts", None, None, None, acts, len(items), router, part)


def _stacked(module: nn.Module) -> int | None:
    """The number of experts whose weights are stacked as tensors in the module or in its direct children."""
    own = [weight.shape[0] for weight in module.parameters(recurse=False) if weight.ndim == 3]
    for child in module.children():
        weight = getattr(child, "weight", None)
        if weight is not None and weight.ndim == 3 and not isinstance(child, nn.modules.conv._ConvNd):
            own.append(weight.shape[0])
    (count, times), *_ = Counter(own).most_common(1) or [(0, 0)]
    return count if times > 1 and count > 1 else None


def _router(
    layer: Part, modules: dict[str, nn.Module], experts: Part, count: int
) -> tuple[Part | None, str]:
    """What has one row for each expert, nearest to the experts, and the module that holds both."""
    home = experts.path
    while under(home, layer.path):
        for name, child in modules[home].named_children():
            path = join(home, name)
            if not under(experts.path, path) and _rows(child) == [count]:
                return Part(path, child), home
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


def _activations(layer: Part, modules: dict[str, nn.Module], path: str) -> tuple[Part, ...]:
    """The non-linearities beside a projection, or further out, up to the block itself (OPT)."""
    while under(path, layer.path):
        found = tuple(
            Part(join(path, name), child)
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
