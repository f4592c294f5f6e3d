"""Where the parts of a transformers model are: stacks of layers, attentions, MLPs, embeddings, head, adapters, loss.

Everything is found in the module tree, by shapes, types and position, so that any model of the library works,
also one that is newer than this file, wrapped by PEFT or by DistributedDataParallel, or written by the user. Every
path is relative to the model that was given: `model.get_submodule(path)` is the module.

```python
found = structure(model)
for layer in found.layers:
    print(layer.path, [attention.num_heads for attention in layer.attentions], [mlp.kind for mlp in layer.mlps])
```
"""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import nn

from salience.core.errors import StructureError
from salience.hosts._mlps import Mlp, find_mlps
from salience.hosts._parts import (
    Attention,
    Heads,
    Place,
    find_attentions,
    has_attention,
    join,
    under,
    walk,
    width,
)
from salience.hosts._towers import can_generate, coders, getter, holds, is_encoder_decoder, stack_name
from salience.hosts._tree import (
    blocks,
    list_by_hand,
    path_of,
    size,
    stack_lists,
    tree,
    unwrap,
    without_wrappers,
)

__all__ = [
    "Attention",
    "Heads",
    "Layer",
    "LossKind",
    "Mlp",
    "Place",
    "Stack",
    "Structure",
    "activation_modules",
    "adapter_layers",
    "layer_index",
    "loss_kind",
    "structure",
    "takes_labels",
    "unwrap",
]

LossKind = Literal["causal", "seq2seq", "masked", "token", "sequence", "question"]

# the first of these that a model has is the one that methods act on
_MAIN = ("decoder", "text", "encoder", "vision", "audio", "layers")


@dataclass(frozen=True)
class Layer:
    """One block of a stack.

    Attributes:
        index (int): its position in its stack, from 0.
        path (str): where it is.
        module (nn.Module): the block.
        attentions (tuple[Attention, ...]): self-attention first, then cross-attention; empty without attention.
        mlps (tuple[Mlp, ...]): sets of experts first.
    """

    index: int
    path: str
    module: nn.Module = field(repr=False)
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another.

    Attributes:
        name (str): "decoder", "encoder", "text", "vision", "audio", or "layers" where the model does not tell;
            a smaller second one of a kind is "vision_2".
        path (str): the list that holds them.
        layers (tuple[Layer, ...]): in the order of the list.
    """

    name: str
    path: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Structure:
    """What was found in a model.

    Attributes:
        stacks (tuple[Stack, ...]): in the order of the module tree.
        main (tuple[str, ...]): names of the stacks that make up `layers`.
        embeddings (Place | None): the input token embedding, or the patch embedding of a vision model.
        head (Place | None): the projection to the vocabulary, or to the classes of a classifier.
        tied (bool): the head's weight is the embedding's weight.
    """

    stacks: tuple[Stack, ...]
    main: tuple[str, ...]
    embeddings: Place | None
    head: Place | None
    tied: bool

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The main stack: the text decoder where there is one, else the encoder; for seq2seq encoder then decoder."""
        return tuple(layer for name in self.main for layer in self.stack(name).layers)

    def stack(self, name: str) -> Stack:
        """The stack of that name.

        Raises:
            StructureError: if there is none.
        """
        for stack in self.stacks:
            if stack.name == name:
                return stack
        names = ", ".join(stack.name for stack in self.stacks)
        raise StructureError(f"stack must be one of {names}, got {name!r}")

    @cached_property
    def _positions(self) -> dict[str, int]:
        """Path of a layer -> its position in `layers`, with wrappers and without."""
        exact = {layer.path: position for position, layer in enumerate(self.layers)}
        return {without_wrappers(path): position for path, position in exact.items()} | exact


