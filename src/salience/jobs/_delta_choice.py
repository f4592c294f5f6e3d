"""Chooses q, and finds Wanda's norms, by running the base under fine-tuned and under pruned weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.core.errors import ConflictError
from salience.hosts.deltas import LoRA, Weights, as_rows
from salience.methods.weights._darex_divisors import geometric_search, trimmed_mean
from salience.methods.weights.darex import DAREx, in_scope, kept_blocks, layer_divisor

if TYPE_CHECKING:
    from salience.jobs.delta import Chosen, DeltaSettings

_ETAS = (0.03, 2.0)  # the paper's tuned ones lie between 0.27 and 1.01
_POINTS = 16  # of q
_MASKS = 4  # of an encoder; a decoder takes the one that is stored

# one mask: (tensor of the model, places, the base's values there, the delta there)
Sparse = list[tuple[str, Tensor, Tensor, Tensor]]


def choose(
    settings: DeltaSettings,
    folder: str,
    method: DAREx,
    base: Weights,
    tuned: Weights | LoRA,
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> Chosen:
    """The q and norms that `method` asks for; see `make_deltas`.

    Raises:
        ConflictError: for q="loss" without data, or a fine-tuned model with other tensors than the base's.
    """
    from salience.hosts import _delta_models as models
    from salience.hosts.checkpoints import load_model
    from salience.jobs.delta import Chosen

    if method.q == "loss" and settings.data is None:
        raise ConflictError("data must be given for q=loss, got none (q=output does without)")
    model, tokenizer = load_model(settings.base, dtype="float32", device=settings.device)
    names = [name for name in model.state_dict() if name in base.entries]
    apart = [k for k in tuned.entries if k not in names or tuned.entries[k].shape != base.entries[k].shape]
    if apart:
        raise ConflictError(
            f"q must be a number or auto, and score random or magnitude, where the base's model has no {apart[0]} of "
            f"the fine-tuned one's shape, got q={method.q!r} and score={method.score!r}"
        )
    if method.q in ("loss", "gradient") and not models.is_decoder(model):
        raise ConflictError(
            f"q must not be {method.q} for a model without next-token logits, got {type(model).__name__}"
        )
    batches = models.sequences(
        model, tokenizer, settings.data, settings.samples, settings.length, method.seed
    )
    say(f"choosing on {sum(len(b['input_ids']) for b in batches)} sequences of {settings.length} tokens")
    models.put(model, names, tuned.rows)
    inputs = models.input_statistics(model, batches)
    norms = {name: one.norms.float() for name, one in inputs.items()} if method.score == "wanda" else {}
    if not isinstance(method.q, str) or method.q == "auto":
        return Chosen(method.divisor, norms=norms)
    wanted = models.reference(model, batches)
    pruned = in_scope([name for name in names if name in tuned.entries], method)
    seeds = 1 if models.is_decoder(model) or method.score != "random" else _MASKS
    drawn = [
        _sparse(replace(method, seed=method.seed + number), pruned, base, tuned, norms)
        for number in range(seeds)
    ]

    def score(divisor: Callable[[str], float]) -> float:
        values = []
        for sparse in drawn:
            _fill(model, sparse, divisor)
            values.append(
                models.mean_loss(model, batches)
                if method.q == "loss"
                else models.output_change(model, batches, wanted)
            )
            _fill(model, sparse, None)
        return -trimmed_mean(values)

    models.put(model, pruned, base.rows)
    if method.q == "gradient":
        return _by_gradient(method, model, drawn[0], inputs, batches, wanted, norms, progress)
    if method.q != "layer":
        done = 0

        def scored(q: float) -> float:
            nonlocal done
            found = score(lambda name: q)
            done += 1
            progress(done, _POINTS)
            return found

        best, tried = geometric_search(scored, method.keep, _POINTS)
        return Chosen(best, norms=norms, tried={q: -value for q, value in tried.items()})
    return _by_layer(method, pruned, base, tuned, inputs, score, progress)


def _by_layer(
    method: DAREx,
    pruned: list[str],
    base: Weights,
    tuned: Weights | LoRA,
    inputs: Mapping[str, Any],
    score: Callable[[Callable[[str], float]], float],
    progress: Callable[[int, int], None],
) -> Chosen:
    """The analytic q of each linear layer, its one free number chosen by the output unless it is given."""
    from salience.jobs.delta import Chosen

    layers = [name for name in pruned if name in inputs]
    _require_layers(layers, "layer")

    def divisors(eta: float) -> dict[str, float]:
        asked = replace(method, eta=eta)
        found = {}
        for name in layers:
            side = name.removesuffix("weight") + "bias"
            bias = (
                _delta(side, base, tuned)(0, base.entries[side].numel).flatten() if side in pruned else None
            )
            found[name] = layer_divisor(
                name, base.entries[name].shape, _delta(name, base, tuned), inputs[name].means, asked, bias
            )
            if bias is not None:
                found[side] = found[name]
        return found

    def judged(eta: float) -> float:
        found = divisors(eta)
        mean = sum(found[name] for name in layers) / len(layers)
        return score(lambda name: found.get(name, mean))

    tried: dict[float, float] = {}
    eta = method.eta
    if eta is None:
        low, high = _ETAS
        steps = 8
        grid = [low * math.exp(math.log(high / low) * step / (steps - 1)) for step in range(steps)]
        for number, one in enumerate(grid, 1):
            tried[one] = -judged(one)
            progress(number, steps)
        eta = min(tried, key=lambda one: tried[one])
    found = divisors(eta)
    mean = sum(found[name] for name in layers) / len(layers)
    return Chosen(mean, by_tensor=found, tried=tried)


def _by_gradient(
    method: DAREx,
    model: Any,
    sparse: Sparse,
    inputs: Mapping[str, Any],
    batches: list[dict[str, Tensor]],
    wanted: list[tuple[Tensor, Tensor | None]],
    norms: Mapping[str, Tensor],
    progress: Callable[[int, int], None],
) -> Chosen:
    """The q of each linear layer that fits the fine-tuned logits best; what is no layer's takes their mean."""
    from salience.jobs._delta_gradient import layer_divisors
    from salience.jobs.delta import Chosen

    named = model.state_dict()
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, where, _, delta in sparse:
        pieces.setdefault(name, []).append((where, delta))
    layers = [name for name in pieces if name in inputs]
    _require_layers(layers, "gradient")
    kept, done = {}, set(layers)
    for name in layers:
        where, delta = (torch.cat(parts) for parts in zip(*pieces[name], strict=True))
        side, bias = name.removesuffix("weight") + "bias", None
        if side in pieces:
            bias = torch.zeros(named[side].shape)
            for places, values in pieces[side]:
                bias[places] = values
            done.add(side)
        width = as_rows(named[name].shape)[1]
        kept[name.removesuffix(".weight")] = (torch.stack([where // width, where % width]), delta, bias)
    rest = [one for one in sparse if one[0] not in done]
    found, seen = layer_divisors(
        model, kept, batches, wanted, method.keep, seed=method.seed, step_done=progress,
        others=lambda q: _fill(model, rest, lambda name: q),
    )  # fmt: skip
    mean = sum(found.values()) / len(found)
    by_tensor = {f"{name}.{part}": q for name, q in found.items() for part in ("weight", "bias")}
    return Chosen(mean, by_tensor={k: q for k, q in by_tensor.items() if k in done}, norms=norms, tried=seen)


def _require_layers(layers: list[str], got: str) -> None:
    if not layers:
        raise ConflictError(
            f"q must be a number, auto, output or loss for a model without linear layers, got {got}"
        )


def _delta(name: str, base: Weights, tuned: Weights | LoRA) -> Callable[[int, int], Tensor]:
    return lambda start, stop: tuned.rows(name, start, stop).float() - base.rows(name, start, stop).float()


def _sparse(
    method: DAREx, names: list[str], base: Weights, tuned: Weights | LoRA, norms: Mapping[str, Tensor]
) -> Sparse:
    found: Sparse = []
    for name in names:
        delta, width = _delta(name, base, tuned), as_rows(base.entries[name].shape)[1]
        for start, stop, mask in kept_blocks(name, base.entries[name].shape, delta, method, norms.get(name)):
            where = mask.flatten().nonzero().flatten()
            old = base.rows(name, start, stop).flatten()[where].float()
            found.append((name, where + start * width, old, delta(start, stop).flatten()[where]))
    return found


@torch.no_grad()
def _fill(model: Any, sparse: Sparse, divisor: Callable[[str], float] | None) -> None:
    """Put pruned weights in place, or the base's again."""
    named = model.state_dict(keep_vars=True)
    for name, where, old, delta in sparse:
        new = old if divisor is None else old + delta / divisor(name)
        flat = named[name].detach().view(-1)
        flat[where.to(flat.device)] = new.to(flat.device, flat.dtype)
