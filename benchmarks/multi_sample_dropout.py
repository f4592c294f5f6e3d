"""Time to a given loss with multi-sample dropout at M = 8 against plain dropout, with a backbone of real size.

A ResNet-18 as transformers builds it (11 million parameters, from scratch) reads scikit-learn's digits enlarged to
32 x 32 pixels and three channels; its head is dropout 0.5, 256 units, dropout 0.5, 10 classes. Batches of 32 with
Adam. Steps and CPU seconds are counted until the eval-mode loss on 300 training digits is below 0.1, looked at every
few steps; looking is not counted. Both arms start from the same weights and see the same batches, for each seed.

    python benchmarks/multi_sample_dropout.py [--seeds 3] [--steps 120] [--device cpu] [--out FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetModel

import salience as sal
from salience.claims._digit_pictures import pictures
from salience.core.evidence import about

GOAL, LOOK, BATCH, TRAIN = 0.1, 5, 32, 300
ARMS = {"M = 1": 1, "M = 8": 8}


class Backbone(nn.Module):
    """ResNet-18 [B, 3, 32, 32] to features [B, 512]."""

    def __init__(self):
        super().__init__()
        config = ResNetConfig(
            embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic"
        )
        self.net = ResNetModel(config)

    def forward(self, images):
        return self.net(images).pooler_output.flatten(1)


def build(samples, seed, device):
    torch.manual_seed(seed)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(512, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 10))
    return nn.ModuleDict({"body": Backbone(), "head": sal.MultiSampleHead(head, samples)}).to(device).train()


def looked(model, images, labels):
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model["head"](model["body"](part)) for part in images.split(100)])
    model.train()
    return float(F.cross_entropy(logits, labels))


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def train(samples, seed, args):
    data = pictures(TRAIN, seed, args.device, size=32)
    images, labels = data.train.expand(-1, 3, -1, -1).contiguous(), data.train_labels
    model = build(samples, seed, args.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.rate)
    order, spent, reached, losses = torch.Generator().manual_seed(seed), 0.0, None, []
    for step in range(1, args.steps + 1):
        rows = torch.randperm(TRAIN, generator=order)[:BATCH].to(args.device)
        started = clock(args.device)
        loss = sal.multi_sample_loss(model["head"](model["body"](images[rows])), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent += clock(args.device) - started
        if step % LOOK == 0:
            losses.append(looked(model, images, labels))
            if losses[-1] < GOAL:
                reached = step
                break
    return {"steps": reached, "seconds": spent, "step ms": 1e3 * spent / step, "last loss": losses[-1]}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = {name: [] for name in ARMS}
    for seed in range(args.seeds):
        for name, samples in ARMS.items():
            rows[name].append(train(samples, seed, args))
            print(name, seed, rows[name][-1], flush=True)
    ratios = {}
    for key in ("steps", "seconds", "step ms"):
        pairs = zip(rows["M = 8"], rows["M = 1"])
        both = [(mine[key], plain[key]) for mine, plain in pairs if mine["steps"] and plain["steps"]]
        ratios[key] = statistics.median(mine / plain for mine, plain in both) if both else None
    print("M = 8 / M = 1:", ratios)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = f"--seeds {args.seeds} --steps {args.steps} --rate {args.rate} --device {args.device}"
        command = f"python benchmarks/multi_sample_dropout.py {settings}"
        found = {"command": command, "about": about(args.device), "arms": rows, "M = 8 / M = 1": ratios}
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