def structure(model: nn.Module, *, layers: str | None = None) -> Structure:
    """Find the stacks, attentions, MLPs, embeddings and head of a model.

    Args:
        model (nn.Module): a transformers model, bare or wrapped by PEFT, torch.compile or DistributedDataParallel,
            or any module that keeps its blocks in a list.
        layers (str | None): dotted path of the list of blocks, where it is not found or not the right one.

    Raises:
        StructureError: if there is no list of blocks; shows the module tree.
    """
    core = Place(path_of(model, inner := unwrap(model)) or "", inner)
    lists = [list_by_hand(model, core, layers)] if layers is not None else stack_lists(core)
    if not lists:
        raise StructureError(
            f"model must hold its blocks in a ModuleList, got none in {type(inner).__name__}; "
            f'say where they are with layers="path.to.blocks". The module tree is\n{tree(model)}'
        )
    embeddings = _embeddings(core, lists)
    names = _unique([stack_name(core, found, lists, embeddings) for found in lists], lists)
    stacks = tuple(_stack(core, name, found) for name, found in zip(names, lists, strict=True))
    head = _head(core, lists)
    return Structure(stacks, _main(core, names), embeddings, head, _tied(embeddings, head))


def activation_modules(model: nn.Module, *, layers: str | None = None) -> list[tuple[str, nn.Module]]:
    """Every MLP non-linearity that is a module, as (path, module), in the order of stacks and layers.

    Raises:
        StructureError: if the model calls its non-linearities as functions, so that there is nothing to act on.
    """
    found = structure(model, layers=layers)
    parts = {
        id(act.module): act
        for stack in found.stacks
        for layer in stack.layers
        for mlp in layer.mlps
        for act in mlp.activations
    }
    if not parts:
        raise StructureError(
            f"MLP activations must be modules, got none in the {sum(len(s.layers) for s in found.stacks)} layers of "
            f"{type(unwrap(model)).__name__}; give each MLP its non-linearity as a child module, for example "
            f"self.act_fn = nn.GELU(). The module tree is\n{tree(model)}"
        )
    return [(part.path, part.module) for part in parts.values()]


def layer_index(found: Structure, name: str) -> int | None:
    """The position in `found.layers` of the layer that a parameter or module belongs to.

    Args:
        found (Structure): of the model, wrapped or not.
        name (str): full name of a parameter or module, as the model or what it wraps gives it.

    Returns:
        int | None: None for what is in no layer of the main stack: embeddings, final norm, head, vision tower.
    """
    for candidate in (name, without_wrappers(name)):
        pieces = candidate.split(".")
        for end in range(len(pieces), 0, -1):
            position = found._positions.get(".".join(pieces[:end]))
            if position is not None:
                return position
    return None


