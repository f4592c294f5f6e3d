"""What the claims of distillation share: a world of 100 classes, a teacher in it, students, and the rival losses.

Two of scikit-learn's digits side by side under pixel noise make 100 classes: `10 * left + right`. A large MLP is the
teacher; it has seen pairs of 900 digits and is unsure where the noise is strong. A small MLP is the student; it has a
few pairs of other digits, with right or partly wrong labels. Every arm has the same pairs, order, steps and initial
weights. What a loss leaves open (a weight, a temperature) is chosen for every arm alike, out of four values, on pairs
that are neither trained on nor reported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salience.claims.harness import Values
from salience.sandbox.digits import digits

CLASSES, INPUTS, WIDTH = 100, 128, 32
TEACHER_STEPS, STEPS, BATCH = 1500, 1000, 64
WRONG = 0.2
_TEACHERS_DIGITS, _PAIRS, _NOISE, _TEACHER_WIDTH = 900, 1500, 0.35, 384
SETTING = (
    "100 classes: two noisy digits side by side; student MLP 128-32-100 on 1500 pairs, teacher MLP 128-384-384-100; "
    "1000 SGD steps of 64, momentum 0.9, rate 0.05 falling to 0"
)

# (student's logits, teacher's logits, labels) -> loss
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KD: `T^2 KL(softmax(t / T) || softmax(s / T))`, the mean over rows [N, C]."""
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return F.kl_div(log_q, p, reduction="batchmean") * temperature**2


def knowledge_distillation(temperature: float, share: float = 0.9) -> Loss:
    """KD with `1 - share` of cross-entropy beside it."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        soft = soft_targets(student, teacher, temperature)
        return share * soft + (1 - share) * F.cross_entropy(student, labels)

    return loss


def decoupled(beta: float, temperature: float = 4.0) -> Loss:
    """DKD: cross-entropy, the split between label and rest, and `beta` times the distribution of the rest."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        index = labels.unsqueeze(-1)
        log_q, log_p = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        rest_q, rest_p = (
            (one / temperature).scatter(-1, index, -1e4).log_softmax(-1) for one in (student, teacher)
        )
        split_q, split_p = (_split(one, index) for one in (log_q, log_p))
        target = F.kl_div(split_q, split_p, reduction="batchmean", log_target=True)
        others = F.kl_div(rest_q, rest_p, reduction="batchmean", log_target=True)
        return F.cross_entropy(student, labels) + temperature**2 * (target + beta * others)

    return loss


@dataclass(frozen=True)
class World:
    """Pairs for the student with labels and the teacher's logits.

    Attributes:
        train, choose, test (tuple): rows [N, 128], labels [N], teacher's logits [N, 100]; labels of `train` may be
            wrong, the others are right.
        teacher (float): the teacher's accuracy on `test`.
    """

    train: tuple[Tensor, Tensor, Tensor]
    choose: tuple[Tensor, Tensor, Tensor]
    test: tuple[Tensor, Tensor, Tensor]
    teacher: float


@lru_cache(maxsize=8)
def world(seed: int, wrong: float = 0.0) -> World:
    """The world of one seed.

    Args:
        seed (int): of split, pairs, noise and the teacher.
        wrong (float): share of training labels that are replaced by others, in [0, 1).
    """
    data = digits(seed=seed)
    random = torch.Generator().manual_seed(seed)
    images, digit = data.train_images[_TEACHERS_DIGITS:], data.train_labels[_TEACHERS_DIGITS:]
    teacher = _teacher(seed)
    rows, labels = _pairs(images, digit, _PAIRS, random)
    chosen = _pairs(images, digit, 1000, random)
    test = _pairs(data.test_images, data.test_labels, 2000, random)
    flipped = torch.rand(_PAIRS, generator=random) < wrong
    other = (labels + torch.randint(1, CLASSES, (_PAIRS,), generator=random)) % CLASSES
    parts = ((rows, torch.where(flipped, other, labels)), chosen, test)
    with torch.no_grad():
        train, choose, tested = ((x, y, teacher(x)) for x, y in parts)
    right = float((tested[2].argmax(-1) == tested[1]).float().mean())
    return World(train, choose, tested, right)


class Student(nn.Module):
    """128-32-100, as features and a classifier."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.backbone = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU())
            self.head: nn.Module = nn.Linear(WIDTH, CLASSES)

    def forward(self, rows: Tensor) -> Tensor:
        """[N, 128] to logits [N, 100] (two of them from a dual head in training)."""
        logits: Tensor = self.head(self.backbone(rows))
        return logits


def train(
    student: Student, data: World, step: Callable[[Tensor, Tensor, Tensor, int], None], seed: int, device: str
) -> Student:
    """SGD on the training pairs; `step(rows, labels, teacher's logits, number)` leaves gradients."""
    student.to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    random = torch.Generator().manual_seed(seed + 1)
    rows, labels, logits = (one.to(device) for one in data.train)
    for number in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - number / STEPS)
        picked = torch.randint(len(rows), (BATCH,), generator=random).to(device)
        step(rows[picked], labels[picked], logits[picked], number)
        torch.nn.utils.clip_grad_norm_(student.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()


def with_loss(loss: Loss, data: World, seed: int, device: str) -> Student:
    """A student trained with one loss on one head."""
    student = Student(seed)

    def step(rows: Tensor, labels: Tensor, logits: Tensor, number: int) -> None:
        loss(student(rows), logits, labels).backward()

    return train(student, data, step, seed, device)


def measure(student: Student, data: World, device: str) -> tuple[float, Values]:
    """Accuracy on the pairs to choose by, and what is reported of the test pairs."""
    with torch.no_grad():
        chosen, tested = (student(part[0].to(device)).cpu() for part in (data.choose, data.test))
    right = {
        name: float((logits.argmax(-1) == part[1]).float().mean())
        for name, logits, part in (("choose", chosen, data.choose), ("test", tested, data.test))
    }
    agreement = kendall(tested[:200], data.test[2][:200])
    values = {"accuracy": right["test"], "order": agreement, "teacher's accuracy": data.teacher}
    return right["choose"], values


def kendall(first: Tensor, second: Tensor) -> float:
    """Kendall's tau of the class orders of two sets of logits [N, C], the mean over rows."""
    signs = [(one.unsqueeze(-1) - one.unsqueeze(-2)).sign() for one in (first, second)]
    pairs = first.shape[-1] * (first.shape[-1] - 1)
    return float(((signs[0] * signs[1]).sum((-1, -2)) / pairs).mean())


@lru_cache(maxsize=4)
def _teacher(seed: int) -> nn.Module:
    data = digits(seed=seed)
    images, labels = data.train_images[:_TEACHERS_DIGITS], data.train_labels[:_TEACHERS_DIGITS]
    width = _TEACHER_WIDTH
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, CLASSES)
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random = torch.Generator().manual_seed(seed + 2)
    for number in range(TEACHER_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - number / TEACHER_STEPS)
        rows, targets = _pairs(images, labels, 128, random)
        F.cross_entropy(model(rows), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _pairs(images: Tensor, labels: Tensor, count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    left, right = torch.randint(len(images), (2, count), generator=random)
    rows = torch.cat([images[left], images[right]], -1)
    noisy = rows + _NOISE * torch.randn(rows.shape, generator=random)
    return noisy, 10 * labels[left] + labels[right]


def _split(log_p: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities of the label and of all others together [N, 2]."""
    own = log_p.gather(-1, index)
    others = log_p.scatter(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([own, others], -1)
