"""A causal language model that scores documents: where it comes from, and what its logits say of every token.

The logits of a batch are never held whole: where the head is a plain projection of the hidden states, it is applied
to a slice of tokens at a time. Whether it is one is seen by comparing, once, with what the model itself makes of
them; a model that scales or caps its logits is asked for all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salience.core.documents import Documents
from salience.core.errors import ParameterError, require
from salience.core.losses import IGNORE
from salience.core.token_scores import row_means
from salience.hosts import checkpoints
from salience.hosts.transformers import loss_kind, structure

# [N, V] fp32 logits, [N] tokens that came -> [N]
Measure = Callable[[Tensor, Tensor], Tensor]

_ELEMENTS = 1 << 25  # logits held at a time: 128 MiB in fp32
_LONGEST = 4096


def scoring_model(model: Any, tokenizer: Any, *, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and the tokenizer that a scoring method was given, loaded if need be.

    Args:
        model (Any): a checkpoint folder or hub id, a causal language model of transformers, or a pair of it and its
            tokenizer.
        tokenizer (Any): the tokenizer, a folder or id of it, or None: the model's own.
        device (str): for a model that is loaded here.
        dtype (str): likewise.

    Raises:
        ParameterError: if there is none, or it is no causal language model.
    """
    wanted = "a causal language model, a checkpoint folder or a hub id"
    if isinstance(model, tuple | list) and len(model) == 2:
        model, tokenizer = model
    require(model is not None, "model", wanted, model)
    if isinstance(model, str | Path):
        place = checkpoints.check_device(device)
        loaded, own = checkpoints.load_model(str(model), kind="causal", dtype=dtype, device=place)
        model, tokenizer = loaded, own if tokenizer is None else tokenizer
    if not isinstance(model, torch.nn.Module):
        raise ParameterError(f"model must be {wanted}, got {type(model).__name__}")
    kind = loss_kind(model)
    require(kind == "causal", "model", f"{wanted} (AutoModelForCausalLM)", f"{type(model).__name__}: {kind}")
    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", "") or None
    if tokenizer is None:
        raise ParameterError(
            f"tokenizer must be given with a {type(model).__name__} that was not loaded from a folder, got none: "
            "model=(model, tokenizer)"
        )
    if isinstance(tokenizer, str | Path):
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(tokenizer))
        except (OSError, ValueError) as error:
            raise ParameterError(f"tokenizer must be one that can be loaded, got {tokenizer}") from error
    checkpoints.check_tokenizer(model, tokenizer)
    return model, tokenizer


def longest(model: Any, asked: int | None) -> int:
    """Tokens of a document that are scored: what is asked for, else the model's positions, at most 4096.

    Raises:
        ParameterError: if more is asked than the model has positions for.
    """
    limit = checkpoints.check_positions(model, asked)
    return limit if asked is not None and limit is not None else min(limit or _LONGEST, _LONGEST)


def fingerprint(model: Any) -> str:
    """The same for the same weights and architecture: a hash of both."""
    found = hashlib.sha256(type(model).__name__.encode())
    for name, value in model.state_dict().items():
        found.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:32]


def vocabulary(tokenizer: Any) -> str:
    """The same for tokenizers that know the same tokens by the same numbers: a hash."""
    words = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return hashlib.sha256(repr(words).encode("utf-8", "replace")).hexdigest()[:16]


class TokenMeter:
    """What a model's predictions say of the tokens of a batch.

    Example:
        >>> TokenMeter(model)(ids, labels, {"loss": nll})["loss"]  # doctest: +SKIP
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._head: Any = getattr(structure(model).head, "module", None)
        self._plain: bool | None = None if self._head is not None else False

    @torch.no_grad()
    def __call__(self, ids: Tensor, labels: Tensor, measures: Mapping[str, Measure]) -> dict[str, Tensor]:
        """Measures of every token that is asked for.

        Args:
            ids (Tensor): [B, T] int64, padded on the right. No mask is needed: no token sees what is behind it.
            labels (Tensor): [B, T] int64 unshifted, -100 where nothing is asked. The first column has no prediction.
            measures (Mapping): name -> function of logits and tokens.

        Returns:
            dict[str, Tensor]: [B, T] fp32 each, NaN where nothing is asked.
        """
        active = labels[:, 1:] != IGNORE
        targets = labels[:, 1:][active]
        found = {name: torch.full(active.shape, torch.nan, device=ids.device) for name in measures}
        rows, project = self._rows(ids, active)
        step = max(1, _ELEMENTS // max(1, self._width()))
        parts: dict[str, list[Tensor]] = {name: [] for name in measures}
        for start in range(0, len(targets), step):
            logits = project(rows[start : start + step]).float()
            for name, measure in measures.items():
                parts[name].append(measure(logits, targets[start : start + step]).float())
        for name, values in parts.items():
            if values:
                found[name][active] = torch.cat(values)
        return {
            name: torch.nn.functional.pad(value, (1, 0), value=torch.nan) for name, value in found.items()
        }

    def means(self, batch: Documents, measure: Measure) -> Tensor:
        """The mean of a measure over the tokens of each document that are asked for: [B] float64, NaN without one."""
        values = self(batch.ids, batch.labels, {"value": measure})["value"]
        return row_means(values, (batch.labels != IGNORE) & ~values.isnan())

    def _width(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    def _rows(self, ids: Tensor, active: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """[N, C] hidden states and the head, or [N, V] logits and nothing to do."""
        if self._plain is not False:
            seen: list[Tensor] = []

            def shorten(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
                seen.append(args[0])
                return (args[0][:, -1:], *args[1:])

            hook = self._head.register_forward_pre_hook(shorten)
            try:
                last = self.model(input_ids=ids, use_cache=False).logits
            finally:
                hook.remove()
            # of several calls, or rows of another form, nothing is known
            if self._plain is None:
                usual = len(seen) == 1 and seen[0].shape[:2] == (len(active), ids.shape[1])
                self._plain = usual and torch.equal(last, self._head(seen[0][:, -1:]))
            if self._plain:
                return seen[0][:, :-1][active], self._head
        logits = self.model(input_ids=ids, use_cache=False).logits
        return logits[:, :-1][active], lambda rows: rows
