"""Gradients of single samples with respect to one layer of a model, and their projection to a few dimensions.

Of an adapted model the adapter's matrices of that layer are differentiated, of a plain one all of its matrices. No
other parameter takes part, so autograd keeps nothing below the layer. Samples of a batch do not touch each other, and
the gradient of a linear map is the sum over tokens of `output gradient x input`: it is taken for each sample apart
from one backward pass over the batch. Layers with other maps (fused experts) are run one sample at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError, require
from salience.core.loop import evaluating
from salience.core.losses import sample_losses, token_losses
from salience.hosts.transformers import structure

_BLOCK = 4096  # parameters that are projected together
_KEPT_BYTES = 256 << 20  # of sign matrices that are kept instead of being made again
_FIELDS = ("logits", "losses", "gradients")


@dataclass(frozen=True)
class SamplePass:
    """What one pass over a batch gave.

    Attributes:
        logits (Tensor): [B, T', V] without graph.
        losses (Tensor): [B] mean loss over the labels; 0 where there is none.
        gradients (Tensor): [B, P] fp32, of these losses.
    """

    logits: Tensor
    losses: Tensor
    gradients: Tensor


class LayerGradients:
    """Takes gradients of samples with respect to the matrices of one layer.

    Args:
        model (nn.Module): a causal language model, also one that sees images, bare or under PEFT.
        layer (int): of the decoder; negative ones count from the end.

    Attributes:
        path (str): of the layer in the model.
        parameters (int): P, how many numbers a gradient has.

    Raises:
        ParameterError: if there is no such layer.
        StructureError: if it holds no matrix.
    """

    def __init__(self, model: nn.Module, layer: int = -1) -> None:
        found = structure(model).layers
        inside = isinstance(layer, int) and -len(found) <= layer < len(found)
        require(inside, "layer", f"one of the {len(found)} layers, from 0 or from the end with -1", layer)
        place = found[layer]
        self.path = place.path
        self._model = model
        self._matrices = _matrices(place.module)
        if not self._matrices:
            raise StructureError(f"layer must hold matrices of floats, got none in {place.path}")
        self.parameters = sum(parameter.numel() for _, _, parameter in self._matrices)
        # one that is not a linear map (fused experts) has no sum over the tokens of a sample to take apart
        self._separable = all(_linear(module, parameter) for module, _, parameter in self._matrices)

    def __call__(self, batch: Mapping[str, Any]) -> SamplePass:
        """One forward and one backward pass in eval mode; the model is left as it was.

        Args:
            batch (Mapping): the model's inputs and labels [B, T], -100 where nothing is learned.

        Raises:
            StructureError: if the layer has to be run one sample at a time and the batch cannot be taken apart.
        """
        size = len(batch["labels"])
        found = self._pass(batch) if self._separable or size == 1 else None
        if found is not None:
            return found
        self._separable = False
        whole = all(isinstance(value, Tensor) and len(value) == size for value in batch.values())
        if not whole:
            raise StructureError(
                f"layer must be one whose maps are linear for a batch of several pictures, got {self.path}: "
                "give one sample at a time"
            )
        rows = [
            self._pass({name: value[row : row + 1] for name, value in batch.items()}) for row in range(size)
        ]
        parts = [row for row in rows if row is not None]
        return SamplePass(*(torch.cat([getattr(part, name) for part in parts]) for name in _FIELDS))

    def _pass(self, batch: Mapping[str, Any]) -> SamplePass | None:
        """None if the samples' gradients cannot be told apart."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"]
        seen: list[tuple[int, Tensor, Tensor]] = []
        with self._only(), evaluating(self._model), torch.enable_grad(), self._watching(seen):
            logits = self._model(**inputs, use_cache=False).logits
            own = logits[:, -labels.shape[1] :]
            losses, _ = sample_losses(*token_losses(own, labels))
            gradients = self._single(losses) if len(labels) == 1 else self._apart(losses, seen)
        return None if gradients is None else SamplePass(logits.detach(), losses.detach(), gradients)

    def _single(self, losses: Tensor) -> Tensor:
        parameters = [parameter for _, _, parameter in self._matrices]
        if not losses.requires_grad:
            return losses.new_zeros(1, self.parameters)
        found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        flat = [
            (torch.zeros_like(parameter) if one is None else one).flatten().float()
            for one, parameter in zip(found, parameters)
        ]
        return torch.cat(flat)[None]

    def _apart(self, losses: Tensor, seen: list[tuple[int, Tensor, Tensor]]) -> Tensor | None:
        size = len(losses)
        # a map that is given the tokens of all samples in one row does not tell whose they are
        if not all(given.dim() >= 3 and len(given) == size for _, given, _ in seen):
            return None
        pieces = [
            torch.zeros(size, parameter.numel(), device=losses.device) for _, _, parameter in self._matrices
        ]
        outputs = [output for _, _, output in seen]
        found = torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if outputs else ()
        for (index, given, _), gradient in zip(seen, found):
            if gradient is not None:
                module = self._matrices[index][0]
                rows, columns = gradient.flatten(1, -2).float(), given.flatten(1, -2).float()
                if not isinstance(module, nn.Linear):
                    rows, columns = columns, rows  # Conv1D holds its matrix the other way round
                pieces[index] += torch.einsum("bto,bti->boi", rows, columns).flatten(1)
        return torch.cat(pieces, 1)

    @contextmanager
    def _only(self) -> Iterator[None]:
        """Nothing but the chosen matrices has a gradient inside the block."""
        flags = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for _, _, parameter in self._matrices:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    @contextmanager
    def _watching(self, seen: list[tuple[int, Tensor, Tensor]]) -> Iterator[None]:
        def watch(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
                seen.append((index, args[0].detach(), output))

            return hook

        handles = [
            module.register_forward_hook(watch(index))
            for index, (module, _, parameter) in enumerate(self._matrices)
            if _linear(module, parameter)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class RandomSigns:
    """Projects rows by a matrix of random signs that is never stored as a whole.

    It is made in blocks from a seed, on the device of the rows: the same on every machine with such a device.

    Args:
        dim (int): d, how many numbers are left of a row, >= 1.
        seed (int): >= 0.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        require(isinstance(dim, int) and dim >= 1, "dim", ">= 1", dim)
        require(isinstance(seed, int) and seed >= 0, "seed", ">= 0", seed)
        self.dim, self.seed = dim, seed
        self._kept: dict[tuple[int, int, torch.device], Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows [B, P] -> [B, d]`, scaled so that lengths stay as they are on average."""
        projected = torch.zeros(len(rows), self.dim, device=rows.device)
        for block, part in enumerate(rows.float().split(_BLOCK, dim=1)):
            projected += part @ self._signs(block, part.shape[1], rows.device)
        return projected / self.dim**0.5

    def _signs(self, block: int, size: int, device: torch.device) -> Tensor:
        key = (block, size, device)
        if key in self._kept:
            return self._kept[key]
        generator = torch.Generator(device).manual_seed((self.seed * 1_000_003 + block) % (1 << 63))
        drawn = torch.randint(
            256, (-(-size * self.dim // 8),), dtype=torch.uint8, device=device, generator=generator
        )
        bits = drawn[:, None] >> torch.arange(8, dtype=torch.uint8, device=device) & 1
        signs = bits.flatten()[: size * self.dim].view(size, self.dim).float() * 2 - 1
        if signs.nbytes * (len(self._kept) + 1) <= _KEPT_BYTES:
            self._kept[key] = signs
        return signs


def unit_rows(rows: Tensor) -> Tensor:
    """Rows [B, d] brought to length 1; a row that is not finite becomes 0 as a whole, and 0 stays 0."""
    rows = torch.where(rows.isfinite().all(-1, keepdim=True), rows, torch.zeros_like(rows))
    return nn.functional.normalize(rows, dim=-1)


def _matrices(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Module, name and matrix: those of adapters where there are any, else all."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    roots = [module for module in layer.modules() if isinstance(module, BaseTunerLayer)]
    base = {id(p) for root in roots for p in root.get_base_layer().parameters()}
    found = []
    for root in roots or [layer]:
        for module in root.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() >= 2 and parameter.is_floating_point() and id(parameter) not in base:
                    found.append((module, name, parameter))
    once = {id(parameter): (module, name, parameter) for module, name, parameter in found}
    return list(once.values())


def _linear(module: nn.Module, parameter: nn.Parameter) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D) and parameter is module.weight
