"""Runs a base under its fine-tuned and its pruned weights, to see what pruning does. One model is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import ConflictError, require
from salience.hosts._streaming import as_rows, row_blocks

Rows = Callable[[str, int, int], Tensor]
_TOP = 5
_AT_ONCE = 4  # sequences


@dataclass
class Inputs:
    """What reached a linear layer over all tokens: the signed mean and the norm of each input, [in] float64."""

    means: Tensor
    norms: Tensor


def sequences(
    model: Any, tokenizer: Any, data: str | None, samples: int, length: int, seed: int
) -> list[dict[str, Tensor]]:
    """Batches of `samples` sequences of `length` tokens, without padding: texts joined, or random tokens.

    Args:
        model (PreTrainedModel): says the vocabulary and the positions.
        tokenizer (PreTrainedTokenizerBase): the model's.
        data (str | None): as for `load_rows`; None draws tokens evenly from the vocabulary.
        samples (int): sequences, fewer where the data has no more.
        length (int): tokens of each.
        seed (int): of random tokens.

    Returns:
        list[dict[str, Tensor]]: input_ids and labels [4, length].
    """
    from salience.hosts.checkpoints import check_positions
    from salience.hosts.data import load_rows, tokenize

    check_positions(model, length)
    if data is None:
        draw = torch.Generator().manual_seed(seed)
        special = set(tokenizer.all_special_ids)
        usual = [token for token in range(len(tokenizer)) if token not in special]
        drawn = torch.randint(0, len(usual), (samples, length), generator=draw)
        ids = torch.tensor(usual)[drawn]
        labels = ids
    else:
        rows = tokenize(load_rows(data), tokenizer, max_length=None)
        if isinstance(rows[0]["labels"], int):
            raise ConflictError(f"data must be texts or prompts with completions, got classes in {data}")
        joined = [torch.tensor(list(chain.from_iterable(rows[name]))) for name in ("input_ids", "labels")]
        count = min(samples, len(joined[0]) // length)
        require(count >= 1, "data", f"at least {length} tokens (or give a shorter length)", len(joined[0]))
        ids, labels = (one[: count * length].view(count, length) for one in joined)
    return [
        {"input_ids": a, "labels": b}
        for a, b in zip(ids.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
    ]


def put(model: nn.Module, names: Sequence[str], rows: Rows) -> None:
    """Fill these tensors of a model, row by row."""
    named = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in names:
            tensor = named[name]
            flat = tensor.detach().view(as_rows(tensor.shape))
            for start, stop in row_blocks(tensor.shape):
                flat[start:stop] = rows(name, start, stop).to(flat.device, flat.dtype)


def input_statistics(model: nn.Module, batches: Sequence[dict[str, Tensor]]) -> dict[str, Inputs]:
    """Of every linear layer that ran, by the name of its weight; tokens of all batches count alike."""
    sums: dict[str, list[Any]] = {}
    handles = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).double()
            held = sums.setdefault(name, [0, 0.0, 0.0])
            held[0] += len(x)
            held[1] = held[1] + x.sum(0)
            held[2] = held[2] + x.square().sum(0)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(watch(f"{name}.weight")))
    try:
        for _ in _run(model, batches):
            pass
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Inputs((total / count).cpu(), squares.sqrt().cpu())
        for name, (count, total, squares) in sums.items()
    }


def is_decoder(model: Any) -> bool:
    """Whether the model gives logits of a next token."""
    return bool(model.config.architectures) and model.config.architectures[0].endswith(
        ("CausalLM", "LMHeadModel")
    )


def reference(model: Any, batches: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor | None]]:
    """What the output is compared with, batch by batch: a decoder's five largest logits and where they are; else the
    last layer's hidden states."""
    found: list[tuple[Tensor, Tensor | None]] = []
    for outputs in _run(model, batches):
        if is_decoder(model):
            top = outputs.logits.float().topk(_TOP, dim=-1)
            found.append((top.values.cpu(), top.indices.cpu()))
        else:
            found.append((outputs.hidden_states[-1].float().cpu(), None))
    return found


def output_change(
    model: Any, batches: Sequence[dict[str, Tensor]], wanted: Sequence[tuple[Tensor, Tensor | None]]
) -> float:
    """Mean square difference of the five logits, or mean absolute difference of the hidden states."""
    total, count = 0.0, 0
    for outputs, (values, where) in zip(_run(model, batches), wanted, strict=True):
        if where is not None:
            apart = (outputs.logits.float().cpu().gather(-1, where) - values).square()
        else:
            apart = (outputs.hidden_states[-1].float().cpu() - values).abs()
        total, count = total + float(apart.double().sum()), count + apart.numel()
    return total / count


def mean_loss(model: Any, batches: Sequence[dict[str, Tensor]]) -> float:
    """The model's own loss, averaged over batches by their number of sequences."""
    total = sum(
        float(o.loss) * len(b["input_ids"]) for o, b in zip(_run(model, batches), batches, strict=True)
    )
    return total / sum(len(batch["input_ids"]) for batch in batches)


def _run(model: Any, batches: Sequence[dict[str, Tensor]]) -> Iterator[Any]:
    device = next(model.parameters()).device
    hidden = not is_decoder(model)
    with torch.no_grad():
        for batch in batches:
            given = {name: value.to(device) for name, value in batch.items()}
            if hidden:
                given.pop("labels")
            yield model(**given, output_hidden_states=hidden)
