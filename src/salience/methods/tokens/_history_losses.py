"""Losses of every response token under a history model, kept by the content of the sample that they belong to."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.errors import ParameterError, StructureError, TrainingError
from salience.core.loop import evaluating
from salience.core.losses import IGNORE, token_losses

_FORMAT = "salience.history_losses.1"
# what a sample of text consists of; anything else (pixels) would be missing from its key
_TEXT = {
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "cache_position",
    "use_cache",
}


class HistoryLosses:
    """The negative log likelihoods of the response tokens of many samples, found by the sample's content.

    A sample's key is a hash of its attended token ids and labels, so neither its place in the data set, nor its
    batch, nor its padding matters, and losses of other data, another template or another truncation are not found.

    Attributes:
        about (dict[str, str]): the manifest: "model" (its architecture and size), "tokenizer" (a digest of it); what
            is not known is absent.

    Example:
        >>> losses = history_losses(model, trainer.get_train_dataloader())  # doctest: +SKIP
        >>> losses.save("base.safetensors")  # doctest: +SKIP
    """

    def __init__(self, about: Mapping[str, str] | None = None) -> None:
        self.about = dict(about or {})
        self._losses: dict[bytes, Tensor] = {}

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, inputs: Mapping[str, Any], losses: Tensor, active: Tensor) -> None:
        """Keep the losses of a batch.

        Args:
            inputs (Mapping[str, Tensor]): `input_ids`, `labels` and perhaps `attention_mask`, [B, T] each.
            losses (Tensor): [B, T], column t is the loss of token t.
            active (Tensor): [B, T] bool, the response tokens.
        """
        kept = losses.detach().float().cpu()
        for key, row, mask in zip(sample_keys(inputs), kept, active.cpu()):
            if bool(mask.any()):
                self._losses.setdefault(key, row[mask].clone())

    def find(self, inputs: Mapping[str, Any]) -> Tensor:
        """The losses of a batch, [B, T] fp32 on the device of its labels; 0 where a token is no response.

        Raises:
            TrainingError: if a sample with a response is missing, or has another number of response tokens.
        """
        labels = inputs["labels"].cpu()
        active = response_tokens(labels)
        found = torch.zeros(labels.shape)
        for index, (key, mask) in enumerate(zip(sample_keys(inputs), active)):
            wanted = int(mask.sum())
            if not wanted:
                continue
            values = self._losses.get(key)
            if values is None:
                raise TrainingError(
                    f"history losses must cover every training sample, got none for row {index} of a batch: were "
                    "they measured on other data, with another tokenizer, template or max_length?"
                )
            if len(values) != wanted:
                raise TrainingError(
                    f"history losses of a sample must have its {wanted} response tokens, got {len(values)}"
                )
            found[index, mask] = values
        return found.to(inputs["labels"].device)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as three tensors: keys [N, 16] uint8, offsets [N + 1] int64, values [sum of lengths] fp32."""
        lengths = torch.tensor([0, *(len(row) for row in self._losses.values())])
        rows = list(self._losses.values())
        keys = (
            torch.frombuffer(bytearray(b"".join(self._losses)), dtype=torch.uint8) if rows else torch.empty(0)
        )
        return {
            "keys": keys.to(torch.uint8).view(-1, 16),
            "offsets": lengths.cumsum(0),
            "values": torch.cat(rows) if rows else torch.empty(0),
        }

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what `tensors` returned.

        Raises:
            ParameterError: if the tensors do not belong together or a loss is not finite.
        """
        keys, offsets, values = tensors["keys"], tensors["offsets"].tolist(), tensors["values"].float()
        if len(offsets) != len(keys) + 1 or offsets[-1] != len(values):
            raise ParameterError(
                f"history losses must have one offset more than keys and end at the last value, got {len(keys)} "
                f"keys, {len(offsets)} offsets up to {offsets[-1]} and {len(values)} values"
            )
        if not bool(values.isfinite().all()):
            raise ParameterError("history losses must be finite, got inf or nan")
        for key, start, stop in zip(keys, offsets, offsets[1:]):
            self._losses[key.numpy().tobytes()] = values[start:stop].clone()

    def digest(self) -> str:
        """A hash of all keys and losses, whatever their order."""
        rows = sorted(key + row.numpy().tobytes() for key, row in self._losses.items())
        return hashlib.blake2b(b"".join(rows), digest_size=16).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, under a temporary name first.

        Returns:
            Path: the file.
        """
        from safetensors.torch import save_file

        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        metadata = {"format": _FORMAT, "about": json.dumps(self.about)}
        save_file(self.tensors(), str(temporary), metadata=metadata)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str = "history",
        wanted: str = "'base', 'ema' or a file of history losses",
    ) -> HistoryLosses:
        """Read a file, or all `*.safetensors` files of a folder: the parts that several workers wrote.

        Args:
            path (str | Path): file or folder.
            name (str): the parameter that named it, for errors.
            wanted (str): what that parameter may be, for errors.

        Raises:
            ParameterError: if there is none, or it is of another kind, or parts come from different models or are
                missing.
        """
        from safetensors import safe_open

        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ParameterError(f"{name} must be {wanted}, got {str(path)!r}")
        losses = cls()
        for index, file in enumerate(files):
            with safe_open(str(file), framework="pt") as stored:
                metadata = stored.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ParameterError(f"{name} must be a file of {name} losses, got {str(file)!r}")
                about = json.loads(metadata["about"])
                if index == 0:
                    losses.about = about
                elif about != losses.about:
                    raise ParameterError(
                        f"{name} must come from one model, got {about} in {file.name} and {losses.about} before"
                    )
                losses.take({field: stored.get_tensor(field) for field in ("keys", "offsets", "values")})
        parts = int(losses.about.get("parts", len(files)))
        if len(files) != parts:
            raise ParameterError(f"{name} must be whole, got {len(files)} of {parts} parts in {str(path)!r}")
        return losses

    def check(self, about: Mapping[str, str], *, name: str = "history") -> None:
        """Compare the manifest with what is known of this run.

        Raises:
            ParameterError: if both sides know something and disagree.
        """
        for field in sorted(self.about.keys() & about.keys()):
            if self.about[field] != about[field]:
                raise ParameterError(
                    f"{name} must be measured with this run's {field} {about[field]!r}, got {self.about[field]!r}"
                )

    def gather(self) -> None:
        """Let every rank have the losses of all ranks."""
        if not distributed.active():
            return
        mine = self.tensors()
        sizes = torch.tensor([[len(mine["keys"]), len(mine["values"])]])
        every = distributed.all_gather(sizes)
        padded = {
            name: _padded(mine[name], int(most)) for name, most in zip(("keys", "values"), every.amax(0))
        }
        lengths = distributed.all_gather(_padded(mine["offsets"].diff(), int(every[:, 0].max()))[None])
        keys, values = (distributed.all_gather(padded[name][None]) for name in ("keys", "values"))
        for rank, (count, total) in enumerate(every.tolist()):
            offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths[rank, :count].cumsum(0)))
            self.take({"keys": keys[rank, :count], "offsets": offsets, "values": values[rank, :total]})


