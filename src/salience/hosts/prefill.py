"""Reads prompts with chosen keys: hangs a choice of key blocks into every attention layer of a causal decoder.

The layers' own projections, norms, rotary embeddings and caches run as they are; only the attention function of each
is stood in for, by the kernels over the keys that a method chose. It is called through transformers' attention
interface, so one engine serves every decoder of the library, and the model's mask is read as what it says of padding:
no map of T x T is ever built. Rows without padding go to the method; what it returns is counted, sampled and drawn.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from salience import kernels
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError
from salience.core.part import Part
from salience.hosts.attention import AttentionCall, intercept
from salience.hosts.kept_keys import LayerRecord, sampled
from salience.hosts.masks import LightMasks, Stretch, given_padding, stretches
from salience.hosts.prompts import Prompt
from salience.hosts.transformers import structure, unwrap
from salience.kernels import KeyBlocks

__all__ = ["Choose", "Prefill", "Prompt", "prefill"]


Choose = Callable[[Prompt], KeyBlocks | None]


@dataclass
class _Thread:
    """State of a layer and its samples, and the newest key at which it stopped."""

    length: int
    newest: Tensor
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Prefill(Part):
    """The working state of a method on key blocks.

    Attributes:
        choose (Choose): what each layer attends to while a prompt is read.
        decodes (bool): whether single new tokens are asked for, too.
        depth (int): layers of the decoder.
        indices (tuple[int, ...]): those with attention.
        layers (dict[int, LayerRecord]): what was chosen in the newest prompt, by layer.
        sampling (bool): whether recall and maps are sampled; without, only pairs and times are counted.
        timed (bool): wait for a GPU before and behind choosing and attending, so that their times tell something.
    """

    choose: Choose
    decodes: bool
    depth: int
    indices: tuple[int, ...]
    layers: dict[int, LayerRecord] = field(default_factory=dict, init=False)
    sampling: bool = field(default=True, init=False)
    timed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._padding: Tensor | None = None
        self._shared: dict[int | None, dict[str, Any]] = {}
        self._threads: dict[tuple[int, int | None], _Thread] = {}
        self._read: tuple[Any, list[Stretch]] | None = None
        self._renewed: set[int] = set()
        self._told = False
        self._counts = {"prompts": 0, "tokens": 0}

    def begin_forward(self, padding: Tensor | None) -> None:
        """The decoder starts to run."""
        self._padding, self._read = padding, None
        self._shared.clear()
        self._renewed.clear()

    def attend(self, layer: int, call: AttentionCall) -> tuple[Tensor, None]:
        """In the place of a layer's attention function: [B, Q, H, Dv], and no map."""
        if call.options.get("dropout"):
            raise ConflictError(
                f"attention dropout must be 0 for chosen key blocks, got {call.options['dropout']}: model.eval()"
            )
        batch, heads, queries, _ = call.query.shape
        window = call.options.get("sliding_window")
        found = self._stretches(call, window)
        if len(found) == 1 and found[0].sample is None:
            return self._part(layer, call, found[0], window).transpose(1, 2).contiguous(), None
        out = call.query.new_zeros(batch, heads, queries, call.value.shape[-1])
        for stretch in found:
            # not in place on what autograd has already seen: a copy of the zeros takes each sample
            out = out.clone() if out.requires_grad else out
            out[stretch.samples, :, stretch.rows] = self._part(layer, call, stretch, window)
        return out.transpose(1, 2).contiguous(), None

    def _stretches(self, call: AttentionCall, window: int | None) -> list[Stretch]:
        queries, keys = call.query.shape[2], call.key.shape[2]
        mask = call.mask
        if mask is None and self._padding is not None:
            # a name without a builder of masks: the padding would be attended to
            mask = self._padding[:, -keys:]
        if hasattr(mask, "mask_mod"):
            raise StructureError("attention mask must be padding or a map of rows, got flex_attention's own")
        if mask is not None and mask.dim() == 4:
            return stretches(mask, queries, keys, window)
        if self._read is None or self._read[0] is not mask or keys != self._read[1][0].keys.stop:
            self._read = (mask, stretches(mask, queries, keys, window))
        return self._read[1]

    def _part(self, layer: int, call: AttentionCall, stretch: Stretch, window: int | None) -> Tensor:
        """Attention of one stretch, [b, H, Q', Dv]."""
        query = call.query[stretch.samples, :, stretch.rows]
        key = call.key[stretch.samples, :, stretch.keys]
        value = call.value[stretch.samples, :, stretch.keys]
        softcap = call.options.get("softcap")
        slides = window is not None and window < key.shape[2]
        if query.shape[2] == 0:
            return query.new_zeros(*query.shape[:3], value.shape[-1])
        if slides or (query.shape[2] == 1 and not (self.decodes and key.shape[2] > 1)):
            limit = window if slides else None
            if query.shape[2] > 1:
                self._count(layer, query, key)
            return kernels.dense.attend(
                query, key, value, scaling=call.scaling, softcap=softcap, window=limit
            )
        prompt = Prompt(
            query.detach(),
            key.detach(),
            value.detach(),
            call.scaling,
            softcap,
            layer,
            self.depth,
            self._shared.setdefault(stretch.sample, {}),
            self._state(layer, stretch.sample, query, key),
        )
        started = self._now(query)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            blocks = self.choose(prompt)
        chosen = self._now(query)
        if blocks is None:
            kernel = "dense"
            out = kernels.dense.attend(query, key, value, scaling=call.scaling, softcap=softcap)
        else:
            kernel, why = kernels.which(query, key, value, blocks)
            if why and not self._told:
                self._told = True
                warnings.warn(f"attention over chosen keys runs by {kernel}: {why}", stacklevel=2)
            out = kernels.attend(query, key, value, blocks, scaling=call.scaling, softcap=softcap)
        if query.shape[2] > 1:
            self._count(layer, query, key)
            self._record(prompt, blocks, kernel, chosen - started, self._now(query) - chosen)
        return out

    def _now(self, states: Tensor) -> float:
        if self.timed and states.device.type != "cpu":
            torch.accelerator.synchronize(states.device)
        return time.perf_counter()

    def _state(self, layer: int, sample: int | None, query: Tensor, key: Tensor) -> dict[str, Any]:
        if not self.decodes:
            return {}
        offset, newest = key.shape[2] - query.shape[2], key[:, :, -1].detach().clone()
        thread = self._threads.get((layer, sample))
        same = (
            thread is not None
            and thread.length == offset > 0
            and torch.equal(thread.newest, key[:, :, offset - 1])
        )
        if thread is None or not same:
            thread = _Thread(key.shape[2], newest)
        thread.length, thread.newest = key.shape[2], newest
        self._threads[layer, sample] = thread
        return thread.state

    def _count(self, layer: int, query: Tensor, key: Tensor) -> None:
        """A prompt begins to be read where its first layer sees no keys before its queries."""
        if query.shape[2] != key.shape[2]:
            return
        if layer not in self._renewed:
            self._renewed.add(layer)
            self.layers.pop(layer, None)
        if layer == min(self.indices):
            self._counts["prompts"] += query.shape[0]
            self._counts["tokens"] += query.shape[0] * query.shape[2]

    @torch.no_grad()
    def _record(
        self, prompt: Prompt, blocks: KeyBlocks | None, kernel: str, choosing: float, attending: float
    ) -> None:
        queries, keys = prompt.query.shape[2], prompt.key.shape[2]
        whole = KeyBlocks.everything(queries, keys, batch=len(prompt.query), device=prompt.query.device)
        record = self.layers.setdefault(prompt.layer, LayerRecord(prompt.layer))
        recall, shown = sampled(prompt, blocks) if self.sampling else (None, None)
        record.add(
            kernel=kernel,
            pairs=(whole if blocks is None else blocks).pairs().sum(0).expand(prompt.query.shape[1]),
            whole=float(whole.pairs().sum()),
            recall=recall,
            map=shown,
            choosing=choosing,
            attending=attending,
        )

    def scores(self) -> dict[str, Tensor]:
        return {
            f"layer {layer} {name}": value
            for layer, record in sorted(self.layers.items())
            for name, value in (("kept share", record.share), ("recall", record.recall))
        }

    def spent(self) -> dict[str, Any]:
        if not self._counts["prompts"]:
            return {}
        records = [record for _, record in sorted(self.layers.items())]
        if not records:
            return {**self._counts}
        kept = sum(float(record.pairs.sum()) for record in records)
        whole = sum(record.whole * len(record.pairs) for record in records)
        return {
            **self._counts,
            "kept share": round(kept / whole, 4),
            "estimated recall": round(sum(float(r.recall.mean()) for r in records) / len(records), 4),
            "kernel": ", ".join(sorted({record.kernel for record in records})),
            "seconds choosing": round(sum(record.choosing for record in records), 4),
            "seconds attending": round(sum(record.attending for record in records), 4),
        }

    def draw(self) -> Any:
        from salience.core.key_maps import draw

        records = [record for _, record in sorted(self.layers.items())]
        return draw(records) if records else None


