"""One step of a Trainer with multi-sample dropout; rank 0 writes the gradients.

python multi_sample.py FOLDER BATCH ACCUMULATION        (or under torchrun)
"""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "methods")]

from gradients import Keep
from leaving import leave
from safetensors.torch import save_file
from test_multi_sample_dropout import FixedMasks, picture_trainer, pictures_model

import salience as sal


def main(folder, batch, accumulation):
    folder = Path(folder)
    model = pictures_model()
    keep = Keep(model)
    trainer = picture_trainer(
        folder / "run",
        model,
        count=8,
        callbacks=[keep],
        max_steps=1,
        per_device_train_batch_size=int(batch),
        gradient_accumulation_steps=int(accumulation),
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    part = sal.focus(trainer, sal.MultiSampleDropout(num_samples=3, p=0.5)).parts[0]
    # a mask that depends on the row's features and the sample alone: however the step is cut, it is the same
    part._masked = FixedMasks(3)
    trainer.train()
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(keep.grads, folder / "gradients.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
