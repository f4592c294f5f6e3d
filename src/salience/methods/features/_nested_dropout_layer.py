"""What nested dropout does to a feature vector: keep the first k features, k drawn so that small k are common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from salience.core.errors import StructureError, require
from salience.core.loop import evaluating
from salience.core.noise import uniform
from salience.hosts.classifier import find_classifier

Convention = Literal["code", "gauss"]
_CHUNK = 1 << 22  # numbers of [rows, features, classes] at once


def prefix_law(
    features: int, std: float = 100.0, *, mu: float = 0.0, convention: Convention = "code"
) -> Tensor:
    """The probability of keeping the first i features, `p_i ~ exp(-((i - mu) / std)^2)`, i = 1..N.

    Args:
        features (int): N, >= 1.
        std (float): > 0; large ones are nearly uniform, small ones keep hardly more than one feature.
        mu (float): where the law peaks; 0 makes it fall.
        convention (str): "code" as above; "gauss" has a 2 under the square: std is then a standard deviation, and
            1 / sqrt(2) of the "code" one.

    Returns:
        Tensor: [N] float64, sum 1.
    """
    require(features >= 1, "features", ">= 1", features)
    require(math.isfinite(std) and std > 0, "std", "> 0 and finite", std)
    require(math.isfinite(mu), "mu", "finite", mu)
    require(convention in ("code", "gauss"), "convention", "one of code, gauss", convention)
    index = torch.arange(1, features + 1, dtype=torch.float64)
    exponent = -(((index - mu) / std).square()) / (2 if convention == "gauss" else 1)
    # softmax takes the largest off first: a small std or a far mu does not underflow to 0/0
    return exponent.softmax(0)


def training_share(law: Tensor) -> Tensor:
    """How often each feature is trained, `sum over i >= j of p_i`: [N] from [N], falling from 1."""
    return law.flip(0).cumsum(0).flip(0)


def prefix_accuracy(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    labels: Tensor,
    biases: Sequence[Tensor | None] = (),
) -> Tensor:
    """The accuracy with the first k features, for every k, from one running sum and not N products.

    Args:
        features (Sequence[Tensor]): [B, N] of each of M models.
        weights (Sequence[Tensor]): [C, N] of each model's classifier, laid out as in `nn.Linear`.
        labels (Tensor): [B] int64.
        biases (Sequence[Tensor | None]): [C] of each model, if any; they do not shrink with k.

    Returns:
        Tensor: [N] float64, accuracy of the mean of the models' logits.
    """
    width, classes = features[0].shape[1], weights[0].shape[0]
    for f, w in zip(features, weights, strict=True):
        same = f.shape == (len(labels), width) and w.shape == (classes, width)
        wanted = "[B, N] and [C, N], alike for all models"
        require(same, "features and weights", wanted, f"{list(f.shape)} and {list(w.shape)}")
    rows = max(1, _CHUNK // (width * classes))
    right = torch.zeros(width, dtype=torch.int64, device=labels.device)
    for start in range(0, len(labels), rows):
        logits = torch.zeros((), device=labels.device)
        for index, (f, w) in enumerate(zip(features, weights)):
            part = f[start : start + rows].detach().float().unsqueeze(2) * w.detach().float().T  # [R, N, C]
            bias = biases[index] if biases else None
            logits = logits + part.cumsum(1) + (0 if bias is None else bias.detach().float())
        right += (logits.argmax(2) == labels[start : start + rows, None]).sum(0)
    return right.double() / len(labels)


def choose_prefix(accuracy: Tensor, *, penalty: float = 1e-5, one_means_all: bool = False) -> int:
    """The k of the largest `accuracy_k - penalty (k - 1)`; of equal ones the smallest.

    Args:
        accuracy (Tensor): [N] for k = 1..N, on data that is neither trained nor tested on.
        penalty (float): >= 0, for each feature beyond the first.
        one_means_all (bool): the fault of the official second stage: a best k of 1 becomes N.

    Returns:
        int: k in 1..N.
    """
    require(penalty >= 0, "penalty", ">= 0", penalty)
    best = int(penalized(accuracy, penalty=penalty).argmax())
    return len(accuracy) if best == 0 and one_means_all else best + 1


def penalized(accuracy: Tensor, *, penalty: float = 1e-5) -> Tensor:
    """`accuracy_k - penalty (k - 1)`: [N] float64 from [N]."""
    wide = accuracy.double()
    return wide - penalty * torch.arange(len(wide), dtype=torch.float64, device=wide.device)


class NestedMask(nn.Module):
    """In training, keeps the first k features of the whole batch, k drawn anew each time; then, the first `keep`.

    Nothing is rescaled. The draw depends on seed and call alone: a resumed run goes on, all ranks keep the same k.
    A forward pass that is run again by gradient checkpointing is another call: leave it out of what is checkpointed.

    Args:
        features (int): N, length of the last axis.
        std (float): of `prefix_law`, > 0.
        mu (float): of `prefix_law`.
        convention (str): of `prefix_law`.
        seed (int): >= 0.

    Attributes:
        keep (Tensor): [] int64, features kept outside of training; N until `limit` says otherwise.
        fixed (int | None): if set, the k of training instead of a draw.

    Shape:
        [..., N] -> [..., N].

    Example:
        >>> import torch, salience as sal
        >>> mask = sal.NestedMask(8, std=3.0)
        >>> mask(torch.ones(2, 8)).sum(1).unique().numel()
        1
    """

    calls: Tensor
    keep: Tensor
    ends: Tensor

    def __init__(
        self,
        features: int,
        *,
        std: float = 100.0,
        mu: float = 0.0,
        convention: Convention = "code",
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(seed >= 0, "seed", ">= 0", seed)
        law = prefix_law(features, std, mu=mu, convention=convention)
        self.features, self.seed = features, seed
        self.fixed: int | None = None
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("keep", torch.tensor(features))
        self.register_buffer("ends", law.cumsum(0).float(), persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """Zero what is behind the prefix."""
        kept = self.draw() if self.training else self.keep
        out = cut(features, kept)
        if self.training and self.fixed is None:
            self.calls.add_(1)
        return out

    def draw(self, call: Tensor | int | None = None) -> Tensor:
        """[] int64: the k of this call, or of the next one."""
        if self.fixed is not None:
            return torch.full_like(self.keep, self.fixed)
        chance = uniform(
            torch.zeros_like(self.keep), seed=self.seed, counter=self.calls if call is None else call
        )
        return (chance > self.ends).sum().clamp(max=self.features - 1) + 1

    def limit(self, keep: int) -> None:
        """Keep the first `keep` features outside of training."""
        require(1 <= keep <= self.features, "keep", f"in [1, {self.features}]", keep)
        self.keep.fill_(keep)

    def order(self) -> Tensor:
        """[N] int64: features, the most important first: those that are trained most often."""
        return torch.arange(self.features)

    def extra_repr(self) -> str:
        return f"{self.features}, keep={int(self.keep)}"


def cut(features: Tensor, kept: Tensor | int) -> Tensor:
    """[..., N] with zeros behind the first `kept`; their gradient is exactly 0, whatever they hold."""
    index = torch.arange(features.shape[-1], device=features.device)
    return features.masked_fill(index >= kept, 0)


def collect(
    models: Sequence[nn.Module], batches: Iterable[Any], paths: Sequence[str | None]
) -> tuple[list[Tensor], Tensor]:
    """What the classifiers of these models read, over batches with labels: [B, N] for each model, and labels [B].

    Masks inside of the models let all features through meanwhile.
    """
    features: list[list[Tensor]] = [[] for _ in models]
    labels: list[Tensor] = []
    device = next(models[0].parameters()).device
    for batch in batches:
        inputs = {
            key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()
        }
        if "labels" not in inputs:
            raise StructureError(f"batches must hold labels, got {', '.join(inputs)}")
        labels.append(inputs.pop("labels"))
        for model, path, rows in zip(models, paths, features):
            _, classifier = find_classifier(model, path)
            masks = [module for module in model.modules() if isinstance(module, NestedMask)]
            before = [mask.keep.clone() for mask in masks]
            handle = classifier.register_forward_pre_hook(
                lambda _, args, rows=rows: rows.append(args[0].detach())
            )
            try:
                for mask in masks:
                    mask.keep.fill_(mask.features)
                with evaluating(model), torch.no_grad():
                    model(**inputs)
            finally:
                handle.remove()
                for mask, keep in zip(masks, before):
                    mask.keep.copy_(keep)
    if not labels:
        raise StructureError("batches must not be empty, got none")
    found = [torch.cat(rows) for rows in features]
    given = torch.cat(labels)
    good = all(rows.dim() == 2 and len(rows) == len(given) for rows in found) and given.dim() == 1
    shapes = f"{[list(rows.shape) for rows in found]} and labels {list(given.shape)}"
    require(good, "features", "[samples, features] for labels [samples]", shapes)
    return found, given


def truncate(
    classifier: nn.Linear, keep: int, before: nn.Linear | None = None
) -> tuple[nn.Linear, nn.Linear | None]:
    """Really smaller layers: the classifier reads the first `keep` features, the layer in front makes no more.

    Args:
        classifier (nn.Linear): N to C.
        keep (int): k in [1, N].
        before (nn.Linear | None): M to N, what gives the features (an elementwise function may stand between).

    Returns:
        tuple[nn.Linear, nn.Linear | None]: k to C, and M to k; new layers with copies of the weights.
    """
    require(1 <= keep <= classifier.in_features, "keep", f"in [1, {classifier.in_features}]", keep)
    fits = before is None or before.out_features == classifier.in_features
    require(fits, "before", f"a layer with {classifier.in_features} outputs", before)
    smaller = _linear(classifier.weight[:, :keep], classifier.bias)
    if before is None:
        return smaller, None
    return smaller, _linear(before.weight[:keep], None if before.bias is None else before.bias[:keep])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made
