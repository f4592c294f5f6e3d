"""Between the vision tower and the decoder: what a projector makes image tokens of, and whose tokens they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import StructureError
from salience.hosts._image_layouts import encoder_of, has_class_token, layout_of, strategy
from salience.hosts.choices import View
from salience.hosts.encoder import Encoder, at_tokens, by_view
from salience.hosts.vision import VisionLanguage


def feature_layer(found: VisionLanguage) -> int:
    """The vision layer whose output becomes the image tokens, as an index that may be negative.

    Of towers that attend within windows, the last layer that attends over the whole picture.
    """
    features = _feature_layers(found)
    if features:
        last = features[-1]
        return max(last - 1, 0) if last >= 0 else max(last, -len(found.vision))
    whole = getattr(encoder_of(found.core), "fullatt_block_indexes", None)
    return int(whole[-1]) if whole else -1


def pictures_of(encoder: Encoder, view: View) -> Tensor:
    """[B, S] which picture each image token belongs to, numbered through the batch; -1 for text.

    The tiles of an any-resolution picture are one picture and its small base view another; a video frame is one.

    Raises:
        ParameterError: if the prompt was called without pixels.
        StructureError: if the model's way of arranging patches is not known.
    """
    core, device = encoder.found.core, view.vision.device
    # the class token, where there is one, comes first
    extra, first = int(has_class_token(core)), 1
    maps: dict[str, list[Tensor]] = {}
    for modality in ("image", "video"):
        found = layout_of(core, view.inputs, modality == "video").views
        if found:
            maps[modality] = [
                torch.full((extra + one.rows * one.columns,), float(first + one.canvas), device=device)
                for one in found
            ]
            first += 1 + max(one.canvas for one in found)
    numbers = at_tokens(encoder, view, maps).round().long()
    # a newline belongs to the patches in front of it
    places = torch.arange(numbers.shape[1], device=device).expand_as(numbers)
    numbers = numbers.gather(1, torch.where(numbers > 0, places, 0).cummax(-1).values)
    return (numbers - 1).masked_fill(~view.vision, -1)


class Projection:
    """Notes the rows that go into a projector which makes one image token of each, and sends other rows through it.

    Args:
        encoder (Encoder): of the model.
        record (Attachment): undoes the hooks.

    Attributes:
        classed (bool): the vision tower puts a class token in front of its patches.
    """

    def __init__(self, encoder: Encoder, record: Attachment) -> None:
        self._encoder = encoder
        found = encoder.found
        self.classed = has_class_token(found.core)
        self._rows: list[Tensor] = []
        self._states: dict[int, Tensor] = {}
        projector = getattr(found.core, "multi_modal_projector", None)
        self._projector: nn.Module | None = projector if isinstance(projector, nn.Module) else None
        self._features: tuple[int, ...] = ()
        if self._projector is None:
            return
        record.hook(self._projector.register_forward_pre_hook(self._see))
        if self.classed and strategy(found.core, {}) == "default":
            depth = len(found.vision)
            self._features = tuple(i if i >= 0 else i + depth + 1 for i in _feature_layers(found))
        for index in set(self._features):
            block = found.vision[max(index - 1, 0)].module
            if index:
                record.hook(block.register_forward_hook(self._after(index)))
            else:
                record.hook(block.register_forward_pre_hook(self._before, with_kwargs=True))

    def at_tokens(self, view: View) -> Tensor | None:
        """[B, S, C] the projector's input at the image tokens; None if it does not make one token of each row."""
        core = self._encoder.found.core
        if self._projector is None or not layout_of(core, view.inputs, False).one_to_one:
            return None
        return at_tokens(self._encoder, view, {"image": by_view(core, view.inputs, self._rows, False)})

    def class_rows(self) -> Tensor | None:
        """[V, C] the class token of each picture, where the model drops it in front of the projector; else None.

        Raises:
            StructureError: if the projector was given something else than the states of the feature layers.
        """
        if self._projector is None or not self._features:
            return None
        states = [self._states[index] for index in self._features]
        first = torch.cat([state[0, 1] for state in states], -1)
        if not torch.equal(first, self._rows[0][0].to(first.device)):
            raise StructureError(
                f"projector of {self._encoder.found.name} must be given the states of vision layers "
                f"{list(self._features)} as they are, got other values"
            )
        return torch.cat([state[:, 0] for state in states], -1)

    def project(self, rows: Tensor) -> Tensor:
        """Rows [N, C] through the projector: [N, C of the decoder]."""
        assert self._projector is not None  # at_tokens gave rows
        kept = self._rows
        projected: Tensor = self._projector(rows.to(kept[0])[None])[0]
        self._rows = kept
        return projected

    def _see(self, projector: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            self._rows = list(args[0].detach())

    def _after(self, index: int) -> Any:
        def hook(block: nn.Module, args: Any, output: Any) -> None:
            self._states[index] = (output[0] if isinstance(output, tuple) else output).detach()

        return hook

    def _before(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._states[0] = (args[0] if args else kwargs["hidden_states"]).detach()


def _feature_layers(found: VisionLanguage) -> list[int]:
    """`vision_feature_layer` as a list: indices of the hidden states, of which 0 is in front of the first layer."""
    given = getattr(found.core.config, "vision_feature_layer", None)
    if given is None:
        return []
    return [given] if isinstance(given, int) else [int(index) for index in given]
