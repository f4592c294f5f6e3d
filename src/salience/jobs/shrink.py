"""The job of `salience shrink`: a model made smaller in one or several ways, each measured beside the untouched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from salience.core.errors import ConflictError, ParameterError
from salience.core.evidence import about
from salience.core.files import check_writable, write_json_atomic
from salience.core.method import Method
from salience.core.registry import entries, load
from salience.core.spec import describe_method, parse_method
from salience.hosts import checkpoints, data, shrinking
from salience.hosts.arms import Arm, Progress, Stopped, Task
from salience.hosts.footprint import TOLERANCE, Checkpoint, measure, stored_dtype
from salience.hosts.tuning import check_folder, run_arm
from salience.jobs import _shrink_sources as sources
from salience.jobs._shrink_sources import Source
from salience.jobs.shrink_recipe import ShrinkRecipe

UNTOUCHED = "untouched"
# held-out nats/token of the quick sandbox model after 60 steps (untouched 3.516; as much LoRA with nothing removed
# 3.321): keep 0.75 gives 3.324 at 0.86 of the parameters, keep 0.5 gives 3.432 at 0.59
RECOMMENDED = ("loraprune:keep=0.75",)
_STEPS, _QUICK_STEPS = 300, 60
_RATE, _SANDBOX_LORA_RATE = 3e-4, 3e-3
_PROMPT = 512
_DELTA = (
    "darex"  # a method of `salience delta`: its result is a delta on a base, as large as before once applied
)


class Halted(Stopped):
    """Stopped cleanly between two pieces of work, on request."""

    def __init__(self, what: str) -> None:
        Exception.__init__(self, f"stopped cleanly before {what}; the same command goes on from there")


def shrink(
    recipe: ShrinkRecipe,
    out: Path,
    *,
    progress: Progress = lambda *_: None,
    say: Callable[[str], None] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
    measured: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Run the recipe in `out`, or go on with it there.

    Args:
        recipe (ShrinkRecipe): what to do.
        out (Path): run folder; new, empty, or of the same recipe.
        progress (Progress): told after every training step.
        say (Callable): told in a sentence what happens now.
        stop (Callable): asked after every training step whether to stop cleanly.
        measured (Callable): told how many of how many timings are done.

    Returns:
        dict: what `result.json` holds; checkpoints lie in `models/<arm>/`, and `report.html` beside them.

    Raises:
        SalienceError: for bad input, before any work starts; if a checkpoint does not load without salience or gives
            other logits than the model in memory.
        Stopped: if `stop` asked for it.
    """
    arms = make_arms(recipe)
    device = checkpoints.check_device(recipe.device)
    check_writable(out)
    source = _source(recipe, arms, device, say)
    tasks = {arm.name: _task(recipe, source, str(device), lora=shrinking.wants_lora(arm)) for arm in arms}
    prompt = _prompt(recipe, source)
    for arm in arms:
        if not shrinking.is_done(arm, out):
            shrinking.check(arm, tasks[arm.name], source.demonstrations)
    check_folder(
        out, {**recipe.model_dump(), "methods": ["+".join(map(describe_method, a.methods)) for a in arms]}
    )
    results: dict[str, Any] = {UNTOUCHED: _untouched(source, out, say)}
    tuned = _baselines(recipe, source, arms, str(device), out, progress, say, stop)
    for arm in arms:
        if stop():
            raise Halted(arm.label)
        say(f"shrinking: {arm.label}")
        results[arm.name] = shrinking.run(
            arm,
            tasks[arm.name],
            source.demonstrations,
            out,
            dtype=_own_dtype(source),
            progress=progress,
            stop=stop,
        )
    if stop():
        raise Halted("measuring")
    say("measuring")
    told = _footprints(recipe, source, results, prompt, str(device), out, measured)
    for name, result in results.items():
        result.update(told[name])
    result = {
        "title": f"Shrinking {source.model['name']}",
        "model": source.model,
        "data": source.data,
        "quality": source.quality,
        "untouched": UNTOUCHED,
        "arms": results,
        "tuned": tuned,
        "prompt_tokens": prompt,
        "new_tokens": recipe.new_tokens,
        "repeats": recipe.repeats,
        "tolerance": TOLERANCE,
        "about": {**about(str(device)), "device": str(device)},
    }
    write_json_atomic(out / "result.json", result)
    say("writing the report")
    from salience.report.shrink import build_shrink

    build_shrink(out)
    return result


