"""Where the losses of a text-only reference come from, and how they are measured once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience.core import distributed
from salience.core.errors import ConflictError, ParameterError, require
from salience.core.files import write_json_atomic
from salience.core.loop import Loop, evaluating
from salience.core.losses import IGNORE
from salience.core.part import Site
from salience.hosts._tree import unwrap
from salience.methods.tokens._history_losses import (
    HistoryLosses,
    manifest,
    response_tokens,
    sample_keys,
    shown,
)
from salience.methods.tokens._history_sources import HistorySource, StoredLosses, adapters_off, base_is_frozen
from salience.methods.tokens._reference_text import PictureTokens, Texts, first_token, text_parameters

_WANTED = "'base', a checkpoint folder, or a file or folder of reference losses"
_COLUMNS = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0, "position_ids": 1}
_FINGERPRINT_ROWS = 64


class OwnText(HistorySource):
    """The frozen language part of the model that trains, run on the text of each batch, adapters off."""

    def __init__(self, pictures: PictureTokens) -> None:
        super().__init__()
        self._pictures = pictures

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        self.passes += 1
        texts = Texts.of(inputs, self._pictures)
        with evaluating(loop.model), torch.no_grad(), _base(loop.model):
            return texts.put_back(texts.losses(loop.model, first_token(loop.model)))


class LoadedText(HistorySource):
    """Another causal language model, run on the text of each batch. It moves to the batch's device."""

    def __init__(self, reference: nn.Module, pictures: PictureTokens) -> None:
        super().__init__()
        self.reference = reference.requires_grad_(False)
        self._pictures = pictures

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        self.passes += 1
        texts = Texts.of(inputs, self._pictures)
        self.reference.to(texts.ids.device)
        _check_ids(texts, self.reference)
        with evaluating(self.reference), torch.no_grad():
            return texts.put_back(texts.losses(self.reference, first_token(self.reference)))


