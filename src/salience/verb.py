"""The verb and its handle: `focus(target, method)` attaches methods to a model, a Trainer or a dataset."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from salience.core.errors import ConflictError, TargetError, require
from salience.core.method import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from salience.core.attach import Attachment
    from salience.core.loop import Loop
    from salience.core.part import Part

Kind = Literal["trainer", "model", "dataset"]
_EXAMPLE = {
    "trainer": "a transformers Trainer: focus(trainer, ...)",
    "model": "a torch module: focus(model, ...)",
    "dataset": "a datasets.Dataset: focus(dataset, ...)",
}


class Focus:
    """What `focus` returns: the scores, what was spent, and the way back.

    As a context manager it undoes itself at the end of the block, also after an exception.

    Attributes:
        target (Any): what was focused.
        methods (tuple[Method, ...]): the methods, in order.
        parts (tuple[Part, ...]): their working state, one for each method.
        dataset (Any): for a dataset target: the samples that were picked.
    """

    def __init__(
        self, target: Any, kind: Kind, methods: Sequence[Method], parts: Sequence[Part], record: Attachment
    ) -> None:
        self.target = target
        self.methods = tuple(methods)
        self.parts = tuple(parts)
        self.dataset: Any = None
        self._kind = kind
        self._record = record

    @property
    def scores(self) -> dict[str, Tensor]:
        """The newest scores, by "slug.name"; higher matters more."""
        return {
            f"{method.slug()}.{name}": value
            for method, part in zip(self.methods, self.parts)
            for name, value in part.scores().items()
        }

    @property
    def spent(self) -> dict[str, dict[str, Any]]:
        """By slug: what was kept and what it cost, with counts and bytes."""
        return {method.slug(): part.spent() for method, part in zip(self.methods, self.parts)}

    def finish(self) -> Focus:
        """Make final what methods that cut have decided: the model is smaller for good, and an ordinary one.

        What would bring the removed units back is forgotten and its memory freed; a later `undo` only takes off
        what else was attached. Methods that cut nothing stay as they are. A second call does nothing.

        Returns:
            Focus: itself.
        """
        for part in self.parts:
            part.finish()
        return self

    def undo(self) -> None:
        """Take everything off again, but for what `finish` made final; a second call does nothing."""
        for part in reversed(self.parts):
            part.undo()
        self._record.undo()

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary checkpoint that `from_pretrained` loads without salience, and `salience.json`.

        Methods that cut are finished first: the checkpoint holds the smaller model. Of a dataset, `scores.parquet`
        (id, score, decision) and the samples that were kept, in `data/`, are written instead.

        Args:
            folder (str | Path): made if it does not exist.

        Returns:
            Path: the folder.
        """
        self.finish()
        folder = Path(folder)
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        about: dict[str, Any] = {"methods": [repr(method) for method in self.methods], "spent": self.spent}
        try:
            if self._kind == "dataset":
                files = [part.save(folder, last=part is self.parts[-1]) for part in self.parts]
                about["selection"] = files[-1]
            elif self._kind == "trainer":
                self.target.save_model(str(folder))
            else:
                self.target.save_pretrained(str(folder))
        except BaseException:
            # a refused save leaves nothing behind
            if made and not any(folder.iterdir()):
                folder.rmdir()
            raise
        (folder / "salience.json").write_text(json.dumps(about, indent=1, default=str), encoding="utf-8")
        return folder

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw what the methods decided: their own picture, else the importance maps, units x time.

        Args:
            path (str | Path | None): where to write a PNG; None only returns the figure.

        Returns:
            matplotlib.figure.Figure: the figure.

        Raises:
            ConflictError: if nothing was recorded yet.
        """
        from salience.core.pictures import draw_histories

        own = next((figure for part in self.parts if (figure := part.draw()) is not None), None)
        histories = {
            f"{method.slug()}: {name}": (method.unit, history)
            for method, part in zip(self.methods, self.parts)
            for name, history in part.histories.items()
            if history.steps
        }
        if own is None and not histories:
            raise ConflictError("plot must be called after scores were recorded, got none yet: train first")
        figure = own if own is not None else draw_histories(histories)
        if path is not None:
            figure.savefig(path, dpi=120, bbox_inches="tight")
        return figure

    def __enter__(self) -> Focus:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        lines = [f"focus on {type(self.target).__name__}: " + ", ".join(map(repr, self.methods))]
        for slug, spent in self.spent.items():
            shown = ", ".join(f"{name} {value}" for name, value in spent.items())
            lines.append(f"  {slug}: {shown or 'nothing spent yet'}")
        for name, value in self.scores.items():
            lines.append(f"  {name}: {list(value.shape)}")
        return "\n".join(lines)


def focus(target: Any, method: Method | Sequence[Method], *, data: Any = None) -> Focus:
    """Attach one or several methods to a model, a Trainer or a dataset.

    The kind of target chooses what a method does: on a Trainer it acts while that Trainer trains, on a model it
    acts at once, on a dataset it picks samples. What is attached comes off by `Focus.undo`.

    Args:
        target (Any): a `torch.nn.Module`, a transformers `Trainer` (or a subclass, such as TRL's), or a
            `datasets.Dataset` / `IterableDataset`.
        method (Method | Sequence[Method]): what to do; a list is attached in order.
        data (Any): what some methods need beyond the target: calibration or probe batches.

    Returns:
        Focus: the handle.

    Raises:
        TargetError: if the target is of no known kind or a method does not act on this kind.
        ConflictError: if two methods contradict each other, or one contradicts the target's settings.

    Example:
        >>> import salience as sal
        >>> handle = sal.focus(trainer, [sal.IST(), sal.SsToken(keep=0.6)])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
    """
    methods = _methods(method)
    kind = _kind(target)
    for one in methods:
        if kind not in one.targets():
            takes = " or ".join(_EXAMPLE[k] for k in one.targets())
            raise TargetError(f"target of {type(one).__name__} must be {takes}, got {type(target).__name__}")
    _refuse_conflicts(methods)
    if kind == "dataset":
        return _focus_dataset(target, methods, data)

    from salience.core.attach import Attachment

    record = Attachment()
    try:
        if kind == "trainer":
            from salience.hosts.trainer import attach_to_trainer

            parts = attach_to_trainer(target, methods, record, data)
        else:
            parts = [one.attach_model(target, record, data) for one in methods]
    except BaseException:
        record.undo()
        raise
    return Focus(target, kind, methods, parts, record)


def loop(
    model: nn.Module,
    method: Method | Sequence[Method],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    data: Iterable[dict[str, Any]] | None = None,
    call: nn.Module | None = None,
    shifted: bool = True,
    smoothing: float = 0.0,
    seed: int = 0,
) -> Loop:
    """Attach training methods to a training loop of one's own; see `salience.core.loop` for the five calls.

    Args:
        model (nn.Module): called with a batch as keywords, returns an object or mapping with `loss` and `logits`; a
            plain module that takes no `labels` is called without them and returns logits.
        method (Method | Sequence[Method]): methods that act on a Trainer.
        optimizer (Optimizer | None): built over everything that may ever train.
        data (Iterable[dict] | None): batches, for methods that probe or score beforehand.
        call (nn.Module | None): what runs the forward pass if it is not `model`: DDP around it.
        shifted (bool): whether labels are shifted against the logits.
        smoothing (float): label smoothing of the weighted loss, in [0, 1).
        seed (int): of the methods' own generators.

    Returns:
        Loop: drives the methods; `loop.record.undo()` takes them off.

    Raises:
        TargetError, ConflictError: as for `focus`.
    """
    from salience.core.attach import Attachment
    from salience.core.loop import Loop
    from salience.core.part import Site
    from salience.hosts.transformers import takes_labels

    require(0.0 <= smoothing < 1.0, "smoothing", "in [0, 1)", smoothing)
    methods = _methods(method)
    for one in methods:
        if "trainer" not in one.targets():
            raise TargetError(
                f"{type(one).__name__} must be a training method for a loop, got {one.targets()}"
            )
    _refuse_conflicts(methods)
    record = Attachment()
    site = Site(model, seed=seed, shifted=shifted, data=data)
    try:
        parts = [one.attach_trainer(site, record) for one in methods]
    except BaseException:
        record.undo()
        raise
    return Loop(
        model,
        parts,
        optimizer=optimizer,
        shifted=shifted,
        smoothing=smoothing,
        record=record,
        own_loss=takes_labels(model),
        call=call,
        data=data,
    )


def _methods(method: Method | Sequence[Method]) -> list[Method]:
    methods: list[Any] = list(method) if isinstance(method, list | tuple) else [method]
    require(bool(methods), "method", "a method or a list of at least one", method)
    for one in methods:
        if isinstance(one, type) and issubclass(one, Method):
            raise TargetError(f"method must be an instance, got the class: write {one.__name__}()")
        if not isinstance(one, Method):
            raise TargetError(f"method must be a salience method, got {type(one).__name__}")
    return methods


def _kind(target: Any) -> Kind:
    # an object's class can only come from a library that is already imported, so none is imported to ask
    for library, names, kind in (
        ("transformers.trainer", ("Trainer",), "trainer"),
        ("torch.nn", ("Module",), "model"),
        ("datasets", ("Dataset", "IterableDataset"), "dataset"),
    ):
        module = sys.modules.get(library)
        if module is not None and isinstance(target, tuple(getattr(module, name) for name in names)):
            return kind  # type: ignore[return-value]
    wanted = ", ".join(_EXAMPLE.values())
    raise TargetError(f"target must be one of {wanted}; got {type(target).__name__}")


def _refuse_conflicts(methods: Sequence[Method]) -> None:
    slugs = [method.slug() for method in methods]
    for index, method in enumerate(methods):
        if slugs.index(slugs[index]) != index:
            raise ConflictError(f"methods must differ, got {type(method).__name__} twice")
        for other in slugs:
            if other in method.conflicts:
                raise ConflictError(
                    f"methods must not contradict each other, got {slugs[index]} with {other}: "
                    f"{method.conflicts[other]}"
                )


def _focus_dataset(target: Any, methods: Sequence[Method], data: Any) -> Focus:
    from salience.core.attach import Attachment

    parts, picked = [], target
    for method in methods:
        part, picked = method.attach_dataset(picked, data)
        parts.append(part)
    handle = Focus(target, "dataset", methods, parts, Attachment())
    handle.dataset = picked
    return handle
