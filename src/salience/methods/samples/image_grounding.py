"""ImageGrounding: instructions about pictures by how much the picture helps with the answer.

Scored: each row with an image by `log IG = NLL(answer | text) - NLL(answer | text, image)`, means over the answer's
tokens in nats. IG, the perplexity without the picture over that with it, is 1 where the picture changes nothing and
above 1 where it helps. Rows without an image have no score and are not kept.
Spent: the best `keep` stay: the most grounded (or the least, to find answers that ignore the picture).

Paper: one of the experts of AdaptInf, arXiv 2410.10636. Official code: adymaharana/adapt-inf (d1b1b2594637).

Differs from the official code in:
- the tokens of the image are taken out and no pixels are given; it blacks the image out, so that image tokens of a
  black picture stay in the prompt;
- both perplexities are exp(mean loss); there the numerator is, and the denominator is the mean of exp(loss), which
  makes the score too low;
- an older script of it computes the inverse, and leaves the answer out of the prompt without the image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from salience.core.budget import check_keep
from salience.core.documents import Documents, Scorer
from salience.core.errors import ParameterError, require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.pictured import Pictured, grounding
from salience.hosts.selecting import pick


@dataclass(frozen=True, kw_only=True)
class ImageGrounding(Method):
    """Keep the instructions whose answers need their picture.

    Attributes:
        model (Any): a vision-language model of transformers.
        processor (Any): its processor.
        keep (int | float): rows that stay, of those with an image: a share in (0, 1], rounded up, or a count.
        prefer (str): "high" keeps answers that need the picture, "low" those that do not.
        pictures (int): rows that are run together, >= 1.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "datasets")
    needs: ClassVar[tuple[str, ...]] = ("model",)
    arxiv: ClassVar[str] = "2410.10636"
    title: ClassVar[str] = (
        "Adapt-infinity: Scalable Continual Multimodal Instruction Tuning via Dynamic Data Selection"
    )

    model: Any = field(default=None, repr=False)
    processor: Any = field(default=None, repr=False)
    keep: int | float = 0.2
    prefer: str = "high"
    pictures: int = 8

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(self.prefer in ("high", "low"), "prefer", "one of high, low", self.prefer)
        whole = isinstance(self.pictures, int) and not isinstance(self.pictures, bool)
        require(whole and self.pictures >= 1, "pictures", ">= 1", self.pictures)

    @property
    def tokenizer(self) -> Any:
        """The processor's, which counts the words of rows."""
        return getattr(self.processor, "tokenizer", None)

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """Two forward passes for every row with prompt, completion and image; `data` may be a `Reading`."""
        if not isinstance(self.model, torch.nn.Module) or not hasattr(self.processor, "image_processor"):
            raise ParameterError(
                "model must be a vision-language model, with its processor=, got "
                f"{type(self.model).__name__} and {type(self.processor).__name__}"
            )
        # without one every row would go without a score, and nothing would be kept
        names = dataset.column_names or []
        if names and not {"image", "images"} & set(names):
            raise ParameterError(
                f"dataset must have a column image or images (rename_column), got {', '.join(names)}"
            )
        return pick(dataset, self, data)

    def scorer(self, model: Any, tokenizer: Any = None) -> Scorer:
        """The score of a batch, a few pictures at a time."""
        pictured = Pictured(self.processor)

        def scored(batch: Documents) -> dict[str, Tensor]:
            gains = torch.full((len(batch),), torch.nan)
            places = [place for place, row in enumerate(batch.rows) if pictured.has(row)]
            for start in range(0, len(places), self.pictures):
                some = places[start : start + self.pictures]
                made = pictured.inputs([batch.rows[place] for place in some])
                inputs = {name: value.to(batch.ids.device) for name, value in made.items()}
                gains[some] = grounding(model, inputs).float().cpu()
            return {"score": score(gains, self.prefer), "grounding": gains}

        return scored


def score(gains: Tensor, prefer: str = "high") -> Tensor:
    """`log IG` [B] with the sign that makes what is preferred high; NaN stays."""
    return gains if prefer == "high" else -gains
