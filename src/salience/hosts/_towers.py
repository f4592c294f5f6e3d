"""What a list of blocks is for: a decoder, an encoder, or the vision, audio or text tower of a larger model."""

from __future__ import annotations

from typing import Any

from torch import nn

from salience.hosts._parts import Place, under, walk

_INPUTS = {"pixel": "vision", "input_features": "audio", "input_values": "audio"}


def stack_name(core: Place, found: Place, lists: list[Place], embeddings: Place | None) -> str:
    """What a list of blocks is for, from the config, the public getters, and what lies around it."""
    for name, coder in coders(core).items():
        if holds(coder, found.module):
            return name
    tower = _tower(core, found, lists, embeddings)
    if tower in ("vision", "audio"):
        return tower
    if not hasattr(core.module, "config"):
        return "layers"
    decoder = getter(core.module, "get_decoder")
    decodes = [decoder is not None and holds(decoder, place.module) for place in lists]
    if any(decodes) and not decodes[lists.index(found)]:
        return tower or "encoder"
    flags = (getattr(place.module, "is_causal", False) for place in walk(found.module))
    if can_generate(core.module) or any(flag is True for flag in flags):
        return "decoder"
    return "text" if tower and len(lists) > 1 else "encoder"


def _tower(core: Place, found: Place, lists: list[Place], embeddings: Place | None) -> str | None:
    """What the blocks read: "vision" (patches), "audio" (frames), "text" (tokens of their own), else None."""
    for modality, name in (("image", "vision"), ("audio", "audio")):
        encoder = getter(core.module, "get_encoder", modality=modality)
        if encoder is not None and encoder is not core.module and holds(encoder, found.module):
            return name
    main_input = str(getattr(core.module, "main_input_name", ""))  # a list of names in a few models
    native = next((name for word, name in _INPUTS.items() if word in main_input), None)
    if can_generate(core.module) and embeddings and isinstance(embeddings.module, nn.Embedding):
        native = None  # captioners start from pixels and have tokens too
    # outwards, the first module that feeds the blocks: with a convolution, or with a token embedding
    path = found.path
    while path != core.path and under(path, core.path):
        path = path.rpartition(".")[0]
        around = core.module.get_submodule(path.removeprefix(core.path).lstrip("."))
        alone = not any(other is not found and under(other.path, path) for other in lists)
        inputs = [place.module for place in walk(around, path) if not under(place.path, found.path)]
        # position embeddings of a patch or frame model are no tokens
        tokens = native is None and any(isinstance(module, nn.Embedding) for module in inputs)
        if tokens and embeddings and holds(around, embeddings.module):
            return "text" if alone else None
        if any(isinstance(module, (nn.Conv2d, nn.Conv3d)) for module in inputs):
            return native or "vision"
        if any(isinstance(module, nn.Conv1d) for module in inputs):
            return "audio"
        if tokens:
            return "text" if alone else None
    return native


def coders(core: Place) -> dict[str, nn.Module]:
    """The encoder and the decoder of an encoder-decoder; empty for any other model."""
    if not is_encoder_decoder(core.module):
        return {}
    found = {name: getter(core.module, f"get_{name}") for name in ("decoder", "encoder")}
    # the getters fall back on the model itself where it has no such part
    return {name: coder for name, coder in found.items() if coder is not None and coder is not core.module}


def is_encoder_decoder(core: nn.Module) -> bool:
    """What the config says."""
    return bool(getattr(getattr(core, "config", None), "is_encoder_decoder", False))


def getter(core: nn.Module, name: str, **options: Any) -> nn.Module | None:
    """What one of the public getters of a transformers model returns; None where it has nothing to return."""
    method = getattr(core, name, None)
    if not callable(method):
        return None
    try:
        found = method(**options)
    except (NotImplementedError, AttributeError, TypeError):
        return None  # transformers itself has no answer for this model, or an older signature
    return found if isinstance(found, nn.Module) else None


def can_generate(core: nn.Module) -> bool:
    """Whether the model writes text, as transformers tells."""
    able = getattr(core, "can_generate", None)
    return bool(able()) if callable(able) else False


def holds(outer: nn.Module, inner: nn.Module) -> bool:
    """Whether `inner` is `outer` or a module inside of it."""
    return any(module is inner for module in outer.modules())
