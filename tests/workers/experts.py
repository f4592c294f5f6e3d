"""Run by a test in a process without salience: load checkpoints, write their logits, say how large they are."""

import json
import sys
from pathlib import Path


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "salience":
            raise ImportError("salience must not be needed")


sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

sizes = {}
for folder in map(Path, sys.argv[1:]):
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = load_file(folder / "batch.st")
    with torch.no_grad():
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
    save_file({"logits": logits}, folder / "logits.st")
    sizes[folder.name] = sum(parameter.numel() for parameter in model.parameters())
sys.stdout.write(json.dumps(sizes))
