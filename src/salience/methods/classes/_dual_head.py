"""Two classifiers on one backbone: the one that is kept, and an auxiliary one that only the teacher talks to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.core.errors import require

Shape = Literal["linear", "nonlinear"]
SHAPES = ("linear", "nonlinear")
_HIDDEN, _DROPOUT = 200, 0.1


class AuxiliaryHead(nn.Module):
    """Features to logits: Linear, or Linear(200), Dropout(0.1), BatchNorm, ReLU, Linear.

    Args:
        features (int): D, >= 1.
        classes (int): C, >= 1.
        shape (str): "linear" or "nonlinear".
        seed (int): of the initial weights; global random states stay as they were.
    """

    def __init__(self, features: int, classes: int, shape: Shape = "linear", *, seed: int = 0) -> None:
        super().__init__()
        check_shape(shape)
        self.uniform: Callable[[Tensor], Tensor] = torch.rand_like
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would move the states of GPUs as well
            torch.default_generator.manual_seed(seed)
            if shape == "linear":
                self.inner: nn.Module | None = None
                self.norm: nn.Module | None = None
                self.outer = nn.Linear(features, classes)
            else:
                self.inner = nn.Linear(features, _HIDDEN)
                self.norm = nn.BatchNorm1d(_HIDDEN)
                self.outer = nn.Linear(_HIDDEN, classes)

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] of any float dtype to [B, C].

        Raises:
            ParameterError: for one sample in training with the nonlinear head, whose BatchNorm needs two.
        """
        features = features.to(self.outer.weight.dtype)
        if self.inner is None or self.norm is None:
            plain: Tensor = self.outer(features)
            return plain
        several = len(features) >= 2 or not self.training
        require(
            several,
            "batch",
            "at least two samples for the nonlinear auxiliary head (BatchNorm)",
            len(features),
        )
        hidden = self.inner(features)
        if self.training:
            hidden = (
                hidden * (self.uniform(hidden.detach().float()) >= _DROPOUT).to(hidden.dtype) / (1 - _DROPOUT)
            )
        logits: Tensor = self.outer(F.relu(self.norm(hidden)))
        return logits


class DualHead(nn.Module):
    """Takes the place of a classifier: in training it gives two sets of logits, in eval mode the classifier's own.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), DualHead(torch.nn.Linear(16, 10)))
        >>> main, auxiliary = model(torch.randn(4, 20))
        >>> model[-1] = model[-1].main  # for export: no trace of the auxiliary head

    Args:
        main (nn.Module): the classifier, with a 2-D `weight` [C, D]; it is kept.
        auxiliary (str): "linear", or "nonlinear" for a teacher of another architecture.
        seed (int): of the auxiliary head's initial weights.
    """

    def __init__(self, main: nn.Module, auxiliary: Shape = "linear", *, seed: int = 0) -> None:
        super().__init__()
        weight = getattr(main, "weight", None)
        linear = isinstance(weight, Tensor) and weight.dim() == 2
        require(linear, "main", "a linear layer with a weight [C, D]", type(main).__name__)
        self.main = main
        self.auxiliary = made_for(main, auxiliary, seed)

    def forward(self, features: Tensor) -> Any:
        """Features [B, D] to logits: `(main, auxiliary)`, both [B, C], in training; `main` [B, C] in eval mode."""
        if not self.training:
            return self.main(features)
        return self.main(features), self.auxiliary(features)


def made_for(main: Any, shape: Shape, seed: int) -> AuxiliaryHead:
    """An auxiliary head for the features and classes of a classifier, on its device; fp32 or wider."""
    classes, features = main.weight.shape
    dtype = torch.promote_types(main.weight.dtype, torch.float32)
    return AuxiliaryHead(features, classes, shape, seed=seed).to(main.weight.device, dtype)


def check_shape(shape: Any) -> None:
    """Refuse another word."""
    require(shape in SHAPES, "aux_head", f"one of {', '.join(SHAPES)}", shape)