class StoredText(StoredLosses):
    """Losses measured beforehand: read from files, or of the training set's text before the first step."""

    def __init__(self, pictures: PictureTokens, read: HistoryLosses | None = None) -> None:
        super().__init__(read, name="reference")
        self._pictures = pictures

    def measure(self, losses: HistoryLosses, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        _add(losses, Texts.of(inputs, self._pictures), model)

    def losses(self, loop: Loop, inputs: Mapping[str, Any]) -> Tensor:
        texts = Texts.of(inputs, self._pictures)
        return texts.put_back(self._losses.find(texts.keyed())[:, 1:])


def reference_source(reference: str, site: Site) -> HistorySource:
    """The source that a `reference` names, checked against the model that trains.

    Raises:
        ParameterError: if it names nothing, or was made for another tokenizer or vocabulary.
        ConflictError: if the base would have to be measured on a stream.
    """
    model, pictures, tokenizer = site.model, PictureTokens.of(site.model), _tokenizer(site.trainer)
    if reference == "base":
        if text_is_frozen(model):
            return OwnText(pictures)
        if site.trainer is not None and not hasattr(site.trainer.train_dataset, "__len__"):
            raise ConflictError(
                "reference must be a checkpoint or a file when the language part trains on a stream, got 'base': "
                "use LoRA, or measure the data with reference_losses"
            )
        return StoredText(pictures)
    if (Path(reference) / "config.json").is_file():
        return LoadedText(_loaded(reference, model, tokenizer), pictures)
    read = HistoryLosses.load(reference, name="reference", wanted=_WANTED)
    require(read.about.get("kind") == "reference", "reference", _WANTED, reference)
    read.check(_about(model, pictures, tokenizer), name="reference")
    return StoredText(pictures, read)


def text_is_frozen(model: nn.Module) -> bool:
    """Whether the language part stays what it is while the model trains, adapters aside."""
    text = dict(text_parameters(model))
    trains = any(parameter.requires_grad for parameter in text.values())
    return not trains or base_is_frozen(model, text)


def reference_losses(
    model: nn.Module,
    dataset: Any,
    folder: str | Path,
    *,
    reference: nn.Module | str = "base",
    tokenizer: Any = None,
    collate: Callable[[list[Any]], Mapping[str, Any]] | None = None,
    batch_size: int = 8,
    part_size: int = 4096,
) -> Path:
    """Measure the captions of a data set under a text-only reference, once, for `PRIOR(reference=folder)`.

    Works through contiguous parts of the data and writes a file for each; what exists is skipped, so a killed run
    goes on where it was. Under torchrun rank r does parts r, r + world, ...; each has its own copy of the model.

    Args:
        model (nn.Module): the model that will be trained: says which tokens belong to pictures.
        dataset (Any): rows by index, with a length: `input_ids` and `labels`, or what `collate` makes them from.
        folder (str | Path): for the parts and a manifest; one for each reference and data set.
        reference (nn.Module | str): a causal language model with the same tokenizer, a folder with its checkpoint,
            or "base": the language part of `model` (adapters off).
        tokenizer (Any): if given, its digest goes into the manifest and is compared when training starts.
        collate (Callable | None): makes a batch of a list of rows: usually the Trainer's `data_collator`. None pads.
        batch_size (int): rows in a forward pass, >= 1.
        part_size (int): rows in a file, >= 1: what a kill can cost.

    Returns:
        Path: the folder; with a process group, after all ranks are done.

    Raises:
        ParameterError: if the folder holds parts of another reference or of other data, if rows have no labels, or
            if the reference has another tokenizer.
    """
    sized = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    require(sized and len(dataset) > 0, "dataset", "rows with a length and indices", type(dataset).__name__)
    require(batch_size >= 1, "batch_size", ">= 1", batch_size)
    require(part_size >= 1, "part_size", ">= 1", part_size)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    reader = model if isinstance(reference, str) else reference
    if isinstance(reference, str) and reference != "base":
        reader = _loaded(reference, model, tokenizer).to(next(model.parameters()).device)
    elif reader is not model:
        _check_reference(reader, None, model, None)
    pictures, rows = PictureTokens.of(model), dataset
    if collate is None and hasattr(dataset, "select_columns"):
        rows = dataset.select_columns([name for name in _COLUMNS if name in dataset.column_names])
    batch_of = collate or _padded
    parts = [range(start, min(start + part_size, len(rows))) for start in range(0, len(rows), part_size)]
    about = _about(model, pictures, tokenizer) | {
        "reference": manifest(reader).get("model", type(reader).__name__),
        "weights": _digest(reader, adapters=reader is not model),
        "data": _fingerprint(rows, batch_of, pictures),
        "parts": str(len(parts)),
    }
    folder = Path(folder)
    _claim(folder, about)
    device, (rank, world) = next(reader.parameters()).device, _share()
    own = _base(reader) if reader is model else nullcontext()
    with evaluating(reader), torch.no_grad(), own:
        for index in range(rank, len(parts), world):
            path = folder / f"part-{index:05d}-of-{len(parts):05d}.safetensors"
            if path.is_file():
                continue
            for left in folder.glob(f".{path.name}.*"):
                left.unlink()  # of a run that was killed
            losses = HistoryLosses(about)
            batches = _batches(rows, parts[index], batch_size, batch_of, sort=collate is None)
            total = -(-len(parts[index]) // batch_size)
            for batch in shown(batches, total, f"reference losses, part {index + 1} of {len(parts)}"):
                texts = Texts.of(
                    {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}, pictures
                )
                _check_ids(texts, reader)
                _add(losses, texts, reader)
            losses.save(path)
    distributed.all_reduce_sum(torch.zeros(1))  # a barrier
    return folder


def _add(losses: HistoryLosses, texts: Texts, model: nn.Module) -> None:
    keyed = texts.keyed()
    measured = torch.nn.functional.pad(texts.losses(model, first_token(model)), (1, 0))
    losses.add(keyed, measured, response_tokens(keyed["labels"]))


def _base(model: nn.Module) -> AbstractContextManager[None]:
    """The model without its adapters, where taking them away leaves the base."""
    return adapters_off(model) if base_is_frozen(model, dict(text_parameters(model))) else nullcontext()


def _loaded(folder: str, model: nn.Module, tokenizer: Any) -> nn.Module:
    from salience.hosts.checkpoints import load_model

    reference, own = load_model(folder, kind="causal")
    _check_reference(reference, own, model, tokenizer)
    made: nn.Module = reference
    return made


def _check_reference(reference: nn.Module, own: Any, model: nn.Module, tokenizer: Any) -> None:
    """The same token ids must mean the same; where no tokenizers tell, vocabularies must be of one size."""
    if own is not None and tokenizer is not None:
        words, ours = own.get_vocab(), tokenizer.get_vocab()
        by_id = {index: word for word, index in ours.items()}
        differ = [
            word
            for word, index in words.items()
            if ours.get(word, index) != index or by_id.get(index, word) != word
        ]
        if differ:
            raise ParameterError(
                f"reference must have the model's tokenizer, got one in which {len(differ)} tokens differ "
                f"({sorted(differ)[0]!r} for one)"
            )
        return
    size, wanted = _vocabulary(reference), _vocabulary(model)
    require(
        size == wanted,
        "reference",
        f"a model with the same vocabulary of {wanted} tokens",
        f"one with {size}",
    )


def _check_ids(texts: Texts, reference: nn.Module) -> None:
    size, largest = _vocabulary(reference), int(texts.ids.max())
    if size is not None and largest >= size:
        raise ParameterError(
            f"reference must know every token of the text, got token {largest} with {size} tokens"
        )


def _vocabulary(model: nn.Module) -> int | None:
    config: Any = getattr(unwrap(model), "config", None)
    return config.get_text_config().vocab_size if hasattr(config, "get_text_config") else None


def _about(model: nn.Module, pictures: PictureTokens, tokenizer: Any) -> dict[str, str]:
    about = {"kind": "reference", "vocabulary": str(_vocabulary(model))}
    about["image tokens"] = ", ".join(map(str, (*pictures.places, *pictures.around))) or "none"
    return about | {name: value for name, value in manifest(model, tokenizer).items() if name == "tokenizer"}


def _tokenizer(trainer: Any) -> Any:
    processor = getattr(trainer, "processing_class", None)
    made = getattr(processor, "tokenizer", processor)  # a processor of pictures and text holds one
    return made if callable(getattr(made, "get_vocab", None)) else None


def _digest(model: nn.Module, *, adapters: bool) -> str:
    """A hash of all weights that text runs through; without `adapters`, of those that stay when they are off."""
    prefix = getattr(getattr(model, "base_model", None), "prefix", None)
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in text_parameters(model):
        if adapters or not prefix or prefix not in name:
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _fingerprint(
    rows: Any, batch_of: Callable[[list[Any]], Mapping[str, Any]], pictures: PictureTokens
) -> str:
    """Of the data: its length, and the text of rows spread over it (reading all would decode every picture)."""
    digest = hashlib.blake2b(str(len(rows)).encode(), digest_size=16)
    for index in range(0, len(rows), -(-len(rows) // _FINGERPRINT_ROWS)):
        for key in sample_keys(Texts.of(batch_of([rows[index]]), pictures).keyed()):
            digest.update(key)
    return digest.hexdigest()


def _claim(folder: Path, about: dict[str, str]) -> None:
    path = folder / "manifest.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(name for name in found.keys() | about.keys() if found.get(name) != about.get(name))
        if differ:
            raise ParameterError(
                f"folder must hold parts of this reference and data, got {folder} with other {', '.join(differ)}: "
                "choose another folder"
            )
    write_json_atomic(path, about)


def _share() -> tuple[int, int]:
    if distributed.active():
        return distributed.rank(), distributed.size()
    # under torchrun without a process group
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def _batches(
    rows: Any, part: range, size: int, batch_of: Callable[[list[Any]], Mapping[str, Any]], *, sort: bool
) -> Iterator[Mapping[str, Any]]:
    if not sort:
        yield from (batch_of([rows[i] for i in part[at : at + size]]) for at in range(0, len(part), size))
        return
    # losses are found by content: the order is free, and like lengths together need less padding
    read = sorted((_labelled(rows[index]) for index in part), key=lambda row: len(row["input_ids"]))
    yield from (batch_of(read[at : at + size]) for at in range(0, len(read), size))


def _padded(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    rows = [{"attention_mask": torch.ones(len(_labelled(row)["input_ids"])), **row} for row in rows]
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.as_tensor(row[name]).long() for row in rows], batch_first=True, padding_value=fill
        )
        for name, fill in _COLUMNS.items()
        if name in rows[0]
    }


def _labelled(row: Mapping[str, Any]) -> Mapping[str, Any]:
    if "input_ids" not in row or "labels" not in row:
        raise ParameterError(
            f"dataset must have rows with input_ids and labels, got {sorted(row)}: give the Trainer's collate"
        )
    return row
