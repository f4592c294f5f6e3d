"""Hangs training methods on a transformers Trainer, or on any subclass such as TRL's SFTTrainer.

Nothing of the Trainer is replaced on its class: four bound functions are wrapped on the instance and one callback
is added, all through the record, so undo leaves the Trainer as it was. Evaluation never sees any of it.

- `get_batch_samples`: counts labels and samples of the optimizer step, over micro-batches and ranks.
- `compute_loss`: in training only, the weighted loss, or the Trainer's own loss plus the penalties. A Trainer on
  which no method weights or penalises keeps its own.
- `training_step`: after the last micro-batch, scales the gradients once, before clipping.
- `train`: learns the checkpoint that is resumed from, for the methods' state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, ParameterError
from salience.core.loop import Loop, without_labels
from salience.core.method import Method
from salience.core.part import Part, Site, State
from salience.hosts.transformers import loss_kind, takes_labels

# a `compute_loss` that is defined elsewhere computes a loss of its own, which weights would silently replace
_KNOWN_LOSSES = ("transformers.trainer", "trl.trainer.sft_trainer")
_STATE = "salience"


def attach_to_trainer(trainer: Any, methods: Sequence[Method], record: Attachment, data: Any) -> list[Part]:
    """Attach training methods to a Trainer; everything is recorded.

    Raises:
        ConflictError: if a method contradicts a setting of this Trainer.
    """
    if getattr(trainer, "_salience", False):
        raise ConflictError(
            "trainer must be focused once with a list of methods, got a Trainer already focused"
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    own_loss = takes_labels(model)
    # a plain module has no configuration that would say how its labels meet its logits: row by row
    shifted = hasattr(model, "config") and loss_kind(model) == "causal"
    site = Site(model, seed=trainer.args.seed, shifted=shifted, trainer=trainer, data=data)
    parts = [method.attach_trainer(site, record) for method in methods]
    smoother = getattr(trainer, "label_smoother", None)
    smoothing = smoother.epsilon if smoother is not None else 0.0
    loop = TrainerLoop(
        trainer,
        model,
        parts,
        shifted=shifted,
        smoothing=smoothing,
        record=record,
        data=data,
        own_loss=own_loss,
    )
    if loop.weighted:
        _refuse_other_losses(trainer)
    loop.attach()
    return parts


class TrainerLoop(Loop):
    """A `Loop` whose steps are a Trainer's."""

    def __init__(self, trainer: Any, model: torch.nn.Module, parts: Sequence[Part], **settings: Any) -> None:
        super().__init__(model, parts, **settings)
        self.trainer = trainer
        self._inside = False
        self._returned = 0.0
        self._resume: Path | None = None

    def attach(self) -> None:
        """Wrap what the module docstring names and add the callback."""
        trainer, record = self.trainer, self.record
        record.set(trainer, "_salience", True)
        record.wrap(trainer, "train", self._wrap_train)
        callback = _callback(self)
        trainer.add_callback(callback)
        record.on_undo(lambda: trainer.remove_callback(callback))
        if self.weighted or self.penalized:
            record.wrap(trainer, "get_batch_samples", self._wrap_get_batch_samples)
            record.wrap(trainer, "compute_loss", self._wrap_compute_loss)
        record.wrap(trainer, "training_step", self._wrap_training_step)

    # --- what the parts may ask for --------------------------------------------------------------------------

    def sampled_batches(self, size: int, random: torch.Generator) -> Iterator[dict[str, Any]]:
        """Endless collated batches of `size` training samples, reshuffled when the set is used up."""
        if self.data is not None:
            yield from super().sampled_batches(size, random)
        dataset, collate = self._training_set()
        order: list[int] = []
        while True:
            while len(order) < size:
                order += torch.randperm(len(dataset), generator=random).tolist()
            chosen, order = order[:size], order[size:]
            yield collate([dataset[index] for index in chosen])

    def ordered_batches(self, size: int) -> Iterable[dict[str, Any]]:
        """The training set once, in its own order, collated."""
        dataset, collate = self._training_set()
        for start in range(0, len(dataset), size):
            yield collate([dataset[index] for index in range(start, min(start + size, len(dataset)))])

    def training_size(self) -> int | None:
        """Number of training samples; None for a stream."""
        dataset = self.trainer.train_dataset
        return len(dataset) if hasattr(dataset, "__len__") else None

    def probe_loss(self, inputs: Mapping[str, Tensor]) -> float:
        """As in `Loop`, under the Trainer's autocast."""
        with self.trainer.compute_loss_context_manager():
            return super().probe_loss(inputs)

    def _training_set(self) -> tuple[Any, Callable[[list[Any]], dict[str, Any]]]:
        # the callback handler holds the prepared loader: unused columns are already gone there
        loader = self.trainer.callback_handler.train_dataloader
        if self.training_size() is None:
            raise ConflictError("train_dataset must have a length for this method, got a stream")
        return loader.dataset, loader.collate_fn

    # --- wrapped functions -----------------------------------------------------------------------------------

    def _wrap_train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def train(resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            self._resume = self._checkpoint(resume_from_checkpoint)
            try:
                return original(resume_from_checkpoint, *args, **kwargs)
            finally:
                self.end()

        return train

    def _wrap_get_batch_samples(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, items = original(*args, **kwargs)
            self.count(batches)
            return batches, items

        return get_batch_samples

    def _wrap_training_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            self._inside = True
            try:
                loss: Tensor = original(model, inputs, num_items_in_batch)
            finally:
                self._inside = False
            if self.trainer.accelerator.sync_gradients:
                scaler = self.trainer.accelerator.scaler
                self.finish_step(scaler.get_scale() if scaler is not None else 1.0)
                if self._deferred:
                    # micro-batches were divided by a provisional count: the log shows the formula's value
                    loss = loss.new_tensor(self.reported_loss() - self._returned)
                self._returned = 0.0
            elif self._deferred:
                self._returned += float(loss)
            return loss

        return training_step

    def _wrap_compute_loss(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def compute_loss(
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
            **kwargs: Any,
        ) -> Any:
            if not self._inside:
                return original(model, inputs, return_outputs, num_items_in_batch, **kwargs)
            self.before_forward(inputs)
            if self.weighted:
                outputs = model(**self._forward_inputs(inputs))
                loss = self.weighted_loss(inputs, outputs) + self._router_loss(outputs)
            else:
                loss, outputs = original(model, inputs, True, num_items_in_batch, **kwargs)
                penalty = self.with_penalty(loss.new_zeros(()), None)
                if self._divides(num_items_in_batch):
                    # the penalty is a share of the step already, and the Trainer is about to divide the sum
                    penalty = penalty * self.trainer.current_gradient_accumulation_steps
                loss = loss + penalty
            return (loss, outputs) if return_outputs else loss

        if self.weighted:
            self.record.set(self.trainer, "loss_is_scaled_for_ga", True)
        return compute_loss

    def _divides(self, items: Any) -> bool:
        """Whether the Trainer divides what `compute_loss` returns by the number of micro-batches."""
        trainer = self.trainer
        if trainer.loss_is_scaled_for_ga is not None:
            return not trainer.loss_is_scaled_for_ga
        return (
            not (trainer.model_accepts_loss_kwargs and items is not None)
            and trainer.compute_loss_func is None
        )

    def _forward_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            return dict(inputs)  # the decoder's inputs are made from the labels
        return without_labels(inputs)

    def _router_loss(self, outputs: Any) -> Tensor | float:
        # a mixture of experts adds its balancing loss only where it computes the loss itself
        auxiliary = getattr(outputs, "aux_loss", None)
        if auxiliary is None:
            return 0.0
        config: Any = self.model.config
        return config.get_text_config().router_aux_loss_coef * auxiliary / self._micro_batches

    # --- checkpoints -----------------------------------------------------------------------------------------

    def start(self, optimizer: Any, global_step: int, max_steps: int) -> None:
        """Training begins, or goes on from a checkpoint."""
        self.step, self.total_steps = global_step, max_steps
        self.begin(getattr(optimizer, "optimizer", optimizer))
        if self._resume is not None:
            self.load_state(read_state(self._resume))

    def save(self, folder: Path) -> None:
        """Write the methods' state into a Trainer's checkpoint folder."""
        if distributed.rank() == 0:
            write_state(folder, self.state())

    def _checkpoint(self, resume: str | bool | None) -> Path | None:
        if resume is True:
            from transformers.trainer_utils import get_last_checkpoint

            last = get_last_checkpoint(self.trainer.args.output_dir)
            return Path(last) if last else None
        return Path(resume) if resume else None


def write_state(folder: Path, states: Mapping[str, State]) -> None:
    """Write the parts' state as `salience.safetensors` (tensors) and `salience.json` (numbers and words)."""
    from safetensors.torch import save_file

    tensors = {
        f"{key}/{name}": value.contiguous()
        for key, state in states.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }
    plain = {
        key: {name: value for name, value in state.items() if not isinstance(value, Tensor)}
        for key, state in states.items()
    }
    save_file(tensors, str(folder / f"{_STATE}.safetensors"))
    (folder / f"{_STATE}.json").write_text(json.dumps(plain), encoding="utf-8")


def read_state(folder: Path) -> dict[str, State]:
    """The inverse of `write_state`.

    Raises:
        ParameterError: if the checkpoint was written without salience.
    """
    from safetensors.torch import load_file

    path = folder / f"{_STATE}.json"
    if not path.is_file():
        raise ParameterError(
            f"resume_from_checkpoint must be a checkpoint of a focused Trainer, got {folder} without {path.name}"
        )
    states: dict[str, State] = json.loads(path.read_text(encoding="utf-8"))
    for key, value in load_file(str(folder / f"{_STATE}.safetensors")).items():
        part, _, name = key.partition("/")
        states[part][name] = value
    return states


def _callback(loop: TrainerLoop) -> Any:
    from transformers import TrainerCallback

    class SalienceCallback(TrainerCallback):
        """Tells the loop what the Trainer does."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loop.start(kwargs.get("optimizer"), state.global_step, state.max_steps)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loop.step = state.global_step
            loop.before_step()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            loop.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return SalienceCallback()


def _refuse_other_losses(trainer: Any) -> None:
    """Weights need the loss of each token: refuse every setting under which they would be lost silently."""
    args = trainer.args
    owner = type(trainer).compute_loss.__module__
    packed = getattr(args, "packing", False) or getattr(args, "padding_free", False)
    reasons = (
        (trainer.compute_loss_func is not None, "compute_loss_func must be None", trainer.compute_loss_func),
        (owner not in _KNOWN_LOSSES, "compute_loss must be the Trainer's own", f"one defined in {owner}"),
        (getattr(args, "loss_type", "nll") == "dft", "loss_type must be 'nll'", "dft"),
        (bool(packed), "packing and padding_free must be off (one sample in a row)", "on"),
        (bool(args.use_liger_kernel), "use_liger_kernel must be False (it returns no logits)", True),
        (args.n_gpu > 1, "one process must use one GPU (launch with torchrun)", f"{args.n_gpu} GPUs"),
        (trainer.is_deepspeed_enabled, "DeepSpeed must be off (it scales gradients itself)", "on"),
    )
    for refused, wanted, got in reasons:
        if refused:
            raise ConflictError(f"{wanted} for methods that weight tokens or samples, got {got!r}")
