"""One optimizer step of a focused Trainer for each mix of methods; rank 0 writes the gradients.

python gradients.py FOLDER BATCH ACCUMULATION        (or under torchrun)
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "core")]

from conftest import losses_of, ragged_samples, tiny_gpt2, tiny_trainer
from leaving import leave
from safetensors.torch import save_file
from test_loop import MIXES
from transformers import TrainerCallback

import salience as sal

METHODS = {**MIXES, "loss-reweighting": [sal.LossReweighting(temperature=0.4)]}


class Keep(TrainerCallback):
    """Copies the gradients that the optimizer is about to use."""

    def __init__(self, model):
        self.model, self.grads = model, {}

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def step(folder, methods, batch, accumulation):
    """Gradients by name and the logged loss."""
    model = tiny_gpt2()
    keep = Keep(model)
    trainer = tiny_trainer(
        folder / "run",
        model,
        ragged_samples(8),
        callbacks=[keep],
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=True,
    )
    sal.focus(trainer, methods)
    trainer.train()
    return keep.grads, losses_of(trainer)[0]


def main(folder, batch, accumulation):
    folder = Path(folder)
    for mix, methods in METHODS.items():
        grads, loss = step(folder, methods, int(batch), int(accumulation))
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(grads, folder / f"{mix}.safetensors", metadata={"loss": str(loss)})


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
