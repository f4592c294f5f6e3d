"""ToMe in a decoder: of two image tokens with almost the same key, one is enough; merge the most alike.

Scored: pairs of image tokens of one picture, by the cosine of their keys, averaged over heads.
Spent: tokens are dealt out in turn to two sides, each of the first finds its most similar one of the second, and the
most similar pairs become one token, the mean weighted by how many tokens each stands for. Each round at most halves
their number, until `floor(keep n)` of n are left, at least one a picture.

Paper: arXiv 2210.09461. Official code: facebookresearch/ToMe.

Differs from the official code in:
- it merges in front of one decoder layer, by its keys after rotary, not in every block of a vision transformer;
- attention does not count a merged token several times (the log of its size is not added to its logits);
- tokens are merged within a picture, and stand where the one of the second side stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.core.attach import Attachment
from salience.core.budget import check_keep
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.choices import Choice, Decide, View, floor_share
from salience.hosts.projection import pictures_of
from salience.hosts.pruning import Pruning, prune

_POSITIONS = ("auto", "renumber", "keep")


@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Merge, once, the image tokens of a picture that are most alike, whatever is asked.

    Attributes:
        keep (int | float): share of the prompt's image tokens that is left, in (0, 1], or a count, >= 1.
        layer (int): the first layer that runs with the merged tokens, in [0, L - 1].
        positions (str): "renumber" counts tokens anew, "keep" does not, "auto" renumbers without several axes.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "merge"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2210.09461"
    title: ClassVar[str] = "Token Merging: Your ViT But Faster"

    keep: int | float = 0.5
    layer: int = 2
    positions: str = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(type(self.layer) is int and self.layer >= 0, "layer", "an integer >= 0", self.layer)
        require(self.positions in _POSITIONS, "positions", f"one of {', '.join(_POSITIONS)}", self.positions)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Image tokens are merged in front of `layer` whenever the model reads a prompt."""
        return prune(model, record, self._stages, positions=self.positions)

    def _stages(self, part: Pruning) -> dict[int, Decide]:
        def decide(view: View) -> Choice:
            counts = spend(view.count, self.keep)
            if bool((counts >= view.count).all()):
                return Choice(view.vision)
            pictures, keys = pictures_of(part.encoder, view), view.attention().key
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(1)
            hidden, keep, merged = view.hidden.clone(), view.vision.clone(), torch.zeros_like(view.vision)
            for row in (counts < view.count).nonzero().flatten().tolist():
                own = row, view.vision[row].nonzero().flatten()
                left, rows, sizes = merge(hidden[own], keys[own], pictures[own], int(counts[row]))
                keep[own], left = False, own[1][left]
                keep[row, left], merged[row, left] = True, sizes > 1
                hidden[row, left] = rows.to(hidden.dtype)
            return Choice(keep, hidden=hidden, merged=merged)

        return {self.layer: decide}


def merge(rows: Tensor, keys: Tensor, pictures: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge n tokens until `count` are left, or one of each picture.

    Args:
        rows, keys (Tensor): [n, C] and [n, d].
        pictures (Tensor): [n] which picture each belongs to; those of a picture lie side by side.
        count (int): >= 0.

    Returns:
        tuple: places [m] of the tokens left; their rows [m, C], at least fp32; how many each stands for [m].
    """
    x, k = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (rows, keys))
    size, places = x.new_ones(len(x), 1), torch.arange(len(x), device=x.device)
    while len(places) > count:
        unit = F.normalize(k, dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            alike = unit[::2] @ unit[1::2].T
        apart = pictures[places][::2, None] != pictures[places][None, 1::2]
        best, partner = alike.masked_fill(apart, -torch.inf).max(-1)
        most = min(len(places) - count, len(places) // 2, int((~apart).any(-1).sum()))
        if not most:
            break  # one token of each picture is left
        goes = best.sort(descending=True, stable=True).indices[:most]
        source, target = 2 * goes, 2 * partner[goes] + 1
        joined = size.index_add(0, target, size[source])
        x, k = ((one * size).index_add(0, target, (one * size)[source]) / joined for one in (x, k))
        stays = torch.ones_like(places, dtype=torch.bool).index_fill(0, source, False)
        x, k, size, places = x[stays], k[stays], joined[stays], places[stays]
    return places, x, size[:, 0]


def spend(count: Tensor, keep: int | float) -> Tensor:
    """How many of [B] image tokens are left in each row: `floor(keep n)` of a share, at most all of a count."""
    return count.clamp_max(keep) if isinstance(keep, int) else floor_share(count, keep)
