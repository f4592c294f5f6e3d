"""How vision-language models rearrange features of patches into image tokens, told by what the models can do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError, require
from salience.hosts._towers import getter


@dataclass(frozen=True)
class View:
    """One picture that the encoder saw.

    Attributes:
        label (str): for people: "image 1", "image 1, tile 2", "video 1, frame 3".
        picture (Tensor): [3, H, W] in [0, 1].
        rows, columns (int): the encoder's grid of patches.
        order (Tensor): [rows * columns, 2] row and column of each patch, in the order of `spread`'s maps. Row by row
            in most families, block by block in Qwen's.
        canvas (int): views of one number are parts of one picture, each at its `origin` there.
        origin (tuple[int, int]): top and left on the canvas, in pixels.
    """

    label: str
    picture: Tensor
    rows: int
    columns: int
    order: Tensor
    canvas: int
    origin: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Layout:
    """How patches become tokens.

    Attributes:
        views (list[View]): with the pixels as the encoder takes them.
        gather (Callable): ([N, d] values of each view's patches, [d] value of newlines) -> [tokens, d].
        one_to_one (bool): tokens are the encoder's positions, so a class token may be among them.
    """

    views: list[View]
    gather: Callable[[list[Tensor], Tensor], Tensor]
    one_to_one: bool = False


def layout_of(core: nn.Module, inputs: Mapping[str, Any], video: bool) -> Layout:
    """The layout of the images (videos) of these inputs; without views where there are none.

    Raises:
        ParameterError: if the prompts hold image tokens and the inputs no pixels.
        StructureError: if the model's way is not known; names its class.
    """
    word, key = ("video", "pixel_values_videos") if video else ("image", "pixel_values")
    pixels = inputs.get(key)
    if pixels is None:
        held = placeholders(core, inputs, video)
        require(not held, "inputs", f"with {key} for the {held} {word} tokens of the prompts", sorted(inputs))
        return Layout([], lambda maps, newline: torch.zeros(0, 0))
    pixels = pixels.detach().float().cpu()
    if inputs.get(f"{word}_grid_thw") is not None and hasattr(encoder_of(core), "spatial_merge_size"):
        return _grids(core, pixels, inputs[f"{word}_grid_thw"], word)
    if video:
        if hasattr(core, "apply_pooling") and hasattr(core, "image_newline") and pixels.ndim == 5:
            return _pooled_frames(core, pixels)
    elif _packs(core):
        return _packed(core, pixels, inputs)
    elif (shuffle := _shuffle(core)) is not None:
        return _shuffled(core, pixels, shuffle)
    elif (sizes := inputs.get("image_sizes")) is not None and (merger := _merger(core)) is not None:
        return _merged(core, pixels, sizes, merger.spatial_merge_size)
    elif pixels.ndim == 4:
        return Layout(_plain(core, pixels, sizes), lambda maps, newline: torch.cat(maps), one_to_one=True)
    raise StructureError(
        f"the {word} layout of {type(core).__name__} must be one of those known, got {key} of shape "
        f"{tuple(pixels.shape)} beside {', '.join(sorted(set(inputs) - {key}))}"
    )


def encoder_of(core: nn.Module) -> Any:
    """The vision encoder. Raises StructureError if there is none."""
    found = getter(core, "get_encoder", modality="image")
    if found is None or found is core:
        raise StructureError(f"model must have a vision encoder, got {type(core).__name__}")
    return found


def placeholders(core: nn.Module, inputs: Mapping[str, Any], video: bool) -> int | None:
    """How many tokens of the prompts an image (a video) fills; None where the inputs hold no ids."""
    ids = inputs.get("input_ids")
    token = getattr(core.config, "video_token_id" if video else "image_token_id", None)
    return None if ids is None or token is None else int((ids == token).sum())


def strategy(core: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Whether the first feature of each view is dropped ("default") or not ("full"); None without that choice."""
    given = inputs.get("vision_feature_select_strategy")
    return given or getattr(core.config, "vision_feature_select_strategy", None)


def has_class_token(core: nn.Module) -> bool:
    """Whether the encoder puts a class token before the patches."""
    names = {name.rpartition(".")[2] for name, _ in encoder_of(core).named_parameters()}
    return bool(names & {"class_embedding", "cls_token", "cls_embedding"})


def _plain(core: nn.Module, pixels: Tensor, sizes: Any = None) -> list[View]:
    """One view for each of [V, 3, H, W], cut to its size where sizes are given."""
    found = []
    for number, picture in enumerate(pixels):
        if sizes is not None:
            high, wide = (int(side) for side in sizes[number])
            picture = picture[:, :high, :wide]
        found.append(_view(core, picture, f"image {number + 1}", number))
    return found


def _view(
    core: nn.Module, picture: Tensor, label: str, canvas: int, origin: tuple[int, int] = (0, 0)
) -> View:
    high, wide = _patch(core)
    rows, columns = picture.shape[1] // high, picture.shape[2] // wide
    order = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return View(label, picture, rows, columns, order, canvas, origin)


def _patch(core: nn.Module) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    size = getattr(getattr(encoder_of(core), "config", None), "patch_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise StructureError(
        f"patch_size must be an integer or two in the config of {type(encoder_of(core)).__name__}, got {size}"
    )


def _packs(core: Any) -> bool:
    """Whether the model puts a base view and tiles together, with newlines."""
    pack = getattr(core, "pack_image_features", None)
    return callable(pack) and {"image_features", "image_sizes", "image_newline"} <= set(
        inspect.signature(pack).parameters
    )


def _packed(core: Any, pixels: Tensor, inputs: Mapping[str, Any]) -> Layout:
    """A base view, then the tiles of a grid whose shape follows from the size of the picture."""
    from transformers.image_processing_utils import select_best_resolution

    side = int(core.config.vision_config.image_size)
    require(inputs.get("image_sizes") is not None, "inputs", "with image_sizes", sorted(inputs))
    sizes = [[int(length) for length in size] for size in inputs["image_sizes"]]
    numbers = inputs.get("batch_num_images")
    # where the number of pictures in a row is told, only those that are alone in their row are cut into tiles
    cut = [True] * len(sizes) if numbers is None else [n == 1 for n in map(int, numbers) for _ in range(n)]
    found: list[View] = []
    counts: list[int] = []
    for number, size in enumerate(sizes):
        label, start = f"image {number + 1}", sum(counts)
        rows, columns = 0, 0
        if cut[number]:
            rows, columns = (
                length // side for length in select_best_resolution(size, core.config.image_grid_pinpoints)
            )
        counts.append(1 + rows * columns)
        tiles = pixels[number] if pixels.ndim == 5 else pixels[start : start + counts[-1]]
        found.append(_view(core, tiles[0], label, 2 * number))
        for tile in range(rows * columns):
            origin = (tile // columns * side, tile % columns * side)
            found.append(_view(core, tiles[1 + tile], f"{label}, tile {tile + 1}", 2 * number + 1, origin))

    def gather(maps: list[Tensor], newline: Tensor) -> Tensor:
        takes = inspect.signature(core.pack_image_features).parameters
        options = {
            "vision_feature_select_strategy": strategy(core, inputs),
            "vision_aspect_ratio": getattr(core.config, "vision_aspect_ratio", None),
        }
        parts = torch.stack(maps).split(counts)
        known = {name: value for name, value in options.items() if name in takes}
        packed, _ = core.pack_image_features(parts, torch.tensor(sizes), image_newline=newline, **known)
        return torch.cat(list(packed))

    return Layout(found, gather)


def _pooled_frames(core: Any, pixels: Tensor) -> Layout:
    """Frames of [videos, frames, 3, H, W], each pooled; one newline after each video."""
    videos, frames = pixels.shape[:2]
    found = [
        _view(core, picture, f"video {number + 1}, frame {frame + 1}", number * frames + frame)
        for number, clip in enumerate(pixels)
        for frame, picture in enumerate(clip)
    ]

    def gather(maps: list[Tensor], newline: Tensor) -> Tensor:
        pooled = core.apply_pooling(torch.stack(maps)).reshape(videos, -1, len(newline))
        return torch.cat([pooled, newline.expand(videos, 1, -1)], dim=1).flatten(0, 1)

    return Layout(found, gather)


def _grids(core: nn.Module, pixels: Tensor, grids: Tensor, word: str) -> Layout:
    """Patches of all views one after another, in blocks of merge × merge that make one token each."""
    encoder = encoder_of(core)
    merge, (high, wide) = int(encoder.spatial_merge_size), _patch(core)
    channels = int(getattr(encoder.config, "in_channels", 3))
    found: list[View] = []
    start = 0
    for number, (slices, rows, columns) in enumerate(grids.tolist()):
        across = torch.arange(rows * columns).reshape(rows // merge, merge, columns // merge, merge)
        place = across.permute(0, 2, 1, 3).flatten()
        order = torch.stack([place // columns, place % columns], dim=1)
        for slice_ in range(slices):
            flat = pixels[start : start + rows * columns].reshape(rows * columns, channels, -1, high, wide)
            start += rows * columns
            picture = torch.empty(rows * columns, channels, high, wide)
            picture[place] = flat[:, :, 0]  # of frames that are encoded together, the first
            picture = picture.reshape(rows, columns, channels, high, wide).permute(2, 0, 3, 1, 4)
            picture = picture.reshape(channels, rows * high, columns * wide)
            label = f"{word} {number + 1}" + (f", frame {slice_ + 1}" if slices > 1 else "")
            found.append(View(label, picture, rows, columns, order, len(found)))

    def gather(maps: list[Tensor], newline: Tensor) -> Tensor:
        return torch.cat(maps).unflatten(0, (-1, merge**2)).mean(1)

    return Layout(found, gather)


def _shuffle(core: Any) -> Callable[[Tensor, View], Tensor] | None:
    """The model's own way to move neighbouring patches [V, N, d] into channels, if it has one."""
    owner = next((part for part in core.modules() if callable(getattr(part, "pixel_shuffle", None))), None)
    if owner is None:
        return None
    takes = list(inspect.signature(owner.pixel_shuffle).parameters)
    if owner is core and len(takes) == 2 and hasattr(core.config, "downsample_ratio"):
        return lambda values, view: owner.pixel_shuffle(
            values.unflatten(1, (view.rows, view.columns)), core.config.downsample_ratio
        )
    if owner is not core and len(takes) == 1:
        return lambda values, view: owner.pixel_shuffle(values)
    if owner is not core and len(takes) == 2 and hasattr(owner, takes[1]):
        return lambda values, view: owner.pixel_shuffle(values, getattr(owner, takes[1]))
    raise StructureError(
        f"the image layout of {type(core).__name__} must be one of those known, got a pixel_shuffle of "
        f"{type(owner).__name__} that takes {', '.join(takes)}"
    )


def _shuffled(core: Any, pixels: Tensor, shuffle: Callable[[Tensor, View], Tensor]) -> Layout:
    if pixels.ndim == 5:  # rows of a batch are filled up with views of zeros, which the model skips
        pixels = pixels.flatten(0, 1)
        pixels = pixels[(pixels != 0).flatten(1).any(1)]
    found = _plain(core, pixels)

    def gather(maps: list[Tensor], newline: Tensor) -> Tensor:
        values = shuffle(torch.stack(maps), found[0])
        return values.flatten(0, -2).unflatten(-1, (-1, len(newline))).mean(-2)

    return Layout(found, gather)


def _merger(core: nn.Module) -> Any:
    """The module that merges neighbouring patches of pictures of any size."""
    return next(
        (part for part in core.modules() if isinstance(getattr(part, "spatial_merge_size", None), int)), None
    )


def _merged(core: nn.Module, pixels: Tensor, sizes: Any, merge: int) -> Layout:
    found = _plain(core, pixels, sizes)

    def gather(maps: list[Tensor], newline: Tensor) -> Tensor:
        tokens = []
        for view, values in zip(found, maps):
            down, across = view.rows // merge, view.columns // merge
            grid = values.unflatten(0, (view.rows, view.columns))[: down * merge, : across * merge]
            tokens.append(grid.reshape(down, merge, across, merge, -1).mean((1, 3)).flatten(0, 1))
        return torch.cat(tokens)

    return Layout(found, gather)