def history_losses(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tokenizer: Any = None,
    total: int | None = None,
) -> HistoryLosses:
    """Measure the response tokens of a data set under a model, in eval mode and without graph.

    With several processes each may be given other batches; the result of each is then what it was given.

    Args:
        model (nn.Module): the history model: usually the base model, before any training.
        batches (Iterable[Mapping]): collated batches with `input_ids` and `labels`: a Trainer's
            `get_train_dataloader()`, or `datasets.Dataset` rows put through its collator.
        tokenizer (Any): if given, its digest goes into the manifest.
        total (int | None): number of batches, for the progress bar on a terminal.

    Returns:
        HistoryLosses: by content of each sample.
    """
    losses = HistoryLosses(manifest(model, tokenizer))
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in shown(batches, total):
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            losses.add(inputs, *forward_losses(model, inputs))
    return losses


def forward_losses(call: Callable[..., Any], inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """One forward pass and the losses of its tokens, [B, T] fp32, and which are active [B, T]."""
    outputs = call(**{name: value for name, value in inputs.items() if name != "labels"})
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs.logits
    return token_losses(logits, inputs["labels"])


def attended_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """[B, T] bool: the attention mask, or without one all tokens up to the last label of each row.

    Raises:
        StructureError: if the attention mask is not [B, T].
    """
    labels, mask = inputs["labels"], inputs.get("attention_mask")
    if mask is None:
        return (labels != IGNORE).flip(-1).cumsum(-1).flip(-1) > 0
    if not isinstance(mask, Tensor) or mask.shape != labels.shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise StructureError(f"attention_mask must be {list(labels.shape)} like the labels, got {got}")
    return mask.bool()


def response_tokens(labels: Tensor) -> Tensor:
    """[B, T] bool: the tokens that have a loss; nothing predicts the first one of a row."""
    response = labels != IGNORE
    response[:, :1] = False
    return response


def sample_keys(inputs: Mapping[str, Any]) -> list[bytes]:
    """16 bytes for each sample: a hash of its attended token ids and of their labels.

    Raises:
        StructureError: if samples hold more than text.
    """
    foreign = sorted(k for k, v in inputs.items() if isinstance(v, Tensor) and k not in _TEXT)
    if foreign or "input_ids" not in inputs:
        raise StructureError(
            f"history losses can be stored for text alone, got samples with {foreign or 'no input_ids'}: use a LoRA "
            "model or history='ema', which measure them while training"
        )
    rows = zip(*(t.cpu() for t in (inputs["input_ids"], inputs["labels"], attended_tokens(inputs))))
    return [
        hashlib.blake2b(torch.stack((ids, labels))[:, mask].numpy().tobytes(), digest_size=16).digest()
        for ids, labels, mask in rows
    ]


def manifest(model: nn.Module, tokenizer: Any = None) -> dict[str, str]:
    """What must agree between the model that was measured and the one that trains."""
    about = {}
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        text = config.get_text_config()
        size = (getattr(text, name, "?") for name in ("num_hidden_layers", "hidden_size"))
        about["model"] = f"{text.model_type} of {' layers, width '.join(map(str, size))}"
    if callable(getattr(tokenizer, "get_vocab", None)):
        words = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        about["tokenizer"] = hashlib.blake2b(words, digest_size=8).hexdigest()
    return about


def _padded(rows: Tensor, length: int) -> Tensor:
    out = rows.new_zeros(length, *rows.shape[1:])
    out[: len(rows)] = rows
    return out


def shown(
    batches: Iterable[Mapping[str, Any]], total: int | None = None, says: str = "history losses"
) -> Iterable[Mapping[str, Any]]:
    """The batches, with a progress bar if the process has a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal or distributed.rank() != 0
    return track(batches, says, total=total, console=console, disable=hidden)
