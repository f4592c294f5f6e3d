"""What the claims of CutMix and MultiSampleDropout share: few digits, and small convolutional networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.sandbox.digits import digits

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Pictures:
    """Images [N, 1, S, S] in [0, 1] and labels [N], for training and for test."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def pictures(count: int, seed: int, device: str, *, size: int = 8) -> Pictures:
    """The digits with `count` for training and all others for test, enlarged to `size` pixels."""
    data = digits(seed=seed)
    rows = torch.cat([data.train_images, data.test_images]).view(-1, 1, 8, 8)
    labels = torch.cat([data.train_labels, data.test_labels]).to(device)
    if size != 8:
        rows = F.interpolate(rows, size=(size, size), mode="bilinear", align_corners=False)
    rows = rows.to(device)
    return Pictures(rows[:count], labels[:count], rows[count:], labels[count:])


def seeded_module(seed: int, device: str, make: Callable[[], Module]) -> Module:
    """`make()` with initial weights of this seed; global random states stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make().to(device)


def convolutions(*widths: int) -> list[nn.Module]:
    """3 x 3 convolutions with BatchNorm and ReLU, the picture halved after each but the last."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(zip((1, *widths), widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if number + 1 < len(widths):
            layers.append(nn.MaxPool2d(2))
    return layers
