"""EL2N: documents by the length of the error vectors that a model makes in predicting their tokens.

Scored: each document by `mean_t || softmax(z_t) - onehot(y_t) ||_2` over its tokens (of a row with a prompt: over
the answer's), in [0, sqrt 2].
Spent: the best `keep` of the corpus, or of each domain, stay: the highest ("hard", what is not learnt yet, the
paper's choice) or the lowest.

Paper: arXiv 2107.07075, which scores images by a classifier early in its training; for tokens the mean over the
answer follows AdaptInf (arXiv 2410.10636). Official code: mansheej/data_diet, in JAX, for classes; there is nothing
in it to compare a language model with.
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
from salience.core.token_scores import el2n
from salience.hosts.language import TokenMeter
from salience.hosts.selecting import pick


@dataclass(frozen=True, kw_only=True)
class EL2N(Method):
    """Keep the documents whose tokens a model gets most wrong, or least.

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
    arxiv: ClassVar[str] = "2107.07075"
    title: ClassVar[str] = "Deep Learning on a Data Diet: Finding Important Examples Early in Training"

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
            return {"score": score(meter.means(batch, el2n), self.prefer)}

        return scored


def score(means: Tensor, prefer: str = "high") -> Tensor:
    """Mean lengths of the error vectors [B] with the sign that makes what is preferred high; NaN stays."""
    return means if prefer == "high" else -means
