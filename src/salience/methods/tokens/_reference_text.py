"""What a text-only reference reads of a batch: the words, without pictures and the places that stand for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.core.errors import StructureError
from salience.core.losses import IGNORE
from salience.hosts._towers import getter
from salience.hosts._tree import unwrap
from salience.methods.tokens._history_losses import attended_tokens, forward_losses, response_tokens

# a loss whose probability is 0 in every float: of tokens that a reference cannot predict, because nothing is before
UNPREDICTED = 1e4
_PLACES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_AROUND = ("vision_start_token_id", "vision_end_token_id", "boi_token_id", "boi_token_index", "eoi_token_id",
           "eoi_token_index")  # fmt: skip


@dataclass(frozen=True)
class PictureTokens:
    """Token ids that belong to pictures, from a vision-language model's config; none for a text model.

    Attributes:
        places (tuple[int, ...]): stand for image features.
        around (tuple[int, ...]): open and close a picture.
    """

    places: tuple[int, ...] = ()
    around: tuple[int, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> PictureTokens:
        """Those of a model."""
        config = getattr(unwrap(model), "config", None)
        places, around = (
            tuple(sorted({v for v in (getattr(config, name, None) for name in names) if isinstance(v, int)}))
            for names in (_PLACES, _AROUND)
        )
        return cls(places, around)


@dataclass(frozen=True)
class Texts:
    """The documents of a batch as plain text, one in each row, from the left and without gaps.

    Attributes:
        ids (Tensor): [D, L] token ids.
        labels (Tensor): [D, L] as in the batch, -100 where a token has no loss.
        mask (Tensor): [D, L] bool, the tokens; the others are padding.
        places (Tensor): [tokens] where they stood in the flat batch, in the order of `mask`.
        shape (torch.Size): of the batch, [B, T].
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor
    places: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, inputs: Mapping[str, Any], pictures: PictureTokens) -> Texts:
        """Take the text out of a batch.

        A row is one document, or where `position_ids` [B, T] start again at 0 (packing) several.

        Raises:
            StructureError: without `input_ids`, or if a place of an image has a label.
        """
        ids, labels = inputs.get("input_ids"), inputs["labels"]
        if not isinstance(ids, Tensor) or ids.shape != labels.shape:
            got = list(ids.shape) if isinstance(ids, Tensor) else "none"
            raise StructureError(f"input_ids must be {list(labels.shape)} like the labels, got {got}")
        place = torch.isin(ids, ids.new_tensor(pictures.places))
        if bool((place & (labels != IGNORE)).any()):
            raise StructureError(
                f"labels must be -100 on image tokens, got some with a label (token ids {pictures.places})"
            )
        around = torch.isin(ids, ids.new_tensor(pictures.around)) & (labels == IGNORE)
        # what follows the last label is of no use, and is there or not depending on the collator's masks
        read = attended_tokens(inputs) & attended_tokens({"labels": labels}) & ~place & ~around
        places = read.flatten().nonzero().squeeze(1)
        document = torch.arange(len(ids), device=ids.device).unsqueeze(1) * ids.shape[1] + documents(inputs)
        counts = document.flatten()[places].unique_consecutive(return_counts=True)[1]
        if not len(counts):
            counts = counts.new_zeros(1)
        mask = torch.arange(max(int(counts.max()), 1), device=ids.device) < counts.unsqueeze(1)
        counted = labels.masked_fill(~response_tokens(labels), IGNORE)
        return cls(
            torch.zeros_like(mask, dtype=ids.dtype).masked_scatter(mask, ids.flatten()[places]),
            torch.full_like(mask, IGNORE, dtype=ids.dtype).masked_scatter(mask, counted.flatten()[places]),
            mask,
            places,
            labels.shape,
        )

    def losses(self, call: Callable[..., Any], bos: int | None) -> Tensor:
        """The loss of every labelled token under a model that reads these texts alone, [D, L] fp32.

        A first token that has a label is predicted from `bos`, put before it; without one it is `UNPREDICTED`.
        """
        first = (self.labels[:, :1] != IGNORE) & self.mask[:, :1]
        # padding may not be all that a row attends to
        mask = self.mask | (torch.arange(self.mask.shape[1], device=self.mask.device) == 0)
        led = {"input_ids": self.ids, "attention_mask": mask.long(), "labels": self.labels}
        if bos is None or not bool(first.any()):
            return forward_losses(call, led)[0].masked_fill(_at_front(first, self.mask), UNPREDICTED)
        leads = {"input_ids": bos, "attention_mask": 1, "labels": IGNORE}
        ends = {"input_ids": 0, "attention_mask": 0, "labels": IGNORE}
        led = {
            name: torch.where(
                first, F.pad(value, (1, 0), value=leads[name]), F.pad(value, (0, 1), value=ends[name])
            )
            for name, value in led.items()
        }
        losses = forward_losses(call, led)[0]
        return torch.where(first, losses[:, 1:], losses[:, :-1])

    def keyed(self) -> dict[str, Tensor]:
        """As a batch that `HistoryLosses` finds by its content, [D, 1 + L]: every token follows something there."""
        fill = {"input_ids": -1, "labels": IGNORE, "attention_mask": 1}
        rows = {"input_ids": self.ids, "labels": self.labels, "attention_mask": self.mask.long()}
        return {name: F.pad(value, (1, 0), value=fill[name]) for name, value in rows.items()}

    def put_back(self, losses: Tensor) -> Tensor:
        """Losses [D, L] at the tokens' places in the batch, [B, T]; 0 elsewhere."""
        flat = losses.new_zeros(self.shape.numel())
        return flat.index_copy(0, self.places, losses[self.mask]).view(self.shape)


def documents(inputs: Mapping[str, Any]) -> Tensor:
    """The number of each token's document in its row, [B, T] int64: counts where `position_ids` are 0."""
    labels, positions = inputs["labels"], inputs.get("position_ids")
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return torch.zeros_like(labels)
    return (positions == 0).long().cumsum(-1).expand(labels.shape)


def text_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that text alone runs through: embeddings, decoder and head; all of them if not told apart."""
    core = unwrap(model)
    names = ("get_decoder", "get_input_embeddings", "get_output_embeddings")
    parts = [part for part in (getter(core, name) for name in names) if part is not None]
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    decoder = getter(core, "get_decoder")
    return [(n, p) for n, p in model.named_parameters() if decoder is None or id(p) in inside]


def first_token(model: nn.Module) -> int | None:
    """The token that texts of a model begin with, as its config says."""
    config: Any = getattr(unwrap(model), "config", None)
    bos = config.get_text_config().bos_token_id if hasattr(config, "get_text_config") else None
    return bos if isinstance(bos, int) else None


def _at_front(first: Tensor, mask: Tensor) -> Tensor:
    return F.pad(first, (0, mask.shape[1] - 1))
