"""A prompt whose image tokens leave the decoder: what each layer sees of it, and what was spent on all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salience.hosts.choices import Stage


@dataclass
class Segment:
    """Layers that see the same tokens: from `first` up to the next segment."""

    first: int
    valid: Tensor
    vision: Tensor
    source: Tensor
    positions: Any
    mask: Any = None


@dataclass
class Prompt:
    """A prompt that was read, and what each layer's cache holds of it."""

    valid: Tensor
    vision: Tensor
    labels: Tensor | None
    inputs: Mapping[str, Any]
    segments: list[Segment] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    reading: bool = True
    # the tokens of the step that runs now, and the segments that are ready for it
    fresh: Tensor = field(default_factory=lambda: torch.empty(0))
    ready: set[int] = field(default_factory=set)

    def segment(self, layer: int) -> Segment | None:
        """What the layer sees, or None if it sees the whole prompt."""
        return next((one for one in reversed(self.segments) if one.first <= layer), None)


@dataclass
class Tally:
    """What was spent on all prompts.

    Attributes:
        kept (dict[int, int]): layer with a decision -> image tokens that went on from there.
    """

    kept: dict[int, int] = field(default_factory=dict)
    prompts: int = 0
    images: int = 0
    token_layers: int = 0
    token_layers_spent: int = 0
    kv: int = 0
    kv_whole: int = 0

    def add(self, prompt: Prompt, layers: int, cache: Any) -> None:
        """Count a prompt that was read through so many layers, and the bytes that its cache holds."""
        images = int(prompt.vision.sum())
        self.prompts += int(prompt.vision.any(-1).sum())
        self.images += images
        self.token_layers += images * layers
        seen = (prompt.segment(index) for index in range(layers))
        self.token_layers_spent += sum(images if one is None else int(one.vision.sum()) for one in seen)
        if cache is not None and prompt.segments:
            held = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
            rows = [layer.keys.shape[-2] for layer in cache.layers]
            self.kv += sum(held)
            self.kv_whole += sum(h // r * prompt.valid.shape[1] for h, r in zip(held, rows, strict=True))

    def spent(self) -> dict[str, Any]:
        """As `Focus.spent` shows it; empty before the first prompt."""
        if not self.prompts:
            return {}
        shown: dict[str, Any] = {"prompts": self.prompts, "image tokens": self.images}
        shown |= {f"kept from layer {layer} on": kept for layer, kept in self.kept.items()}
        shown["share of image token-layers"] = round(self.token_layers_spent / self.token_layers, 4)
        if self.kv_whole:
            shown |= {"KV bytes": self.kv, "KV bytes without pruning": self.kv_whole}
        return shown
