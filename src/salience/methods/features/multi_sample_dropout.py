"""Multi-sample dropout: the head sees each batch with M different dropout masks, the backbone runs once.

Scored: nothing; units of the features are dropped at random, M times for each training example.
Spent: M passes of the head in each training step, to save training steps. The weights are shared and

    loss = (1 / M) sum_m criterion(head(features; masks m), labels)

so the gradient has the mean of plain dropout's, and the part of its variance that comes from the masks falls as 1/M.
What comes from the choice of the batch does not fall, so that the gain ends where masks are no longer the larger
part. At inference dropout is off and the head runs once.

Paper: arXiv 1905.09788. There is no official code.

The official code does not exist, and the code that is popular under this name (drzqb/Multi-Sample-Dropout and many
notebooks) differs from the paper, and this from it, in:
- it averages logits or probabilities and takes one loss of them. That is another method: cross-entropy is convex, so
  its loss is never larger, and with growing M the dropout averages away. Here losses are averaged; the other is there
  by name, `reduce="logits"`;
- it runs the head M times in a Python loop, with M updates of BatchNorm's running statistics; here the batch is
  repeated and the head is called once (`chunk` calls it on fewer samples at a time);
- evaluation that averages stochastic passes is Monte Carlo dropout: here it is one pass without dropout;
- one sample has no batch statistics, and its M copies are no batch: with BatchNorm in the head it is an error;
- dropout that is a number inside a function (attention) is no module and is not reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.methods.features._multi_sample_head import (
    MultiSampleHead,
    Reduce,
    check_samples,
    multi_sample_loss,
)
from salience.methods.features._multi_sample_training import SampledHead, dropped

__all__ = ["MultiSampleHead", "dropped", "multi_sample_loss"]


@dataclass(frozen=True, kw_only=True)
class MultiSampleDropout(Method):
    """Train the head on several dropout masks of each example at once, for fewer steps to the same loss.

    `MultiSampleHead` and `multi_sample_loss` are the same for a loop of one's own.

    Example:
        >>> import torch, salience as sal
        >>> head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(16, 10))
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 16), sal.MultiSampleHead(head, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> for x, y in [(torch.randn(8, 20), torch.randint(10, (8,))) for _ in range(4)]:
        ...     sal.multi_sample_loss(model(x), y).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()

    Attributes:
        num_samples (int): M >= 1; beyond 8 little is gained.
        p (float | None): ratio of one dropout in front of a head that has none, in [0, 1); None takes those it has.
        start (str | None): name of the module at which the repeated part begins: a Dropout, or a module that holds
            one (or any, with `p`). None finds it: the Dropout beside the model's head, else the head itself.
        reduce (str): "loss" is the paper's, "logits" the popular variant that averages logits.
    """

    unit: ClassVar[str] = "feature"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "regularize"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "1905.09788"
    title: ClassVar[str] = "Multi-Sample Dropout for Accelerated Training and Better Generalization"

    num_samples: int = 8
    p: float | None = None
    start: str | None = None
    reduce: Reduce = "loss"

    def __post_init__(self) -> None:
        check_samples(self.num_samples, self.p)
        require(self.start is None or bool(self.start), "start", "None or the name of a module", self.start)
        require(self.reduce in ("loss", "logits"), "reduce", "one of loss, logits", self.reduce)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Repeats the features in front of the model's head in every training step."""
        return SampledHead(self, site, record)
