"""Mixtures of experts in a transformers model: where routers and fused expert tensors are, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from salience.core.errors import StructureError, TargetError
from salience.hosts.transformers import structure, unwrap

# the names under which a config says how many experts a layer has
_CONFIG_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Mixture:
    """One layer's routed experts.

    Attributes:
        path (str): of the block that holds router and experts.
        layer (nn.Module): the decoder layer around it.
        block (nn.Module): called with the normed residual stream.
        router (nn.Module): gives (logits, weights [T, k], ids [T, k]).
        experts (nn.Module): holds the weights as [E, ., .], called with (hidden [T, d], ids, weights).
    """

    path: str
    layer: nn.Module = field(repr=False)
    block: nn.Module = field(repr=False)
    router: nn.Module = field(repr=False)
    experts: nn.Module = field(repr=False)


@dataclass(frozen=True)
class Mixtures:
    """All of a model's mixtures, which have the same number of experts.

    Attributes:
        core (nn.Module): the model without wrappers.
        config (Any): the config that says the number of experts.
        config_name (str): under which name.
        layers (tuple[Mixture, ...]): in the order in which they run.
        experts (int): E, routed experts in each layer.
        top_k (int): how many of them each token gets.
        groups (int): G, from which the router chooses groups first; 1 without groups.
        chosen_groups (int): how many groups it chooses.
        per_group (int): the fewest experts that a group needs for its score.
    """

    core: nn.Module = field(repr=False)
    config: Any = field(repr=False)
    config_name: str
    layers: tuple[Mixture, ...]
    experts: int
    top_k: int
    groups: int
    chosen_groups: int
    per_group: int


def find_mixtures(model: nn.Module) -> Mixtures:
    """Find every mixture of experts by its structure: a router beside [E, ., .] tensors.

    Args:
        model (nn.Module): of transformers, perhaps wrapped.

    Returns:
        Mixtures: at least one layer.

    Raises:
        StructureError: if there are none, or they are not held as fused tensors of one number of experts.
        TargetError: if their weights are integers or quantised.
    """
    core = unwrap(model)
    _refuse_quantised(core)
    found = []
    for layer in structure(model).layers:
        for mlp in layer.mlps:
            if mlp.kind == "experts" and mlp.router is not None and mlp.experts is not None:
                found.append(
                    Mixture(mlp.path, layer.module, mlp.module, mlp.router.module, mlp.experts.module)
                )
    name = type(core).__name__
    if not found:
        raise StructureError(f"model must have layers with a router and experts, got {name} without any")
    for one in found:
        _check(one)
    numbers = {rows(one.router)["weight"].shape[0] for one in found}
    if len(numbers) != 1:
        raise StructureError(f"every layer must have as many experts, got {sorted(numbers)} in {name}")
    experts = numbers.pop()
    config, config_name = _config(core, experts)
    router = found[0].router
    top_k = next(
        (value for key in ("top_k", "num_experts_per_tok") if (value := getattr(router, key, None))), 0
    )
    top_k = int(top_k or config.num_experts_per_tok)
    groups, chosen, per_group = _groups(router)
    return Mixtures(core, config, config_name, tuple(found), experts, top_k, groups, chosen, per_group)


def rows(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers that have one row for each expert, by name."""
    held: list[tuple[str, Tensor | None]] = [*module._parameters.items(), *module._buffers.items()]
    own = {name: value for name, value in held if value is not None}
    first = max((value.shape[0] for value in own.values() if value.ndim > 1), default=0)
    return {name: value for name, value in own.items() if value.ndim >= 1 and value.shape[0] == first}


def _check(one: Mixture) -> None:
    router, experts = rows(one.router), rows(one.experts)
    number = router["weight"].shape[0] if "weight" in router else -1
    fused = [value for value in experts.values() if value.ndim == 3]
    if len(fused) < 2 or any(value.shape[0] != number for value in experts.values()):
        shown = {name: list(value.shape) for name, value in {**router, **experts}.items()}
        raise StructureError(
            f"experts of {one.path} must be fused tensors [E, ., .] beside a router weight [E, d], got {shown}"
        )
    for name, value in {**router, **experts}.items():
        if not value.is_floating_point():
            raise TargetError(
                f"experts must have floating point weights, got {value.dtype} in {one.path}.{name}"
            )


def _refuse_quantised(core: nn.Module) -> None:
    config = getattr(core, "config", None)
    if getattr(core, "is_quantized", False) or getattr(config, "quantization_config", None) is not None:
        raise TargetError(
            "model must have floating point weights, got a quantised one: prune before quantising"
        )
    for name, value in core.named_parameters():
        if "expert" in name and not value.is_floating_point():
            raise TargetError(f"experts must have floating point weights, got {value.dtype} in {name}")


def _config(core: nn.Module, experts: int) -> tuple[Any, str]:
    whole: Any = getattr(core, "config", None)
    candidates = [whole.get_text_config(), whole] if hasattr(whole, "get_text_config") else [whole]
    for config in candidates:
        for name in _CONFIG_NAMES:
            # an alias stands in the class's attribute_map, the real name among the instance's values
            if vars(config or object).get(name) == experts:
                return config, name
    raise StructureError(
        f"config must say the number of experts ({experts}) as one of {', '.join(_CONFIG_NAMES)}"
    )


def _groups(router: nn.Module) -> tuple[int, int, int]:
    """(groups, groups chosen, fewest experts of a group) of a router that limits tokens to groups."""
    groups = int(getattr(router, "num_group", None) or getattr(router, "n_group", None) or 1)
    chosen = int(getattr(router, "topk_group", None) or 1)
    if getattr(router, "topk_method", None) == "greedy":
        return 1, 1, 1
    # with a correction bias a group's score is the sum of its two best experts
    return groups, chosen, 2 if "e_score_correction_bias" in router._buffers else 1
