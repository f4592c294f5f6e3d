"""REAP: keep the experts that add the most to the tokens they get, however many those are.

Scored: the routed experts of each layer, by the mean over the tokens that are sent to them of the gate weight times
the length of their output. An expert that is needed seldom but then much is not lost, as it is by a sum.
Spent: the best `keep` of each layer stay, as many in every layer, and the router chooses among them.

Paper: arXiv 2510.13999. Written from the paper; its official code was not compared.
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
class REAP(Method):
    """Keep the experts of a mixture that add the most to each of the tokens they get.

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
    arxiv: ClassVar[str] = "2510.13999"
    title: ClassVar[str] = "REAP the Experts: Why Pruning Prevails for One-Shot MoE compression"
    cuts: ClassVar[bool] = True

    keep: int | float = 0.5
    samples: int | None = None
    mode: str = "prune"

    def __post_init__(self) -> None:
        check_cut(self.keep, self.mode, samples=self.samples)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """All but those that add the most of each layer leave the model."""
        return cut_experts(
            model, record, data, score, keep=self.keep, mode=self.mode, samples=self.samples, mean=True
        )


def score(routed: Routed) -> Tensor:
    """`sum_t g_it |e_it|` over T tokens: [E] fp64; the mean divides it by how many tokens each expert got."""
    return routed.by_expert(routed.weights.double() * routed.norms.double())
