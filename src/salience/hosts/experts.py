"""Cutting a mixture of experts down to the experts that matter: routers, expert tensors and config together.

The router chooses among what is left by its own rule, so that the result is an ordinary model of the same class with
fewer experts. Routers that choose groups first keep equally many experts in each group, because that is how their
config describes groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.budget import check_keep, count
from salience.core.errors import ConflictError, require
from salience.core.part import Part, parameter_bytes
from salience.hosts._experts_cut import cut_routers, cut_tensors, drop_removed, translate_ids
from salience.hosts._experts_pass import Measured, Routed, Score, check_data, measure
from salience.hosts._experts_tree import Mixture, Mixtures, find_mixtures

__all__ = [
    "Cut", "Measured", "Mixture", "Mixtures", "Routed", "Score", "check_cut", "cut_experts", "cut_unseen",
    "find_mixtures", "kept_of", "measure", "select",
]  # fmt: skip

MODES = ("prune", "mask")


def check_cut(keep: float | int, mode: str, reroute: bool = True, samples: int | None = None) -> None:
    """Refuse what no method on experts takes.

    Raises:
        ParameterError: names the parameter.
    """
    check_keep(keep)
    require(mode in MODES, "mode", f"one of {', '.join(MODES)}", mode)
    require(isinstance(reroute, bool), "reroute", "True or False", reroute)
    require(reroute or mode == "mask", "reroute", "True unless mode is 'mask'", reroute)
    fine = samples is None or (type(samples) is int and samples >= 1)
    require(fine, "samples", "None or an integer >= 1", samples)


def kept_of(found: Mixtures, keep: float | int) -> int:
    """M, how many experts of each layer stay; a share is rounded up, to whole groups' multiples.

    Raises:
        ParameterError: if the router could not choose its k experts among so few; names the least.
    """
    number, groups = found.experts, found.groups
    # a token's k experts all come from the chosen groups
    each = max(-(-found.top_k // (found.chosen_groups if groups > 1 else 1)), found.per_group)
    floor = each * groups
    shape = f" and a multiple of {groups} (one number of experts for each group)" if groups > 1 else ""
    kept = keep if isinstance(keep, int) else groups * count(keep, number // groups)
    wanted = f"for {floor} to {number} experts{shape}: a token is sent to {found.top_k}"
    valid = floor <= kept <= number and kept % groups == 0
    require(valid, "keep", wanted, keep if kept == keep else f"{keep} ({kept} experts)")
    return kept


def select(scores: Tensor, hits: Tensor, keep: int, *, groups: int = 1) -> Tensor:
    """The `keep` best experts of each layer; of equal ones those with more tokens, then the lower index.

    Args:
        scores (Tensor): [L, E] float, higher matters more.
        hits (Tensor): [L, E] how many tokens each expert got.
        keep (int): M, in [1, E], a multiple of `groups`.
        groups (int): G; the best M / G of each run of E / G experts stay.

    Returns:
        Tensor: [L, M] int64, rising in each row.
    """
    layers, experts = scores.shape
    inside = experts // groups
    scores, hits = (value.reshape(layers, groups, inside) for value in (scores, hits))
    by_hits = torch.sort(hits, dim=-1, descending=True, stable=True).indices
    by_score = torch.sort(scores.gather(-1, by_hits), dim=-1, descending=True, stable=True).indices
    best = by_hits.gather(-1, by_score)[..., : keep // groups]
    offset = torch.arange(groups, device=best.device)[:, None] * inside
    return (best + offset).reshape(layers, -1).sort(-1).values


@dataclass
class Cut(Part):
    """Experts that were chosen to stay, and the others on their way out.

    Attributes:
        found (Mixtures): of the model, as it was.
        mode (str): "prune" or "mask".
        reroute (bool): whether tokens of removed experts go to kept ones.
        measured (Measured): the scores.
        kept (Tensor): [L, M] int64.
        own (Attachment): brings the removed experts back.
        before (tuple[int, int]): parameters and bytes of the whole model.
        physical (bool): whether the expert tensors are cut.
        translated (Attachment): hooks of a masked model.
    """

    found: Mixtures
    mode: str
    reroute: bool
    measured: Measured
    kept: Tensor
    own: Attachment
    before: tuple[int, int]
    physical: bool = False
    translated: Attachment = field(default_factory=Attachment)

    def finish(self) -> None:
        """Cut the tensors, if they were only masked, and forget what was removed.

        Raises:
            ConflictError: if tokens are not rerouted, which no config can say.
        """
        if self.kept.shape[1] < self.found.experts and not self.physical and len(self.own):
            if not self.reroute:
                raise ConflictError(
                    "reroute must be True for a smaller model, got False: its router would know experts that are gone"
                )
            self.translated.undo()
            cut_tensors(self.found, self.kept, self.own)
            self.physical = True
        self.own.forget()

    def scores(self) -> dict[str, Tensor]:
        """`experts`: [L, E] fp64."""
        return {"experts": self.measured.scores.clone()}

    def spent(self) -> dict[str, Any]:
        """Experts, parameters and bytes, before and now; demonstrations that it took."""
        core = self.found.core
        return {
            "experts": self.kept.shape[1],
            "of": self.found.experts,
            "layers": len(self.found.layers),
            "parameters": sum(p.numel() for p in core.parameters()),
            "parameters before": self.before[0],
            "bytes": parameter_bytes(core),
            "bytes before": self.before[1],
            "demonstrations": self.measured.demonstrations,
            "tokens": self.measured.tokens,
        }

    def draw(self) -> Any:
        """Each layer's scores, brighter is higher, with a dot on the experts that stay."""
        from salience.hosts._experts_pictures import draw_experts

        return draw_experts(self.measured.scores, self.kept)


