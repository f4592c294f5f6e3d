"""Instructions with a picture as a model's inputs, with and without the picture, and what the picture is worth.

Image grounding is the perplexity of the answer without the picture over that with it. Without it, the tokens that
stand for the picture are taken out of the prompt and no pixels are given: the model reads the same text as if nothing
had been shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.errors import ParameterError, first_line
from salience.core.loop import evaluating
from salience.core.losses import IGNORE
from salience.core.sample_scores import mean_losses
from salience.hosts.vision import vision_language

_FORMS = (("prompt", "completion"), ("question", "answer"))


class Pictured:
    """Makes inputs of rows with an image, a prompt and an answer.

    Args:
        processor (Any): of the model: holds a tokenizer and an image processor.
        columns (Mapping[str, str]): our name -> the dataset's, for prompt, completion and image.
        max_length (int | None): most tokens of a row, image tokens included; longer ones are cut at their end.
    """

    def __init__(
        self, processor: Any, columns: Mapping[str, str] | None = None, max_length: int | None = None
    ) -> None:
        self._processor, self._columns, self._max_length = processor, dict(columns or {}), max_length
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._pad = 0 if pad is None else int(pad)

    def has(self, row: Mapping[str, Any]) -> bool:
        """Whether there is a picture in a row."""
        return self._image(row) is not None

    def inputs(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of rows that all have a picture, padded on the right, with labels on the answers.

        Raises:
            ParameterError: for a row without prompt and answer, or one that the processor does not take.
        """
        from salience.hosts.seeing import prompt_text

        pairs = [self._pair(row) for row in rows]
        try:
            made = self._processor(
                text=[prompt_text(self._processor, prompt, 1) for prompt, _ in pairs],
                images=[self._image(row) for row in rows],
                padding=True,
                return_tensors="pt",
            )
        except (ValueError, TypeError) as error:
            raise ParameterError(
                f"data must be rows that the processor takes, got {first_line(error)}"
            ) from error
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(made["input_ids"], made["attention_mask"])]
        whole = [
            (prompt + answer, [IGNORE] * len(prompt) + answer)
            for prompt, answer in zip(prompts, self._answers([answer for _, answer in pairs]))
        ]
        # what has a column for each token of the prompt does not fit the longer row any more
        shape = made["input_ids"].shape
        rest = {
            name: value
            for name, value in made.items()
            if isinstance(value, Tensor) and value.shape[:2] != shape
        }
        return {**_padded(whole, self._pad, self._max_length), **rest}

    def _answers(self, answers: Sequence[str]) -> list[list[int]]:
        tokenizer = self._processor.tokenizer
        # behind a prompt an answer starts with a space, as in most tokenizers' words
        texts = [answer if answer[:1].isspace() else f" {answer}" for answer in answers]
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        return [ids + end for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        for form in _FORMS:
            found = [row.get(self._columns.get(name, name)) for name in form]
            if all(isinstance(value, str) for value in found):
                return found[0], found[1]  # type: ignore[return-value]
        raise ParameterError(
            f"data must be rows with prompt and completion beside an image, got columns {', '.join(row)}"
        )

    def _image(self, row: Mapping[str, Any]) -> Any:
        found = row.get(self._columns.get("image", "image"))
        several = row.get(self._columns.get("images", "images"))
        if found is None and several:
            if len(several) > 1:
                raise ParameterError(f"images must be one for each row, got {len(several)}")
            found = several[0]
        return found


def without_pictures(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same text with no image tokens and no pixels.

    Args:
        model (nn.Module): with image tokens.
        batch (Mapping): input_ids, attention_mask and labels [B, T], padded on either side, and what belongs to
            pictures.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    text = batch["attention_mask"].bool() & ~vision_language(model).image_tokens(ids)
    rows = [(ids[row][kept].tolist(), labels[row][kept].tolist()) for row, kept in enumerate(text)]
    return {name: value.to(ids.device) for name, value in _padded(rows, 0, None).items()}


@torch.no_grad()
def grounding(model: nn.Module, batch: Mapping[str, Tensor], with_picture: Tensor | None = None) -> Tensor:
    """`log IG = NLL without the picture - NLL with it` of the answers, [B]; 0 where the picture changes nothing.

    Args:
        model (nn.Module): a vision-language model.
        batch (Mapping): its inputs with labels.
        with_picture (Tensor | None): [B] mean losses of this batch, where they are known already.
    """
    with evaluating(model):
        losses = []
        for inputs in ((batch,) if with_picture is None else ()) + (without_pictures(model, batch),):
            asked = {name: value for name, value in inputs.items() if name != "labels"}
            losses.append(mean_losses(model(**asked, use_cache=False).logits, inputs["labels"]))
    return losses[-1] - (losses[0] if with_picture is None else with_picture.to(losses[-1]))


def _padded(
    rows: Sequence[tuple[list[int], list[int]]], pad: int, max_length: int | None
) -> dict[str, Tensor]:
    rows = [(ids[:max_length], labels[:max_length]) for ids, labels in rows]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    labels, mask = torch.full_like(ids, IGNORE), torch.zeros_like(ids)
    for place, (own, asked) in enumerate(rows):
        ids[place, : len(own)] = torch.tensor(own)
        labels[place, : len(own)] = torch.tensor(asked)
        mask[place, : len(own)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
