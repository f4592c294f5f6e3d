"""A few steps of LISA or IST; every rank writes what it saw. Started by test_layers_fsdp.py.

python layers.py FOLDER CASE ...        (or under torchrun; of a case every rank writes FOLDER/CASE.RANK)
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from conftest import collate, losses_of, ragged_samples, tiny_llama, tiny_trainer, with_lora
from leaving import leave
from safetensors.torch import save_file

import salience as sal
from salience.core.part import optimizer_bytes
from salience.hosts.transformers import structure
from salience.methods.layers.lisa import units

STEPS, BATCH, RATE = 8, 4, 1e-3


def sharded(model, mixed):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if mixed:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in structure(model).layers:
        fully_shard(layer.module, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def build(case, ranks):
    """(model, what runs the forward pass, method, batches to probe with)."""
    if "ist" in case:
        model = with_lora(tiny_llama(layers=4))
        probes = [collate(ragged_samples(4, seed=100 + index)) for index in range(3)]
        method = sal.IST(active_layers=1, score_every=2, candidates=3)
    else:
        model, probes = tiny_llama(layers=4), None
        method = sal.LISA(active_layers=1, interval=2, sample_embeddings="ends" in case)
    call = model
    if ranks > 1 and "fsdp" in case:
        call = model = sharded(model, "mixed" in case)
    elif ranks > 1 and "ddp" in case:
        call = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return model, call, method, probes


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def in_a_trainer(out, case):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    model, _, method, probes = build(case, 1)
    trainer = tiny_trainer(
        Path(f"{out}-run"),
        model,
        ragged_samples(STEPS * BATCH),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // ranks,
        learning_rate=RATE,
        train_sampling_strategy="sequential",
    )
    handle = sal.focus(trainer, method, data=probes)
    trainer.train()
    seen = {f"score.{name}": value for name, value in handle.scores.items()}
    weights = {f"weight.{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    losses = {"score.losses": torch.tensor(losses_of(trainer))}
    save_file({**seen, **losses, **weights}, f"{out}.{os.environ.get('RANK', '0')}")


def in_a_loop(out, case):
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")
    rank = dist.get_rank() if ranks > 1 else 0
    model, call, method, probes = build(case, ranks)
    names = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in names.values() if p.requires_grad], lr=RATE, weight_decay=0.1)
    loop = sal.loop(model, method, optimizer=optimizer, data=probes, call=call)
    loop.begin()
    seen = {}
    for step in range(STEPS):
        samples = ragged_samples(BATCH, seed=step)
        share = collate(samples[rank * BATCH // ranks : (rank + 1) * BATCH // ranks])
        loop.start_step([share])
        # flags of the sharded parameters, whatever is registered on the modules now
        flags = torch.tensor([p.requires_grad for p in names.values()])
        loss = loop.loss(share)
        loss.backward()
        loop.finish_step()
        seen[f"{step}.flags"] = flags
        seen[f"{step}.gradients"] = torch.tensor([p.grad is not None for p in names.values()])
        optimizer.step()
        optimizer.zero_grad()
        held = [bool(optimizer.state.get(p)) for p in names.values()]
        seen[f"{step}.state"] = torch.tensor(held)
        seen[f"{step}.bytes"] = torch.tensor(optimizer_bytes(optimizer))
        if "evaluated" in case:
            # a forward pass without a backward pass leaves FSDP2's outermost group gathered
            with torch.no_grad():
                call(**share)
    loop.end()
    for name, value in loop.parts[0].scores().items():
        seen[f"score.{name}"] = value
    if isinstance(method, sal.LISA):
        found = units(model, sample_embeddings=method.sample_embeddings)
        inside = set().union(*found.values())
        seen["inside"] = torch.tensor([name in inside for name in names])
    weights = {f"weight.{name}": whole(p.detach()).contiguous() for name, p in names.items()}
    save_file({**seen, **weights}, f"{out}.{rank}")


if __name__ == "__main__":
    for case in sys.argv[2:]:
        run = in_a_trainer if "trainer" in case else in_a_loop
        run(f"{sys.argv[1]}/{case}", case)
    leave()
