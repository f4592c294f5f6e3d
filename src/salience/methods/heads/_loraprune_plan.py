"""LoRAPrune's plan for a model: which kinds of units are pruned, and how many of each stay in a layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from salience.core.errors import ConflictError, StructureError, require
from salience.hosts.cutting import KINDS, Kind, Units, find_units, sayable
from salience.methods.heads._loraprune_scores import masked_count

if TYPE_CHECKING:
    from salience.methods.heads.loraprune import LoRAPrune


@dataclass(frozen=True)
class Plan:
    """What is to be pruned.

    Attributes:
        units (dict[Kind, Units]): the kinds that are pruned.
        counts (dict[Kind, int]): how many units of a layer stay.
        pruned (tuple[bool, ...]): for each layer whether it is pruned.
        unsayable (str): why no stock checkpoint can hold the result; "" if it can.
        left_out (str): which kinds are not pruned and why; "" if none.
    """

    units: dict[Kind, Units]
    counts: dict[Kind, int]
    pruned: tuple[bool, ...]
    unsayable: str
    left_out: str

    def full_masks(self) -> dict[Kind, Tensor]:
        """Masks [L, U] that keep everything."""
        return {
            kind: torch.ones(len(units.groups), units.total, dtype=torch.bool)
            for kind, units in self.units.items()
        }


def plan(method: LoRAPrune, model: nn.Module) -> Plan:
    """Find the units and count.

    Args:
        method (LoRAPrune): with the budget.
        model (nn.Module): the transformers model, whose projections may be PEFT's tuner layers.

    Raises:
        ParameterError: if the budget leaves no unit of a layer, or no layer to prune.
        StructureError, ConflictError: if there is nothing to prune.
    """
    kinds: tuple[Kind, ...] = KINDS
    if method.units in KINDS:
        kinds = (method.units,)
    units: dict[Kind, Units] = {}
    counts: dict[Kind, int] = {}
    reasons, unsayable = [], []
    for kind in kinds:
        try:
            found = find_units(model, kind)
            count = _wanted(method, found)
            stated = sayable(model, found, count)
        except StructureError as error:
            if method.units != "auto":
                raise
            reasons.append(f"{kind} ({error})")
            continue
        name = type(model.config).__name__
        if stated is None and method.units == "auto":
            reasons.append(f"{kind} ({name} ties their number to the hidden size)")
            continue
        if stated is None:
            unsayable.append(f"{count} of {found.total} {kind} a layer, which {name} cannot state")
        units[kind], counts[kind] = found, count if stated is None else stated
    if not units:
        raise ConflictError(f"model must have units that can be pruned, got none: {'; '.join(reasons)}")
    layers = len(next(iter(units.values())).groups)
    skipped = method.skip_first + method.skip_last
    require(skipped < layers, "skip_first + skip_last", f"less than the model's {layers} layers", skipped)
    if skipped and any(counts[kind] < units[kind].total for kind in units):
        unsayable.append(f"{skipped} layers that are wider than the others (skip_first, skip_last)")
    pruned = tuple(method.skip_first <= layer < layers - method.skip_last for layer in range(layers))
    return Plan(units, counts, pruned, " and ".join(unsayable), "; ".join(reasons))


def _wanted(method: LoRAPrune, units: Units) -> int:
    what = units.kind if units.heads == 1 else f"key/value heads ({units.heads} query heads each)"
    multiple = 1
    if units.kind == "channels":
        fits = units.total >= 32 and units.total % 8 == 0
        multiple = method.multiple if method.multiple is not None else 8 if fits else 1
        require(
            multiple <= units.total, "multiple", f"at most the {units.total} channels of a layer", multiple
        )
    floor = 1 / units.total
    require(
        method.keep >= floor - 1e-9,
        "keep",
        f"at least {floor:.4g}, which leaves one of the {units.total} {what} of a layer",
        method.keep,
    )
    kept = units.total - masked_count(units.total, 1 - method.keep)
    return min(math.ceil(kept / multiple) * multiple, units.total)
