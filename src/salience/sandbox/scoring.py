"""Numbers for models of the sandbox: loss on texts, greedy answers, and how many of them are right."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from salience.core.errors import require

if TYPE_CHECKING:
    from torch.nn import Module


def text_loss(
    model: Module, tokenizer: Any, texts: Sequence[str], *, windows: int = 96, length: int = 128
) -> float:
    """Mean loss of a causal language model on texts.

    Args:
        model (Module): called with `input_ids` and `labels`, as models of transformers are.
        tokenizer (Any): its tokenizer.
        texts (Sequence[str]): joined with an end token after each and cut into windows.
        windows (int): how many windows are read, evenly spaced over the texts.
        length (int): tokens of a window; the first is not predicted.

    Returns:
        float: nats per token.
    """
    import torch

    require(windows >= 1, "windows", ">= 1", windows)
    require(length >= 2, "length", ">= 2", length)
    ids = [[*one, tokenizer.eos_token_id] for one in tokenizer(list(texts), verbose=False)["input_ids"]]
    stream = torch.tensor([token for one in ids for token in one])
    require(len(stream) >= length, "texts", f"at least {length} tokens long", len(stream))
    starts = torch.linspace(0, len(stream) - length, windows).long()
    device, training, total = next(model.parameters()).device, model.training, 0.0
    model.eval()
    try:
        with torch.no_grad():
            for few in starts.split(32):
                rows = stream[few[:, None] + torch.arange(length)].to(device)
                total += float(model(input_ids=rows, labels=rows, use_cache=False).loss) * len(few)
    finally:
        model.train(training)
    return total / windows


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, new_tokens: int = 12, batch_size: int = 100
) -> list[str]:
    """Greedy continuations of prompts, up to the end token.

    Args:
        model (Any): a causal language model of transformers, or peft's wrapper of one.
        tokenizer (Any): its tokenizer; its settings are not changed.
        prompts (Sequence[str]): padded on the left to the longest of a batch.
        new_tokens (int): at most so many tokens are generated.
        batch_size (int): prompts at a time.

    Returns:
        list[str]: one text for each prompt, without special tokens.
    """
    import torch
    from transformers import GenerationConfig

    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    device, training = next(model.parameters()).device, model.training
    found: list[str] = []
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(prompts), batch_size):
                rows = tokenizer(list(prompts[start : start + batch_size]))["input_ids"]
                longest = max(map(len, rows))
                ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(row)) + row for row in rows])
                mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
                made = model.generate(
                    input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
                )
                found.extend(tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True))
    finally:
        model.train(training)
    return found


def exact_match(
    model: Any, tokenizer: Any, rows: Iterable[Mapping[str, Any]], *, batch_size: int = 100
) -> dict[str, float]:
    """The share of questions that a model answers without any error, decoding greedily.

    Args:
        model (Any): a causal language model of transformers, or peft's wrapper of one.
        tokenizer (Any): its tokenizer.
        rows (Iterable[Mapping]): with prompt, completion and task, such as `instruction_world().test`.
        batch_size (int): prompts at a time.

    Returns:
        dict[str, float]: "all", then each task, in [0, 1].
    """
    asked = list(rows)
    require(len(asked) > 0, "rows", "at least one", asked)
    longest = max(len(tokenizer(row["completion"])["input_ids"]) for row in asked)
    predictions = answers(
        model, tokenizer, [row["prompt"] for row in asked], new_tokens=longest + 1, batch_size=batch_size
    )
    scored = score(predictions, asked)
    tasks = {
        name.removeprefix("exact."): value for name, value in scored.items() if name.startswith("exact.")
    }
    return {"all": scored["exact"], **tasks}


def score(predictions: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """How right predicted answers are.

    Args:
        predictions (Sequence[str]): one for each row; white space around an answer does not count.
        rows (Iterable[Mapping]): with completion (the right answer) and task.

    Returns:
        dict[str, float]: "exact" (share of answers right as a whole), "characters" (share of positions right,
        counted over the longer of both without white space), then "exact.<task>" for each task.
    """
    asked = list(rows)
    require(
        len(predictions) == len(asked), "predictions", f"one for each of {len(asked)} rows", len(predictions)
    )
    require(len(asked) > 0, "rows", "at least one", asked)
    exact: dict[str, list[bool]] = {}
    right = positions = 0
    for said, row in zip(predictions, asked):
        exact.setdefault(row["task"], []).append(said.strip() == row["completion"].strip())
        ours, theirs = "".join(said.split()), "".join(row["completion"].split())
        right += sum(a == b for a, b in zip(ours, theirs))
        positions += max(len(ours), len(theirs))
    return {
        "exact": sum(map(sum, exact.values())) / len(asked),
        "characters": right / max(positions, 1),
        **{f"exact.{task}": sum(exact[task]) / len(exact[task]) for task in sorted(exact)},
    }
