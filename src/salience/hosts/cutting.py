"""Cuts heads and channels out of a transformers model, and says so in its config.

What is cut is found by the structure of the blocks (`hosts/transformers.py`), for decoders and encoders, with fused
or separate projections, `nn.Linear` or `Conv1D`, with or without PEFT around them. Biases are cut with their rows.

A stock checkpoint has one number of heads, one head width and one feed-forward width for all layers, so a model that
is to be loaded elsewhere needs equal counts in every layer, and a config class that knows those numbers apart from
the hidden size. Which it knows is tried and not looked up: `sayable` builds the smaller model from its config on the
meta device and compares shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, TargetError
from salience.hosts._cutting_units import (
    KINDS,
    Group,
    Kind,
    Side,
    Units,
    base_layer,
    dense_gradient,
    dense_weight,
    find_units,
    is_transposed,
)

__all__ = [
    "KINDS", "Group", "Kept", "Kind", "Originals", "Side", "Units", "base_layer", "cut", "dense_gradient",
    "dense_weight", "find_units", "hang_masks", "refuse_saving", "refuse_uncuttable", "sayable",
]  # fmt: skip

# kind -> for each layer the rising indices of the units that stay
Kept = Mapping[Kind, Sequence[Tensor]]
_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_q_heads")
_KV_COUNTS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_SPANS = ("split_size", "all_head_size", "inner_dim")
_INNER = (
    "intermediate_size",
    "n_inner",
    "ffn_dim",
    "d_ff",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)


class Originals:
    """Replaces attributes, and remembers the first value of each, so that undo skips what was there in between.

    Args:
        record (Attachment | None): restores the first values; None remembers nothing.
    """

    def __init__(self, record: Attachment | None = None) -> None:
        self._record = record
        self._seen: set[tuple[int, str]] = set()

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of a module (a parameter, say) or of a config."""
        key = (id(owner), name)
        if self._record is not None and key not in self._seen:
            self._seen.add(key)
            # what a class gives (a method, say) is covered, and uncovered again
            if hasattr(owner, name) and (name in vars(owner) or not hasattr(type(owner), name)):
                old = getattr(owner, name)
                self._record.on_undo(lambda: setattr(owner, name, old))
            else:
                self._record.on_undo(lambda: delattr(owner, name))
        setattr(owner, name, value)


def refuse_uncuttable(model: nn.Module) -> None:
    """Refuse what has no config of its own or keeps its weights as integers.

    Raises:
        TargetError: if it is no transformers model.
        ConflictError: if it is quantised.
    """
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise TargetError(
            f"model must be a transformers model (its config has to say the new sizes), got {type(model).__name__}"
        )
    method = getattr(model, "quantization_method", None)
    whole = next((n for n, p in model.named_parameters() if not p.is_floating_point()), None)
    if method is not None or whole is not None:
        got = f"{getattr(method, 'value', method)} weights" if method is not None else f"integers in {whole}"
        raise ConflictError(
            f"model must have float weights to be cut, got {got}: load it without quantization_config"
        )


def sayable(model: nn.Module, units: Units, wanted: int) -> int | None:
    """The smallest number of units, at least `wanted`, that a stock checkpoint of this model can state.

    Some config classes demand more than a number (Llama: the hidden size is a multiple of the heads), hence "at
    least". A count of all units is always sayable.

    Args:
        model (nn.Module): a plain transformers model, whatever its projections are wrapped in.
        units (Units): from `find_units(model, kind)`.
        wanted (int): in [1, units.total].

    Returns:
        int | None: None if the config ties this size to another: GPT-2's and BERT's heads, to the hidden size.
    """
    from huggingface_hub.errors import StrictDataclassError

    for count in range(wanted, units.total):
        config: Any = copy.deepcopy(model.config)
        try:
            for name, value in config_changes(model, units, count).items():
                setattr(_stated_in(config), name, value)
            config = type(config).from_dict(config.to_dict())
        except (ValueError, StrictDataclassError):
            continue  # the class refuses this very number; another may do
        return count if _builds(model, config, units, count) else None
    return units.total


def config_changes(model: nn.Module, units: Units, count: int) -> dict[str, int]:
    """What a config has to say for `count` units in each layer, by the names that it has.

    Raises:
        StructureError: if it has no such name.
    """
    config = _stated_in(model.config)
    if units.kind == "channels":
        # GPT-2 says None for four times the hidden size
        names = [
            name for name in _INNER if hasattr(config, name) and getattr(config, name) in (units.total, None)
        ]
        if not names:
            raise StructureError(
                f"config must state the {units.total} channels of the feed-forward networks, got none of "
                f"{', '.join(_INNER)} in {type(config).__name__}"
            )
        return {names[0]: count}
    heads = next((name for name in ("num_attention_heads", *_COUNTS) if hasattr(config, name)), None)
    if heads is None:
        raise StructureError(f"config must state the number of heads, got none in {type(config).__name__}")
    changes = {heads: count * units.heads, "head_dim": units.dim}
    changes |= {name: count for name in _KV_COUNTS if hasattr(config, name)}
    return changes