def prefill(model: nn.Module, record: Attachment, choose: Choose, *, decodes: bool = False) -> Prefill:
    """Attach a choice of keys to every self-attention layer of a causal decoder.

    Layers with a sliding window keep it, and are asked only while all keys are inside; soft caps are respected.

    Args:
        model (nn.Module): a transformers model, bare or wrapped by PEFT.
        record (Attachment): undoes it.
        choose (Callable): given a `Prompt` with Q > 1, returns the lists or None for all keys; called without graph.
        decodes (bool): call it for single new tokens (Q = 1) as well.

    Raises:
        StructureError: if the model has an attention that lists of keys cannot serve: cross or bidirectional
            attention, position biases, attention sinks, latent attention, chunks, or one of its own making.
        ConflictError: if another method chooses keys or drops tokens in the same model.
    """
    found = structure(model)
    layers = [(layer.index, attention) for layer in found.layers for attention in layer.attentions]
    name = type(unwrap(model)).__name__
    if not layers:
        raise StructureError(f"attention must be found in the layers, got a {name} without any")
    if "encoder" in found.main:
        raise StructureError(
            f"attention must be causal for chosen key blocks, got {name} with an encoder, whose attention is "
            "bidirectional, and cross-attention"
        )
    for index, attention in layers:
        _refuse(name, index, attention)
    path = found.stack(found.main[-1]).path.rpartition(".")[0]
    owner = model.get_submodule(path)
    for mark, what in (("_salience_keys", "choose keys"), ("_salience_pruned", "drop tokens")):
        if vars(owner).get(mark) is not None:
            raise ConflictError(
                f"{name} must be read by one method at a time, got a second beside one that {what}s"
            )
    part = Prefill(choose, decodes, len(found.layers), tuple(index for index, _ in layers))
    for index, attention in layers:
        intercept(attention.module, record, _stand_in(part, index))
    _watch(owner, record, part)
    record.set(owner, "_salience_keys", True)
    return part


