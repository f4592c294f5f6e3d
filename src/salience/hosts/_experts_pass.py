"""One pass over demonstrations: what routers choose, how long the experts' outputs are and what they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ParameterError, StructureError, require
from salience.hosts._experts_tree import Mixture, Mixtures

_DATA = "demonstrations: batches with input_ids, or a mapping of domain to batches"
_WHOLE = "all"


@dataclass(frozen=True)
class Routed:
    """What one layer's router and experts did with the T tokens of one batch, padding left out.

    Attributes:
        ids (Tensor): [T, k] int64, the experts of each token.
        weights (Tensor): [T, k] fp32, their final weights: renormalised, scaled.
        norms (Tensor): [T, k] fp32, L2 norm of each expert's raw output for this token.
        cosine (Tensor): [T] fp32, between the residual stream before and after the weighted sum of routed experts.
        experts (int): E.
    """

    ids: Tensor
    weights: Tensor
    norms: Tensor
    cosine: Tensor
    experts: int

    def by_expert(self, parts: Tensor) -> Tensor:
        """What each expert gets of `parts` [T, k], summed over the tokens: [E] fp64."""
        sums = torch.zeros(self.experts, dtype=torch.float64, device=parts.device)
        return sums.index_add_(0, self.ids.flatten().long(), parts.double().flatten())


Score = Callable[[Routed], Tensor]


@dataclass(frozen=True)
class Measured:
    """Sums over all demonstrations and all ranks.

    Attributes:
        scores (Tensor): [L, E] fp64; of several domains the mean of each one's scores divided by their sum.
        hits (Tensor): [L, E] fp64, how many tokens each expert got.
        demonstrations (int): rows read.
        tokens (int): without padding.
    """

    scores: Tensor
    hits: Tensor
    demonstrations: int
    tokens: int


def check_data(data: Any) -> dict[str, list[Mapping[str, Any]]]:
    """Demonstrations as batches by domain.

    Args:
        data (Any): a batch, several, or a mapping of domain -> one or several. A batch is a mapping with `input_ids`
            [B, S] and, where rows are padded, `attention_mask` [B, S].

    Raises:
        ParameterError: if there are none, or something is no batch.
    """
    require(data is not None, "data", _DATA, None)
    domains = data if isinstance(data, Mapping) and "input_ids" not in data else {_WHOLE: data}
    found = {str(name): _batches(batches) for name, batches in domains.items()}
    require(
        bool(found) and all(found.values()), "data", _DATA, {name: len(few) for name, few in found.items()}
    )
    return found


def measure(
    found: Mixtures,
    domains: Mapping[str, list[Mapping[str, Any]]],
    score: Score,
    *,
    samples: int | None = None,
    mean: bool = False,
) -> Measured:
    """Run the demonstrations once, without gradient and in eval mode, and sum each expert's scores.

    Args:
        found (Mixtures): of the model.
        domains (Mapping): what `check_data` returned.
        score (Score): what a batch adds to the score of each expert [E]; has to be a sum over tokens.
        samples (int | None): at most so many rows of each domain, the first ones; on each rank.
        mean (bool): divide by how many tokens each expert got.

    Returns:
        Measured: on the CPU, the same on all ranks.
    """
    by_domain, hits, rows, tokens = [], torch.zeros(len(found.layers), found.experts).double(), 0, 0
    for batches in domains.values():
        sums = torch.zeros(2, len(found.layers), found.experts, dtype=torch.float64)
        seen = torch.zeros(2, dtype=torch.float64)

        def see(layer: int, routed: Routed, sums: Tensor = sums) -> None:
            sums[0, layer] += score(routed).double().cpu()
            sums[1, layer] += torch.bincount(routed.ids.flatten(), minlength=found.experts).double().cpu()

        for batch in _first_rows(batches, samples):
            seen += torch.tensor(run(found, batch, see))
        sums, seen = distributed.all_reduce_sum(sums), distributed.all_reduce_sum(seen)
        by_domain.append(sums[0] / sums[1].clamp_min(1.0) if mean else sums[0])
        hits, rows, tokens = hits + sums[1], rows + int(seen[0]), tokens + int(seen[1])
    if len(by_domain) > 1:
        by_domain = [
            one / one.sum(-1, keepdim=True).clamp_min(torch.finfo(one.dtype).tiny) for one in by_domain
        ]
    return Measured(torch.stack(by_domain).mean(0), hits, rows, tokens)


def run(found: Mixtures, batch: Mapping[str, Any], see: Callable[[int, Routed], None]) -> tuple[int, int]:
    """One forward pass; `see(l, routed)` is called when layer l's experts have run.

    Returns:
        tuple[int, int]: rows and tokens without padding.
    """
    core = found.core
    device = next(core.parameters()).device
    inputs = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("labels", "use_cache")
    }
    mask = inputs.get("attention_mask")
    real = (torch.ones_like(inputs["input_ids"]) if mask is None else mask).bool().flatten()
    record = Attachment()
    try:
        with _evaluating(core), torch.no_grad():
            for index, one in enumerate(found.layers):
                _watch(one, record, real, found.experts, partial(see, index))
            # the head's logits are not needed
            getattr(core, "base_model", core)(**inputs, use_cache=False)
    finally:
        record.undo()
    return inputs["input_ids"].shape[0], int(real.sum())


def _watch(
    one: Mixture, record: Attachment, real: Tensor, number: int, see: Callable[[Routed], None]
) -> None:
    streams: dict[str, Tensor] = {}

    def after_norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # the residual stream is what went into the norm whose output the block gets
        if args and isinstance(output, Tensor):
            streams["before"], streams["normed"] = args[0], output

    def before_block(module: nn.Module, args: tuple[Any, ...]) -> None:
        if streams.get("normed") is not args[0]:
            raise StructureError(
                f"{one.path} must get the output of a norm of its layer's residual stream, got something else"
            )

    for child in one.layer.children():
        if _is_norm(child):
            record.hook(child.register_forward_hook(after_norm))
    record.hook(one.block.register_forward_pre_hook(before_block))

    def recording(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            output, norms = _one_by_one(forward, hidden, ids, weights)
            if len(ids) != len(real):
                raise StructureError(f"{one.path} must route {len(real)} tokens of the batch, got {len(ids)}")
            before = streams["before"].reshape(len(ids), -1)[real].float()
            routed = output.reshape(len(ids), -1)[real].float()
            cosine = torch.nn.functional.cosine_similarity(before, before + routed, dim=-1)
            see(Routed(ids[real], weights[real].float(), norms[real], cosine, number))
            return output

        return call

    record.wrap(one.experts, "forward", recording)


def _one_by_one(
    forward: Callable[..., Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The weighted sum [T, d] and the norms [T, k]; the raw output of one expert at a time is in memory."""
    output = torch.zeros_like(hidden)
    norms = torch.zeros(ids.shape, dtype=torch.float32, device=hidden.device)
    for expert in ids.unique():
        token, place = torch.where(ids == expert)
        alone = torch.full_like(token, int(expert)).unsqueeze(1)
        raw = forward(hidden[token], alone, weights.new_ones(len(token), 1))
        norms[token, place] = torch.linalg.vector_norm(raw, dim=-1, dtype=torch.float32)
        output.index_add_(0, token, (raw * weights[token, place, None]).to(output.dtype))
    return output, norms


def _is_norm(module: nn.Module) -> bool:
    """Norms have one-dimensional weights and nothing below them."""
    own = list(module.parameters())
    return not list(module.children()) and all(p.ndim == 1 for p in own) and bool(own)


def _batches(given: Any) -> list[Mapping[str, Any]]:
    batches = [given] if isinstance(given, Mapping) else list(given) if isinstance(given, Iterable) else []
    for batch in batches:
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not (isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel()):
            raise ParameterError(
                f"data must be {_DATA}, got a batch of {type(batch).__name__} without input_ids"
            )
    return batches


def _first_rows(batches: list[Mapping[str, Any]], samples: int | None) -> Iterator[Mapping[str, Any]]:
    left = samples
    for batch in batches:
        rows = len(batch["input_ids"])
        if left is None or left >= rows:
            yield batch
        elif left > 0:
            few = left
            yield {
                name: value[:few]
                if isinstance(value, Tensor) and value.ndim and len(value) == rows
                else value
                for name, value in batch.items()
            }
        left = None if left is None else max(left - rows, 0)


@contextmanager
def _evaluating(core: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and afterwards the mode that each one had."""
    modes = [(module, module.training) for module in core.modules()]
    core.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
