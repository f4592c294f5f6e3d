"""The main job: tune a model with and without methods, measure both, and write the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from salience.core.errors import ConflictError
from salience.core.evidence import about
from salience.core.files import check_writable, write_json_atomic
from salience.core.method import Method
from salience.core.spec import describe_method, parse_method
from salience.hosts import checkpoints, data
from salience.hosts.arms import Arm, Progress, Task, check_arm
from salience.hosts.tuning import check_folder, run_arm
from salience.jobs._tune_sources import Source, given, sandbox
from salience.jobs.recipe import TuneRecipe

# saves memory at some cost in quality; docs/tune.md has what was tried, the figures, and how it was chosen
RECOMMENDED = ("ist:active_layers=6", "loss-reweighting:strategy=quadratic")
_QUICK_RECOMMENDED = ("ist:active_layers=3", RECOMMENDED[1])  # the quick model has half as many layers
_SANDBOX_STEPS, _QUICK_STEPS = 300, 100
# with plain LoRA on the sandbox: the best of 3e-3, 5e-3 at 300 steps, and of 5e-3, 1e-2, 2e-2 on the quick one
_SANDBOX_RATE, _QUICK_RATE, _RATE = 5e-3, 1e-2, 2e-4


def tune(
    recipe: TuneRecipe,
    out: Path,
    *,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Run the recipe in `out`, or go on with it there.

    Args:
        recipe (TuneRecipe): what to do.
        out (Path): run folder; new, empty, or of the same recipe.
        progress (Progress): told after every step.
        say (Callable): told in a sentence what happens now.
        stop (Callable): asked after every step whether to stop cleanly.

    Returns:
        dict: what `result.json` holds; `report.html` lies beside it.

    Raises:
        SalienceError: for bad input, before any work starts; for a loss that is not finite, with everything kept.
        Stopped: if `stop` asked for it.
    """
    methods = [parse_method(text) for text in _method_texts(recipe)]
    device = checkpoints.check_device(recipe.device)
    _refuse(recipe, methods)
    check_writable(out)
    source = (
        sandbox(recipe, say) if recipe.model is None and recipe.data is None else given(recipe, device, say)
    )
    task = _task(recipe, source, str(device))
    arms = _arms(recipe, methods)
    for arm in arms:
        check_arm(arm, task, out)
    check_folder(out, {**recipe.model_dump(), "methods": [describe_method(method) for method in methods]})
    results = {}
    for arm in arms:
        say(f"tuning: {arm.label}")
        results[arm.name] = run_arm(arm, task, out, progress, stop)
    result = {
        "title": f"Tuning {source.model['name']} on {source.data['name']}",
        "model": source.model,
        "data": source.data,
        "quality": source.quality,
        "baseline": arms[0].name,
        "arms": results,
        "verdict": [],
        "about": about(str(device)),
    }
    write_json_atomic(out / "result.json", result)
    _gather(out, [arm.name for arm in arms])
    say("writing the report")
    from salience.report import build

    build(out)
    return result


def _method_texts(recipe: TuneRecipe) -> list[str]:
    if recipe.methods:
        return recipe.methods
    if recipe.model is not None or recipe.data is not None:
        return []
    return list(_QUICK_RECOMMENDED if recipe.quick else RECOMMENDED)


def _refuse(recipe: TuneRecipe, methods: list[Method]) -> None:
    for method in methods:
        if "trainer" not in method.targets():
            raise ConflictError(f"method must act on training for tune, got {method.slug()}")
        if "peft" in method.needs and recipe.adapter == "none":
            raise ConflictError(f"adapter must be lora for {method.slug()}, got none")
        if "full" in method.needs and recipe.adapter == "lora":
            raise ConflictError(
                f"adapter must be none for {method.slug()} (it trains whole layers), got lora"
            )


def _arms(recipe: TuneRecipe, methods: list[Method]) -> list[Arm]:
    plain = "LoRA" if recipe.adapter == "lora" else "full tuning"
    name = plain.lower().replace(" ", "-")
    arms = [Arm(name, plain)] if recipe.baseline or not methods else []
    if methods:
        together = " + ".join(type(method).__name__ for method in methods)
        arms.append(
            Arm(f"{name}-{'-'.join(m.slug() for m in methods)}", f"{plain} with {together}", tuple(methods))
        )
    return arms


def _task(recipe: TuneRecipe, source: Source, device: str) -> Task:
    sandbox = recipe.model is None
    usual = (_QUICK_RATE if recipe.quick else _SANDBOX_RATE) if sandbox else _RATE
    rate = recipe.learning_rate or usual * (1 if recipe.adapter == "lora" else 0.1)
    per_step = recipe.batch_size * recipe.accumulation
    steps = recipe.steps or (
        (_QUICK_STEPS if recipe.quick else _SANDBOX_STEPS)
        if sandbox and recipe.data is None
        else max(round(recipe.epochs * len(source.train) / per_step), 1)
    )
    return Task(
        make=source.make,
        train=source.train,
        test=source.test,
        collate=data.Collator(source.tokenizer),
        score=source.score,
        steps=steps,
        settings={
            "per_device_train_batch_size": recipe.batch_size,
            "per_device_eval_batch_size": 4 * recipe.batch_size,
            "gradient_accumulation_steps": recipe.accumulation,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(steps // 20, 1),
            "weight_decay": 0.0,
            "use_cpu": device == "cpu",
            "bf16": device != "cpu" and recipe.dtype != "float32",
        },
        lora=_lora(recipe, source.task_type) if recipe.adapter == "lora" else None,
        seed=recipe.seed,
        save_every=recipe.save_every,
    )


def _lora(recipe: TuneRecipe, task_type: str | None) -> dict[str, Any]:
    return {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha or 2 * recipe.rank,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "task_type": task_type,  # a new classification head trains with its adapter
    }


def _gather(out: Path, arms: list[str]) -> None:
    """Bring the arms' score histories and token heat into the run folder's own files."""
    from safetensors.torch import load_file, save_file

    scores, tokens = {}, []
    for arm in arms:
        home = out / "arms" / arm
        if (home / "scores.safetensors").is_file():
            scores.update(load_file(str(home / "scores.safetensors")))
        if (home / "tokens.json").is_file():
            tokens += json.loads((home / "tokens.json").read_text(encoding="utf-8"))
    if scores:
        save_file(scores, str(out / "scores.safetensors"))
    if tokens:
        write_json_atomic(out / "tokens.json", tokens)
