"""Replaces the layers of a module by factored ones, and factored ones by what a deployed model needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError, require
from salience.methods.ranks._maestro_lasso import group_lasso, hierarchical_lasso, importance, kept_rank
from salience.methods.ranks._maestro_layers import FactoredLayer, factored, matrix_of

Output = Literal["dense", "factors"]


class Factors(dict[str, FactoredLayer]):
    """The factored layers of a model by path, in the order of the model."""

    @property
    def ranks(self) -> list[int]:
        """The kept rank of each layer."""
        return [layer.rank for layer in self.values()]

    def cut(self, pair: tuple[int, int] | None) -> None:
        """The next training passes run layer `pair[0]` (from 0) with `pair[1]` components and all others in full.

        Args:
            pair (tuple[int, int] | None): what `OrderedRanks.at` drew; None: all in full.
        """
        for index, layer in enumerate(self.values()):
            layer.cut = pair[1] if pair is not None and index == pair[0] else None

    def penalty(self, *, hierarchical: bool = True) -> Tensor:
        """Sum of the group lasso over the kept components of all layers, [] with graph, at least fp32."""
        lasso = hierarchical_lasso if hierarchical else group_lasso
        terms = [lasso(one.U[:, : one.rank], one.V[: one.rank]).sum() for one in self.values()]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()


def decompose(
    model: nn.Module,
    *,
    rank: int | Mapping[str, int] | None = None,
    ignore_first: int = 0,
    ignore_last: bool = False,
) -> Factors:
    """Replace, in place, linear layers and convolutions (groups 1) by factored ones that compute the same.

    Left alone: layers whose weight is frozen, tied to another module's or not floating, subclasses of `nn.Linear` and
    `nn.Conv2d`, and layers with a single row or column.

    Args:
        model (nn.Module): any module; its own class may not be a layer itself.
        rank (int | Mapping[str, int] | None): components to keep of the singular value decomposition, for all layers
            (where they have so many) or by path; None or a missing path: all.
        ignore_first (int): so many layers at the front stay dense.
        ignore_last (bool): the last layer stays dense.

    Returns:
        Factors: the new layers. An optimizer has to be built after this call.

    Raises:
        StructureError: if there is no layer to factor, or a weight is not finite; nothing is changed then.
    """
    places = find_layers(model, ignore_first=ignore_first, ignore_last=ignore_last)
    made = Factors()
    for path, (layer, _) in places.items():
        wanted = rank.get(path) if isinstance(rank, Mapping) else rank
        full = min(_matrix(layer).shape)
        # one rank for all layers: thin ones have fewer
        made[path] = factored(layer, min(rank, full) if isinstance(rank, int) else wanted)
    for path, (_, owners) in places.items():
        made[path].take_over()
        put(owners, made[path])
    return made


Places = dict[str, tuple[nn.Module, list[tuple[nn.Module, str]]]]


def find_layers(model: nn.Module, *, ignore_first: int = 0, ignore_last: bool = False) -> Places:
    """The layers that `decompose` would replace: path -> (layer, every parent with the name it has there).

    Raises:
        StructureError: if there is none.
    """
    require(ignore_first >= 0, "ignore_first", "a whole number >= 0", ignore_first)
    owners: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
    uses: dict[int, int] = {}
    for parent in model.modules():
        for name, child in parent.named_children():
            owners.setdefault(child, []).append((parent, name))
        for parameter in parent._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    every = [(path, m) for path, m in model.named_modules() if path and matrix_of(m) is not None]
    # the first and the last are counted before tied and frozen layers fall out: a tied head is still the last layer
    chosen = every[ignore_first : len(every) - 1 if ignore_last else None]
    found = {
        path: (layer, owners[layer])
        for path, layer in chosen
        if layer.weight.requires_grad and uses[id(layer.weight)] == 1 and min(_matrix(layer).shape) > 1
    }
    if not found:
        raise StructureError(
            "model must have linear layers or convolutions to decompose (trainable, not tied, not quantised, beside "
            f"the ignored ones), got none in {type(model).__name__}"
        )
    return found


def put(owners: Iterable[tuple[nn.Module, str]], layer: nn.Module) -> None:
    """Set a layer at all its places."""
    for parent, name in owners:
        setattr(parent, name, layer)


def to_dense(model: nn.Module) -> nn.Module:
    """Replace, in place, every factored layer by a dense one with the product of its kept components."""
    return _replace(model, lambda layer: layer.dense())


def to_factors(model: nn.Module) -> nn.Module:
    """Replace, in place, factored layers by two stock torch layers each, or by a dense one where that is no larger.

    A layer of rank r stays two layers, `nn.Sequential(nn.Linear(n, r, bias=False), nn.Linear(r, m))` or the two
    convolutions, if r (m + n) < m n. The result needs nothing of this package.
    """
    return _replace(model, lambda layer: layer.factors() if layer.smaller else layer.dense())


def _replace(model: nn.Module, make: Callable[[FactoredLayer], nn.Module]) -> nn.Module:
    if isinstance(model, FactoredLayer):
        return make(model)
    made: dict[FactoredLayer, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FactoredLayer):
                if child not in made:
                    made[child] = make(child)
                setattr(parent, name, made[child])
    return model


@torch.no_grad()
def shrink(
    layers: Mapping[str, FactoredLayer],
    eps: float = 1e-7,
    *,
    relative: bool = False,
    hierarchical: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, int]:
    """Drop for good the components whose tail importance is below the threshold; the first one always stays.

    What is dropped is set to zero with its state in the optimizer, so that no momentum moves it any more.

    Args:
        layers (Mapping[str, FactoredLayer]): what `decompose` returned.
        eps (float): threshold of `||U_{b:}||_F * ||V_{b:}||_F`, >= 0.
        relative (bool): multiply it by the layer's largest importance.
        hierarchical (bool): False compares `||u_b|| * ||v_b||` of each component alone.
        optimizer (Optimizer | None): that trains the factors.

    Returns:
        dict[str, int]: the rank of each layer.
    """
    for layer in layers.values():
        U, V = layer.U[:, : layer.rank], layer.V[: layer.rank]
        rank = kept_rank(importance(U, V, hierarchical=hierarchical), eps, relative=relative)
        if rank < layer.rank:
            drop_tail(layer, rank, optimizer)
    return {path: layer.rank for path, layer in layers.items()}


@torch.no_grad()
def drop_tail(layer: FactoredLayer, rank: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Cut a layer to its first `rank` components for good."""
    layer.take_over()
    layer.rank = rank
    for parameter, dim in ((layer.U, 1), (layer.V, 0)):
        state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
        for held in (parameter, *state.values()):
            if isinstance(held, Tensor) and held.shape == parameter.shape:
                held.narrow(dim, rank, held.shape[dim] - rank).zero_()


