"""A q for each linear layer by gradient: one scalar a layer, trained until the pruned decoder's logits fit.

Each layer computes `x W^T + x D^T / (|a| + k)` with the base's W and the kept entries D of the delta, which stay
sparse; only the scalars learn, so that the weights are in memory once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from salience.hosts import _delta_models as models

_START = 1e-4
_RATE, _STEPS = 1e-2, 200
_TOGETHER = 2  # batches of four sequences in a step
_CHECK_EVERY, _PATIENCE = 10, 5
_HELD_OUT = 5  # one batch of so many is for checking

# layer -> (coordinates [2, n], values [n], delta of the bias [out] or None)
Kept = Mapping[str, tuple[Tensor, Tensor, Tensor | None]]


class _Divided(nn.Module):
    """What a linear layer adds for its kept entries."""

    def __init__(self, kept: tuple[Tensor, Tensor, Tensor | None], layer: nn.Linear, keep: float) -> None:
        super().__init__()
        where, values, self.bias = kept
        place = layer.weight.device
        shape = (layer.out_features, layer.in_features)
        # rows first and unique: they were collected in rising order
        self.matrix = torch.sparse_coo_tensor(
            where, values, shape, device=place, is_coalesced=True, check_invariants=False
        )
        self.bias = None if self.bias is None else self.bias.to(place)
        self.scalar = nn.Parameter(torch.tensor(_START, device=place))
        self._keep = keep

    @property
    def divisor(self) -> Tensor:
        return (self.scalar.abs() + self._keep).clamp(max=1.0)

    def forward(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        added = torch.sparse.mm(self.matrix, x.flatten(0, -2).float().T).T
        if self.bias is not None:
            added = added + self.bias
        changed: Tensor = output + (added / self.divisor).view(output.shape).to(output.dtype)
        return changed


def layer_divisors(
    model: nn.Module,
    kept: Kept,
    batches: Sequence[dict[str, Tensor]],
    wanted: Sequence[tuple[Tensor, Tensor | None]],
    keep: float,
    *,
    others: Callable[[float], None] = lambda q: None,
    steps: int = _STEPS,
    seed: int = 0,
    step_done: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[dict[str, float], dict[float, float]]:
    """Train one divisor a layer: AdamW at 0.01 with a cosine to 0, until five checks in a row bring nothing.

    Args:
        model (nn.Module): a decoder with the base's weights in the layers of `kept`; unchanged afterwards.
        kept (Mapping): layer's name -> coordinates and values of its kept entries, undivided, and its bias's delta.
        batches (Sequence[dict[str, Tensor]]): token ids; every fifth batch is only checked on, if there are two.
        wanted (Sequence): of `reference`, for each batch: the fine-tuned model's largest logits and their places.
        keep (float): k, the smallest divisor.
        others (Callable): is told the mean divisor before each check, for tensors that are no layer's.
        steps (int): most steps, >= 1.
        seed (int): of the order of the batches.
        step_done (Callable): steps done, most steps.

    Returns:
        tuple: layer -> q in [k, 1] at the best check, and step -> mean square error there.
    """
    layers = dict(model.named_modules())
    added = {name: _Divided(one, layers[name], keep) for name, one in kept.items()}
    handles = [layers[name].register_forward_hook(one) for name, one in added.items()]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    pairs = list(zip(batches, wanted, strict=True))
    checked = pairs[::_HELD_OUT] if len(pairs) > 1 else pairs
    learnt = [pair for index, pair in enumerate(pairs) if index % _HELD_OUT] or pairs
    try:
        return _descend(model, added, learnt, checked, others, steps, seed, step_done)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _descend(
    model: Any,
    added: Mapping[str, _Divided],
    learnt: list[Any],
    checked: list[Any],
    others: Callable[[float], None],
    steps: int,
    seed: int,
    step_done: Callable[[int, int], None],
) -> tuple[dict[str, float], dict[float, float]]:
    optimizer = torch.optim.AdamW([one.scalar for one in added.values()], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device

    def divisors() -> dict[str, float]:
        return {name: float(one.divisor.detach()) for name, one in added.items()}

    def check() -> float:
        found = divisors()
        others(sum(found.values()) / len(found))
        return models.output_change(model, [batch for batch, _ in checked], [want for _, want in checked])

    seen = {0.0: check()}
    best, failed = (seen[0.0], divisors()), 0
    order: list[int] = []
    for step in range(1, steps + 1):
        for _ in range(min(_TOGETHER, len(learnt))):
            order = order or torch.randperm(len(learnt), generator=draw).tolist()
            batch, (values, where) = learnt[order.pop()]
            logits = model(input_ids=batch["input_ids"].to(device)).logits.float()
            loss = (logits.gather(-1, where.to(device)) - values.to(device)).square().mean()
            loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        step_done(step, steps)
        if step % _CHECK_EVERY and step != steps:
            continue
        seen[float(step)] = check()
        if seen[float(step)] < best[0]:
            best, failed = (seen[float(step)], divisors()), 0
        else:
            failed += 1
            if failed == _PATIENCE:
                break
    others(sum(best[1].values()) / len(best[1]))
    return best[1], seen
