"""Projections and attentions in a block of a network, told by shapes, types and attribute names.

Nothing here imports transformers or peft, and nothing knows a model by its class name. A *projection* is a module
that maps the last dimension to another by a matrix: `nn.Linear` and its kin, the transposed `Conv1D` of GPT-2, and
the tuner layers that PEFT puts around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from salience.core.errors import StructureError

_ROLE = re.compile(
    r"(?:to_|w_?|linear_|lin_|attn_|project_|projection_)?"
    r"(q_a|q_b|kv_a|kv_b|qkv|query_key_value|q|query|k|key|v|value|kv|c_attn|in|o|out)"
    r"(?:_?(?:proj|projection|lin|linear|layer|dense|head|attn|with_mqa))*"
)
_ROLE_OF = {
    "query": "q",
    "key": "k",
    "value": "v",
    "out": "o",
    "query_key_value": "qkv",
    "c_attn": "qkv",
    "in": "qkv",
}
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads", "heads")
_HEAD_DIMS = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim", "dim_per_head", "d_head")
_CROSS = re.compile(r"cross|enc(oder)?_?(dec|att)")


class Place(NamedTuple):
    """A module and its dotted path in the model that was given. Under PEFT a projection is its tuner layer."""

    path: str
    module: nn.Module

    def __repr__(self) -> str:
        return f"{self.path}: {type(self.module).__name__}"


@dataclass(frozen=True)
class Heads:
    """How an attention divides its width.

    Attributes:
        num (int): query heads.
        kv (int): key and value heads.
        dim (int): width of one query and one key.
        value_dim (int): width of one value.
    """

    num: int
    kv: int
    dim: int
    value_dim: int


@dataclass(frozen=True)
class Attention:
    """One attention. A projection that the model does not have in that form is None.

    Attributes:
        path (str): where the module that computes the attention is.
        module (nn.Module): that module; BERT's output projection lies outside of it.
        heads (Heads | None): None where neither the module nor its config tells; the properties then raise.
        q, k, v, o (Place | None): separate projections.
        qkv (Place | None): one fused projection; None also where it is a bare parameter (`nn.MultiheadAttention`).
        kv (Place | None): keys and values fused, queries apart.
        q_a, q_b, kv_a, kv_b (Place | None): down and up projections of latent attention.
        is_cross (bool): keys and values come from another sequence.
    """

    path: str
    module: nn.Module = field(repr=False)
    heads: Heads | None
    q: Place | None = None
    k: Place | None = None
    v: Place | None = None
    o: Place | None = None
    qkv: Place | None = None
    kv: Place | None = None
    q_a: Place | None = None
    q_b: Place | None = None
    kv_a: Place | None = None
    kv_b: Place | None = None
    is_cross: bool = False

    @property
    def num_heads(self) -> int:
        """Query heads. Raises StructureError if they are unknown, as the other numbers do."""
        return self._known().num

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads; as many as query heads without grouping and in latent attention."""
        return self._known().kv

    @property
    def head_dim(self) -> int:
        """Width of one query and one key."""
        return self._known().dim

    @property
    def value_dim(self) -> int:
        """Width of one value; differs from `head_dim` in latent attention."""
        return self._known().value_dim

    def _known(self) -> Heads:
        if self.heads is None:
            raise StructureError(
                f"the heads of {self.path} must be known, got neither num_heads nor head_dim on "
                f"{type(self.module).__name__}; set one of them on that module"
            )
        return self.heads


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


def walk(module: nn.Module, path: str = "") -> Iterator[Place]:
    """The module and all below it, parents first; what is inside projections (adapter matrices) is left out."""
    yield Place(path, module)
    inner = getattr(module, "base_layer", None)
    if width(module) is not None:
        return
    children = [("base_layer", inner)] if isinstance(inner, nn.Module) else module.named_children()
    for name, child in children:
        yield from walk(child, join(path, name))


