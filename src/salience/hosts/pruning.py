"""Image tokens leave a running decoder: from a chosen layer on, the sequence really is shorter.

A method says at which layers a decision is due and how it is taken; everything else is done here, for any
transformers vision-language model and without touching its code. While a prompt is read, hidden states, rotary
embeddings and the attention mask are gathered in front of the layer, so that it and all later ones compute, and put
into the KV cache, the surviving tokens only. Later steps give each layer the mask and the positions of its own,
shorter cache. What leaves the decoder has the length that went in: a dropped token's place is filled by the last
survivor before it, so labels, losses and `generate` fit as before, and the token behind an image is predicted from
its last surviving token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, require
from salience.core.part import Part
from salience.hosts._pruned_prompts import Prompt, Segment, Tally
from salience.hosts.attention import AttentionCall, ask, observe
from salience.hosts.choices import Choice, Decide, Stage, View
from salience.hosts.encoder import Encoder
from salience.hosts.sequences import (
    gathering,
    renumbered,
    report_prompt_length,
    require_causal,
    require_dynamic,
    rows_at,
)
from salience.hosts.vision import VisionLanguage, cache_of, vision_language

_PIXELS = ("pixel_values", "pixel_values_videos")


class Pruning(Part):
    """Runs the decisions of one method on one model.

    Attributes:
        found (VisionLanguage): where the model's parts are.
        stages (list[Stage]): decisions on the newest prompt.
        prompt (dict | None): what the newest prompt's model was called with, for pictures.
        notes (dict): what else `spent` shows.
    """

    def __init__(self, found: VisionLanguage, record: Attachment, *, renumber: bool) -> None:
        super().__init__()
        self.found = found
        self.encoder = Encoder(found, record)
        self.stages: list[Stage] = []
        self.prompt: Mapping[str, Any] | None = None
        self.notes: dict[str, Any] = {}
        self._decide: dict[int, Decide] = {}
        self._renumber = renumber
        self._labels: Tensor | None = None
        self._now: Prompt | None = None
        self._prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()
        self._tally = Tally()

    # --- what a method may ask while a prompt is read ---------------------------------------------------------

    @property
    def reading(self) -> bool:
        """Whether a prompt with images is being read now."""
        return self._now is not None and self._now.reading

    @property
    def places(self) -> tuple[Tensor, Tensor, Tensor]:
        """(valid, vision, source), each [B, S], of the sequence that runs now."""
        now = self._now
        if now is None:
            raise StructureError("a prompt with images must be read now, got none")
        if now.segments:
            last = now.segments[-1]
            return last.valid, last.vision, last.source
        places = torch.arange(now.valid.shape[1], device=now.valid.device).expand_as(now.valid)
        return now.valid, now.vision, places

    def watch(self, layer: int, record: Attachment, see: Callable[[AttentionCall], None]) -> None:
        """Call `see` with the queries and keys of a layer each time that it runs over a prompt with images."""
        observe(_attention_of(self.found, layer), record, lambda call: see(call) if self.reading else None)

    # --- attaching --------------------------------------------------------------------------------------------

    def hang(self, model: nn.Module, record: Attachment, decide: Mapping[int, Decide]) -> None:
        """Register the hooks: on the whole model, its core, every layer from the first decision on, the decoder."""
        found = self.found
        self._decide = dict(sorted(decide.items()))
        self._tally.kept = dict.fromkeys(self._decide, 0)
        if model is not found.core:
            record.hook(model.register_forward_pre_hook(self._labelled, with_kwargs=True))
        record.hook(found.core.register_forward_pre_hook(self._entered, with_kwargs=True))
        record.hook(found.core.register_forward_hook(self._left, always_call=True))
        for layer in found.layers[min(self._decide) :]:
            hook = _before(self, layer.index)
            record.hook(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        record.hook(found.text.register_forward_hook(self._expanded))

    def before_forward(self, loop: Any, inputs: Mapping[str, Any]) -> None:
        self._labels = inputs.get("labels")

    def _labelled(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        self._labels = self._labels if labels is None else labels

    def _entered(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        labels, self._labels, self._now = self._labels, None, None
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = cache_of(kwargs)
        held = cache is not None and cache.get_seq_length() > 0
        if ids is None:
            raise StructureError(
                "input_ids must be given, to tell image tokens from text, got inputs_embeds alone"
            )
        vision = self.found.image_tokens(ids)
        given = kwargs.get("attention_mask")
        if held:
            pictured = any(kwargs.get(name) is not None for name in _PIXELS)
            self._now = self._resume(cache, vision, given, pictured)
            return
        if not bool(vision.any()):
            if any(kwargs.get(name) is not None for name in _PIXELS):
                raise StructureError(
                    f"prompt must hold an image token (id {self.found.image_ids[0]}) for each image, got none"
                )
            return
        valid = torch.ones_like(vision) if given is None else given
        if not isinstance(valid, Tensor) or valid.shape != ids.shape:
            got = list(valid.shape) if isinstance(valid, Tensor) else type(valid).__name__
            raise StructureError(f"attention_mask must be [B, S] like input_ids {list(ids.shape)}, got {got}")
        valid = valid.bool()
        require(bool(valid.any(-1).all()), "attention_mask", "1 somewhere in each row", "a row of padding")
        # pixels of a plain forward are noted only when they are encoded, after this
        self._now = Prompt(valid, vision & valid, labels, {**kwargs, "input_ids": ids})

    def _resume(self, cache: Any, vision: Tensor, given: Tensor | None, pictured: bool) -> Prompt | None:
        # an image id alone is a word that the model wrote
        if pictured and bool(vision.any()):
            raise ConflictError(
                "images must come with the first tokens of a cache, got image tokens behind "
                f"{cache.get_seq_length()} cached ones: start with an empty cache"
            )
        prompt = self._prompts.get(cache)
        if prompt is None:
            lengths = {layer.get_seq_length() for layer in cache.layers}
            if len(lengths) > 1:
                raise ConflictError(
                    "cache must be one that this model filled while focused, got a pruned copy"
                )
            return None
        size, held = len(vision), len(prompt.segments[-1].valid)
        if size != held:
            raise ConflictError(f"a cache of {held} rows must be continued with as many, got {size}")
        new = torch.ones_like(vision) if given is None else given[:, -vision.shape[1] :].bool()
        prompt.fresh, prompt.ready = new, set()
        return prompt

    def _left(self, core: nn.Module, args: Any, output: Any) -> None:
        self._now = None
        self.encoder.read()

    # --- one layer --------------------------------------------------------------------------------------------

    def run_before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shorten what a layer is called with; None leaves it."""
        now = self._now
        if now is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = cache_of(kwargs)
        if now.reading:
            if index == min(self._decide):
                require_dynamic(cache)
                require_causal(kwargs.get("attention_mask"), now.vision)
            if index in self._decide:
                hidden = self._reduce(index, now, hidden, kwargs)
            if cache is not None and now.segments:
                self._prompts[cache] = now
        segment = now.segment(index)
        if segment is None:
            return None
        if segment.first not in now.ready:
            now.ready.add(segment.first)
            if not now.reading:
                self._continue(segment, now.fresh, hidden, kwargs)
            segment.mask = self._mask(segment, hidden, cache, index)
        changed = kwargs | {"attention_mask": segment.mask, "position_embeddings": segment.positions}
        # gaps would be taken for the borders of packed sequences; rotary embeddings hold the positions already
        changed["position_ids"] = None
        if args:
            return (hidden, *args[1:]), changed
        return args, changed | {"hidden_states": hidden}

    def _reduce(self, index: int, now: Prompt, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        valid, vision, source = self.places
        positions = now.segments[-1].positions if now.segments else kwargs["position_embeddings"]
        layer = self.found.layers[index]
        labels = None if now.labels is None else now.labels.gather(1, source)
        still = hidden.detach()
        view = View(
            index, still, vision, valid, source, now.vision.sum(-1), labels, self._inputs(now),
            lambda: ask(layer.module, _attention_of(self.found, index), still, positions),
        )  # fmt: skip
        with torch.no_grad():
            choice = self._decide[index](view)
        keep = valid & (choice.keep | ~vision)
        self._note(index, now, source, keep & vision, choice)
        if choice.hidden is not None:
            hidden = choice.hidden.to(hidden.dtype)
        if choice.order is None and choice.hidden is None and bool((keep == valid).all()):
            return hidden
        order, kept = gathering(keep, choice.order, left=not bool((now.valid & ~now.valid[:, -1:]).any()))
        segment = Segment(index, kept, vision.gather(1, order) & kept, source.gather(1, order), None)
        hidden = rows_at(hidden, order)
        if self._renumber:
            segment.positions = self._rotary(hidden, renumbered(kept))
        else:
            segment.positions = tuple(rows_at(one.expand(len(order), -1, -1), order) for one in positions)
        now.segments.append(segment)
        return hidden

    def _inputs(self, now: Prompt) -> dict[str, Any]:
        """The prompt and its pictures, each once."""
        return {
            **now.inputs,
            **self.encoder.inputs,
            "input_ids": self.encoder.own_rows(now.inputs["input_ids"]),
        }

    def _continue(self, segment: Segment, fresh: Tensor, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """The next tokens join a segment: its mask grows, and positions go on where its own ended."""
        segment.valid = torch.cat((segment.valid, fresh), -1)
        segment.positions = kwargs["position_embeddings"]
        if self._renumber:
            places = renumbered(segment.valid)[:, -hidden.shape[1] :]
            segment.positions = self._rotary(hidden, places)

    def _mask(self, segment: Segment, hidden: Tensor, cache: Any, index: int) -> Any:
        from transformers.masking_utils import create_causal_mask

        return create_causal_mask(
            self.found.text.config,
            hidden,
            segment.valid.to(torch.int64),
            cache,
            layer_idx=index,
        )

    def _rotary(self, hidden: Tensor, places: Tensor) -> Any:
        rotary = getattr(self.found.text, "rotary_emb", None)
        if not isinstance(rotary, nn.Module):
            raise StructureError(
                f"{type(self.found.text).__name__} must have a rotary_emb to number positions anew, got none: use "
                "positions='keep'"
            )
        return rotary(hidden, position_ids=places)

    # --- the end of the decoder ---------------------------------------------------------------------------------

    def _expanded(self, text: nn.Module, args: Any, output: Any) -> Any:
        now = self._now
        if now is None or not now.reading:
            return None
        now.reading = False
        self.stages, self.prompt = now.stages, self._inputs(now)
        cache = output.get("cache", output.get("past_key_values")) if isinstance(output, dict) else None
        self._tally.add(now, len(self.found.layers), cache)
        if not now.segments:
            return None
        if cache is not None:
            self._prompts[cache] = now
            if now.segments[0].first == 0:
                report_prompt_length(cache, now.valid.shape[1] - now.segments[0].valid.shape[1])
        for segment in now.segments:
            segment.mask = None
        last = now.segments[-1]
        place = now.valid.new_full(now.valid.shape, -1, dtype=torch.int64)
        new = torch.arange(last.source.shape[1], device=place.device).expand_as(last.source)
        place.scatter_(1, last.source, torch.where(last.valid, new, place.gather(1, last.source)))
        # padding in front of the first survivor takes that survivor's state: nothing reads it
        index = place.cummax(-1).values.clamp_min(0)
        if isinstance(output, tuple):
            return rows_at(output[0], index), *output[1:]
        output["last_hidden_state"] = rows_at(output["last_hidden_state"], index)
        return output

    # --- the record ---------------------------------------------------------------------------------------------

    def _note(self, index: int, now: Prompt, source: Tensor, kept: Tensor, choice: Choice) -> None:
        def scattered(values: Tensor, empty: float | bool) -> Tensor:
            full = values.new_full(now.valid.shape, empty)
            here, _, _ = self.places
            return full.scatter_(1, source, torch.where(here, values, full.gather(1, source)))

        merged = torch.zeros_like(kept) if choice.merged is None else choice.merged & kept
        scores = None
        if choice.scores is not None:
            scores = scattered(choice.scores.float().masked_fill(~self.places[1], torch.nan), torch.nan)
        now.stages.append(Stage(index, scattered(kept, False), scattered(merged, False), scores))
        self._tally.kept[index] += int(kept.sum())

    def draw(self) -> Any:
        from salience.hosts.kept_pictures import draw, kept_pictures

        return draw({"kept": kept_pictures(self)})

    def scores(self) -> dict[str, Tensor]:
        return {f"layer {s.layer}": s.scores.cpu() for s in self.stages if s.scores is not None}

    def spent(self) -> dict[str, Any]:
        shown = self._tally.spent()
        return shown | self.notes if shown else {}


def prune(
    model: nn.Module,
    record: Attachment,
    decide: Callable[[Pruning], Mapping[int, Decide]],
    *,
    positions: str = "auto",
) -> Pruning:
    """Attach decisions to a model.

    Args:
        model (nn.Module): a vision-language model.
        record (Attachment): undoes it.
        decide (Callable): makes layer -> decision in front of it, from the part whose `found` holds the model's
            layers, whose `encoder` and `watch` let a decision see more.
        positions (str): "keep" leaves survivors their positions, "renumber" counts them 0, 1, 2, ...; "auto"
            renumbers unless positions have several axes (M-RoPE).

    Raises:
        StructureError: if the model is no vision-language model.
        ParameterError: if a layer is out of range.
        ConflictError: if another method prunes the same model, or features are added behind a layer by position.
    """
    found = vision_language(model)
    if positions == "renumber" and found.spatial_positions:
        raise ConflictError(
            f"positions must be 'keep' or 'auto' for {found.name}, whose positions have several axes, got 'renumber'"
        )
    if vars(found.text).get("_salience_pruned") is not None:
        raise ConflictError(f"image tokens of {found.name} must be pruned by one method at a time, got two")
    if vars(found.text).get("_salience_keys") is not None:
        raise ConflictError(
            f"{found.name} must be read by one method at a time, got a second beside chosen keys"
        )
    record.set(found.text, "_salience_pruned", True)
    part = Pruning(found, record, renumber=positions != "keep" and not found.spatial_positions)
    stages = decide(part)
    depth = len(found.layers)
    for layer in stages:
        require(
            0 <= layer < depth, "layers", f"in [0, {depth - 1}] for {depth} layers of {found.name}", layer
        )
    if found.first_free and min(stages) < found.first_free:
        raise ConflictError(
            f"layers must be >= {found.first_free} for {found.name}, which adds image features behind its first "
            f"{found.first_free} layers at the prompt's own places, got {min(stages)}"
        )
    part.hang(model, record, stages)
    return part


def _before(part: Pruning, index: int) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return part.run_before(index, args, kwargs)

    return hook


def _attention_of(found: VisionLanguage, layer: int) -> nn.Module:
    own = [attention.module for attention in found.layers[layer].attentions if not attention.is_cross]
    if not own:
        raise StructureError(f"layer {layer} of {found.name} must have self-attention, got none")
    return own[0]
