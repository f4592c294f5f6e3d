"""The base class of every method, and the errors that all of them share.

A method is a frozen keyword-only dataclass: its fields are the paper's parameters, its class attributes say what
it scores and spends. It acts on the kinds of target whose `attach_*` function it defines, and on no others.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

UNITS = ("layer", "weight", "rank", "expert", "head", "token", "key", "sample", "class", "feature", "step")
SPENDS = ("keep", "drop", "weight", "train", "freeze", "route", "merge")
JOBS = ("tune", "shrink", "run", "select", "distill", "regularize", "pretrain")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A published way to score units and to spend only on those that matter.

    Subclasses are frozen keyword-only dataclasses that set the class attributes below, validate their fields in
    `__post_init__` and define one or more of `attach_trainer`, `attach_model` and `attach_dataset`.

    Attributes:
        unit (str): what is scored, one of `UNITS`.
        spends (str): what the decision does, one of `SPENDS`.
        job (str): the user's job it belongs to, one of `JOBS`.
        hosts (tuple[str, ...]): the libraries it lives in: "transformers", "peft", "torch", "datasets".
        needs (tuple[str, ...]): what it asks for beyond the target: "data", "grad", "teacher", "peft".
        arxiv (str): the paper's arXiv id, empty for a baseline.
        title (str): the paper's title.
        conflicts (dict[str, str]): slug of a method that it cannot be combined with -> the reason.
        cuts (bool): whether it takes units out of the model, which `Focus.finish` and `Focus.save` make final.
    """

    unit: ClassVar[str]
    spends: ClassVar[str]
    job: ClassVar[str]
    hosts: ClassVar[tuple[str, ...]] = ("transformers",)
    needs: ClassVar[tuple[str, ...]] = ()
    arxiv: ClassVar[str]
    title: ClassVar[str]
    conflicts: ClassVar[dict[str, str]] = {}
    cuts: ClassVar[bool] = False

    # A subclass defines those that it supports; None means "does not act on this kind of target".
    #   attach_trainer(self, site: Site, record: Attachment) -> Part
    #   attach_model(self, model: nn.Module, record: Attachment, data) -> Part
    #   attach_dataset(self, dataset, data) -> tuple[Part, dataset]
    attach_trainer: ClassVar[Any] = None
    attach_model: ClassVar[Any] = None
    attach_dataset: ClassVar[Any] = None

    @classmethod
    def slug(cls) -> str:
        """The method's name on the command line and in files: its module's name with hyphens."""
        return cls.__module__.rpartition(".")[2].replace("_", "-")

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """The kinds of target that it acts on, of "trainer", "model" and "dataset"."""
        return tuple(k for k in ("trainer", "model", "dataset") if getattr(cls, f"attach_{k}") is not None)

    def parameters(self) -> dict[str, Any]:
        """The fields as a dictionary, in the order of their definition."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