@contextmanager
def _recalibrating(model: nn.Module) -> Iterator[list[Any]]:
    norms = _batch_norms(model)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative average
            norm.train()
        yield norms
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def recalibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any] | None = None
) -> int:
    """Estimate the running statistics of batch norms anew, with the model at its kept ranks.

    Everything but the batch norms runs in eval mode; modes and momenta come back afterwards.

    Args:
        model (nn.Module): without batch norms nothing runs.
        batches (Iterable): training data, at least one batch.
        forward (Callable | None): runs `(model, batch)`; None calls the model with a mapping's entries as keywords,
            and with anything else as its only argument.

    Returns:
        int: batches that were run.
    """
    if not has_batch_norms(model):
        return 0
    count = 0
    batches = iter(batches)
    first = next(batches, None)
    require(first is not None, "batches", "at least one batch", "none")
    with _recalibrating(model):
        while first is not None:
            if forward is not None:
                forward(model, first)
            elif isinstance(first, Mapping):
                model(**first)
            else:
                model(first)
            count += 1
            first = next(batches, None)
    return count


def has_batch_norms(model: nn.Module) -> bool:
    """Whether there are batch norms with running statistics."""
    return bool(_batch_norms(model))


def _batch_norms(model: nn.Module) -> list[Any]:
    every = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    return [module for module in every if module.track_running_stats]


def _matrix(layer: nn.Module) -> Tensor:
    matrix = matrix_of(layer)
    assert matrix is not None
    return matrix
