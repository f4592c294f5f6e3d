"""What a model says of whole samples: a vector that tells which skill they ask for, and the scores of experts.

One forward pass gives all of them; gradients take one backward pass through one layer, image grounding a second
forward pass over the samples with a picture, without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salience.core.documents import Documents
from salience.core.errors import ParameterError, require
from salience.core.loop import evaluating
from salience.core.sample_scores import entropies, error_norms, gradient_norms, mean_losses
from salience.hosts.gradients import LayerGradients, RandomSigns, unit_rows
from salience.hosts.pictured import Pictured, grounding
from salience.hosts.transformers import structure

Vectors = Literal["gradient", "hidden"]
EXPERTS = ("perplexity", "grounding", "el2n", "entropy", "grand")

_ELEMENTS = 1 << 27  # numbers of logits, and of gradients, that are held at a time: 512 MiB each in fp32


class SampleMeter:
    """Measures samples of a batch.

    Args:
        model (nn.Module): a causal language model, also one that sees images, bare or under PEFT.
        vectors (str): "gradient" of the mean answer loss with respect to one layer, or "hidden": the mean of that
            layer's states.
        layer (int): of the decoder; negative ones count from the end.
        dim (int): d, numbers of a vector; longer ones are projected by random signs.
        seed (int): of the signs.
        experts (Sequence[str]): of `EXPERTS`.
        pictured (Pictured | None): makes inputs of samples with a picture; None refuses them.

    Attributes:
        dim (int): what a vector really has: `dim`, or fewer where nothing has to be projected.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        vectors: Vectors,
        layer: int,
        dim: int,
        seed: int,
        experts: Sequence[str],
        pictured: Pictured | None = None,
    ) -> None:
        self.experts = tuple(experts)
        self._model, self._pictured = model, pictured
        by_gradient = vectors == "gradient"
        if "grand" in experts:
            require(by_gradient, "experts", "without grand unless vectors='gradient'", list(experts))
        self._gradients = LayerGradients(model, layer) if by_gradient else None
        self._layer = None if by_gradient else _layer(model, layer)
        config: Any = model.config
        text = config.get_text_config()
        self._vocabulary = int(text.vocab_size)
        size = self._gradients.parameters if self._gradients is not None else int(text.hidden_size)
        self._size = size
        self._project = RandomSigns(dim, seed) if size > dim else None
        self.dim = min(size, dim)

    def __call__(self, batch: Documents) -> tuple[Tensor, dict[str, Tensor]]:
        """Vectors [B, d] fp32 of length 1 (0 where none is finite), and [B] of loss and experts, NaN for none."""
        vectors = torch.zeros(len(batch), self.dim)
        scores = {name: torch.full((len(batch),), torch.nan) for name in ("loss", *self.experts)}
        with_picture = [self._pictured is not None and self._pictured.has(row) for row in batch.rows]
        if self._pictured is None and any(_pictures(row) for row in batch.rows):
            raise ParameterError("tokenizer must be a processor for samples with images, got a tokenizer")
        for pictures in (False, True):
            # a document without tokens has nothing to measure
            some_tokens = (batch.lengths > 0).tolist()
            marks = zip(with_picture, some_tokens)
            places = [
                at for at, (marked, some) in enumerate(marks) if marked == pictures and (marked or some)
            ]
            for some in self._parts(places, batch):
                inputs = self._pictures(batch, some) if pictures else _texts(batch, some)
                found, values = self._measure(inputs)
                vectors[some] = found.float().cpu()
                if pictures and "grounding" in self.experts:
                    values["grounding"] = grounding(self._model, inputs, values["loss"])
                for name in scores.keys() & values.keys():
                    scores[name][some] = values[name].float().cpu()
        return vectors, scores

    def _parts(self, places: Sequence[int], batch: Documents) -> list[list[int]]:
        """Places in lots whose logits and gradients fit into memory."""
        largest = max(batch.ids.shape[1] * self._vocabulary, self._size if self._gradients is not None else 0)
        step = max(1, _ELEMENTS // max(1, largest))
        return [list(places[start : start + step]) for start in range(0, len(places), step)]

    def _pictures(self, batch: Documents, places: Sequence[int]) -> dict[str, Tensor]:
        assert self._pictured is not None  # asked by has()
        made = self._pictured.inputs([batch.rows[place] for place in places])
        return {name: value.to(batch.ids.device) for name, value in made.items()}

    def _measure(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        labels = inputs["labels"]
        values: dict[str, Tensor] = {}
        if self._gradients is not None:
            found = self._gradients(inputs)
            logits, raw = found.logits, found.gradients
            values["grand"] = gradient_norms(raw)
        else:
            logits, raw = self._states(inputs)
        values["loss"] = values["perplexity"] = mean_losses(logits, labels)
        if "el2n" in self.experts:
            values["el2n"] = error_norms(logits, labels)
        if "entropy" in self.experts:
            values["entropy"] = entropies(logits, labels)
        return unit_rows(raw if self._project is None else self._project(raw)), values

    @torch.no_grad()
    def _states(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits, and the mean state of the layer over what is no padding."""
        seen: list[Tensor] = []
        assert self._layer is not None

        def see(module: nn.Module, args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = self._layer.register_forward_hook(see)
        try:
            with evaluating(self._model):
                asked = {name: value for name, value in inputs.items() if name != "labels"}
                logits = self._model(**asked, use_cache=False).logits
        finally:
            hook.remove()
        mask = inputs["attention_mask"].unsqueeze(-1).float()
        states = seen[-1].float()[:, -mask.shape[1] :]
        return logits, (states * mask).sum(1) / mask.sum(1).clamp_min(1)


def _layer(model: nn.Module, layer: int) -> nn.Module:
    found = structure(model).layers
    inside = isinstance(layer, int) and -len(found) <= layer < len(found)
    require(inside, "layer", f"one of the {len(found)} layers, from 0 or from the end with -1", layer)
    return found[layer].module


def _texts(batch: Documents, places: Sequence[int]) -> dict[str, Tensor]:
    longest = int(batch.lengths[places].max())
    columns = torch.arange(longest, device=batch.ids.device)
    mask = (columns < batch.lengths[places][:, None]).long()
    return {
        "input_ids": batch.ids[places, :longest],
        "attention_mask": mask,
        "labels": batch.labels[places, :longest],
    }


def _pictures(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) is not None for name in ("image", "images"))