def adapter_layers(model: nn.Module, *, layers: str | None = None) -> dict[int, list[tuple[str, nn.Module]]]:
    """The PEFT tuner layers with a scaling, as (path, module), by position of their layer in the main stack.

    Tuner layers outside of the main stack (on embeddings, head or vision tower) are left out; a layer without
    adapters has no entry.

    Raises:
        StructureError: if the main stack holds no such tuner layer.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = structure(model, layers=layers)
    grouped: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer) or not isinstance(getattr(module, "scaling", None), dict):
            continue
        position = layer_index(found, path)
        if position is not None:
            grouped.setdefault(position, []).append((path, module))
    if not grouped:
        raise StructureError(
            f"model must carry PEFT adapters with a scaling in its layers, got none in {type(model).__name__}; "
            "wrap it first: peft.get_peft_model(model, peft.LoraConfig(...))"
        )
    return dict(sorted(grouped.items()))


def loss_kind(model: nn.Module) -> LossKind:
    """How a model's labels meet its logits.

    "causal": [B, T] labels are shifted by one against [B, T, V] logits, vision-language models included.
    "seq2seq": [B, T] decoder labels, no shift. "masked", "token": [B, T] labels, no shift.
    "sequence": [B] labels (or [B, C]), also of images. "question": start and end positions.

    Raises:
        StructureError: if the model has no loss: it is a bare backbone, or its loss is none of these.
    """
    from transformers.loss import loss_utils

    core = unwrap(model)
    named = getattr(core, "loss_type", None)
    kinds: dict[Any, LossKind] = {
        loss_utils.ForCausalLMLoss: "causal",
        loss_utils.ForMaskedLMLoss: "masked",
        loss_utils.ForTokenClassification: "token",
        loss_utils.ForSequenceClassificationLoss: "sequence",
        loss_utils.ForQuestionAnsweringLoss: "question",
    }
    kind = kinds.get(loss_utils.LOSS_MAPPING.get(named))
    if named is None and _output_embeddings(core) is not None:
        # classes named before the pattern (GPT2LMHeadModel) state no loss: a head that generates is causal
        kind = "causal" if can_generate(core) else "masked"
    if kind is None:
        raise StructureError(
            f"model must have a loss on labels, got {type(core).__name__} with loss_type {named!r}; load it with a "
            "head (AutoModelForCausalLM, AutoModelForMaskedLM, ...), or set model.loss_type to a key of "
            "transformers.loss.loss_utils.LOSS_MAPPING"
        )
    # the decoder's inputs are already shifted there, whichever of the two losses the model takes
    if kind in ("causal", "masked") and is_encoder_decoder(core):
        return "seq2seq"
    return kind


def takes_labels(model: nn.Module) -> bool:
    """Whether a model takes `labels` and so gives its loss itself; a plain module that returns logits does not."""
    taken = inspect.signature(unwrap(model).forward).parameters
    return "labels" in taken or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())


def _stack(core: Place, name: str, found: Place) -> Stack:
    # the position decides in encoder-decoders: every attention but a decoder layer's first reads the encoder
    in_decoder = name == "decoder" and bool(coders(core))
    layers = []
    for index, block in enumerate(blocks(found)):
        attentions = find_attentions(block, in_decoder=in_decoder)
        layers.append(Layer(index, block.path, block.module, attentions, find_mlps(block, attentions)))
    return Stack(name, found.path, tuple(layers))


def _main(core: Place, names: list[str]) -> tuple[str, ...]:
    if coders(core) and {"encoder", "decoder"} <= set(names):
        return "encoder", "decoder"
    return (next((name for name in _MAIN if name in names), names[0]),)


def _unique(kinds: list[str], lists: list[Place]) -> list[str]:
    """Names for stacks of these kinds: the largest with attention is "vision", the next "vision_2"."""
    names = [""] * len(kinds)
    seen: Counter[str] = Counter()
    ranks = [(has_attention(found.module), size(found.module)) for found in lists]
    for place in sorted(range(len(kinds)), key=lambda place: ranks[place], reverse=True):
        kind = kinds[place]
        seen[kind] += 1
        names[place] = kind if seen[kind] == 1 else f"{kind}_{seen[kind]}"
    return names


def _embeddings(core: Place, lists: list[Place]) -> Place | None:
    module = getter(core.module, "get_input_embeddings")
    if module is None:
        outside = (part for part in walk(core.module) if not any(holds(x.module, part.module) for x in lists))
        module = next((part.module for part in outside if isinstance(part.module, nn.Embedding)), None)
    return _part(core, module)


def _head(core: Place, lists: list[Place]) -> Place | None:
    """The output embedding, else the last projection outside of the backbone (a classifier), or after the blocks."""
    module = _output_embeddings(core.module)
    if module is not None:
        return _part(core, module)
    base = getattr(core.module, "base_model", None)
    if base is core.module and getattr(base, "loss_type", None) is None:
        return None  # a backbone ends in hidden states
    behind = list(walk(core.module, core.path))
    if isinstance(base, nn.Module) and base is not core.module:
        inside = {id(module) for module in base.modules()}
        behind = [part for part in behind if id(part.module) not in inside]
    else:
        last = max(place for place, part in enumerate(behind) if under(part.path, lists[-1].path))
        behind = behind[last + 1 :]
    return next((part for part in reversed(behind) if width(part.module)), None)


def _tied(embeddings: Place | None, head: Place | None) -> bool:
    if embeddings is None or head is None:
        return False
    first, second = (_innermost(part.module) for part in (embeddings, head))
    weight = getattr(first, "weight", None)
    return weight is not None and weight is getattr(second, "weight", None)


def _innermost(module: nn.Module) -> nn.Module:
    """What a tuner layer wraps, at any depth; the module itself without one."""
    inner = getattr(module, "base_layer", None)
    return _innermost(inner) if isinstance(inner, nn.Module) else module


def _part(core: Place, module: Any) -> Place | None:
    path = path_of(core.module, module) if isinstance(module, nn.Module) else None
    return None if path is None else Place(join(core.path, path), module)


def _output_embeddings(core: nn.Module) -> nn.Module | None:
    return getter(core, "get_output_embeddings")
