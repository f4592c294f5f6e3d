"""Runs one way to shrink a model, from fresh weights to an ordinary checkpoint; survives being killed.

Methods that act on a Trainer train as `salience tune` does and go on from their last checkpoint; the others act on
the model at once, with batches of demonstrations. What is written appears under its name only when it is whole.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import set_seed

from salience.core import drawing, pictures
from salience.core.files import folder_atomic, write_json_atomic
from salience.core.pictures import as_svg
from salience.core.spec import describe_method
from salience.hosts.arms import Arm, Progress, Task, check_arm, train_arm
from salience.verb import Focus, focus

Batches = Sequence[dict[str, Tensor]]
_PROBE = (2, 12)  # rows and tokens of the batch whose logits are compared


def trains(arm: Arm) -> bool:
    """Whether all methods of the arm act on a Trainer."""
    return all("trainer" in method.targets() for method in arm.methods)


def wants_lora(arm: Arm) -> bool:
    """Whether a method of the arm asks for adapters."""
    return any("peft" in method.needs for method in arm.methods)


def is_done(arm: Arm, folder: Path) -> bool:
    """Whether the arm's result and checkpoint lie in the run folder."""
    return (folder / "arms" / arm.name / "done.json").is_file() and (folder / "models" / arm.name).is_dir()


def check(arm: Arm, task: Task, batches: Batches) -> None:
    """Attach the arm's methods to a fresh model and take them off again: what cannot work is refused at once.

    Raises:
        SalienceError: what `focus` says.
    """
    if trains(arm):
        # a Trainer makes its folder at once, and what is refused must leave none
        with tempfile.TemporaryDirectory() as scratch:
            check_arm(arm, task, Path(scratch))
        return
    model, _ = task.make()
    focus(model, arm.methods, data=list(batches[:1])).undo()


def run(
    arm: Arm,
    task: Task,
    batches: Batches,
    folder: Path,
    *,
    dtype: torch.dtype,
    progress: Progress,
    stop: Callable[[], bool],
) -> dict[str, Any]:
    """Shrink a fresh model as the arm says, or take its stored result.

    Args:
        arm (Arm): with at least one method.
        task (Task): the model and, for methods that train, what on.
        batches (Batches): demonstrations, for methods that do not train.
        folder (Path): the run folder; writes `arms/<name>/` and the checkpoint `models/<name>/`.
        dtype (torch.dtype): of the weights as they are written: the untouched checkpoint's.
        progress (Progress): told after every training step.
        stop (Callable): asked after every training step whether to stop cleanly.

    Returns:
        dict: the arm's entry of `result.json`, without what loading the checkpoint tells.

    Raises:
        Stopped: if `stop` said so.
    """
    home, place = folder / "arms" / arm.name, folder / "models" / arm.name
    if is_done(arm, folder):
        stored: dict[str, Any] = json.loads((home / "done.json").read_text(encoding="utf-8"))
        return stored
    home.mkdir(parents=True, exist_ok=True)
    set_seed(task.seed)
    model, tokenizer = task.make()
    started = time.perf_counter()
    if trains(arm):
        trainer, trained = train_arm(arm, task, model, folder, progress, stop)
        assert trained is not None  # an arm has methods
        handle = trained
    else:
        trainer, handle = None, focus(model, arm.methods, data=list(batches))
    handle.finish()
    spent = json.loads(json.dumps(handle.spent, default=str))
    drawn = _pictures(handle, arm.name)
    handle.undo()
    if trainer is None:
        seconds = time.perf_counter() - started
    else:
        seconds = trainer.meters.seconds
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    works = model.dtype
    model = model.eval().to(dtype)
    with folder_atomic(place) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    write_json_atomic(home / "pictures.json", drawn)
    result = {
        "label": arm.label,
        "methods": [describe_method(method) for method in arm.methods],
        "slugs": [method.slug() for method in arm.methods],
        "class": type(model).__name__,
        "trained": trainer is not None,
        "lora": task.lora is not None,
        "steps": task.steps if trainer is not None else 0,
        "seconds": seconds,
        "spent": spent,
        "quality": task.score(model.to(works), tokenizer) if task.score is not None else {},
    }
    # what was rounded to the checkpoint's dtype, computed in float32
    _write_probe(model.to(dtype).float(), home / "logits.safetensors")
    write_json_atomic(home / "done.json", result)
    for checkpoint in home.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


@torch.no_grad()
def _write_probe(model: Any, path: Path) -> None:
    """A batch of random tokens and the float32 logits that the checkpoint must give for it."""
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(rows, _PROBE, generator=torch.Generator().manual_seed(0))
    logits = model(input_ids=ids.to(model.device)).logits
    save_file({"input_ids": ids, "logits": logits.float().cpu().contiguous()}, str(path))


def _pictures(handle: Focus, arm: str) -> list[dict[str, str]]:
    """What each method draws of its decision, for a page and for a phone."""
    drawn = []
    for method, part in zip(handle.methods, handle.parts):
        figure = part.draw()
        if figure is None:
            histories = {name: (method.unit, one) for name, one in part.histories.items() if one.steps}
            if not histories:
                continue
            figure = pictures.draw_histories(histories)
        drawn.append(
            {"slug": method.slug(), **_svg(figure, f"what {method.slug()} removed", f"{arm}-{method.slug()}")}
        )
    return drawn


def _svg(figure: Any, label: str, salt: str) -> dict[str, str]:
    """The same figure in the width of a page and, where its panels stand in one column, in that of a phone."""
    wide, high = figure.get_size_inches()
    shown = {}
    beside = (
        len({round(axes.get_subplotspec().colspan.start) for axes in figure.axes if axes.get_subplotspec()})
        > 1
    )
    for name, width in (("wide", drawing.WIDE), ("narrow", drawing.NARROW)):
        if name == "narrow" and beside:
            shown[name] = ""
            continue
        figure.set_size_inches(width / 96, high * max(width / 96 / wide, 1.0))
        _wrap(figure, width // 8)
        shown[name] = as_svg(figure, label=label, salt=f"{salt}-{name}")
    return shown


def _wrap(figure: Any, characters: int) -> None:
    """Break titles that are wider than the figure."""
    for axes in figure.axes:
        for place in ("left", "center", "right"):
            title = axes.get_title(loc=place)
            if len(title) > characters:
                for text in axes.findobj(lambda one, title=title: getattr(one, "get_text", str)() == title):
                    text.set_text(textwrap.fill(title, characters))
