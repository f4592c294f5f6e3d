"""Where a vision-language model keeps its parts: the decoder that reads image tokens, its vision tower, its ids.

Everything is told by the module tree and the config, so LLaVA, LLaVA-NeXT, LLaVA-OneVision, Qwen2-VL to Qwen3-VL,
InternVL, Idefics and their kin are found alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from salience.core.errors import StructureError
from salience.hosts.transformers import Layer, structure, unwrap

_IMAGE_IDS = ("image_token_id", "image_token_index")
_VIDEO_IDS = ("video_token_id", "video_token_index")


@dataclass(frozen=True)
class VisionLanguage:
    """The parts of a vision-language model.

    Attributes:
        name (str): of the model's class.
        core (nn.Module): takes token ids and pixels, puts image features among the token embeddings and runs `text`.
        text (nn.Module): the decoder, which holds `layers`, a final norm and the rotary embedding.
        layers (tuple[Layer, ...]): of the decoder.
        vision (tuple[Layer, ...]): of the vision tower.
        image_ids (tuple[int, ...]): placeholder tokens of images.
        video_ids (tuple[int, ...]): placeholder tokens of video frames.
        spatial_positions (bool): positions have several axes (M-RoPE), so they cannot be numbered anew.
        first_free (int): the first layer that nothing is added in front of by position (DeepStack), 0 for most.
    """

    name: str
    core: nn.Module = field(repr=False)
    text: nn.Module = field(repr=False)
    layers: tuple[Layer, ...] = field(repr=False)
    vision: tuple[Layer, ...] = field(repr=False)
    image_ids: tuple[int, ...]
    video_ids: tuple[int, ...]
    spatial_positions: bool
    first_free: int

    def image_tokens(self, ids: Tensor) -> Tensor:
        """Which tokens stand for image patches or video frames; bool of the shape of `ids`."""
        found = ids == self.image_ids[0]
        for other in (*self.image_ids[1:], *self.video_ids):
            found = found | (ids == other)
        return found


def vision_language(model: nn.Module) -> VisionLanguage:
    """Find the parts of a vision-language model.

    Args:
        model (nn.Module): bare or wrapped by PEFT, torch.compile or DistributedDataParallel.

    Raises:
        StructureError: if it has no vision tower, no causal text decoder, or no image token; names the class.
    """
    inner = unwrap(model)
    name = type(inner).__name__
    found = structure(inner)
    kinds = {stack.name: stack for stack in found.stacks}
    if "vision" not in kinds or "decoder" not in kinds:
        raise StructureError(
            "model must be a vision-language model with a vision tower and a text decoder, got "
            f"{name} with {' and '.join(sorted(kinds))} only"
        )
    decoder, vision = kinds["decoder"], kinds["vision"]
    text_path = decoder.path.rpartition(".")[0]
    core = inner.get_submodule(_around(text_path, vision.path))
    config: Any = getattr(core, "config", None)
    image_ids = _ids(config, _IMAGE_IDS)
    if not image_ids:
        raise StructureError(
            f"config of {name} must name the image token (image_token_id), got none: models that read images by "
            "cross-attention or from embeddings alone have no image tokens to spend"
        )
    text = inner.get_submodule(text_path)
    rope = getattr(getattr(text, "config", None), "rope_parameters", None) or {}
    return VisionLanguage(
        name=name,
        core=core,
        text=text,
        layers=decoder.layers,
        vision=vision.layers,
        image_ids=image_ids,
        video_ids=_ids(config, _VIDEO_IDS),
        spatial_positions="mrope_section" in rope,
        first_free=max((_deepstack(module) for module in core.modules()), default=0),
    )


def cache_of(keywords: Mapping[str, Any]) -> Any:
    """The KV cache among a forward's keywords (`cache` since transformers 5.24, `past_key_values` before)."""
    found = keywords.get("cache")
    return keywords.get("past_key_values") if found is None else found


def _around(first: str, second: str) -> str:
    """The path of the innermost module that holds both."""
    common = []
    for one, other in zip(first.split("."), second.split("."), strict=False):
        if one != other:
            break
        common.append(one)
    return ".".join(common)


def _ids(config: Any, names: tuple[str, ...]) -> tuple[int, ...]:
    found = (getattr(config, name, None) for name in names)
    return tuple(dict.fromkeys(value for value in found if isinstance(value, int)))


def _deepstack(module: nn.Module) -> int:
    # features of deeper vision blocks are added behind as many decoder layers, at the full prompt's positions
    layers = getattr(module, "deepstack_visual_indexes", None)
    return len(layers) if isinstance(layers, list | tuple) else 0
