"""Which Trainers let parameters be frozen and trained again between two optimizer steps."""

from __future__ import annotations

from typing import Any

from salience.core.errors import ConflictError


def refuse_fixed_training(trainer: Any, name: str) -> None:
    """Refuse the settings under which the parameters that train are settled once, at the start.

    Args:
        trainer (Any): a transformers Trainer; None (a loop of one's own) is never refused.
        name (str): the method, for the text.

    Raises:
        ConflictError: for DeepSpeed, FSDP version 1, or DDP that does not look for unused parameters.
    """
    if trainer is None:
        return
    if trainer.is_deepspeed_enabled:
        raise ConflictError(
            f"DeepSpeed must be off for {name} (its engine is built for the parameters that train at the start: "
            "use FSDP version 2), got on"
        )
    if trainer.is_fsdp_enabled:
        version = trainer.accelerator.state.fsdp_plugin.fsdp_version
        if version < 2:
            raise ConflictError(
                f"fsdp_version must be 2 for {name} (version 1 flattens frozen and trained parameters together), "
                f"got {version}"
            )
        return
    handler = trainer.accelerator.ddp_handler
    alone = trainer.args.world_size == 1
    if not alone and handler is not None and not handler.find_unused_parameters:
        raise ConflictError(
            f"ddp_find_unused_parameters must be True for {name} (frozen blocks give no gradient), got False; the "
            "Trainer sets False by itself under gradient checkpointing"
        )
