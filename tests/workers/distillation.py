"""One step of a Trainer with a distillation method on several ranks; rank 0 writes the gradients it steps with.

python distillation.py FOLDER METHOD,BATCH,ACCUMULATION ...        (or under torchrun)

The gradients of a case are in FOLDER/METHOD,BATCH,ACCUMULATION.safetensors.
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

from leaving import leave
from picture_models import TEACHER, picture_trainer, vit
from safetensors.torch import save_file
from transformers import TrainerCallback

import salience as sal

METHODS = {
    "pld": sal.PLD(teacher=TEACHER),
    "dhkd": sal.DHKD(teacher=TEACHER, alpha=0.5, gamma=0.7),
    "aligned": sal.DHKD(teacher=TEACHER, alpha=0.5, gamma=0.7, align=True),
}


class Keep(TrainerCallback):
    def __init__(self, model):
        self.model, self.grads, self.part = model, {}, None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.grads = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        extra = getattr(self.part, "_parameters", {})
        self.grads |= {n: p.grad.clone() for n, p in extra.items()}


def run(folder, case):
    method, batch, accumulation = case.split(",")
    model = vit()
    keep = Keep(model)
    trainer = picture_trainer(
        folder / case,
        model,
        callbacks=[keep],
        max_steps=1,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=int(accumulation),
        max_grad_norm=0.0,
    )
    keep.part = sal.focus(trainer, METHODS[method]).parts[0]
    trainer.train()
    if os.environ.get("RANK", "0") == "0":
        save_file(keep.grads, folder / f"{case}.safetensors")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        run(Path(sys.argv[1]), case)
    leave()
