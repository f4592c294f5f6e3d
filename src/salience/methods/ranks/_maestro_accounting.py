"""Multiply-adds of a model, and which ranks a budget leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import require
from salience.methods.ranks._maestro_layers import FactoredLayer, matrix_of


@torch.no_grad()
def multiply_adds(model: nn.Module, inputs: Any) -> int:
    """Multiply-adds of the linear layers and convolutions of one forward pass, dense or factored.

    A weight [m, n] costs m n at every output position, factors of rank r cost r (m + n). Products without a weight
    (the scores of attention), embeddings, norms and experts stacked in one parameter are not counted.

    Args:
        model (nn.Module): run once, in eval mode.
        inputs (Any): a mapping is given as keywords, anything else as the only argument.

    Returns:
        int: over the whole batch: divide by its size, or by its tokens.
    """
    from salience.core.loop import evaluating

    total = 0

    def count(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal total
        m, n, r = _sizes(module)
        total += output.numel() // m * (m * n if r is None else r * (m + n))

    every = [m for m in model.modules() if isinstance(m, FactoredLayer) or _counts(m)]
    handles = [module.register_forward_hook(count) for module in every]
    try:
        with evaluating(model):
            model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total


def ranks_for_budget(
    importances: Sequence[Tensor], shapes: Sequence[tuple[int, int]], keep: float
) -> list[int]:
    """Ranks with which all layers together hold at most `keep` of their dense weights.

    Always the last component goes whose tail holds the smallest share of its layer's importance. A layer of rank r
    holds min(r (m + n), m n) numbers, since it is deployed dense where its factors would be larger.

    Args:
        importances (Sequence[Tensor]): [r_i] for each layer, not increasing.
        shapes (Sequence[tuple[int, int]]): (m, n) of each layer.
        keep (float): in (0, 1].

    Returns:
        list[int]: for each layer, at least 1.

    Raises:
        ParameterError: if even rank 1 everywhere is larger; the text says what is possible.
    """
    require(0 < keep <= 1, "keep", "in (0, 1]", keep)
    dense = sum(m * n for m, n in shapes)
    least = sum(min(m + n, m * n) for m, n in shapes) / dense
    require(least <= keep, "keep", f"at least {least:.4g} (rank 1 in every layer)", keep)
    ranks = [len(values) for values in importances]
    shares = [(values.double() / values[0].double().clamp_min(1e-300)).tolist() for values in importances]
    order = sorted(
        (share, -b, i) for i, values in enumerate(shares) for b, share in enumerate(values) if b > 0
    )
    held = sum(stored(r, *shape) for r, shape in zip(ranks, shapes))
    for _, negative, i in order:
        if held <= keep * dense:
            break
        held -= stored(ranks[i], *shapes[i]) - stored(-negative, *shapes[i])
        ranks[i] = -negative
    return ranks


def search_ranks(
    layers: Mapping[str, FactoredLayer],
    score: Callable[[], float],
    keep: float,
    *,
    step: float = 0.1,
) -> dict[str, int]:
    """Ranks under a budget of multiply-adds by greedy search against a validation score.

    In each round every layer is cut in turn by `step` of its rank, and the cut stays that costs the least score for
    each multiply-add it saves. The layers keep all components; set `layer.rank` to what is returned, or `shrink`.

    Args:
        layers (Mapping[str, FactoredLayer]): what `decompose` returned, trained; in eval mode while scored.
        score (Callable): validation score of the model as it is, higher is better.
        keep (float): share of the dense layers' multiply-adds, in (0, 1].
        step (float): share of a layer's rank that one round takes, in (0, 1); at least one component goes.

    Returns:
        dict[str, int]: a rank for each layer; the ranks before the call are restored.
    """
    require(0 < keep <= 1, "keep", "in (0, 1]", keep)
    require(0 < step < 1, "step", "in (0, 1)", step)
    before = {path: layer.rank for path, layer in layers.items()}
    budget = keep * sum(layer.dense_cost for layer in layers.values())
    least = sum(min(layer.cost // layer.rank, layer.dense_cost) for layer in layers.values())
    require(least <= budget, "keep", "at least what rank 1 in every layer costs", keep)
    try:
        for layer in layers.values():
            m, n = layer.shape
            # the first rank at which factors are cheaper: cuts above it would save nothing
            layer.rank = min(layer.rank, max(-(-m * n // (m + n)) - 1, 1))
        while sum(min(one.cost, one.dense_cost) for one in layers.values()) > budget:
            now, best = score(), (float("inf"), "", 0)
            for path, layer in layers.items():
                old, cost = layer.rank, layer.cost
                if old == 1:
                    continue
                layer.rank = old - max(int(step * old), 1)
                loss = (now - score()) / (cost - layer.cost)
                best = min(best, (loss, path, layer.rank))
                layer.rank = old
            layers[best[1]].rank = best[2]
        return {path: layer.rank for path, layer in layers.items()}
    finally:
        for path, rank in before.items():
            layers[path].rank = rank


def stored(rank: int, m: int, n: int) -> int:
    """Numbers that a layer of this rank holds in its smaller form."""
    return min(rank * (m + n), m * n)


def _counts(module: nn.Module) -> bool:
    return matrix_of(module) is not None or isinstance(module, (nn.Linear, nn.Conv2d))


def _sizes(module: nn.Module) -> tuple[int, int, int | None]:
    if isinstance(module, FactoredLayer):
        return (*module.shape, module.rank)
    matrix = matrix_of(module)
    if matrix is None:
        weight: Any = module.weight
        matrix = weight.flatten(1)
    return matrix.shape[0], matrix.shape[1], None