def cut_experts(
    model: nn.Module,
    record: Attachment,
    data: Any,
    score: Score,
    *,
    keep: float | int,
    mode: str = "prune",
    reroute: bool = True,
    samples: int | None = None,
    mean: bool = False,
) -> Cut:
    """Score every expert in one pass over the demonstrations, and take out all but the best of each layer.

    Args:
        model (nn.Module): with fused experts.
        record (Attachment): what comes off with the method.
        data (Any): demonstrations, see `check_data`.
        score (Score): what a batch adds to each expert's score.
        keep, mode, reroute, samples: of the method, see `check_cut`.
        mean (bool): scores are means over the tokens that an expert got, not sums.

    Returns:
        Cut: the part.

    Raises:
        StructureError, TargetError, ParameterError: before anything is changed.
    """
    found = find_mixtures(model)
    kept = kept_of(found, keep)
    measured = measure(found, check_data(data), score, samples=samples, mean=mean)
    return _cut(found, record, measured, kept, mode, reroute)


def cut_unseen(
    model: nn.Module,
    record: Attachment,
    score: Callable[[int, int], Tensor],
    *,
    keep: float | int,
    mode: str = "prune",
    reroute: bool = True,
) -> Cut:
    """The same without demonstrations: `score(L, E)` gives [L, E]."""
    found = find_mixtures(model)
    kept = kept_of(found, keep)
    scores = score(len(found.layers), found.experts).double()
    return _cut(found, record, Measured(scores, torch.zeros_like(scores), 0, 0), kept, mode, reroute)


def _cut(found: Mixtures, record: Attachment, measured: Measured, kept: int, mode: str, reroute: bool) -> Cut:
    own = Attachment()
    record.on_undo(own.undo)
    chosen = select(measured.scores, measured.hits, kept, groups=found.groups)
    before = (sum(p.numel() for p in found.core.parameters()), parameter_bytes(found.core))
    part = Cut(found, mode, reroute, measured, chosen, own, before)
    if kept == found.experts:
        return part
    if not reroute:
        drop_removed(found, chosen, own)
        return part
    cut_routers(found, chosen, own)
    if mode == "prune":
        cut_tensors(found, chosen, own)
        part.physical = True
    else:
        part.translated = translate_ids(found, chosen, own)
    return part