def _stand_in(part: Prefill, index: int) -> Callable[..., Any]:
    def act(call: AttentionCall, original: Callable[[], Any]) -> Any:
        return part.attend(index, call)

    return act


def _watch(owner: nn.Module, record: Attachment, part: Prefill) -> None:
    """While the decoder runs, and only then, masks come as what they say of padding."""
    running: list[LightMasks] = []

    def enter(entered: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if entered is owner:  # a deep copy of it carries this hook as well
            part.begin_forward(given_padding(owner, args, kwargs))
            config: Any = owner.config
            running.append(LightMasks(config._attn_implementation).__enter__())

    def leave(left: nn.Module, args: Any, output: Any) -> None:
        if left is owner and running:
            running.pop().__exit__()

    record.hook(owner.register_forward_pre_hook(enter, with_kwargs=True))
    record.hook(owner.register_forward_hook(leave, always_call=True, prepend=True))


def _refuse(name: str, index: int, attention: Any) -> None:
    """What lists of keys cannot serve, told before anything runs."""
    module, config = attention.module, getattr(attention.module, "config", None)
    reason = None
    if attention.is_cross:
        reason = "cross-attention"
    elif not getattr(module, "is_causal", True):
        reason = "bidirectional attention"
    elif getattr(module, "kv_lora_rank", None) is not None:
        reason = "latent attention (MLA)"
    elif getattr(module, "sinks", None) is not None:
        reason = "learned attention sinks"
    elif getattr(config, "attention_chunk_size", None) is not None:
        reason = "attention within chunks"
    elif getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        reason = "ALiBi position biases"
    if reason is not None:
        raise StructureError(
            f"attention must be causal self-attention without biases for chosen key blocks, got {reason} in layer "
            f"{index} of {name}"
        )
