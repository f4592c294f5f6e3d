"""The penalty that empties the tail of a factored layer, and the importance by which components are kept.

Everything is a function of the squared column norms of U [m, r] and the squared row norms of V [r, ...].
"""

from __future__ import annotations

import torch
from torch import Tensor

from salience.core.errors import require


def component_norms(U: Tensor, V: Tensor, *, hierarchical: bool = True) -> tuple[Tensor, Tensor]:
    """Norms of both factors for each component b: of the tails b..r together, or of component b alone.

    Args:
        U (Tensor): [m, r], any float dtype.
        V (Tensor): [r, ...], one row for each component (a kernel for convolutions).
        hierarchical (bool): tails, `||U_{b:}||_F` and `||V_{b:}||_F`; False gives `||u_b||` and `||v_b||`.

    Returns:
        tuple[Tensor, Tensor]: [r] each, at least fp32, with graph. Where a norm is zero its gradient is zero too:
        the gradient of a bare square root is not a number there.
    """
    squares = (_wide(U).square().sum(0), _wide(V).flatten(1).square().sum(1))
    if hierarchical:
        squares = (_tails(squares[0]), _tails(squares[1]))
    return _root(squares[0]), _root(squares[1])


def hierarchical_lasso(U: Tensor, V: Tensor) -> Tensor:
    """Hierarchical group lasso of each component, `||U_{b:}||_F + ||V_{b:}||_F`; the penalty is its sum.

    Args:
        U (Tensor): [m, r].
        V (Tensor): [r, ...].

    Returns:
        Tensor: [r], at least fp32, never increasing, with graph.
    """
    first, second = component_norms(U, V)
    return first + second


def group_lasso(U: Tensor, V: Tensor) -> Tensor:
    """Plain group lasso of each component, `||u_b|| + ||v_b||`; arguments and result as in `hierarchical_lasso`."""
    first, second = component_norms(U, V, hierarchical=False)
    return first + second


def importance(U: Tensor, V: Tensor, *, hierarchical: bool = True) -> Tensor:
    """What the components from b on can still contribute, `||U_{b:}||_F * ||V_{b:}||_F`.

    Args:
        U (Tensor): [m, r].
        V (Tensor): [r, ...].
        hierarchical (bool): False gives `||u_b|| * ||v_b||`, which need not fall with b.

    Returns:
        Tensor: [r], at least fp32, without graph.
    """
    first, second = component_norms(U.detach(), V.detach(), hierarchical=hierarchical)
    return first * second


def keep_mask(values: Tensor, eps: float, *, relative: bool = False) -> Tensor:
    """Which components reach the threshold, `importance >= eps`: for tail importances a prefix.

    Args:
        values (Tensor): [r] importances.
        eps (float): >= 0.
        relative (bool): multiply `eps` by the largest importance first, so that it does not depend on the scale
            of the weights.

    Returns:
        Tensor: [r] bool.
    """
    require(eps >= 0, "eps", ">= 0", eps)
    bound = eps * float(values.max()) if relative else eps
    return values >= bound


def kept_rank(values: Tensor, eps: float, *, relative: bool = False) -> int:
    """The rank that shrinking leaves: everything before the first component below the threshold, at least 1.

    Arguments as in `keep_mask`.
    """
    below = (~keep_mask(values, eps, relative=relative)).nonzero()
    return max(int(below[0]), 1) if len(below) else len(values)


def _tails(values: Tensor) -> Tensor:
    return values.flip(0).cumsum(0).flip(0)


def _root(squares: Tensor) -> Tensor:
    positive = squares > 0
    # two where(): the inner one keeps the infinite slope at zero out of the graph
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), 0.0)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
