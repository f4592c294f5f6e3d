"""One step of a Trainer with CutMix on several ranks: the gradient against the formula, from what each rank fed.

python cutmix.py FOLDER BATCH,ACCUMULATION,SAMPLES ...        (or under torchrun)

What a case gave is in the folder FOLDER/BATCH,ACCUMULATION,SAMPLES.
"""

import copy
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "methods")]

import torch
import torch.distributed as dist
from gradients import Keep
from leaving import leave
from safetensors.torch import save_file
from test_cutmix import picture_trainer, pictures_model

import salience as sal
from salience.methods.samples.cutmix import mixed_loss


def run(folder, case):
    batch, accumulation, samples = map(int, case.split(","))
    folder, rank = folder / case, int(os.environ.get("RANK", "0"))
    folder.mkdir(exist_ok=True)
    model = pictures_model()
    fresh, keep = copy.deepcopy(model), Keep(model)
    trainer = picture_trainer(
        folder / "run",
        model,
        count=samples,
        callbacks=[keep],
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    part = sal.focus(trainer, sal.CutMix()).parts[0]
    fed = []

    def watch(module, args, kwargs):
        if module.training:
            mixed = part._mixed
            assert mixed is not None and torch.equal(kwargs["pixel_values"], mixed.images)
            fed.append((mixed.images.clone(), mixed.labels, mixed.partner_labels, mixed.lam))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    trainer.train()
    count = torch.tensor(sum(len(one[0]) for one in fed))
    if dist.is_initialized():
        dist.all_reduce(count)
    for images, labels, partner, lam in fed:
        loss = mixed_loss(fresh(pixel_values=images).logits, labels, partner, lam)
        (loss * len(images) / count).backward()
    wanted = {}
    for name, parameter in fresh.named_parameters():
        wanted[name] = parameter.grad
        if dist.is_initialized():
            dist.all_reduce(wanted[name])
    shares = torch.tensor([one[3] for one in fed])
    save_file({"lam": shares}, folder / f"lam-{rank}.safetensors")
    if rank == 0:
        save_file(keep.grads, folder / "found.safetensors")
        save_file(wanted, folder / "wanted.safetensors")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        run(Path(sys.argv[1]), case)
    leave()
