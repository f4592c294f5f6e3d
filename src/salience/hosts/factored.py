"""Transformers models whose layers are factored: what a Trainer must not do to them, and how factors are written.

A stock config cannot say that a layer is two thinner ones, so `from_pretrained` builds the dense layer. Factors are
therefore written as `factors.safetensors` beside `config.json`, under the names of the stock layers; without a
`model.safetensors`, `from_pretrained` on that folder fails instead of loading random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from salience.core.errors import ConflictError, TargetError

FILE = "factors.safetensors"


def refuse_fixed_weights(model: nn.Module, trainer: Any, *, full_pass: bool = False) -> None:
    """Refuse models and Trainers in which weights cannot be replaced by factors that train.

    Args:
        model (nn.Module): the model.
        trainer (Any): a transformers Trainer; None (a loop of one's own) is never refused.
        full_pass (bool): whether the model runs twice in a step, at different ranks.

    Raises:
        TargetError: for models with PEFT adapters.
        ConflictError: for a model spread over devices, and for a Trainer that has its optimizer already or would
            spread parameters over ranks.
    """
    if hasattr(model, "peft_config"):
        raise TargetError(
            "model must be without PEFT adapters for Maestro (it trains the weights themselves), got "
            f"{type(model).__name__}"
        )
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ConflictError(
            "device_map must be one device for Maestro (the hooks that move a layer's inputs are its own), got "
            f"{model.hf_device_map}"
        )
    if full_pass and getattr(model, "is_gradient_checkpointing", False):
        raise ConflictError(
            "gradient checkpointing must be off for full_pass (it would run the first pass again at the rank of the "
            "second), got on"
        )
    if trainer is None:
        return
    reasons = (
        (
            trainer.optimizer is not None,
            "trainer.optimizer must be None (it is built over the factors)",
            "one",
        ),
        (trainer.args.n_gpu > 1, "one process must use one GPU (launch with torchrun)", trainer.args.n_gpu),
        (trainer.is_deepspeed_enabled, "DeepSpeed must be off (ranks must stay whole)", "on"),
        (trainer.is_fsdp_enabled, "FSDP must be off (ranks must stay whole)", "on"),
        (
            full_pass and trainer.args.gradient_checkpointing,
            "gradient_checkpointing must be False with full_pass",
            True,
        ),
    )
    for refused, wanted, got in reasons:
        if refused:
            raise ConflictError(f"{wanted} for Maestro, got {got}")


def write_factors_on_save(model: Any) -> None:
    """Let this model's own `save_pretrained` write factors; a module without one is left as it is."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _Writer(model)


class _Writer:
    """Stands in for `save_pretrained`; a class, so that copying the model copies it along."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, save_directory: str | Path, *, is_main_process: bool = True, **_: Any) -> None:
        if is_main_process:
            write_factors(self._model, Path(save_directory))


def write_factors(model: Any, folder: Path) -> None:
    """Write all weights of a model as `factors.safetensors`, tied ones once, and its configuration.

    Args:
        model (Any): a transformers model, some of whose layers are `nn.Sequential` of two stock layers.
        folder (Path): made if it does not exist.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            tensors[name] = value.detach().contiguous().cpu()
    save_file(tensors, str(folder / FILE), metadata={"format": "pt"})
    model.config.save_pretrained(folder)
    if getattr(model, "can_generate", lambda: False)():
        model.generation_config.save_pretrained(folder)
