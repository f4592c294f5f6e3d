"""Arms of a run and how one of them trains: measured at every step, stopped at any, resumed from a checkpoint.

An arm is a set of methods; all arms of a task start from the same weights and see the same data in the same order.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from salience.core.errors import TrainingError
from salience.core.evidence import saved_for_backward
from salience.core.files import write_text_atomic
from salience.core.method import Method
from salience.core.part import gradient_bytes, optimizer_bytes
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
class Meters:
    """What is measured while an arm trains; survives a resume through the checkpoint.

    Attributes:
        step_seconds (list[float]): of each optimizer step.
        other_seconds (float): of what methods did before the first.
        gradients (int): bytes before the optimizer's step, the most there were.
        optimizer (int): bytes of its state, the most there were.
        saved (list[int]): bytes kept for backward, of each micro-batch that was looked at.
    """

    step_seconds: list[float] = field(default_factory=list)
    other_seconds: float = 0.0
    gradients: int = 0
    optimizer: int = 0
    saved: list[int] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all steps, and of what methods did before the first."""
        return sum(self.step_seconds) + self.other_seconds


class TuneTrainer(ResumableTrainer):
    """Stops at a loss that is not finite, and counts now and then what autograd keeps for backward.

    Attributes:
        meters (Meters): what is measured.
        meter_at (frozenset[int]): steps on which the bytes kept for backward are counted.
    """

    meters: Meters
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


class Stopped(Exception):  # noqa: N818 - not an error: the user asked for it
    """Training stopped cleanly at a step, on request."""

    def __init__(self, arm: str, step: int, steps: int) -> None:
        super().__init__(
            f"stopped cleanly at step {step} of {steps} ({arm}); the same command goes on from there"
        )


def train_arm(
    arm: Arm, task: Task, model: Any, folder: Path, progress: Progress, stop: Callable[[], bool]
) -> tuple[TuneTrainer, Focus | None]:
    """Train a model as the arm says, or go on from its last checkpoint.

    Args:
        arm (Arm): what to run.
        task (Task): what on.
        model (Any): as `task.make` gave it; adapters are put on here.
        folder (Path): the run folder; checkpoints go to the existing `folder/arms/<name>`, a row of every step to
            `folder/metrics.jsonl`.
        progress (Progress): told after every step.
        stop (Callable): asked after every step whether to stop cleanly.

    Returns:
        tuple: the trainer after the last step, with `model` and `meters`, and the handle, still attached; None
        without methods.

    Raises:
        TrainingError: if the loss is not finite.
        Stopped: if `stop` said so; a resumable state was written.
    """
    home, metrics = folder / "arms" / arm.name, folder / "metrics.jsonl"
    trainer = _trainer(arm, task, model, home, metrics, progress, stop)
    handle = focus(trainer, arm.methods) if arm.methods else None
    trainer.add_callback(_Seal(trainer.meters))
    resume = last_checkpoint(home, task.steps)
    _trim_metrics(metrics, arm.name, resume)
    if resume is not None:
        trainer.meters.__dict__.update(json.loads((resume / "meters.json").read_text(encoding="utf-8")))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if trainer.state.global_step < task.steps:
        raise Stopped(arm.name, trainer.state.global_step, task.steps)
    return trainer, handle


def check_arm(arm: Arm, task: Task, folder: Path) -> None:
    """Attach the arm's methods to the model and take them off again, so that what cannot work is refused at once.

    Raises:
        SalienceError: what `focus` says.
    """
    if not arm.methods:
        return
    model, _ = task.make()
    trainer = _trainer(arm, task, model, folder, folder / "metrics.jsonl", lambda *_: None, lambda: False)
    focus(trainer, arm.methods).undo()


def _trainer(
    arm: Arm, task: Task, model: Any, home: Path, metrics: Path, progress: Progress, stop: Callable[[], bool]
) -> TuneTrainer:
    meters = Meters()
    if task.lora is not None:
        model = _with_lora(model, task.lora, arm.methods)
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
        callbacks=[_Watch(arm.name, task.steps, meters, metrics, progress, stop)],
    )
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.meters = meters
    spread = range(0, task.steps, max(task.steps // task.meter_steps, 1))
    trainer.meter_at = frozenset(spread)
    return trainer


def _with_lora(model: Any, settings: dict[str, Any], methods: Sequence[Method]) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = dict(settings)
    if any(method.slug() == "allora" for method in methods):
        settings["lora_alpha"] = settings["r"]  # ALLoRA has no scaling factor
    return get_peft_model(model, LoraConfig(**settings))


class _Watch(TrainerCallback):
    """Times steps, counts exact bytes, writes metrics and tells the progress bar. Added before the methods'."""

    def __init__(
        self, arm: str, steps: int, meters: Meters, path: Path, progress: Progress, stop: Callable[[], bool]
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

    def __init__(self, meters: Meters) -> None:
        self.meters = meters

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "meters.json").write_text(json.dumps(self.meters.__dict__), encoding="utf-8")
        seal(folder)


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