def make_arms(recipe: ShrinkRecipe) -> list[Arm]:
    """An arm for each `--method`; the default's where none is given and the sandbox is used.

    Raises:
        SalienceError: for an unknown method, one that does not shrink, or the same arm twice.
    """
    texts = recipe.methods or ([] if recipe.model or recipe.data else list(RECOMMENDED))
    if not texts:
        raise ParameterError(
            f"method must be given together with model, got none: --method {_shrinking()[0]}"
        )
    arms: list[Arm] = []
    for text in texts:
        # a plus in a number, such as 1e+5, joins nothing
        methods = tuple(parse_method(one) for one in re.split(r"\+(?=[A-Za-z])", text))
        _refuse(methods)
        shown = " + ".join(_shown(method) for method in methods)
        name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(map(describe_method, methods))).strip("-")
        if name in (arm.name for arm in arms):
            raise ParameterError(f"method must be given once with the same parameters, got {text} twice")
        arms.append(Arm(name, shown, methods))
    return arms


def _shown(method: Method) -> str:
    """As people read it: with what differs from the defaults, and with the share that is kept in any case."""
    _, _, rest = describe_method(method).partition(":")
    keep = getattr(method, "keep", None)
    told = ([f"keep={keep}"] if keep is not None and not rest.startswith("keep=") else []) + [
        rest.replace(",", ", ")
    ]
    shown = ", ".join(filter(None, told))
    return f"{type(method).__name__} ({shown})" if shown else type(method).__name__


def _shrinking() -> list[str]:
    """Slugs of the methods that leave a smaller model."""
    return sorted(one.slug for one in entries().values() if one.job == "shrink" and load(one.slug).cuts)


def _refuse(methods: Sequence[Method]) -> None:
    known = _shrinking()
    for method in methods:
        if method.slug() == _DELTA:
            raise ConflictError(
                f"method must be one of {', '.join(known)}, got {_DELTA}: it makes a small delta on a base, "
                "which is what `salience delta` is for"
            )
    if not any(method.slug() in known for method in methods):
        raise ConflictError(f"method must be one that shrinks ({', '.join(known)}), got {methods[0].slug()}")
    if len(methods) > 1 and not all("trainer" in method.targets() for method in methods):
        other = next(method for method in methods if "trainer" not in method.targets())
        raise ConflictError(f"methods joined by + must all act on training, got {other.slug()}")


def _source(recipe: ShrinkRecipe, arms: Sequence[Arm], device: Any, say: Callable[[str], None]) -> Source:
    if recipe.model is not None or recipe.data is not None:
        if recipe.world is not None:
            raise ParameterError(f"world must be left out with model or data, got {recipe.world}")
        if recipe.data is None:
            for arm in arms:
                for method in arm.methods:
                    if shrinking.trains(arm) or "data" in method.needs:
                        raise ParameterError(
                            f"data must be given for {method.slug()}, got none: --data FILE_OR_DATASET"
                        )
        return sources.given(recipe, device, say)
    experts = all(method.unit == "expert" for arm in arms for method in arm.methods)
    return sources.sandbox(recipe, recipe.world or ("mixture" if experts else "text"), say)


