"""What a scoring method is asked when the target is a dataset, and what the reader of documents is told.

A method that scores documents gives `scorer(model)`: a function of one batch that returns a score for each document
and moves nothing. Reading, tokens, batches, shards, resuming, the choice of the best share and the files are the
engine's, `hosts/selecting.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from salience.core.errors import require

NUMBERED = "#"  # in the place of a column of ids: documents are numbered


@dataclass(frozen=True)
class Documents:
    """Documents of one batch, of like length.

    Attributes:
        ids (Tensor): [B, T] int64 tokens, padded on the right; [B, 0] for a method that needs no model.
        labels (Tensor): [B, T] int64, unshifted, -100 on padding and where nothing is asked (a prompt).
        lengths (Tensor): [B] int64, tokens of each without padding.
        characters (Tensor): [B] int64, of the text.
        numbers (Tensor): [B] int64, place of each in the corpus, from 0: whatever shard it is in.
        rows (Sequence[Mapping]): what the dataset holds of each, with its own columns.
    """

    ids: Tensor
    labels: Tensor
    lengths: Tensor
    characters: Tensor
    numbers: Tensor
    rows: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.numbers)


# batch -> "score" [B], float, NaN for what cannot be scored, higher is kept; and further columns to keep beside it,
# of which those of bool are counted
Scorer = Callable[[Documents], Mapping[str, Tensor]]


class ScoringMethod(Protocol):
    """A method whose scores decide which share of a dataset is kept."""

    @property
    def keep(self) -> float | int: ...

    @classmethod
    def slug(cls) -> str: ...

    def scorer(self, model: Any, tokenizer: Any) -> Scorer:
        """The function that scores a batch; both are None unless the method's `needs` say "model"."""
        ...


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How documents are read and where scores are kept: `focus(dataset, method, data=Reading(...))`.

    Attributes:
        columns (Mapping[str, str]): our name -> the dataset's: {"text": "content"}; as for `salience tune`.
        id_column (str | None): column of ids, each once; None takes "id" where there is one and numbers the
            documents otherwise; "#" numbers them.
        source_column (str | None): column that says where a document comes from, for the report; None takes
            "source" where there is one, else the file.
        domain_column (str | None): column of domains; the share is kept inside each. None: of all together.
        max_length (int | None): longest document in tokens, >= 2; longer ones are scored by their beginning. None
            takes the model's positions, at most 4096.
        batch_tokens (int): tokens of a batch, padding included, >= 1.
        shard_documents (int): documents that are scored and written together, >= 1: what a kill can cost.
        folder (str | Path | None): where scores are kept, and found again after a kill; None: a temporary place.
        device (str): "auto", "cpu", "cuda", ...
        dtype (str): of the weights of a model that is loaded here; "auto" is the checkpoint's own.
        skip_bad (bool): leave out what cannot be read, and count and list it, instead of refusing it.
        progress (bool | None): show a bar while scoring; None shows it where standard error is a terminal.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    id_column: str | None = None
    source_column: str | None = None
    domain_column: str | None = None
    max_length: int | None = None
    batch_tokens: int = 8192
    shard_documents: int = 2048
    folder: str | Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    skip_bad: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        require(self.max_length is None or self.max_length >= 2, "max_length", ">= 2", self.max_length)
        for name in ("batch_tokens", "shard_documents"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
