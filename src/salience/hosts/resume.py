"""A Trainer whose checkpoints survive `kill -9` and hold no pickle.

transformers writes a checkpoint file by file and keeps optimizer, scheduler and random state as pickles. Here they
are safetensors and JSON, every file is on the disk before a marker says that the folder is whole, and only marked
folders are resumed from. On a CPU a resumed run has the losses of an unbroken one, bit for bit.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

MARKER = "complete"


class ResumableTrainer(Trainer):
    """A transformers Trainer with checkpoints as described above; for one process."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        state = self.optimizer.state_dict()
        tensors = {
            f"{index}.{name}": value.contiguous()
            for index, entry in state["state"].items()
            for name, value in entry.items()
            if isinstance(value, Tensor)
        }
        plain = {
            str(index): {name: value for name, value in entry.items() if not isinstance(value, Tensor)}
            for index, entry in state["state"].items()
        }
        save_file(tensors, str(folder / "optimizer.safetensors"))
        about = {"state": plain, "groups": state["param_groups"], "scheduler": self.lr_scheduler.state_dict()}
        (folder / "optimizer.json").write_text(json.dumps(about), encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        about = json.loads((Path(checkpoint) / "optimizer.json").read_text(encoding="utf-8"))
        state: dict[int, dict[str, Any]] = {
            int(index): dict(entry) for index, entry in about["state"].items()
        }
        for key, value in load_file(str(Path(checkpoint) / "optimizer.safetensors")).items():
            index, _, name = key.partition(".")
            state[int(index)][name] = value
        groups = [{k: tuple(v) if k == "betas" else v for k, v in group.items()} for group in about["groups"]]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(about["scheduler"])

    def _save_rng_state(self, output_dir: str) -> None:
        folder = Path(output_dir)
        version, internal, gauss = random.getstate()
        name, keys, *rest = np.random.get_state(legacy=True)
        about = {"python": [version, list(internal), gauss], "numpy": [name, *rest]}
        tensors = {"cpu": torch.get_rng_state(), "numpy": torch.from_numpy(np.array(keys, dtype=np.int64))}
        if torch.cuda.is_available():
            tensors["cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, str(folder / "random.safetensors"))
        (folder / "random.json").write_text(json.dumps(about), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        about = json.loads((Path(checkpoint) / "random.json").read_text(encoding="utf-8"))
        tensors = load_file(str(Path(checkpoint) / "random.safetensors"))
        version, internal, gauss = about["python"]
        random.setstate((version, tuple(internal), gauss))
        name, *rest = about["numpy"]
        np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), *rest))
        torch.set_rng_state(tensors["cpu"])
        if "cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["cuda"])


def seal(folder: Path) -> None:
    """Mark a checkpoint folder as whole, once every file in it is on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _sync(path)
    _sync(folder)
    (folder / MARKER).write_text("", encoding="utf-8")
    _sync(folder / MARKER)
    _sync(folder)


def last_checkpoint(folder: Path, steps: int) -> Path | None:
    """The newest whole checkpoint under `folder` that leaves something to train; the others after it are removed.

    Torn ones are of no use, and a Trainer that resumes after the last of `steps` steps takes one more.
    """
    whole: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        step = int(path.name.rpartition("-")[2])
        if step < steps and (path / MARKER).is_file():
            whole[step] = path
        else:
            shutil.rmtree(path)
    return whole[max(whole)] if whole else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
