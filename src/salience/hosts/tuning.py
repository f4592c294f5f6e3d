"""Tunes a model with one or several sets of methods, measures each, and survives being killed.

An arm is a set of methods; all arms start from the same weights and see the same data in the same order. A run
folder holds `recipe.json`, `metrics.jsonl`, `arms/<arm>/` with the finished adapter or model as ordinary
safetensors, `result.json`, and what the report draws. The same recipe in the same folder goes on where it stopped.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainingArguments, set_seed

from salience.core.errors import ParameterError, TrainingError
from salience.core.evidence import saved_for_backward
from salience.core.files import write_json_atomic, write_text_atomic
from salience.core.method import Method
from salience.core.part import gradient_bytes, optimizer_bytes, parameter_bytes
from salience.core.spec import describe_method
from salience.hosts.resume import ResumableTrainer, last_checkpoint, seal
from salience.verb import Focus, focus

# told (arm, step, steps, loss) after every optimizer step
Progress = Callable[[str, int, int, float], None]
Score = Callable[[Any, Any], dict[str, float]]


@dataclass(frozen=True)
class Arm:
    """One set of methods to tune with.

    Attributes:
        name (str): short, used in file names.
        label (str): as the report shows it.
        methods (tuple[Method, ...]): in order; empty for the baseline.
    """

    name: str
    label: str
    methods: tuple[Method, ...] = ()


@dataclass
class Task:
    """What every arm gets.

    Attributes:
        make (Callable): () -> (model, tokenizer), fresh and equal each time.
        train (Any): tokenised training set.
        test (Any): tokenised held-out set.
        collate (Any): rows -> batch of tensors.
        score (Score | None): (model, tokenizer) -> {"overall": share, task: share...}; None: held-out loss only.
        steps (int): optimizer steps.
        settings (dict[str, Any]): TrainingArguments.
        lora (dict[str, Any] | None): LoraConfig, or None to train all weights.
        seed (int): of everything.
        save_every (int): steps between resumable states.
        evaluations (int): how often the held-out loss is taken, evenly spread, the end included.
        meter_steps (int): on how many steps the bytes kept for backward are counted.
    """

    make: Callable[[], tuple[Any, Any]]
    train: Any
    test: Any
    collate: Any
    score: Score | None
    steps: int
    settings: dict[str, Any]
    lora: dict[str, Any] | None
    seed: int
    save_every: int = 50
    evaluations: int = 4
    meter_steps: int = 6


@dataclass
class _Meters:
    """What is measured while an arm trains; survives a resume through the checkpoint."""

    step_seconds: list[float] = field(default_factory=list)
    other_seconds: float = 0.0
    gradients: int = 0
    optimizer: int = 0
    saved: list[int] = field(default_factory=list)


class TuneTrainer(ResumableTrainer):
    """Stops at a loss that is not finite, and counts now and then what autograd keeps for backward."""

    meters: _Meters
    meter_at: frozenset[int] = frozenset()

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step in self.meter_at:
            with saved_for_backward() as kept:
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
            self.meters.saved.append(kept["bytes"])
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if not bool(loss.isfinite()):
            shape = list(inputs["input_ids"].shape) if "input_ids" in inputs else "?"
            raise TrainingError(
                f"loss must be finite, got {float(loss)} at step {self.state.global_step + 1} "
                f"(batch of shape {shape}); the last checkpoint is kept: lower learning_rate or look at the data"
            )
        return loss


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
    if task.lora is not None:
        model = _with_lora(model, task.lora, arm.methods)
    trainer, meters = _trainer(arm, task, model, home, folder, progress, stop)
    handle = focus(trainer, arm.methods) if arm.methods else None
    trainer.add_callback(_Seal(meters))
    resume = last_checkpoint(home, task.steps)
    _trim_metrics(folder / "metrics.jsonl", arm.name, resume)
    if resume is not None:
        meters.__dict__.update(json.loads((resume / "meters.json").read_text(encoding="utf-8")))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.state.global_step < task.steps:
        raise Stopped(arm.name, trainer.state.global_step, task.steps)
    result = _measure(arm, task, trainer, tokenizer, handle, meters)
    _store(handle, arm, home, tokenizer)
    if handle is not None:
        handle.undo()
    _save_weights(model, tokenizer, home / "model", lora=task.lora is not None)
    write_json_atomic(done, result)
    for checkpoint in home.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return result


def check_arm(arm: Arm, task: Task, folder: Path) -> None:
    """Attach the arm's methods to the model and take them off again, so that what cannot work is refused at once.

    Raises:
        SalienceError: what `focus` says.
    """
    if not arm.methods:
        return
    model, _ = task.make()
    if task.lora is not None:
        model = _with_lora(model, task.lora, arm.methods)
    trainer, _ = _trainer(arm, task, model, folder, folder, lambda *_: None, lambda: False)
    focus(trainer, arm.methods).undo()


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """Training stopped cleanly at a step, on request."""

    def __init__(self, arm: str, step: int, steps: int) -> None:
        super().__init__(
            f"stopped cleanly at step {step} of {steps} ({arm}); the same command goes on from there"
        )


def _with_lora(model: Any, settings: dict[str, Any], methods: Sequence[Method]) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = dict(settings)
    if any(method.slug() == "allora" for method in methods):
        settings["lora_alpha"] = settings["r"]  # ALLoRA has no scaling factor
    return get_peft_model(model, LoraConfig(**settings))


def _trainer(
    arm: Arm, task: Task, model: Any, home: Path, folder: Path, progress: Progress, stop: Callable[[], bool]
) -> tuple[TuneTrainer, _Meters]:
    meters = _Meters()
    arguments = TrainingArguments(
        output_dir=str(home),
        max_steps=task.steps,
        seed=task.seed,
        data_seed=task.seed,
        save_strategy="steps",
        save_steps=task.save_every,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=max(task.steps // task.evaluations, 1),
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **task.settings,
    )
    trainer = TuneTrainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        eval_dataset=task.test,
        data_collator=task.collate,
        callbacks=[_Watch(arm.name, task.steps, meters, folder / "metrics.jsonl", progress, stop)],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.meters = meters
    spread = range(0, task.steps, max(task.steps // task.meter_steps, 1))
    trainer.meter_at = frozenset(spread)
    return trainer, meters


class _Watch(TrainerCallback):
    """Times steps, counts exact bytes, writes metrics and tells the progress bar. Added before the methods'."""

    def __init__(
        self, arm: str, steps: int, meters: _Meters, path: Path, progress: Progress, stop: Callable[[], bool]
    ) -> None:
        self.arm, self.steps, self.meters, self.path = arm, steps, meters, path
        self.progress, self.stop = progress, stop
        self._started = self._begun = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._begun:
            # what methods do before the first step, such as scoring the data, is part of their cost
            self.meters.other_seconds += time.perf_counter() - self._begun
            self._begun = 0.0
        self._started = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meters.gradients = max(self.meters.gradients, gradient_bytes(kwargs["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.meters.step_seconds.append(time.perf_counter() - self._started)
        optimizer = kwargs["optimizer"]
        held = optimizer_bytes(getattr(optimizer, "optimizer", optimizer))
        self.meters.optimizer = max(self.meters.optimizer, held)
        if self.stop():
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        row = {"arm": self.arm, "step": state.global_step}
        if "loss" in logs:
            seconds = round(sum(self.meters.step_seconds), 3)
            row |= {"loss": logs["loss"], "lr": logs["learning_rate"], "seconds": seconds}
            self.progress(self.arm, state.global_step, self.steps, logs["loss"])
        elif "eval_loss" in logs:
            row |= {"eval_loss": logs["eval_loss"]}
        else:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class _Seal(TrainerCallback):
    """Completes a checkpoint; added after the methods' callback, which writes their state into it."""

    def __init__(self, meters: _Meters) -> None:
        self.meters = meters

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "meters.json").write_text(json.dumps(self.meters.__dict__), encoding="utf-8")
        seal(folder)


def _measure(
    arm: Arm, task: Task, trainer: TuneTrainer, tokenizer: Any, handle: Focus | None, meters: _Meters
) -> dict[str, Any]:
    model = trainer.model
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
        "seconds": sum(meters.step_seconds) + meters.other_seconds,
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


def _save_weights(model: Any, tokenizer: Any, folder: Path, *, lora: bool) -> None:
    staging = folder.with_name(folder.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    model.save_pretrained(str(staging))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(staging))
    shutil.rmtree(folder, ignore_errors=True)
    staging.rename(folder)


def _trim_metrics(path: Path, arm: str, resume: Path | None) -> None:
    """Drop the rows that the resumed run will write again."""
    if not path.is_file():
        return
    upto = int(resume.name.rpartition("-")[2]) if resume else -1
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # torn by a kill in the middle of a write
        if row["arm"] != arm or row["step"] <= upto:
            kept.append(json.dumps(row))
    write_text_atomic(path, "".join(line + "\n" for line in kept))


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
