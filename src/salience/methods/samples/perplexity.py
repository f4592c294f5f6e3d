"""Perplexity: documents by how well a language model predicts them, the oldest filter of web text.

Scored: each document by its mean loss per token, `l = mean_t -log p(x_t | x_<t)`, in nats; perplexity is `exp(l)`.
Spent: the best `keep` of the corpus, or of each domain, stay: the lowest losses (what the model finds fluent, as
CCNet's filter does, arXiv 1911.00359) or the highest (what it does not know yet).

A baseline: its score is the loss, with the sign of what is preferred; there is no official code.
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
from salience.core.token_scores import nll
from salience.hosts.language import TokenMeter
from salience.hosts.selecting import pick


@dataclass(frozen=True, kw_only=True)
class Perplexity(Method):
    """Keep the documents that a language model predicts best, or worst.

    Attributes:
        model (Any): checkpoint folder, hub id, a causal language model, or a pair of it and its tokenizer.
        tokenizer (Any): None takes the model's own.
        keep (int | float): documents that stay: a share in (0, 1], rounded up, or a count.
        prefer (str): "low" or "high" perplexity.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "datasets")
    needs: ClassVar[tuple[str, ...]] = ("model",)
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Perplexity"

    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    keep: int | float = 0.2
    prefer: str = "low"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(self.prefer in ("low", "high"), "prefer", "one of low, high", self.prefer)

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """One forward pass for every document; `data` may be a `Reading`."""
        return pick(dataset, self, data)

    def scorer(self, model: Any, tokenizer: Any = None) -> Scorer:
        """The score and, beside it, the loss."""
        meter = TokenMeter(model)

        def scored(batch: Documents) -> dict[str, Tensor]:
            loss = meter.means(batch, nll)
            return {"score": score(loss, self.prefer), "loss": loss}

        return scored


def score(loss: Tensor, prefer: str = "low") -> Tensor:
    """Mean losses [B] in nats, with the sign that makes what is preferred high; NaN stays."""
    return -loss if prefer == "low" else loss
