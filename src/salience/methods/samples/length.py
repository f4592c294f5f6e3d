"""Length: documents by how long they are, the baseline that shows what a scorer owes to length alone.

Scored: each document by its characters.
Spent: the longest (or shortest) `keep` of the corpus, or of each domain, stay.

A baseline, from no paper; there is no official code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from salience.core.budget import check_keep
from salience.core.documents import Scorer
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.selecting import pick


@dataclass(frozen=True, kw_only=True)
class Length(Method):
    """Keep the longest documents, or the shortest: a baseline that reads no text.

    Attributes:
        keep (int | float): documents that stay: a share in (0, 1], rounded up, or a count.
        prefer (str): "long" or "short".
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("datasets",)
    arxiv: ClassVar[str] = ""
    title: ClassVar[str] = "Length"

    keep: int | float = 0.2
    prefer: str = "long"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(self.prefer in ("long", "short"), "prefer", "one of long, short", self.prefer)

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """Counts characters; no model is needed. `data` may be a `Reading`."""
        return pick(dataset, self, data)

    def scorer(self, model: Any = None, tokenizer: Any = None) -> Scorer:
        """Characters with a sign."""
        return lambda batch: {"score": score(batch.characters, self.prefer)}


def score(characters: Tensor, prefer: str = "long") -> Tensor:
    """Characters [B], with the sign that makes what is preferred high: float32 [B]."""
    return characters.float() if prefer == "long" else -characters.float()
