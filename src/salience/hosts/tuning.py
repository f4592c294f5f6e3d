"""Tunes a model with one or several sets of methods, measures each, and survives being killed.

A run folder holds `recipe.json`, `metrics.jsonl`, `arms/<arm>/` with the finished adapter or model as ordinary
safetensors, `result.json`, and what the report draws. The same recipe in the same folder goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from transformers import set_seed

from salience.core.errors import ParameterError
from salience.core.files import write_json_atomic
from salience.core.part import parameter_bytes
from salience.core.spec import describe_method
from salience.hosts.arms import Arm, Progress, Task, TuneTrainer, train_arm
from salience.verb import Focus


def run_arm(
    arm: Arm, task: Task, folder: Path, progress: Progress, stop: Callable[[], bool]
) -> dict[str, Any]:
    """Tune one arm, or take its stored result.

    Args:
        arm (Arm): what to run.
        task (Task): what on.
        folder (Path): the run folder; the arm's files go to `folder/arms/<name>`.
        progress (Progress): told after every step.
        stop (Callable): asked after every step whether to stop cleanly.

    Returns:
        dict: the arm's entry of `result.json`.

    Raises:
        TrainingError: if the loss is not finite.
        Stopped: if `stop` said so; a resumable state was written.
    """
    home = folder / "arms" / arm.name
    done = home / "done.json"
    if done.is_file():
        result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return result
    home.mkdir(parents=True, exist_ok=True)
    set_seed(task.seed)
    model, tokenizer = task.make()
    trainer, handle = train_arm(arm, task, model, folder, progress, stop)
    result = _measure(arm, task, trainer, tokenizer, handle)
    _store(handle, arm, home, tokenizer)
    if handle is not None:
        handle.undo()
    _save_weights(trainer.model, tokenizer, home / "model")
    write_json_atomic(done, result)
    for checkpoint in home.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


def _measure(
    arm: Arm, task: Task, trainer: TuneTrainer, tokenizer: Any, handle: Focus | None
) -> dict[str, Any]:
    model, meters = trainer.model, trainer.meters
    eval_loss = next(row["eval_loss"] for row in reversed(trainer.state.log_history) if "eval_loss" in row)
    model.eval()
    scores = task.score(model, tokenizer) if task.score is not None else {}
    spent = handle.spent if handle is not None else {}
    return {
        "label": arm.label,
        "methods": [describe_method(method) for method in arm.methods],
        "slugs": [method.slug() for method in arm.methods],
        "quality": scores.get("overall", eval_loss),
        "quality_by_task": {name: value for name, value in scores.items() if name != "overall"},
        "eval_loss": eval_loss,
        "steps": task.steps,
        "seconds": meters.seconds,
        "step_seconds": median(meters.step_seconds),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "memory": {
            "parameters": parameter_bytes(model),
            "gradients": meters.gradients,
            "optimizer": meters.optimizer,
            "saved_for_backward": int(sum(meters.saved) / max(len(meters.saved), 1)),
        },
        "spent": json.loads(json.dumps(spent, default=str)),
    }


def _store(handle: Focus | None, arm: Arm, home: Path, tokenizer: Any) -> None:
    """Write what the report draws: score histories and token heat."""
    if handle is None:
        return
    from safetensors.torch import save_file

    histories: dict[str, Tensor] = {}
    tokens: list[dict[str, Any]] = []
    for method, part in zip(handle.methods, handle.parts):
        for name, history in part.histories.items():
            if history.steps:
                for key, value in history.state().items():
                    histories[f"{arm.name}/{method.slug()}/{name}/{key}"] = value.contiguous()
        for heat in getattr(part, "heat", []):
            tokens.append({"arm": arm.name, "slug": method.slug(), **_readable(heat, tokenizer)})
    if histories:
        save_file(histories, str(home / "scores.safetensors"))
    write_json_atomic(home / "tokens.json", tokens)


def _readable(heat: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Token ids as text, and scores only where a token could be chosen."""
    scores = [score if could else None for score, could in zip(heat["scores"], heat["response"])]
    return {
        "title": f"a sample of step {heat['step']}",
        "tokens": [tokenizer.decode([token]) for token in heat["tokens"]],
        "prompt": heat["prompt"],
        "score": scores,
        "kept": heat["kept"],
    }


def _save_weights(model: Any, tokenizer: Any, folder: Path) -> None:
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(str(staging))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(staging))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def check_folder(folder: Path, recipe: dict[str, Any]) -> None:
    """Refuse a run folder that was made by another recipe; write the recipe into a new one.

    Raises:
        ParameterError: if the folder belongs to another recipe (naming the first difference), or holds other files.
    """
    path = folder / "recipe.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(key for key in {*stored, *recipe} if stored.get(key) != recipe.get(key))
        if differing:
            key = differing[0]
            raise ParameterError(
                f"out must be a folder of the same recipe, got {folder} with {key} = {stored.get(key)!r} "
                f"instead of {recipe.get(key)!r}: choose another folder"
            )
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ParameterError(f"out must be an empty or a run folder, got {folder} with other files in it")
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, recipe)