def hang_masks(units: Units, masks: Sequence[Tensor], record: Attachment) -> None:
    """Multiply what the output and down projections read by a mask of units, as if those units were cut out.

    The masks are read at each forward pass, so that they may be changed in place. That is the same function as
    masking the outputs of all other projections of the group, with the same gradients, and it holds for every
    non-linearity, also one that is not 0 at 0.

    Args:
        units (Units): of the model.
        masks (Sequence[Tensor]): for each layer [U] bool.
        record (Attachment): takes the masks off.
    """
    for group, mask in zip(units.groups, masks, strict=True):
        side = group.sides[-1]
        record.hook(side.place.module.register_forward_pre_hook(_masked(mask, side.index.shape[1])))


def _masked(mask: Tensor, size: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        hidden = args[0]
        return (hidden * mask.repeat_interleave(size).to(hidden.device, hidden.dtype), *args[1:])

    return hook


@torch.no_grad()
def cut(
    model: nn.Module, kept: Kept, originals: Originals, *, merge: Callable[[str], None] | None = None
) -> None:
    """Make a plain model smaller in place, and its config with it if all layers keep equal counts.

    Args:
        model (nn.Module): a transformers model without PEFT layers.
        kept (Kept): units that stay, by kind.
        originals (Originals): remembers what is replaced.
        merge (Callable | None): called with the path of each projection right before its layer is cut.
    """
    for kind, rows in kept.items():
        units = find_units(model, kind)
        counts = {len(row) for row in rows}
        for group, row in zip(units.groups, rows, strict=True):
            if merge is not None:
                for path in {side.place.path: None for side in group.sides}:
                    merge(path)
            if len(row) < units.total:
                _cut_group(units, group, row, originals)
        if len(counts) == 1 and counts != {units.total}:
            for name, value in config_changes(model, units, counts.pop()).items():
                originals.set(_stated_in(model.config), name, value)


def refuse_saving(model: nn.Module, why: str, originals: Originals) -> None:
    """Let `save_pretrained` of this model raise: what it would write could not be loaded.

    Args:
        model (nn.Module): the model.
        why (str): read after "model must have sizes that its config can state to be saved, got ".
        originals (Originals): takes it back.
    """

    def save_pretrained(*_: Any, **__: Any) -> None:
        raise ConflictError(f"model must have sizes that its config can state to be saved, got {why}")

    originals.set(model, "save_pretrained", save_pretrained)


def _cut_group(units: Units, group: Group, row: Tensor, originals: Originals) -> None:
    for place in {side.place.path: side.place for side in group.sides}.values():
        sides = [side for side in group.sides if side.place.path == place.path]
        # sides of a fused projection follow one another, so the features stay in order
        features = torch.cat([side.index[row.to(side.index.device)].flatten() for side in sides])
        _cut_projection(place.module, features, originals, out=sides[0].out)
    if units.kind == "channels":
        return
    for names, old, new in (
        (_COUNTS, units.total * units.heads, len(row) * units.heads),
        (_KV_COUNTS, units.total, len(row)),
        (_SPANS, units.total * units.heads * units.dim, len(row) * units.heads * units.dim),
    ):
        for name in names:
            if vars(group.owner).get(name) == old:
                originals.set(group.owner, name, new)


def _cut_projection(module: nn.Module, features: Tensor, originals: Originals, *, out: bool) -> None:
    transposed = is_transposed(module)
    weight: Any = module.weight
    features = features.to(weight.device)
    _replace(module, "weight", weight.index_select(1 if out is transposed else 0, features), originals)
    if out and module.bias is not None:
        _replace(module, "bias", module.bias[features], originals)  # type: ignore[index]
    name = ("nf" if out else "nx") if transposed else ("out_features" if out else "in_features")
    originals.set(module, name, len(features))


def _replace(module: nn.Module, name: str, value: Tensor, originals: Originals) -> None:
    trains = getattr(module, name).requires_grad
    originals.set(module, name, nn.Parameter(value.contiguous(), requires_grad=trains))


def _stated_in(config: Any) -> Any:
    """The config that states the main stack's sizes: a part of it in models of several towers."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _builds(model: nn.Module, config: Any, units: Units, count: int) -> bool:
    """Whether a model built from this config has exactly the shapes that cutting to `count` units gives."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        other = type(model)(config)
    built = find_units(other, units.kind)
    if (built.total, built.heads, built.dim) != (count, units.heads, units.dim):
        return False
    pairs = zip(units.groups, built.groups, strict=True)
    return all(
        side.index.shape[1:] == twin.index.shape[1:] and side.role == twin.role
        for group, new in pairs
        for side, twin in zip(group.sides, new.sides, strict=True)
    )
