"""What DAREx does to one tensor: whether it is pruned, its mask, the division, and the analytic q of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.core.errors import require
from salience.hosts._streaming import as_rows, row_blocks
from salience.methods.weights._darex_divisors import row_divisors
from salience.methods.weights._darex_masks import Rows, masks, rows_of

if TYPE_CHECKING:
    from salience.methods.weights.darex import DAREx

_BLOCKS = ("self_attn", "mlp")
_ETA = 0.45  # the official code's default


def in_scope(names: Iterable[str], method: DAREx) -> list[str]:
    """Of these tensors, in their order, those whose delta is pruned; the others are copied as they are."""
    names = list(names)
    decoder = method.scope == "auto" and any("self_attn" in name.split(".") for name in names)
    return [
        name
        for name in names
        if not any(word in name for word in method.heads)
        and (not decoder or any(word in name.split(".") for word in _BLOCKS))
    ]


def sparsified(
    name: str,
    base: Tensor,
    tuned: Tensor,
    method: DAREx,
    *,
    q: float | None = None,
    norms: Tensor | None = None,
) -> tuple[Tensor, int]:
    """`base + mask * (tuned - base) / q` of one tensor.

    Args:
        name (str): of the tensor, for its mask.
        base (Tensor): any float dtype.
        tuned (Tensor): of the same shape.
        method (DAREx): says what is kept.
        q (float | None): divisor; None takes the method's own.
        norms (Tensor | None): [in] input norms for "wanda".

    Returns:
        tuple: the tensor in the base's dtype and on its device, and how many entries of the delta were kept.
    """
    before, after = rows_of(base), rows_of(tuned)
    merged, kept = base.detach().clone().reshape(as_rows(base.shape)), 0

    def delta(start: int, stop: int) -> Tensor:
        return after(start, stop).cpu().float() - before(start, stop).cpu().float()

    for start, stop, mask in kept_blocks(name, base.shape, delta, method, norms):
        change = delta(start, stop)
        block = divided(before(start, stop).cpu(), change, mask, method.divisor if q is None else q)
        merged[start:stop] = block.to(merged.device)
        kept += int(mask.sum())
    return merged.reshape(base.shape), kept


def kept_blocks(
    name: str, shape: Any, delta: Rows, method: DAREx, norms: Tensor | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """The masks of one tensor, block by block, as `method` asks; see `masks`."""
    return masks(
        name,
        shape,
        delta,
        keep=method.keep,
        score=method.score,
        columns=method.columns,
        seed=method.seed,
        norms=norms,
    )


def divided(base: Tensor, delta: Tensor, mask: Tensor, q: float) -> Tensor:
    """`base + mask * delta / q`, in fp32 (float64 stays), in the base's dtype; where dropped `base` to the bit."""
    wide = base if base.dtype == torch.float64 else base.float()
    return torch.where(mask, (wide + delta / q).to(base.dtype), base)


def layer_divisor(
    name: str, shape: Any, delta: Rows, means: Tensor, method: DAREx, bias: Tensor | None = None
) -> float:
    """The analytic q of one weight [out, in]: the mean over its rows.

    Args:
        name (str): not used but to name the layer in errors.
        shape (Any): of the weight.
        delta (Rows): rows of its delta.
        means (Tensor): [in], signed mean of the inputs over all calibration tokens.
        method (DAREx): eta, gamma, stop share and sign.
        bias (Tensor | None): [out] delta of the bias: one more column.
    """
    require(
        len(means) == as_rows(shape)[1], f"input means of {name}", f"{as_rows(shape)[1]} long", len(means)
    )
    if method.keep == 1:
        return 1.0
    sums, squares = [], []
    for start, stop in row_blocks(shape):
        c = delta(start, stop).double() * means.double()
        if bias is not None:
            c = torch.cat([c, bias[start:stop, None].double()], 1)
        sums.append(c.sum(1))
        squares.append(c.square().sum(1))
    rows = row_divisors(
        torch.cat(sums),
        torch.cat(squares),
        method.keep,
        eta=_ETA if method.eta is None else method.eta,
        gamma=method.gamma,
        stop_share=method.stop_share,
        bias_sign=method.bias_sign,
    )
    return min(1.0, max(method.keep, float(rows.mean())))
