"""What a vision tower is given and what it attends to, picture by picture, while a model reads a prompt."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import StructureError, require
from salience.hosts._image_layouts import layout_of
from salience.hosts.attention import AttentionCall, observe
from salience.hosts.choices import View
from salience.hosts.image_grid import block_order, spread
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
        self._tokens: dict[str, int] = {}
        self._on_start: list[Callable[[str], None]] = []
        for modality in _MODALITIES:
            name = f"get_{modality}_features"
            if callable(getattr(found.core, name, None)):
                record.wrap(found.core, name, functools.partial(self._wrapped, modality))

    def on_start(self, act: Callable[[str], None]) -> None:
        """Call `act(modality)` before a modality is encoded."""
        self._on_start.append(act)

    def read(self) -> None:
        """The model has read the prompt: the next run belongs to another one, and a prompt without a run to none."""
        self.inputs, self._read = {}, True

    def own_rows(self, ids: Tensor) -> Tensor:
        """The rows [B, S] that pictures were encoded for: beams repeat each of them, with the same pictures."""
        made = sum(self._tokens.values())
        return ids[:: max(1, int(self.found.image_tokens(ids).sum()) // max(1, made))]

    def _wrapped(self, modality: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def encode(*args: Any, **kwargs: Any) -> Any:
            if self._read:
                self.inputs, self._tokens, self._read = {}, {}, False
            named = signature.bind_partial(*args, **kwargs).arguments
            self.inputs |= {name: value for name, value in named.items() if name != "kwargs"}
            self.modality = modality
            for act in self._on_start:
                act(modality)
            output = original(*args, **kwargs)
            features = getattr(output, "pooler_output", output)
            self._tokens[modality] = sum(one.shape[:-1].numel() for one in features)
            return output

        return encode


def unpacked(call: AttentionCall) -> list[AttentionCall]:
    """A call over several pictures in one row, as flash attention takes them, as one call for each picture."""
    borders = call.options.get("cu_seq_lens_q")
    if borders is None:
        return [call]
    options = {name: value for name, value in call.options.items() if not name.startswith("cu_seq_lens")}
    return [
        replace(
            call,
            query=call.query[:, :, start:end],
            key=call.key[:, :, start:end],
            value=call.value[:, :, start:end],
            mask=None,
            options=options,
        )
        for start, end in itertools.pairwise(borders.tolist())
    ]


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
        views (dict[str, list[Tensor]]): by modality, one map for each encoder view, or for each window of one; in the
            order of the tower's blocks.
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
        views = self.views.setdefault(self._encoder.modality, [])
        for one in unpacked(call):
            views.extend(self._measure(one))

    def at_tokens(
        self, view: View, values: dict[str, list[Tensor]] | None = None, *, newline: float = 0.0
    ) -> Tensor:
        """The maps of the prompt's pictures at its image tokens.

        Args:
            view (View): the sequence; none of its image tokens may have left yet.
            values (dict | None): by modality, as they were measured, [N] or [N, D] each; None takes `views`.
            newline (float): for tokens that stand for the end of a row of patches.

        Returns:
            Tensor: [B, S] or [B, S, D], 0 at other places.

        Raises:
            StructureError: if the vision tower did not run, or its patches do not fit the image tokens.
        """
        core = self._encoder.found.core
        maps = {
            modality: by_view(core, view.inputs, measured, modality == "video")
            for modality, measured in (self.views if values is None else values).items()
        }
        return at_tokens(self._encoder, view, maps, newline=newline)


def at_tokens(encoder: Encoder, view: View, maps: dict[str, list[Tensor]], *, newline: float = 0.0) -> Tensor:
    """Values by modality, one map for each view in its order, at the image tokens; see `EncoderMaps.at_tokens`."""
    found, ids = encoder.found, view.inputs["input_ids"]
    if not any(maps.values()):
        raise StructureError(
            f"vision tower of {found.name} must run with the prompt, got features made before"
        )
    full: Tensor | None = None
    for modality, views in maps.items():
        video = modality == "video"
        tokens = found.video_ids if video and found.video_ids else found.image_ids
        places = torch.isin(ids, torch.tensor(tokens, device=ids.device))
        values = spread(found.core, view.inputs, views, newline=newline, video=video)
        if int(places.sum()) != len(values):
            raise StructureError(
                f"patches of the vision tower must fit the {int(places.sum())} {modality} tokens, got {len(values)}"
            )
        part = torch.zeros(*places.shape, *values.shape[1:], dtype=values.dtype, device=places.device)
        part[places] = values.to(places.device)
        full = part if full is None else full + part
    assert full is not None  # some modality was encoded
    full = full.repeat_interleave(len(view.source) // len(ids), 0)  # beams
    source = view.source.view(*view.source.shape, *[1] * (full.dim() - 2)).expand(-1, -1, *full.shape[2:])
    return full.gather(1, source)


def by_view(core: nn.Module, inputs: Mapping[str, Any], maps: list[Tensor], video: bool) -> list[Tensor]:
    """Maps as the tower gave them, by attention window or all pictures in one row, as one map for each view."""
    order = block_order(core, inputs, video=video)
    sizes = [view.rows * view.columns for view in layout_of(core, inputs, video).views]
    fits = sum(map(len, maps)) == sum(sizes)
    if not fits or (order is None and len(maps) == len(sizes)):
        return maps
    flat = torch.cat(maps)
    if order is not None:
        restored = torch.empty_like(flat)
        restored[order.to(flat.device)] = flat
        flat = restored
    return list(flat.split(sizes))


__all__ = ["Encoder", "EncoderMaps", "at_tokens", "by_view"]
