"""Gradients of co-teaching, nested dropout, a contrastive loss and temporal dropout, by one process or two under DDP.

python features.py FILE        (or under torchrun)
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

from leaving import leave
from safetensors.torch import save_file

import salience as sal

BATCH = 8


def wrapped(model, ranks):
    return DistributedDataParallel(model) if ranks > 1 else model


def mine(tensor, rank, ranks):
    """This rank's rows."""
    return tensor.chunk(ranks)[rank]


def main(path):
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(BATCH, 6, generator=draw), torch.randint(3, (BATCH,), generator=draw)
    found = {}

    torch.manual_seed(0)
    nested = nn.Sequential(
        nn.Linear(6, 16), nn.Tanh(), sal.NestedMask(16, std=6.0), nn.Linear(16, 3, bias=False)
    )
    run = wrapped(nested, ranks)
    for _ in range(3):
        loss = nn.functional.cross_entropy(run(mine(x, rank, ranks)), mine(y, rank, ranks))
    loss.backward()
    found |= {f"nested.{name}": p.grad for name, p in nested.named_parameters()}

    torch.manual_seed(1)
    encoder = sal.ProjectionHead(kind="mlp").wrap(nn.Linear(6, 5), features=5)
    run = wrapped(encoder, ranks)
    z = run(mine(x, rank, ranks))
    loss = sal.supervised_contrastive(z, mine(y, rank, ranks), gather=True)
    loss.backward()
    found |= {f"contrast.{name}": p.grad for name, p in encoder.named_parameters()}
    found["contrast.loss"] = loss.detach()

    torch.manual_seed(2)
    series = torch.randn(BATCH, 7, 3, generator=draw)
    for name, learn in (("fixed", False), ("concrete", True)):
        model = nn.Sequential(sal.TemporalDropout(0.4, learn=learn), nn.Flatten(), nn.Linear(21, 1))
        nn.init.constant_(model[2].weight, 0.1)
        nn.init.zeros_(model[2].bias)
        run = wrapped(model, ranks)
        for _ in range(2):
            loss = run(mine(series, rank, ranks)).square().mean()
        loss.backward()
        found |= {f"{name}.{key}": p.grad for key, p in model.named_parameters()}

    torch.manual_seed(3)
    pair = sal.CoTeaching(nn.Linear(6, 3), nn.Linear(6, 3), forget_rate=0.5)
    run = wrapped(pair, ranks)
    run(input=mine(x, rank, ranks), labels=mine(y, rank, ranks))["loss"].backward()
    found |= {f"pair.{name}": p.grad for name, p in pair.named_parameters()}
    if rank == 0:
        save_file({name: value.clone().contiguous() for name, value in found.items()}, path)


if __name__ == "__main__":
    main(sys.argv[1])
    leave()
