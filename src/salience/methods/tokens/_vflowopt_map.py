"""The map of VFlowOpt: attention of much attended patches and entropy of pixels, and where tokens lie in the grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from salience.core.attach import Attachment
from salience.core.errors import StructureError
from salience.hosts._image_layouts import has_class_token
from salience.hosts.attention import AttentionCall
from salience.hosts.choices import View
from salience.hosts.encoder import EncoderMaps, at_tokens, by_view
from salience.hosts.image_grid import View as Picture
from salience.hosts.image_grid import views
from salience.hosts.projection import feature_layer
from salience.hosts.pruning import Pruning

if TYPE_CHECKING:
    from salience.methods.tokens.vflowopt import VFlowOpt

# rows computed at a time: all of them first, then the few that ask
_CHUNK, _FEW = 256, 32


class PatchMap:
    """Measures in the vision tower and brings the result to the image tokens of the prompt."""

    def __init__(self, part: Pruning, record: Attachment, method: VFlowOpt) -> None:
        found = part.found
        layer = feature_layer(found) if method.encoder_layer is None else method.encoder_layer
        self._first = int(has_class_token(found.core))
        self._encoder, self._method = part.encoder, method
        self._maps = EncoderMaps(
            part.encoder, layer, record, lambda call: measure(call, method.t, classed=bool(self._first))
        )

    def at_tokens(self, view: View) -> tuple[Tensor, Tensor]:
        """Scores and places of the image tokens.

        Returns:
            tuple: [B, S] scores, and [B, S, 3]: number of the canvas, and centre down and across on it
            in pixels, nan where a token stands for no place (newlines, a class token). Those score best of all.
        """
        core, method = self._encoder.found.core, self._method
        columns: dict[str, list[Tensor]] = {}
        first = 0
        for modality, measured in self._maps.views.items():
            video = modality == "video"
            maps = by_view(core, view.inputs, measured, video)
            pictures = views(core, view.inputs, mean=method.pixel_mean, std=method.pixel_std, video=video)
            if len(maps) != len(pictures):
                raise StructureError(
                    f"vision tower must attend in each of the {len(pictures)} {modality} views, got {len(maps)} maps"
                )
            columns[modality] = [self._columns(one, map_, first) for one, map_ in zip(pictures, maps)]
            first += 1 + max((one.canvas for one in pictures), default=0)
        at = at_tokens(self._encoder, view, columns, newline=torch.nan).to(view.hidden.device)
        scores, grid = at[..., 0], at[..., 1:]
        best = scores.nan_to_num(nan=-torch.inf).amax(-1, keepdim=True)
        return torch.where(scores.isnan(), best.clamp_min(0.0) + 1.0, scores), grid

    def _columns(self, picture: Picture, parts: Tensor, first: int) -> Tensor:
        """[N, 4] score, canvas, centre down and across of each patch of a view; nan in front for a class token."""
        method, parts = self._method, parts.float().cpu()
        leading = len(parts) - picture.rows * picture.columns
        parts = parts[leading:]
        bits = entropy(picture.picture, picture.rows, picture.columns) if method.alpha else None
        if bits is not None:
            bits = bits.view(picture.rows, picture.columns)[tuple(picture.order.T)]
        scores = importance(parts, bits, method.alpha, over=method.over)
        sides = torch.tensor(picture.picture.shape[1:]) / torch.tensor([picture.rows, picture.columns])
        centres = (picture.order + 0.5) * sides + torch.tensor(picture.origin)
        canvas = torch.full_like(scores, first + picture.canvas)
        columns = torch.cat((scores[:, None], canvas[:, None], centres), 1)
        return torch.cat((columns.new_full((max(leading, 0), 4), torch.nan), columns))


def measure(call: AttentionCall, t: float, *, classed: bool) -> Tensor:
    """What the patches of V views receive, who asks, and what those who ask pay.

    Args:
        call (AttentionCall): of one layer, with its own mask.
        t (float): who receives more than t times the mean asks.
        classed (bool): the first of the N rows is a class token, which is left out of rows and columns.

    Returns:
        Tensor: [V, N, 3] at least fp32: attention received from all rows together, whether a patch asks (0 or 1),
        and attention received from those who ask together. 0 for a class token. Sums and not means, so that pictures
        that share one packed row can be told apart afterwards.
    """
    first, length = int(classed), call.query.shape[2]
    precise = torch.promote_types(call.query.dtype, torch.float32)
    received = call.query.new_zeros(len(call.query), length, dtype=precise)
    asked = torch.zeros_like(received)
    for start in range(first, length, _CHUNK):
        received += call.probabilities(start, min(start + _CHUNK, length)).mean(1).sum(1)
    received[:, :first] = 0.0
    asks = (received > t * received[:, first:].mean(-1, keepdim=True)).to(precise)
    asks[:, :first] = 0.0
    for start in range(first, length, _FEW):
        part = asks[:, start : start + _FEW]
        if bool(part.any()):
            rows = call.probabilities(start, min(start + _FEW, length)).mean(1)
            asked += torch.einsum("vrn,vr->vn", rows, part)
    asked[:, :first] = 0.0
    return torch.stack((received, asks, asked), -1)


def importance(parts: Tensor, bits: Tensor | None, alpha: float = 0.0, *, over: str = "mean") -> Tensor:
    """`I_i = mean_{k in K} A_ki + alpha softmax(H)_i`; an empty K stands for all patches.

    Args:
        parts (Tensor): [N, 3] from `measure`, of one view without class token.
        bits (Tensor | None): [N] entropy; None leaves it out.
        alpha (float): its weight.
        over (str): "mean" or "sum" over K.

    Returns:
        Tensor: [N] of the dtype of `parts`.
    """
    received, asks, asked = parts.unbind(-1)
    count = float(asks.sum())
    attention, rows = (asked, count) if count else (received, float(len(parts)))
    if over == "mean":
        attention = attention / rows
    return attention if bits is None else attention + alpha * bits.to(parts).softmax(-1)


def entropy(picture: Tensor, rows: int, columns: int, *, cast: bool = False) -> Tensor:
    """Entropy of the grey values of each patch, `-sum p log2 p` over 256 values, in bits.

    Args:
        picture (Tensor): [3, H, W] in [0, 1].
        rows, columns (int): of patches.
        cast (bool): make bytes as the official code does: cut towards zero, so that the rounding errors of
            normalising take a whole value down by one, and wrap around what is outside of [0, 1].

    Returns:
        Tensor: [rows * columns] float64, row by row.
    """
    colours = picture.double() * 255
    colours = colours.trunc().remainder(256) if cast else colours.round().clamp(0, 255)
    grey = colours.mean(0).round().long()  # [H, W]
    high, wide = grey.shape[0] // rows, grey.shape[1] // columns
    grey = grey[: rows * high, : columns * wide].reshape(rows, high, columns, wide)
    patches = grey.transpose(1, 2).reshape(rows * columns, high * wide)
    counts = torch.zeros(len(patches), 256, dtype=torch.float64, device=grey.device)
    counts.scatter_add_(1, patches, torch.ones_like(patches, dtype=torch.float64))
    return torch.special.entr(counts / (high * wide)).sum(-1) / torch.log(counts.new_tensor(2.0))


def grid_cells(places: Tensor, side: float) -> Tensor:
    """Number of the cell of `side` x `side` tokens that each token lies in.

    Args:
        places (Tensor): [n, 3] number of the picture, each with a grid of its own; centre down and across in any
            unit, equal ones being one line of tokens. nan: no place.
        side (float): in tokens.

    Returns:
        Tensor: [n] int64, equal within a cell; -1 for tokens without a place.
    """
    cells = torch.full_like(places[:, 0], -1, dtype=torch.int64)
    placed = ~places[:, 0].isnan()
    canvas = places[placed, 0].round().long()
    found = torch.stack((canvas, torch.zeros_like(canvas), torch.zeros_like(canvas)), -1)
    for number in canvas.unique():
        own = canvas == number
        for axis in (1, 2):
            found[own, axis] = torch.floor(_lines(places[placed, axis][own]) / side).long()
    if len(found):
        cells[placed] = found.unique(dim=0, return_inverse=True)[1]
    return cells


def _lines(values: Tensor) -> Tensor:
    """[n] which line each value is on, counted upwards from 0; values within a hundredth are on one."""
    ordered, order = values.sort()
    steps = torch.zeros_like(order)
    steps[1:] = ordered.diff() > 0.01
    lines = torch.empty_like(order)
    lines[order] = steps.cumsum(0)
    return lines
