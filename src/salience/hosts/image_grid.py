"""Where image tokens lie in the pictures, and how values of encoder patches become values of image tokens.

A vision tower reads *views*: the picture itself, its tiles, or the frames of a video, each a grid of patches. What it
says of the patches reaches the prompt rearranged: tiles are put together and their padding is cut away, groups of
patches are merged, newline tokens come between. `spread` sends any values of the patches down the same way, `boxes`
tells for each image token which rectangle of which view it stands for. Both go through the model's own functions
where it has them, found by what the model can do and not by its name:

- the model packs features (`pack_image_features`): a base view and tiles, LLaVA-NeXT and LLaVA-OneVision;
- a grid of patches for each image comes with the inputs (`image_grid_thw`): Qwen2-VL and later;
- the model or its connector shuffles pixels into channels (`pixel_shuffle`): InternVL, Idefics3, SmolVLM;
- a module merges neighbouring patches of pictures of any size (`spatial_merge_size`): Mistral3;
- none of these: one token a patch, LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError, require
from salience.hosts._image_layouts import (
    Layout,
    View,
    encoder_of,
    has_class_token,
    layout_of,
    placeholders,
    strategy,
)

__all__ = ["Box", "View", "block_order", "boxes", "put_together", "spread", "views"]


@dataclass(frozen=True)
class Box:
    """A rectangle in a view, in pixels; `view` is its number in `views`."""

    view: int
    top: float
    left: float
    bottom: float
    right: float


def views(
    core: nn.Module,
    inputs: Mapping[str, Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    video: bool = False,
) -> list[View]:
    """The pictures that the encoder sees for these inputs, in its order.

    Args:
        core (nn.Module): the inner multimodal module (`model.model` of a LlavaForConditionalGeneration).
        inputs (Mapping): keywords of its forward.
        mean, std (Sequence[float] | None): three numbers each, by which the processor normalised. Without them the
            range of the views of one canvas is stretched to [0, 1], which shows the picture but not its true colours.
        video (bool): the videos' frames and not the images. Of frames that are encoded together (two in Qwen's),
            the first is shown.

    Returns:
        list[View]: empty where the inputs hold no image (no video).

    Raises:
        ParameterError: if only one of mean and std is given, or not three numbers.
        StructureError: if the model's way of reading pictures is not known.
    """
    require((mean is None) == (std is None), "mean and std", "given together", (mean, std))
    found = layout_of(core, inputs, video).views
    if mean is not None and std is not None:
        for name, values in (("mean", mean), ("std", std)):
            require(len(values) == 3, name, "three numbers", values)
        scale, shift = (
            torch.tensor(list(values), dtype=torch.float32)[:, None, None] for values in (std, mean)
        )
        return [replace(view, picture=(view.picture * scale + shift).clamp(0, 1)) for view in found]
    shown = []
    for view in found:
        same = [other.picture for other in found if other.canvas == view.canvas]
        low = min(float(picture.min()) for picture in same)
        high = max(float(picture.max()) for picture in same)
        shown.append(replace(view, picture=(view.picture - low) / max(high - low, 1e-12)))
    return shown


def spread(
    core: nn.Module,
    inputs: Mapping[str, Any],
    maps: Sequence[Tensor],
    *,
    newline: float = 0.0,
    video: bool = False,
) -> Tensor:
    """Values of patches, rearranged into values of image tokens as the model does with its features.

    Where several patches make one token, it gets their mean; where features are interpolated, so are the values.

    Args:
        core (nn.Module): the inner multimodal module.
        inputs (Mapping): keywords of its forward.
        maps (Sequence[Tensor]): one for each view, [N] or [N, d] with N patches in the view's `order`. A class token
            may come first; it is dropped where the model drops it.
        newline (float): the value of newline tokens.
        video (bool): the videos' tokens and not the images'.

    Returns:
        Tensor: [tokens] or [tokens, d], float32 (float64 for float64 maps), in the order of the placeholders in the
        prompts, row after row of the batch.

    Raises:
        ParameterError: if the maps do not fit the views.
        StructureError: if the model's way is not known, or does not lead to as many tokens as the prompts hold.
    """
    layout = layout_of(core, inputs, video)
    require(
        len(maps) == len(layout.views), "maps", f"{len(layout.views)} tensors, one for each view", len(maps)
    )
    if not maps:
        return torch.zeros(0)
    flat = {values.ndim == 1 for values in maps}
    widths = {tuple(values.shape[1:]) for values in maps}
    fits = len(flat) == 1 and len(widths) == 1 and max(values.ndim for values in maps) <= 2
    require(fits, "maps", "all [N] or all [N, d] with one d", [tuple(values.shape) for values in maps])
    kind = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    columns = [values.to(kind).reshape(len(values), -1) for values in maps]
    classed = has_class_token(core)
    columns = [
        _patches_of(core, inputs, layout, number, values, classed) for number, values in enumerate(columns)
    ]
    try:
        tokens = layout.gather(columns, columns[0].new_full((columns[0].shape[1],), newline))
    except (RuntimeError, ValueError) as error:  # the model's own function finds another number of patches
        raise StructureError(
            f"{type(core).__name__} must take one value for each patch in place of a feature, got {error} for "
            f"views of {[(view.rows, view.columns) for view in layout.views]} patches"
        ) from error
    wanted = placeholders(core, inputs, video)
    if wanted is not None and len(tokens) != wanted:
        raise StructureError(
            f"patches of {type(core).__name__} must spread to the {wanted} {'video' if video else 'image'} tokens of "
            f"the prompts, got {len(tokens)} from {len(maps)} views of {[len(values) for values in columns]} patches"
        )
    return tokens[:, 0] if flat == {True} else tokens


def boxes(core: nn.Module, inputs: Mapping[str, Any], *, video: bool = False) -> list[Box | None]:
    """Where each image token lies, in the order of `spread`.

    Found by spreading the centres of patches. Tokens that stand for no place (newlines, a class token) are None.

    Args:
        core (nn.Module): the inner multimodal module.
        inputs (Mapping): keywords of its forward.
        video (bool): the videos' tokens and not the images'.

    Raises:
        StructureError: as `spread` does.
    """
    found = layout_of(core, inputs, video).views
    # the class token, where there is one, has no place
    first = torch.full((int(has_class_token(core)), 3), torch.nan, dtype=torch.float64)
    maps = [torch.cat([first, _centres(view)]) for view in found]
    if not maps:
        return []
    at = spread(core, inputs, maps, newline=torch.nan, video=video)
    result: list[Box | None] = [None] * len(at)
    for canvas in sorted({view.canvas for view in found}):
        members = [number for number, view in enumerate(found) if view.canvas == canvas]
        (tokens,) = torch.nonzero(at[:, 0].round() == canvas, as_tuple=True)
        places = at[tokens, 1:]
        height, width = _cell(places, [found[number] for number in members])
        for token, (down, across) in zip(tokens.tolist(), places.tolist()):
            result[token] = _box(found, members, down, across, height, width)
    return result


def block_order(core: nn.Module, inputs: Mapping[str, Any], *, video: bool = False) -> Tensor | None:
    """The order in which patches run through the encoder's blocks, where it is not that of the maps.

    Qwen2.5-VL sorts the patches of all its views by attention window: position k of a block's hidden states is patch
    `order[k]` of the views' maps put one after another. To bring recorded values back: `restored[order] = recorded`.

    Returns:
        Tensor | None: [patches of all views], or None where the order is that of the maps.
    """
    encoder = encoder_of(core)
    grids = inputs.get("video_grid_thw" if video else "image_grid_thw")
    if grids is None or not hasattr(encoder, "permute_input_for_window_attn"):
        return None
    from transformers.vision_utils import get_vision_window_index

    merge = int(encoder.spatial_merge_size)
    index, _ = get_vision_window_index(grids, merge, encoder.window_size, encoder.patch_size)
    group = torch.arange(merge**2)
    return (index.cpu()[:, None] * merge**2 + group).flatten()


def put_together(
    found: Sequence[View], where: Sequence[Box | None]
) -> tuple[list[str], list[Tensor], Tensor]:
    """The tiles of each canvas as one picture, and the places of tokens there, as they are drawn over pictures.

    Args:
        found (Sequence[View]): what `views` returned.
        where (Sequence[Box | None]): what `boxes` returned.

    Returns:
        tuple: labels of the pictures; the pictures, [3, H, W] each; and [tokens, 5] float64: number of the picture,
        top, left, bottom and right there, all nan for a token without a place.
    """
    canvases = list(dict.fromkeys(view.canvas for view in found))
    labels, pictures = [], []
    for canvas in canvases:
        members = [view for view in found if view.canvas == canvas]
        high = max(view.origin[0] + view.picture.shape[1] for view in members)
        wide = max(view.origin[1] + view.picture.shape[2] for view in members)
        whole = torch.zeros(3, high, wide)
        for view in members:
            (top, left), (_, height, width) = view.origin, view.picture.shape
            whole[:, top : top + height, left : left + width] = view.picture
        alone = len(members) == 1
        labels.append(
            members[0].label if alone else f"{members[0].label.rpartition(',')[0]}, {len(members)} tiles"
        )
        pictures.append(whole)
    places = torch.full((len(where), 5), torch.nan, dtype=torch.float64)
    for token, box in enumerate(where):
        if box is not None:
            view = found[box.view]
            (top, left), number = view.origin, canvases.index(view.canvas)
            sides = (top + box.top, left + box.left, top + box.bottom, left + box.right)
            places[token] = torch.tensor([number, *sides], dtype=torch.float64)
    return labels, pictures, places


def _centres(view: View) -> Tensor:
    """[N, 3] canvas number, and centre down and across on the canvas, of each patch in order; float64."""
    high, wide = view.picture.shape[1] / view.rows, view.picture.shape[2] / view.columns
    sizes = torch.tensor([high, wide], dtype=torch.float64)
    centres = (view.order.double() + 0.5) * sizes + torch.tensor(view.origin)
    return torch.cat([torch.full((len(centres), 1), float(view.canvas), dtype=torch.float64), centres], dim=1)


def _cell(places: Tensor, members: list[View]) -> tuple[float, float]:
    """Height and width of the tokens of a canvas, given their centres [tokens, 2]."""
    if not len(places):
        return 0.0, 0.0
    view = members[0]
    steps: list[float | None] = []
    for axis in range(2):
        lines = torch.unique(torch.round(places[:, axis], decimals=4))
        if len(lines) > 1:
            steps.append(float(lines.diff().median()))
        else:  # a single line: the grid of a whole picture starts in the corner
            steps.append(2 * float(lines[0]) if len(members) == 1 else None)
    patch = view.picture.shape[1] / view.rows
    return steps[0] or steps[1] or patch, steps[1] or steps[0] or patch


def _box(
    found: list[View], members: list[int], down: float, across: float, height: float, width: float
) -> Box:
    """The rectangle around a centre on the canvas, in the view that holds the centre, cut at its border."""
    for number in members:
        (top, left), (_, high, wide) = found[number].origin, found[number].picture.shape
        y, x = down - top, across - left
        if 0 <= y < high and 0 <= x < wide:
            break
    sides = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
    limits = (high, wide, high, wide)
    return Box(number, *(min(max(round(side, 4), 0.0), float(limit)) for side, limit in zip(sides, limits)))


def _patches_of(
    core: nn.Module, inputs: Mapping[str, Any], layout: Layout, number: int, values: Tensor, classed: bool
) -> Tensor:
    """The rows of a map that the model makes tokens of."""
    view = layout.views[number]
    patches = view.rows * view.columns
    how = strategy(core, inputs)
    # a model that gives no choice is taken to drop its class token, which stands for no place
    drops = how == "default" or (how is None and classed)
    allowed = [patches + 1, patches] if classed and drops else [patches + classed]
    require(
        len(values) in allowed,
        f"map {number}",
        f"of {' or '.join(map(str, sorted(allowed)))} rows for {view.rows} × {view.columns} patches",
        tuple(values.shape),
    )
    if drops and len(values) == allowed[0]:
        values = values[1:]  # the model drops the first row whether or not it is a class token
    if len(values) != patches and not layout.one_to_one:
        raise StructureError(
            f"{type(core).__name__} must make tokens of all patches and of no class token, got "
            f"{len(values)} features for {view.rows} × {view.columns} patches"
        )
    return values
