"""CutMix: does it lower the test error of a small classifier, with the object whole and with a hole in it?

200 of scikit-learn's digits at 16 x 16 pixels train a network of three convolutions in 500 steps of 50 (the other
1,597 test it). The rivals are plain training and Cutout, which blanks the very same boxes. Every arm has its own best
learning rate, chosen by the error on whole digits, and the last step is reported, never the best one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.claims._digit_pictures import convolutions, pictures, seeded_module
from salience.claims.harness import Experiment, Statement, Values
from salience.methods.samples.cutmix import CutMix

_STEPS, _BATCH, _TRAIN, _SIZE, _HOLE = 500, 50, 200, 16, 6
# arm -> share of the batches that are changed, and whether the box is blanked instead of filled
_ARMS = {
    "plain": (0.0, False),
    "Cutout": (1.0, True),
    "CutMix, half of the batches": (0.5, False),
    "CutMix": (1.0, False),
}


def _network() -> nn.Module:
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*convolutions(16, 32, 64), *pool)


def _loss(model: nn.Module, arm: str, images: Tensor, labels: Tensor, random: torch.Generator) -> Tensor:
    prob, blank = _ARMS[arm]
    mixed = CutMix(prob=prob)(images, labels, generator=random)
    if not blank:
        return mixed.loss(model(mixed.images))
    for top, bottom, left, right in mixed.boxes:
        images = images.clone()
        images[:, :, top:bottom, left:right] = 0.0
    return F.cross_entropy(model(images), labels)


def _run(arm: str, seed: int, rate: float, device: str, *, steps: int = _STEPS) -> Values:
    data = pictures(_TRAIN, seed, device, size=_SIZE)
    model = seeded_module(seed, device, _network).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order, random = (torch.Generator().manual_seed(2 * seed + number) for number in range(2))
    for _ in range(steps):
        rows = torch.randperm(_TRAIN, generator=order)[:_BATCH].to(device)
        _loss(model, arm, data.train[rows], data.train_labels[rows], random).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    holed, middle = data.test.clone(), slice((_SIZE - _HOLE) // 2, (_SIZE + _HOLE) // 2)
    holed[:, :, middle, middle] = 0.0
    with torch.no_grad():
        whole, hidden = model(data.test), model(holed)
    errors = [float((logits.argmax(1) != data.test_labels).float().mean()) for logits in (whole, hidden)]
    return {
        "error": errors[0],
        "error with a hole": errors[1],
        "test loss": float(F.cross_entropy(whole, data.test_labels)),
    }


EXPERIMENT = Experiment(
    slug="cutmix",
    question="Does filling a box with another image lower the test error, of whole digits and with a hole?",
    setting="three convolutions on 200 digits of 16 x 16 pixels, 500 steps of 50, last step",
    paper="CIFAR-100 top-1 error 14.47 with CutMix, 16.53 with Cutout, 16.45 with neither; ImageNet ResNet-50 21.40 "
    "against 23.68 (tables 5 and 3, best epoch on the test set)",
    arms=tuple(_ARMS),
    metrics={
        "error": "share of 1,597 test digits that are wrong, at each arm's own best learning rate (lower is better)",
        "error with a hole": "the same with a hole of 6 x 6 pixels in the middle of every test digit",
        "test loss": "mean cross-entropy on whole test digits, in nats",
    },
    statements=(
        Statement(
            says="With a hole in the digits CutMix errs at most two thirds as often as plain training",
            metric="error with a hole", arm="CutMix", against="plain", direction="lower", size=2 / 3, ratio=True,
            headline=True,
        ),
        Statement(
            says="On whole digits CutMix errs less than plain training",
            metric="error", arm="CutMix", against="plain", direction="lower",
        ),
        Statement(
            says="So does CutMix in half of the batches",
            metric="error", arm="CutMix, half of the batches", against="plain", direction="lower",
        ),
        Statement(
            says="On whole digits CutMix errs less than Cutout with the same boxes",
            metric="error", arm="CutMix", against="Cutout", direction="lower",
        ),
        Statement(
            says="With a hole CutMix errs less than Cutout, which trains on holes",
            metric="error with a hole", arm="CutMix", against="Cutout", direction="lower",
        ),
        Statement(
            says="Its test loss is below that of plain training",
            metric="test loss", arm="CutMix", against="plain", direction="lower",
        ),
    ),
    run=_run,
    rates=(0.03, 0.1, 0.3),
    tuned_on="error",
    tuned_higher=False,
    notes="Plain training nearly solves whole digits, so there is little to gain there; 500 steps are few for a "
    "method made for 300 epochs. Cutout trains on the very corruption of the second metric.",
)  # fmt: skip
