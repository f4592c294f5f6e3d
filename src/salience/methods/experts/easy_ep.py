"""EASY-EP: keep the experts that a few demonstrations of a domain need, and take the others out of every layer.

Scored: the routed experts of each layer, in one pass over the demonstrations, by the sum over tokens of the gate
weight times the length of the expert's output, times how much the routed experts together turned that token's
residual stream.
Spent: the best `keep` of each layer stay, as many in every layer; the others' weights and router rows are cut out and
nothing is trained. The router then chooses among the survivors by its own rule.

Paper: arXiv 2504.06792. Official code: RUCAIBox/EASYEP.

Differs from the official code in:
- its scoring script stops with a NameError and its mixing script never calls its `main`: here is what they mean;
- any fused mixture of transformers and batches with padding, where it has the sizes of DeepSeek-R1 as constants and
  reads one sample at a time;
- the demonstrations are those that are given; it takes the 25 longest records of a file, its paper 25 random ones;
- norms are summed in fp32 and scores in fp64, where it stores norms in the activations' dtype;
- a removed expert can never be chosen. The official server chooses groups by the scores of all experts and then
  sets those of removed ones to 0, so that one is chosen where a group holds too few survivors or their scores plus a
  negative bias are below 0. Here the router is cut, with equally many survivors in each group;
- the router's rows of removed experts go too; the official checkpoint keeps all of them;
- of equal scores the expert with more tokens stays, then the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.experts import Routed, check_cut, cut_experts


@dataclass(frozen=True, kw_only=True)
class EasyEP(Method):
    """Keep the experts of a mixture that a few demonstrations of a domain need.

    Attributes:
        keep (int | float): experts of each layer that stay: a share in (0, 1], rounded up, or a count, at least as
            many as a token is sent to. The paper's M.
        token_weight (bool): weigh tokens by how far the routed experts turn their residual stream, s_t.
        use_norm (bool): count the length of an expert's output, not its gate weight alone.
        samples (int | None): at most so many demonstrations of each domain, the first ones; None takes all. The
            paper uses 25.
        mode (str): "prune" cuts at once; "mask" leaves the expert tensors whole until `finish` or `save`.
        reroute (bool): tokens of removed experts go to the next best ones; False, with "mask" only, leaves their
            part of the output out.
    """

    unit: ClassVar[str] = "expert"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "shrink"
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[tuple[str, ...]] = ("data",)
    arxiv: ClassVar[str] = "2504.06792"
    title: ClassVar[str] = (
        "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations"
    )
    cuts: ClassVar[bool] = True

    keep: int | float = 0.5
    token_weight: bool = True
    use_norm: bool = True
    samples: int | None = None
    mode: str = "prune"
    reroute: bool = True

    def __post_init__(self) -> None:
        check_cut(self.keep, self.mode, self.reroute, self.samples)
        require(isinstance(self.token_weight, bool), "token_weight", "True or False", self.token_weight)
        require(isinstance(self.use_norm, bool), "use_norm", "True or False", self.use_norm)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """All but the best experts of each layer leave the model."""
        return cut_experts(
            model,
            record,
            data,
            lambda routed: score(routed, token_weight=self.token_weight, use_norm=self.use_norm),
            keep=self.keep,
            mode=self.mode,
            reroute=self.reroute,
            samples=self.samples,
        )


def score(routed: Routed, *, token_weight: bool = True, use_norm: bool = True) -> Tensor:
    """`I_i = sum_t s_t g_it |e_it|` with `s_t = max(1 - cos(x_t, x_t + sum_i g_it e_it), 0)`.

    Args:
        routed (Routed): what T tokens were sent to.
        token_weight (bool): False leaves out `s_t`.
        use_norm (bool): False leaves out `|e_it|`.

    Returns:
        Tensor: [E] fp64; linear in the tokens.
    """
    parts = routed.weights.double()
    if use_norm:
        parts = parts * routed.norms.double()
    if token_weight:
        parts = parts * (1.0 - routed.cosine.double()).clamp_min(0.0)[:, None]
    return routed.by_expert(parts)
