"""What a vision tower is given and what it attends to, picture by picture, while a model reads a prompt."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from salience.core.attach import Attachment
from salience.core.errors import StructureError, require
from salience.hosts.attention import AttentionCall, observe
from salience.hosts.choices import View
from salience.hosts.image_grid import spread
from salience.hosts.vision import VisionLanguage

_MODALITIES = ("image", "video")


class Encoder:
    """Notes each run of the vision tower that leads to one prompt.

    `generate` encodes the pictures before it calls the model, a plain forward inside of it; both go through
    `get_image_features` and `get_video_features`, which are wrapped here.

    Attributes:
        inputs (dict[str, Any]): keywords of those calls: pixels, grids, sizes.
        modality (str): what is being encoded now, or was last.
    """

    def __init__(self, found: VisionLanguage, record: Attachment) -> None:
        self.found = found
        self.inputs: dict[str, Any] = {}
        self.modality = _MODALITIES[0]
        self._read = False
        self._on_start: list[Callable[[str], None]] = []
        for modality in _MODALITIES:
            name = f"get_{modality}_features"
            if callable(getattr(found.core, name, None)):
                record.wrap(found.core, name, functools.partial(self._wrapped, modality))

    def on_start(self, act: Callable[[str], None]) -> None:
        """Call `act(modality)` before a modality is encoded."""
        self._on_start.append(act)

    def read(self) -> None:
        """The model has read the prompt: the next run belongs to another one."""
        self._read = True

    def _wrapped(self, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            if self._read:
                self.inputs, self._read = {}, False
            named = signature.bind_partial(*args, **kwargs).arguments
            self.inputs |= {name: value for name, value in named.items() if name != "kwargs"}
            self.modality = modality
            for act in self._on_start:
                act(modality)
            return original(*args, **kwargs)

        return encode


class EncoderMaps:
    """Values per patch, measured in one attention layer of the vision tower, and brought to the image tokens.

    Args:
        encoder (Encoder): tells when pictures are encoded.
        layer (int): of the vision tower; negative counts from the end.
        record (Attachment): undoes the hooks.
        measure (Callable): the layer's call for V encoder views of N patches -> [V, N] or [V, N, D].

    Raises:
        ParameterError: if there is no such layer.
        StructureError: if the layer's attention does not go through transformers' attention interface.

    Attributes:
        views (dict[str, list[Tensor]]): by modality, one map for each encoder view.
    """

    def __init__(
        self, encoder: Encoder, layer: int, record: Attachment, measure: Callable[[AttentionCall], Tensor]
    ) -> None:
        found = encoder.found
        depth = len(found.vision)
        wanted = f"in [-{depth}, {depth - 1}] for the {depth} vision layers of {found.name}"
        require(-depth <= layer < depth, "encoder_layer", wanted, layer)
        own = [attention.module for attention in found.vision[layer].attentions]
        if not own:
            raise StructureError(f"vision layer {layer} of {found.name} must have attention, got none")
        self.views: dict[str, list[Tensor]] = {}
        self._encoder = encoder
        self._measure = measure
        encoder.on_start(self._start)
        observe(own[0], record, self._see)

    def _start(self, modality: str) -> None:
        if modality == _MODALITIES[0]:
            self.views = {}
        self.views[modality] = []

    def _see(self, call: AttentionCall) -> None:
        # packed towers call once for each picture, others once for a batch of them
        self.views.setdefault(self._encoder.modality, []).extend(self._measure(call))

    def at_tokens(
        self, view: View, values: dict[str, list[Tensor]] | None = None, *, newline: float = 0.0
    ) -> Tensor:
        """The maps of the prompt's pictures at its image tokens.

        Args:
            view (View): the sequence; none of its image tokens may have left yet.
            values (dict | None): by modality, one [N] or [N, D] for each encoder view; None takes what was measured.
            newline (float): for tokens that stand for the end of a row of patches.

        Returns:
            Tensor: [B, S] or [B, S, D], 0 at other places.

        Raises:
            StructureError: if the vision tower did not run, or its patches do not fit the image tokens.
        """
        return at_tokens(self._encoder, view, self.views if values is None else values, newline=newline)


def at_tokens(encoder: Encoder, view: View, maps: dict[str, list[Tensor]], *, newline: float = 0.0) -> Tensor:
    """Per-patch values by modality at the image tokens: [B, S] or [B, S, D]; see `EncoderMaps.at_tokens`."""
    found, ids = encoder.found, view.inputs["input_ids"]
    if not any(maps.values()):
        raise StructureError(
            f"vision tower of {found.name} must run with the prompt, got features made before"
        )
    full: Tensor | None = None
    for modality, views in maps.items():
        video = modality == "video"
        places = view.vision & _among(ids, found.video_ids if video and found.video_ids else found.image_ids)
        values = spread(found.core, view.inputs, views, newline=newline, video=video)
        # beams repeat each row, but its pictures are encoded once
        repeats = int(places.sum()) // max(1, len(values))
        own = places[:: max(1, repeats)]
        if int(own.sum()) != len(values):
            raise StructureError(
                f"patches of the vision tower must fit the {int(places.sum())} {modality} tokens, got {len(values)}"
            )
        part = torch.zeros(*own.shape, *values.shape[1:], dtype=values.dtype, device=places.device)
        part[own] = values.to(places.device)
        part = part.repeat_interleave(max(1, repeats), 0)
        full = part if full is None else full + part
    assert full is not None  # some modality was encoded
    return full


def _among(ids: Tensor, tokens: tuple[int, ...]) -> Tensor:
    return torch.isin(ids, torch.tensor(tokens, device=ids.device))


__all__ = ["Encoder", "EncoderMaps", "at_tokens"]