def _task(recipe: ShrinkRecipe, source: Source, device: str, *, lora: bool) -> Task:
    sandbox = recipe.model is None
    rate = recipe.learning_rate or (_SANDBOX_LORA_RATE if lora and sandbox else _RATE)
    per_step = recipe.batch_size * recipe.accumulation
    rows = len(source.train) if source.train is not None else 0
    steps = recipe.steps or (
        (_QUICK_STEPS if recipe.quick else _STEPS)
        if sandbox and recipe.data is None
        else max(round(recipe.epochs * rows / per_step), 1)
    )
    settings = {
        "r": recipe.rank,
        "lora_alpha": recipe.alpha or 2 * recipe.rank,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
        "task_type": source.task_type,
    }
    return Task(
        make=source.make,
        train=source.train,
        test=source.test,
        collate=data.Collator(source.tokenizer),
        score=source.score,
        steps=steps,
        settings={
            "per_device_train_batch_size": recipe.batch_size,
            "per_device_eval_batch_size": recipe.batch_size,
            "gradient_accumulation_steps": recipe.accumulation,
            "learning_rate": rate,
            "lr_scheduler_type": "linear",
            "warmup_steps": max(steps // 20, 1),
            "weight_decay": 0.0,
            "use_cpu": device == "cpu",
            "bf16": device != "cpu" and recipe.dtype != "float32",
        },
        lora=settings if lora else None,
        seed=recipe.seed,
        save_every=recipe.save_every,
        evaluations=2,
    )


def _own_dtype(source: Source) -> Any:
    """The dtype of the untouched checkpoint, in which the smaller ones are written, so that bytes compare."""
    return stored_dtype(source.folder)


def _untouched(source: Source, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The entry of the model as it came."""
    path = out / "untouched.json"
    if path.is_file():
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return stored
    say("scoring the untouched model")
    model, tokenizer = source.make()
    entry = {
        "label": "untouched",
        "methods": [],
        "slugs": [],
        "class": type(model).__name__,
        "trained": False,
        "lora": False,
        "quality": source.score(model, tokenizer) if source.score is not None else {},
    }
    write_json_atomic(path, entry)
    return entry


def _baselines(
    recipe: ShrinkRecipe,
    source: Source,
    arms: Sequence[Arm],
    device: str,
    out: Path,
    progress: Progress,
    say: Callable[[str], None],
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """What training alone does, for each way in which an arm trains: its gain is not the method's."""
    found: dict[str, Any] = {}
    if not recipe.baseline:
        return found
    for lora in sorted({shrinking.wants_lora(arm) for arm in arms if shrinking.trains(arm)}, reverse=True):
        label = "LoRA, nothing removed" if lora else "trained, nothing removed"
        name = "lora-alone" if lora else "training-alone"
        say(f"training: {label}")
        done = run_arm(Arm(name, label), _task(recipe, source, device, lora=lora), out, progress, stop)
        found[name] = {
            "label": label,
            "lora": lora,
            "quality": {"overall": done["quality"], **done["quality_by_task"]},
            "steps": done["steps"],
            "seconds": done["seconds"],
        }
    return found


def _footprints(
    recipe: ShrinkRecipe,
    source: Source,
    results: dict[str, Any],
    prompt: int,
    device: str,
    out: Path,
    measured: Callable[[int, int], None],
) -> dict[str, dict[str, Any]]:
    path = out / "footprint.json"
    if path.is_file():
        stored: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        return stored
    found = measure(
        {
            name: Checkpoint(
                source.folder if name == UNTOUCHED else out / "models" / name,
                result["class"],
                None if name == UNTOUCHED else out / "arms" / name / "logits.safetensors",
            )
            for name, result in results.items()
        },
        tokens=prompt,
        new_tokens=recipe.new_tokens,
        repeats=recipe.repeats,
        device=device,
        progress=measured,
    )
    write_json_atomic(path, found)
    return found


def _prompt(recipe: ShrinkRecipe, source: Source) -> int:
    """Tokens of the prompt that is timed; with what is written behind it, no longer than the model's positions."""
    model, _ = source.make()
    limit = checkpoints.check_positions(model)
    if limit is None:
        return recipe.prompt_tokens or _PROMPT
    most = max(limit - recipe.new_tokens, 1)
    if recipe.prompt_tokens is not None and recipe.prompt_tokens > most:
        raise ParameterError(
            f"prompt_tokens must be at most {most} ({limit} positions less {recipe.new_tokens} new_tokens), "
            f"got {recipe.prompt_tokens}"
        )
    return recipe.prompt_tokens or min(_PROMPT, most)
