"""Entropy: documents by how uncertain a model is about their next tokens.

Scored: each document by `mean_t H(softmax(z_t))`, the entropy in nats of the distribution in front of each of its
tokens (of a row with a prompt: of the answer's), in [0, log V].
Spent: the best `keep` of the corpus, or of each domain, stay: the highest (uncertain) or the lowest.

A baseline, the classic score of active learning; of the pool of AdaptInf (arXiv 2410.10636), whose official code
averages over padding and prompt as well. There is no official code of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from salience.core.budget import check_keep
from salience.core.documents import Documents, Scorer
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.core.token_scores import entropy
from salience.hosts.language import TokenMeter
from salience.hosts.selecting import pick


@dataclass(frozen=True, kw_only=True)
class Entropy(Method):
    """Keep the documents about whose tokens a model is least certain, or most.

    Attributes:
        model (Any): checkpoint folder, hub id, a causal language model, or a pair of it and its tokenizer.
        tokenizer (Any): None takes the model's own.
        keep (int | float): documents that stay: a share in (0, 1], rounded up, or a count.
        prefer (str): "high" or "low" scores.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "datasets")
    needs: ClassVar[tuple[str, ...]] = ("model",)
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Entropy"

    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    keep: int | float = 0.2
    prefer: str = "high"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(self.prefer in ("high", "low"), "prefer", "one of high, low", self.prefer)

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """One forward pass for every document; `data` may be a `Reading`."""
        return pick(dataset, self, data)

    def scorer(self, model: Any, tokenizer: Any = None) -> Scorer:
        """The score of a batch."""
        meter = TokenMeter(model)

        def scored(batch: Documents) -> dict[str, Tensor]:
            return {"score": score(meter.means(batch, entropy), self.prefer)}

        return scored


def score(means: Tensor, prefer: str = "high") -> Tensor:
    """Mean entropies [B] in nats, with the sign that makes what is preferred high; NaN stays."""
    return means if prefer == "high" else -means
