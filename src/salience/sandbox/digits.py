"""Handwritten digits (8 x 8 pixels, bundled with scikit-learn) and a residual network that learns them in seconds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.core.errors import SalienceError, require


@dataclass(frozen=True)
class Digits:
    """Images as rows of 64 pixels in [0, 1], with labels 0..9.

    Attributes:
        train_images (Tensor): [1437, 64] float32.
        train_labels (Tensor): [1437] int64.
        test_images (Tensor): [360, 64] float32.
        test_labels (Tensor): [360] int64.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits(*, transposed: bool = False, seed: int = 0) -> Digits:
    """The digits, split four to one.

    Args:
        transposed (bool): rows and columns of every image exchanged: the same classes, another task.
        seed (int): of the split, >= 0; both orientations of one seed share it.

    Returns:
        Digits: the same for the same arguments. Global random states stay as they were.

    Raises:
        SalienceError: if scikit-learn is not installed.
    """
    require(seed >= 0, "seed", ">= 0", seed)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SalienceError("digits need scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    rows = (images.mT if transposed else images).reshape(len(images), 64)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    test, train = order[: len(rows) // 5 + 1], order[len(rows) // 5 + 1 :]
    return Digits(rows[train], labels[train], rows[test], labels[test])


@dataclass
class Classified:
    """What `ResidualMLP` returns, named as in transformers.

    Attributes:
        logits (Tensor): [B, classes].
        loss (Tensor | None): [] mean cross-entropy in nats, if labels were given.
    """

    logits: Tensor
    loss: Tensor | None = None


class ResidualBlock(nn.Module):
    """`h <- h + down(act(up(norm(h))))`, four times as wide inside."""

    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.act = activation()
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, width] -> [B, width]."""
        changed: Tensor = hidden + self.down(self.act(self.up(self.norm(hidden))))
        return changed


class ResidualMLP(nn.Module):
    """A small network with units to choose from: `embed`, residual `blocks`, `head`.

    Args:
        blocks (int): how many, >= 1.
        width (int): of the residual stream.
        classes (int): of the head.
        activation (type[nn.Module]): in every block.
        inputs (int): length of an input row.
        seed (int): of the initial weights; global random states stay as they were.
    """

    def __init__(
        self,
        blocks: int = 8,
        width: int = 64,
        classes: int = 10,
        activation: type[nn.Module] = nn.ReLU,
        *,
        inputs: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require(blocks >= 1, "blocks", ">= 1", blocks)
        with torch.random.fork_rng(devices=[]):
            # not torch.manual_seed, which would move the states of GPUs as well
            torch.default_generator.manual_seed(seed)
            self.embed = nn.Linear(inputs, width)
            self.blocks = nn.ModuleList(ResidualBlock(width, activation) for _ in range(blocks))
            self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Classified:
        """Images [B, inputs] to logits [B, classes], and the loss if labels [B] are given."""
        hidden = self.embed(images)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden)
        return Classified(logits, None if labels is None else F.cross_entropy(logits, labels))


def trained(
    model: ResidualMLP, data: Digits, *, steps: int = 300, rate: float = 1e-3, batch: int = 64, seed: int = 0
) -> ResidualMLP:
    """Train all parameters that want gradients with AdamW; the model itself is changed and returned, in eval mode.

    Args:
        model (ResidualMLP): what to train, on its device.
        data (Digits): its training half is used.
        steps (int): optimizer steps, >= 0.
        rate (float): learning rate, falling linearly to 0.
        batch (int): images of a step, drawn with replacement.
        seed (int): of the order of the data.
    """
    require(steps >= 0, "steps", ">= 0", steps)
    generator = torch.Generator().manual_seed(seed)
    device = model.head.weight.device
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        rows = torch.randint(len(images), (batch,), generator=generator).to(device)
        loss = model(images[rows], labels[rows]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def accuracy(model: ResidualMLP, data: Digits) -> float:
    """Share of the test half that the model classifies correctly."""
    device = model.head.weight.device
    with torch.no_grad():
        found = model(data.test_images.to(device)).logits.argmax(-1).cpu()
    return float((found == data.test_labels).float().mean())
