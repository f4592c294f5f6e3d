"""Digits with wrong labels, and digits seen twice with coarse labels, for methods that act on features.

The images are scikit-learn's (8 x 8 pixels, bundled); nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from salience.core.errors import require
from salience.sandbox.digits import digits

_SIDE = 8


@dataclass(frozen=True)
class NoisyDigits:
    """Digits of which some training labels are wrong.

    Attributes:
        train_images (Tensor): [1000, 64] float32 in [0, 1].
        train_labels (Tensor): [1000] int64, as given: some are wrong.
        clean_labels (Tensor): [1000] int64, the right ones, to measure by and not to train on.
        valid_images, valid_labels (Tensor): [200, 64] and [200], right labels, to choose by.
        test_images, test_labels (Tensor): [597, 64] and [597].
    """

    train_images: Tensor
    train_labels: Tensor
    clean_labels: Tensor
    valid_images: Tensor
    valid_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def wrong(self) -> Tensor:
        """[1000] bool: which training labels are wrong."""
        return self.train_labels != self.clean_labels


def noisy_digits(*, noise: float = 0.4, seed: int = 0) -> NoisyDigits:
    """Digits with symmetric label noise: a share `noise` of the training labels is one of the nine others.

    Args:
        noise (float): in [0, 1).
        seed (int): of split and noise, >= 0.

    Returns:
        NoisyDigits: the same for the same arguments. Global random states stay as they were.
    """
    require(0 <= noise < 1, "noise", "in [0, 1)", noise)
    data = digits(seed=seed)
    images = torch.cat((data.train_images, data.test_images))
    labels = torch.cat((data.train_labels, data.test_labels))
    random = torch.Generator().manual_seed(seed + 1)
    clean = labels[:1000]
    moved = (clean + torch.randint(1, 10, (1000,), generator=random)) % 10
    chosen = torch.zeros(1000, dtype=torch.bool)
    chosen[torch.randperm(1000, generator=random)[: round(1000 * noise)]] = True
    given = torch.where(chosen, moved, clean)
    rest = images[1000:1200], labels[1000:1200], images[1200:], labels[1200:]
    return NoisyDigits(images[:1000], given, clean, *rest)


@dataclass(frozen=True)
class CoarseDigits:
    """Digits whose training labels only say whether they are five or more; which digit it is comes later.

    Attributes:
        train_images (Tensor): [1037, 64] float32 in [0, 1].
        coarse_labels (Tensor): [1037] int64, 0 or 1.
        probe_images, probe_labels (Tensor): [400, 64] and [400], digits 0..9, to fit a probe on.
        test_images, test_labels (Tensor): [360, 64] and [360], digits 0..9.
    """

    train_images: Tensor
    coarse_labels: Tensor
    probe_images: Tensor
    probe_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def coarse_digits(*, seed: int = 0) -> CoarseDigits:
    """Digits with coarse labels for training and fine ones for a probe.

    Args:
        seed (int): of the split, >= 0.

    Returns:
        CoarseDigits: the same for the same arguments. Global random states stay as they were.
    """
    data = digits(seed=seed)
    images, labels = data.train_images, data.train_labels
    coarse = (labels[400:] >= 5).long()
    probe = images[:400], labels[:400]
    return CoarseDigits(images[400:], coarse, *probe, data.test_images, data.test_labels)


def two_views(images: Tensor, random: torch.Generator, *, noise: float = 0.1) -> Tensor:
    """Each image twice, each time moved by up to a pixel and with noise of its own.

    Args:
        images (Tensor): [B, 64].
        random (torch.Generator): moved on.
        noise (float): standard deviation of the noise, >= 0.

    Returns:
        Tensor: [2 B, 64]: all first views, then all second ones.
    """
    require(images.dim() == 2 and images.shape[1] == _SIDE**2, "images", "[B, 64]", list(images.shape))
    require(noise >= 0, "noise", ">= 0", noise)
    views = []
    for _ in range(2):
        down, right = torch.randint(-1, 2, (2, len(images), 1, 1), generator=random)
        index = torch.arange(_SIDE)
        rows, columns = index.view(1, -1, 1) + down, index.view(1, 1, -1) + right
        inside = (rows >= 0) & (rows < _SIDE) & (columns >= 0) & (columns < _SIDE)
        places = (rows.clamp(0, _SIDE - 1) * _SIDE + columns.clamp(0, _SIDE - 1)).flatten(1)
        moved = images.gather(1, places) * inside.flatten(1)
        views.append(moved + noise * torch.randn(moved.shape, generator=random))
    return torch.cat(views)
