"""Router score: keep the experts that the router gives the most weight; it never looks at what they do.

Scored: the routed experts of each layer, by the sum of their gate weights over the tokens of the demonstrations.
Spent: the best `keep` of each layer stay, as many in every layer, and the router chooses among them.

A baseline, from no paper of its own; there is no official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.experts import Routed, check_cut, cut_experts


@dataclass(frozen=True, kw_only=True)
class RouterScoreExperts(Method):
    """Keep the experts of a mixture that the router gives the most weight: a baseline.

    Attributes:
        keep (int | float): experts of each layer that stay: a share in (0, 1], rounded up, or a count, at least as
            many as a token is sent to.
        samples (int | None): at most so many demonstrations of each domain, the first ones; None takes all.
        mode (str): "prune" cuts at once; "mask" leaves the expert tensors whole until `finish` or `save`.
    """

    unit: ClassVar[str] = "expert"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "shrink"
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Experts by their gate weights"
    cuts: ClassVar[bool] = True

    keep: int | float = 0.5
    samples: int | None = None
    mode: str = "prune"

    def __post_init__(self) -> None:
        check_cut(self.keep, self.mode, samples=self.samples)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """All but the experts of the most weight of each layer leave the model."""
        return cut_experts(model, record, data, score, keep=self.keep, mode=self.mode, samples=self.samples)


def score(routed: Routed) -> Tensor:
    """`sum_t g_it`, the final gate weights of each expert over T tokens: [E] fp64."""
    return routed.by_expert(routed.weights)
