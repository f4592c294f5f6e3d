"""LoRA on the projections that are to be cut: put on, read, and taken off again, merged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, TargetError
from salience.hosts._cutting_units import Units, base_layer, is_transposed
from salience.hosts.cutting import Kept, Originals, cut
from salience.hosts.transformers import unwrap

_NAME = "default"


@dataclass(frozen=True)
class LoRA:
    """A projection's LoRA.

    Attributes:
        A (nn.Parameter): [r, in].
        B (nn.Parameter): [out, r].
        scaling (float): s; the merged weight is W + s B A.
    """

    A: nn.Parameter
    B: nn.Parameter
    scaling: float


def lora_of(path: str, module: nn.Module) -> LoRA:
    """The one plain, trainable LoRA of a projection.

    Raises:
        TargetError: if it has none, several, or another kind of adapter.
        ConflictError: if it is frozen or merged.
    """
    from peft.tuners.lora import LoraLayer

    wanted = f"{path} must have one plain LoRA adapter to be scored"
    if not isinstance(module, LoraLayer):
        raise TargetError(f"{wanted}, got {type(module).__name__}: add it to target_modules")
    active = [name for name in module.active_adapters if name in module.lora_A]
    if len(active) != 1:
        raise TargetError(f"{wanted}, got {len(active)} active ones")
    variant = module.lora_variant.get(active[0])
    if variant is not None or not hasattr(module.lora_A[active[0]], "weight"):
        raise TargetError(f"{wanted}, got a {type(variant).__name__}")
    found = LoRA(
        module.lora_A[active[0]].weight, module.lora_B[active[0]].weight, float(module.scaling[active[0]])
    )
    if module.merged or not (found.A.requires_grad and found.B.requires_grad):
        state = "merged" if module.merged else "frozen"
        raise ConflictError(f"LoRA of {path} must train to be scored, got a {state} one")
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer is PEFT's."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


class Wrapped:
    """LoRA put on a plain model, in place; gradients are wanted for A and B only.

    Args:
        model (nn.Module): a transformers model without adapters.
        units (list[Units]): all their projections get LoRA.
        record (Attachment): takes LoRA off and restores `requires_grad`.
        rank (int): r.
        alpha (float): s = alpha / r.
        dropout (float): before A.
    """

    def __init__(
        self,
        model: nn.Module,
        units: list[Units],
        record: Attachment,
        *,
        rank: int,
        alpha: float,
        dropout: float,
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self._model = model
        self._places = {
            side.place.path: side.place.module
            for one in units
            for group in one.groups
            for side in group.sides
        }
        self._trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        own = set(vars(model))
        record.flags(model.parameters())
        record.on_undo(self._off)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=list(self._places),
            fan_in_fan_out=any(is_transposed(module) for module in self._places.values()),
        )
        inject_adapter_in_model(config, model, adapter_name=_NAME)
        self._added = set(vars(model)) - own

    def merge_and_cut(self, kept: Kept, originals: Originals) -> None:
        """Take LoRA off and leave the kept part of W + s B A behind, with the user's `requires_grad`.

        Projections are merged one after the other, right before they are cut: no second model is in memory.
        """
        layers: dict[str, Any] = {path: self._model.get_submodule(path) for path in self._places}
        self._off()

        def merge(path: str) -> None:
            weight: Any = self._places[path].weight
            merged = (weight.float() + layers[path].get_delta_weight(_NAME).float()).to(weight.dtype)
            originals.set(self._places[path], "weight", nn.Parameter(merged, requires_grad=False))

        cut(self._model, kept, originals, merge=merge)
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._trains[name])

    def _off(self) -> None:
        for path, base in self._places.items():
            parent, _, name = path.rpartition(".")
            setattr(self._model.get_submodule(parent), name, base)
        for name in self._added & set(vars(self._model)):
            delattr(self._model, name)


def trained_model(model: nn.Module) -> Any:
    """The transformers model inside of a PEFT model.

    Raises:
        TargetError: if the model is no PEFT model.
    """
    if not hasattr(model, "merge_and_unload"):
        raise TargetError(
            "target of LoRAPrune must be a Trainer whose model is a PEFT model with LoRA: "
            f"peft.get_peft_model(model, LoraConfig(target_modules='all-linear')), got {type(model).__name__}"
        )
    return unwrap(model)


def merged_model(trainer: Any, model: Any) -> nn.Module:
    """Merge the adapters of a Trainer's PEFT model and let the Trainer hold the plain model that is left."""
    with torch.no_grad():
        plain: nn.Module = model.merge_and_unload()
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(plain).pop(name, None)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    if trainer is not None:
        trainer.model = trainer.model_wrapped = plain
    return plain


def frozen_weights(units: list[Units]) -> Iterator[tuple[str, nn.Parameter]]:
    """(path, base weight) of every projection of the units, once each."""
    places = {
        side.place.path: side.place.module for one in units for group in one.groups for side in group.sides
    }
    for path, module in places.items():
        yield path, base_layer(module).weight  # type: ignore[misc]
