"""ssToken over ranks: gradients of one step with stored history, and a training set measured in shares.

python sstoken.py FOLDER BATCH ACCUMULATION HISTORY        (or under torchrun)
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from conftest import ragged_samples, tiny_gpt2, tiny_trainer
from gradients import step
from leaving import leave
from safetensors.torch import save_file

import salience as sal


def main(folder, batch, accumulation, history):
    folder, rank = Path(folder), int(os.environ.get("RANK", "0"))
    grads, loss = step(folder, sal.SsToken(keep=0.5, history=history), int(batch), int(accumulation))
    if rank == 0:
        save_file(grads, folder / "gradients.safetensors", metadata={"loss": str(loss)})
    # seven samples in batches of two: the ranks get different numbers of batches
    trainer = tiny_trainer(folder / "run", tiny_gpt2(), ragged_samples(7), max_steps=1)
    handle = sal.focus(trainer, sal.SsToken(keep=0.5))
    trainer.train()
    state = handle.parts[0].state()
    lengths = state["source.offsets"].diff()
    rows = zip(state["source.keys"].tolist(), state["source.values"].split(lengths.tolist()))
    found = {bytes(key).hex(): values for key, values in rows}
    save_file(found, folder / f"history-{rank}.safetensors", metadata={"passes": str(state["passes"])})


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