def find_attentions(layer: Place, *, in_decoder: bool = False) -> tuple[Attention, ...]:
    """Every attention in a block, in the order of the module tree.

    Args:
        layer (Place): the block.
        in_decoder (bool): the block belongs to the decoder of an encoder-decoder, where every attention after the
            first reads the encoder.
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


def _attention_roles(part: Place) -> dict[str, Place]:
    """The projections directly in `part` by role, if together they make an attention; else nothing."""
    roles: dict[str, Place] = {}
    if is_recurrent(part.module):
        return roles
    for name, child in part.module.named_children():
        match = _ROLE.fullmatch(name.lower())
        size = width(child)
        if match and size is not None and (match[1] != "in" or _is_fused(part.module, size)):
            role = _ROLE_OF.get(match[1], match[1])
            roles.setdefault(role, Place(join(part.path, name), child))
    if "q" in roles and "qkv" in roles:
        # GPT-2 reads another sequence: c_attn then makes keys and values only
        roles["kv"] = roles.pop("qkv")
    # layers that borrow the keys and values of an earlier one have only q and o
    sets = ({"q", "k", "v"}, {"qkv"}, {"q", "kv"}, {"q_b", "kv"}, {"kv_a", "kv_b"}, {"q", "o"})
    known = any(wanted <= roles.keys() for wanted in sets)
    return roles if known or isinstance(part.module, nn.MultiheadAttention) else {}


def _is_fused(module: nn.Module, size: tuple[int, int]) -> bool:
    """Whether an `in_proj` makes queries, keys and values: gated convolutions have one too, but no heads."""
    return size[1] == 3 * size[0] and _number(module, _HEADS) is not None


def _attention(
    layer: Place, parts: list[Place], holder: Place, roles: dict[str, Place], cross_by_position: bool
) -> Attention:
    roles = dict(roles)
    if "o" not in roles and (out := _output_projection(layer, parts, holder, roles)):
        roles["o"] = out
    stated = getattr(holder.module, "is_cross_attention", None)
    named = bool(_CROSS.search(holder.path.removeprefix(layer.path).lower()))
    cross = stated if isinstance(stated, bool) else named or cross_by_position
    return Attention(holder.path, holder.module, _heads(holder.module, roles), is_cross=cross, **roles)


def _output_projection(
    layer: Place, parts: list[Place], holder: Place, roles: dict[str, Place]
) -> Place | None:
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


def _heads(module: nn.Module, roles: dict[str, Place]) -> Heads | None:
    size = {role: shape for role, part in roles.items() if (shape := width(part.module))}
    stated = _number(module, _HEADS) or _number(getattr(module, "config", None), _HEADS)
    queries = size.get("q_b") or size.get("q")
    outputs = size["o"][0] if "o" in size else None
    if "kv_b" in size and queries and stated:
        dim = queries[1] // stated
        return Heads(stated, stated, dim, outputs // stated if outputs else dim)
    spans = [span for span in (outputs, queries[1] if queries else None) if span]
    dim = _number(module, _HEAD_DIMS) or (spans[0] // stated if stated and spans else 0)
    # what the shapes say wins over what was configured (heads may have been pruned); where they allow two readings
    # (query projections that also make a gate, values of another width) the configured number decides
    counts = [span // dim for span in spans if span % dim == 0] if dim else []
    heads = stated if stated in counts or not counts else counts[0]
    if not heads or not dim:
        return None
    return Heads(heads, _kv_heads(module, size, heads, dim), dim, outputs // heads if outputs else dim)


def _kv_heads(module: nn.Module, size: dict[str, tuple[int, int]], heads: int, dim: int) -> int:
    if "k" in size:
        return size["k"][1] // dim
    if "kv" in size:
        return max(1, size["kv"][1] // (2 * dim))  # one head where a single vector is key and value
    if "qkv" in size:
        return (size["qkv"][1] - heads * dim) // (2 * dim)
    return heads // (_number(module, ("num_key_value_groups",)) or 1)


def _number(owner: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        try:
            value = getattr(owner, name, None)
        except RuntimeError:  # a config whose layers differ refuses to name one number
            continue
        if isinstance(value, int) and value > 0:
            return value
    return None


def is_recurrent(module: nn.Module) -> bool:
    """Whether the module mixes neighbouring tokens by a convolution: a state space or linear attention layer."""
    return any(isinstance(child, nn.Conv1d) for child in module.children())
