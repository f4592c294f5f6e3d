"""Decisions on image tokens: what they see and what they answer; `hosts/pruning.py` carries them out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from salience.core.budget import top_mask
from salience.core.errors import require
from salience.core.losses import IGNORE
from salience.hosts.attention import AttentionCall


@dataclass(frozen=True)
class View:
    """What a decision sees: the sequence in front of one layer, B rows of S places with padding.

    Attributes:
        layer (int): the layer that is about to run.
        hidden (Tensor): [B, S, C], without graph.
        vision (Tensor): [B, S] bool, image tokens.
        valid (Tensor): [B, S] bool, what is not padding.
        source (Tensor): [B, S] the place in the prompt that each token had.
        count (Tensor): [B] image tokens that the prompt had.
        labels (Tensor | None): [B, S] in training, else None.
        inputs (Mapping[str, Any]): what the model was called with: ids, pixels, grids.
        call (Callable): see `attention`.
    """

    layer: int
    hidden: Tensor
    vision: Tensor
    valid: Tensor
    source: Tensor
    count: Tensor
    labels: Tensor | None
    inputs: Mapping[str, Any]
    call: Callable[[], AttentionCall] = field(repr=False)

    def attention(self) -> AttentionCall:
        """Queries and keys that the layer computes from `hidden`."""
        return self.call()

    def last(self) -> Tensor:
        """[B, S] bool: the last token of each row."""
        place = torch.where(self.valid, torch.arange(self.valid.shape[1], device=self.valid.device), -1)
        return (place == place.amax(-1, keepdim=True)) & self.valid

    def behind(self) -> Tensor:
        """[B, S] bool: the text behind the last image."""
        places = torch.arange(self.vision.shape[1], device=self.vision.device)
        last = torch.where(self.vision, places, -1).amax(-1, keepdim=True)
        return self.valid & ~self.vision & (places > last) & (last >= 0)


@dataclass(frozen=True)
class Choice:
    """A decision.

    Attributes:
        keep (Tensor): [B, S] bool, the image tokens that go on; text and padding are not asked.
        scores (Tensor | None): [B, S] what it was taken from, for the record.
        hidden (Tensor | None): [B, S, C] new hidden states, where tokens were merged; None leaves them.
        merged (Tensor | None): [B, S] bool, the kept tokens that stand for several.
        order (Tensor | None): [B, S] where kept tokens go among each other, rising; None keeps their order.
    """

    keep: Tensor
    scores: Tensor | None = None
    hidden: Tensor | None = None
    merged: Tensor | None = None
    order: Tensor | None = None


Decide = Callable[[View], Choice]


@dataclass
class Stage:
    """What one decision left of the newest prompt, by place in the prompt.

    Attributes:
        layer (int): the first layer that ran without the dropped tokens.
        kept (Tensor): [B, S] bool, image tokens that went on.
        merged (Tensor): [B, S] bool, those of them that stand for several.
        scores (Tensor | None): [B, S], NaN for tokens that had left before.
    """

    layer: int
    kept: Tensor
    merged: Tensor
    scores: Tensor | None


def keep_best(view: View, scores: Tensor, counts: Tensor) -> Choice:
    """Keep the `counts` [B] best image tokens of each row by `scores` [B, S]; ties go to the left."""
    return Choice(top_mask(scores, counts, view.vision), scores)


def floor_share(count: Tensor, ratio: float) -> Tensor:
    """`floor(ratio n)` for each row: how many of [B] image tokens a share keeps, [B]."""
    # a product that is whole but for rounding counts as whole
    return (count.double() * ratio + 1e-9).floor().long()


def equal_stages(depth: int, drops: int, *, name: str) -> tuple[int, ...]:
    """The layers in front of which `drops` decisions cut a decoder of `depth` layers into equal stages.

    Args:
        depth (int): layers of the decoder.
        drops (int): decisions.
        name (str): the parameter that says how many there are, for the error.

    Raises:
        ParameterError: if there are fewer layers than stages.
    """
    require(depth > drops, name, f"fewer than the decoder's {depth} layers", drops)
    return tuple(depth * (stage + 1) // (drops + 1) for stage in range(drops))


def questions(view: View) -> Tensor:
    """[B, S] bool: the last token in front of each answer in training, else the last token of the prompt."""
    last = view.last()
    if view.labels is None:
        return last
    silent = (view.labels == IGNORE) & view.valid
    asked = silent[:, :-1] & (view.labels[:, 1:] != IGNORE) & view.valid[:, 1:]
    asked = torch.cat((asked, torch.zeros_like(asked[:, :1])), 1)
    return torch.where(asked.any(-1, keepdim=True), asked, last)
