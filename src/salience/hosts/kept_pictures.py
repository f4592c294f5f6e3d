"""The pictures of the newest prompt, and which of their tokens each decision kept: ready to be drawn or stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salience.core.drawing import WIDE
from salience.core.errors import ConflictError
from salience.core.overlays import DROPPED, KEPT, MERGED, Stage, draw_kept
from salience.hosts.image_grid import boxes, put_together, views

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from salience.hosts.pruning import Pruning


@dataclass(frozen=True)
class KeptPictures:
    """What `draw_kept` needs.

    Attributes:
        labels (list[str]): of the pictures.
        pictures (list[Tensor]): [3, H, W] each, in [0, 1].
        places (Tensor): [n, 5] picture, top, left, bottom, right of each image token of the batch.
        stages (list[Stage]): by decision, what became of each of the n tokens.
    """

    labels: list[str]
    pictures: list[Tensor]
    places: Tensor
    stages: list[Stage]


def kept_pictures(
    part: Pruning, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> KeptPictures:
    """The pictures of the prompt that was read last.

    Args:
        part (Pruning): after a prompt.
        mean, std (Sequence[float] | None): of the image processor; None stretches each picture to the full range.

    Raises:
        ConflictError: if no prompt with pixels was read yet.
    """
    inputs = part.prompt
    if inputs is None or not part.stages:
        raise ConflictError("plot must be called after a prompt with images was read, got none yet")
    core = part.found.core
    labels: list[str] = []
    pictures: list[Tensor] = []
    places: list[Tensor] = []
    order: list[Tensor] = []
    ids = inputs["input_ids"]
    for video, name in ((False, "pixel_values"), (True, "pixel_values_videos")):
        if inputs.get(name) is None:
            continue
        seen = views(core, inputs, mean=mean, std=std, video=video)
        new_labels, new_pictures, where = put_together(seen, boxes(core, inputs, video=video))
        tokens = part.found.video_ids if video and part.found.video_ids else part.found.image_ids
        order.append(torch.isin(ids, torch.tensor(tokens, device=ids.device)))
        where[:, 0] += len(pictures)
        labels += new_labels
        pictures += new_pictures
        places.append(where)
    if not pictures:
        raise ConflictError(
            "plot must be called after a prompt with pixels was read, got features made before"
        )
    stages = []
    for stage in part.stages:
        fates = torch.where(stage.merged, MERGED, torch.where(stage.kept, KEPT, DROPPED))
        # beams repeat each row, its pictures are shown once
        rows = torch.cat([fates[:: len(fates) // len(own)][own] for own in order])
        stages.append(Stage(f"layer {stage.layer}", rows.cpu().numpy()))
    return KeptPictures(labels, pictures, torch.cat(places), stages)


def draw(parts: Mapping[str, KeptPictures], *, width: int = WIDE) -> Figure:
    """Several methods on the same pictures, side by side."""
    first = next(iter(parts.values()))
    return draw_kept(
        [picture.numpy() for picture in first.pictures],
        first.places.numpy(),
        {name: one.stages for name, one in parts.items()},
        labels=first.labels,
        width=width,
    )
