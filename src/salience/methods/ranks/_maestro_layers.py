"""Layers written as a sum of rank-1 components, W = U V, that can run with their first components only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.core.errors import StructureError, require


class FactoredLayer(nn.Module):
    """What factored linear layers and convolutions share: two factors, a bias, and how many components count.

    `U` [m, r] and `V` [r, n] (convolutions: [r, cin, k, k]) train in place of the weight. In training mode the layer
    runs with its first `cut` components if a cut is set, otherwise, and always in eval mode, with its first `rank`.

    Args:
        dense (nn.Module): the layer to factor; it is emptied when the factors take over, filled when they end.
        rank (int | None): components to keep of the singular value decomposition; None: all, min(m, n).

    Attributes:
        cut (int | None): components of the next training passes.
        positions (int): output positions of one sample in the last pass (1 for linear layers).
    """

    bias: nn.Parameter | None
    kept: Tensor

    def __init__(self, dense: nn.Module, rank: int | None = None) -> None:
        super().__init__()
        matrix = matrix_of(dense)
        assert matrix is not None
        full = min(matrix.shape)
        require(rank is None or 1 <= rank <= full, "rank", f"in [1, {full}]", rank)
        U, V = split(matrix, rank)
        weight: Any = dense.weight
        dtype, trains = weight.dtype, weight.requires_grad
        self.U = nn.Parameter(U.to(dtype), requires_grad=trains)
        self.V = nn.Parameter(V.to(dtype).reshape(-1, *self._kernel(dense)), requires_grad=trains)
        bias: Any = dense.bias
        self.register_parameter("bias", bias)
        self.register_buffer("kept", torch.tensor(self.U.shape[1], device=weight.device))
        self.cut: int | None = None
        self.positions = 1
        self._rank = self.U.shape[1]
        # in a list, so that the dense layer is no child: its weight is no parameter of the model any more
        self._dense = [dense]
        self._pristine = True
        self.training = dense.training

    @property
    def rank(self) -> int:
        """Components that are still there, >= 1; always the first ones."""
        return self._rank

    @rank.setter
    def rank(self, value: int) -> None:
        require(1 <= value <= self.U.shape[1], "rank", f"in [1, {self.U.shape[1]}]", value)
        self._rank = int(value)
        self.kept.fill_(self._rank)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows m and columns n of the weight as a matrix; a kernel counts as cin * k * k columns."""
        return self.U.shape[0], self.V[0].numel()

    @property
    def weight(self) -> Tensor:
        """The product of the kept components in the dense layer's own shape, with graph."""
        return self._as_weight(self.U[:, : self.rank] @ self.V[: self.rank].flatten(1))

    @property
    def cost(self) -> int:
        """Multiply-adds of one sample as factors: `positions * rank * (m + n)`."""
        return self.positions * self.rank * sum(self.shape)

    @property
    def dense_cost(self) -> int:
        """Multiply-adds of one sample as one dense weight: `positions * m * n`."""
        return self.positions * self.shape[0] * self.shape[1]

    @property
    def smaller(self) -> bool:
        """Whether the factors hold fewer numbers than the dense weight: rank * (m + n) < m * n."""
        m, n = self.shape
        return self.rank * (m + n) < m * n

    def forward(self, x: Tensor) -> Tensor:
        """As the dense layer, from the components that count now."""
        if self._pristine and not self.training:
            # nothing has trained yet: the dense weight itself gives the same without rounding twice
            out: Tensor = self._dense[0](x)
            return out
        count = self.rank if self.cut is None or not self.training else min(self.cut, self.rank)
        return self.run(x, self.U[:, :count], self.V[:count])

    def run(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """The layer with these components in place of its own."""
        raise NotImplementedError

    def take_over(self) -> None:
        """From now on the factors alone count: the dense weight's memory is freed."""
        if self._pristine:
            self._pristine = False
            weight: Any = self._dense[0].weight
            weight.data = weight.data.new_empty(0)

    def dense(self) -> nn.Module:
        """The dense layer: as it was if the factors never took over, else with the product of the kept ones."""
        layer: Any = self._dense[0]
        if not self._pristine:
            with torch.no_grad():
                layer.weight.data = _in_wide(
                    self.U.detach()[:, : self.rank], self.V.detach()[: self.rank], self
                )
        layer.bias = self.bias
        done: nn.Module = layer.train(self.training)
        return done

    def factors(self) -> nn.Sequential:
        """The kept components as two stock torch layers that need nothing of this package; weights are copied."""
        raise NotImplementedError

    def _as_weight(self, matrix: Tensor) -> Tensor:
        raise NotImplementedError

    @staticmethod
    def _kernel(dense: nn.Module) -> tuple[int, ...]:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLayer:
        # .to(device) and .half() have to reach the dense layer, which is no child
        super()._apply(fn, recurse)
        self._dense[0]._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._rank = int(self.kept)
        if f"{prefix}U" in state_dict:
            self.take_over()

    def extra_repr(self) -> str:
        m, n = self.shape
        return f"{n} -> {self.rank} -> {m}, bias={self.bias is not None}"


class FactoredLinear(FactoredLayer):
    """A linear layer `y = U_{:b} (V_{:b} x) + bias`; also for the transposed weights of GPT-2's Conv1D."""

    def run(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """[..., n] -> [..., m]."""
        return F.linear(F.linear(x, V), U, self.bias)

    def factors(self) -> nn.Sequential:
        m, n = self.shape
        settings: dict[str, Any] = {"device": self.U.device, "dtype": self.U.dtype}
        down = nn.utils.skip_init(nn.Linear, n, self.rank, bias=False, **settings)
        up = nn.utils.skip_init(nn.Linear, self.rank, m, bias=self.bias is not None, **settings)
        return _filled(down, up, self, self.U, self.V)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix if isinstance(self._dense[0], nn.Linear) else matrix.T

    @staticmethod
    def _kernel(dense: nn.Module) -> tuple[int, ...]:
        matrix = matrix_of(dense)
        assert matrix is not None
        return (matrix.shape[1],)


class FactoredConv2d(FactoredLayer):
    """A convolution as a k x k convolution to b channels and a 1 x 1 convolution with the bias."""

    def run(self, x: Tensor, U: Tensor, V: Tensor) -> Tensor:
        """[B, cin, H, W] -> [B, cout, H', W']."""
        conv: Any = self._dense[0]
        hidden = conv._conv_forward(x, V, None)  # with the stride, padding and dilation of the dense layer
        self.positions = hidden.shape[-1] * hidden.shape[-2]
        return F.conv2d(hidden, U[:, :, None, None], self.bias)

    def factors(self) -> nn.Sequential:
        conv: Any = self._dense[0]
        settings: dict[str, Any] = {"device": self.U.device, "dtype": self.U.dtype}
        down = nn.utils.skip_init(
            nn.Conv2d, conv.in_channels, self.rank, conv.kernel_size, stride=conv.stride, padding=conv.padding,
            dilation=conv.dilation, padding_mode=conv.padding_mode, bias=False, **settings,
        )  # fmt: skip
        up = nn.utils.skip_init(
            nn.Conv2d, self.rank, conv.out_channels, 1, bias=self.bias is not None, **settings
        )
        return _filled(down, up, self, self.U[:, :, None, None], self.V)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, *self.V.shape[1:])

    @staticmethod
    def _kernel(dense: nn.Module) -> tuple[int, ...]:
        weight: Any = dense.weight
        return tuple(weight.shape[1:])


def matrix_of(module: nn.Module) -> Tensor | None:
    """The weight of a layer that can be factored as a matrix [m, n] without graph, None for every other module.

    Linear layers, convolutions without groups, and transformers' transposed Conv1D; not their subclasses, which may
    use their weight in other ways.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return None
    if type(module) is nn.Linear:
        return weight.detach()
    if type(module) is nn.Conv2d and module.groups == 1:
        return weight.detach().flatten(1)
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return weight.detach().T
    return None


def factored(module: nn.Module, rank: int | None = None) -> FactoredLayer:
    """The factored form of one layer."""
    return FactoredConv2d(module, rank) if isinstance(module, nn.Conv2d) else FactoredLinear(module, rank)


def split(matrix: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Thin singular value decomposition, half of each singular value on both sides: `W = (P sqrt S)(sqrt S Q^T)`.

    Args:
        matrix (Tensor): [m, n], any float dtype; must be finite.
        rank (int | None): components to keep, the largest first; None: all.

    Returns:
        tuple[Tensor, Tensor]: U [m, r] and V [r, n], at least fp32.

    Raises:
        StructureError: if a weight is not finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        raise StructureError("weights must be finite to be decomposed, got infinite or missing ones")
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    P, S, Q = torch.linalg.svd(wide, full_matrices=False)
    root = S.sqrt()
    return (P * root)[:, :rank].contiguous(), (root[:, None] * Q)[:rank].contiguous()


def _in_wide(U: Tensor, V: Tensor, layer: FactoredLayer) -> Tensor:
    """The product, rounded once, when half-precision factors are multiplied."""
    wide = torch.float64 if U.dtype == torch.float64 else torch.float32
    return layer._as_weight((U.to(wide) @ V.flatten(1).to(wide)).to(U.dtype)).contiguous()


@torch.no_grad()
def _filled(down: Any, up: Any, layer: FactoredLayer, U: Tensor, V: Tensor) -> nn.Sequential:
    down.weight.copy_(V[: layer.rank])
    up.weight.copy_(U[:, : layer.rank])
    if layer.bias is not None:
        up.bias = layer.bias
    pair = nn.Sequential(down, up)
    # for models that ask a layer's weight for its dtype or device; no second entry of parameters or state dict
    pair.__dict__["weight"] = down.weight
    for parameter in (down.weight, up.weight):
        parameter.requires_grad_(layer.U.requires_grad)
    return pair.train(layer.training)
