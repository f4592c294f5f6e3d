"""What the claims of IST and LISA share: digits learnt upright, then tuned to transposed digits, with bytes and time.

Time is the process's own CPU time, so that other programs on the machine do not count. Bytes kept for backward are
counted on every fifth step, which is left out of the time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor, nn

from salience import loop as make_loop
from salience.core.evidence import saved_for_backward
from salience.core.method import Method
from salience.core.part import gradient_bytes, optimizer_bytes
from salience.sandbox.digits import Digits, ResidualMLP, accuracy, digits, trained

BATCH, STEPS, BLOCKS = 32, 150, 8
_PROBES, _PROBE_SIZE = 40, 16


class WithEmbedding(ResidualMLP):
    """The network of the sandbox, saying which of its modules is the embedding.

    Not for adapters: PEFT would make the embedding's output want gradients, and backward would run to the bottom.
    """

    def get_input_embeddings(self) -> nn.Module:
        """What reads the input."""
        return self.embed


@lru_cache(maxsize=8)
def _start(seed: int) -> dict[str, Tensor]:
    model = trained(ResidualMLP(BLOCKS, seed=seed), digits(seed=seed), seed=seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def pretrained(seed: int, device: str, kind: type[ResidualMLP] = ResidualMLP) -> ResidualMLP:
    """The network that reads upright digits."""
    model = kind(BLOCKS, seed=seed)
    model.load_state_dict(_start(seed))
    return model.to(device).train()


def with_adapters(model: ResidualMLP, rank: int, blocks: list[int] | None = None) -> nn.Module:
    """LoRA on both projections of every block, or of some; the same initial matrices for the same network."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["up", "down"], layers_to_transform=blocks
    )
    if blocks is not None:
        config.layers_pattern = "blocks"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def tune(
    model: nn.Module,
    method: Method | None,
    *,
    rate: float,
    seed: int,
    device: str,
    steps: int = STEPS,
    batch: int = BATCH,
    seconds: float | None = None,
) -> dict[str, float]:
    """Tune to transposed digits with AdamW and a constant rate.

    Args:
        model (nn.Module): what `pretrained` gave, with adapters or without.
        method (Method | None): what chooses the layers.
        rate (float): learning rate.
        seed (int): of split, order and draws.
        device (str): where.
        steps (int): optimizer steps.
        batch (int): images of a step.
        seconds (float | None): stop after so much CPU time instead of after `steps`.

    Returns:
        dict: accuracy, steps, seconds, and bytes: kept for backward and gradients (mean and most of the steps),
        optimizer state (at the end and most).
    """
    data = digits(transposed=True, seed=seed)
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
    probes = list(_batches(data, _PROBE_SIZE, seed + 2, device, _PROBES))
    loop = (
        make_loop(model, method, optimizer=optimizer, data=probes, shifted=False, seed=seed)
        if method
        else None
    )
    if loop is not None:
        loop.begin()
    kept: list[int] = []
    gradients: list[int] = []
    states: list[int] = []
    spent, done = 0.0, 0
    for batch_now in _batches(data, batch, seed + 1, device):
        if done == steps if seconds is None else spent >= seconds:
            break
        started = time.process_time()
        if loop is not None:
            loop.start_step([batch_now])
        if done % 5 == 0:
            with saved_for_backward() as saved:
                loss = model(**batch_now).loss
            kept.append(saved["bytes"])
            started = time.process_time() - spent / max(done, 1)  # this step costs what the others cost
        else:
            loss = model(**batch_now).loss
        loss.backward()
        if loop is not None:
            loop.finish_step()
        optimizer.step()
        spent += time.process_time() - started
        gradients.append(gradient_bytes(model))
        states.append(optimizer_bytes(optimizer))
        optimizer.zero_grad()
        done += 1
    if loop is not None:
        loop.end()
    model.eval()
    return {
        "accuracy": accuracy(model, data),  # type: ignore[arg-type]
        "steps": done,
        "seconds": spent,
        "kept for backward": sum(kept) / len(kept),
        "most kept for backward": max(kept),
        "gradients": sum(gradients) / len(gradients),
        "most gradients": max(gradients),
        "optimizer": states[-1],
        "most optimizer": max(states),
    }


def _batches(
    data: Digits, size: int, seed: int, device: str, count: int | None = None
) -> Iterator[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    while count is None or count > 0:
        rows = torch.randint(len(data.train_images), (size,), generator=random)
        yield {"images": data.train_images[rows].to(device), "labels": data.train_labels[rows].to(device)}
        count = None if count is None else count - 1
