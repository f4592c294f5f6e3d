"""Everything that a method hangs on somebody else's object, recorded so that it comes off without a trace.

Undoing runs backwards. It restores replaced attributes, removes hooks, puts modules, flags and saved tensors back,
and is safe to call twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class Attachment:
    """A record of changes with their inverses."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], Any]] = []

    def __len__(self) -> int:
        return len(self._undo)

    def on_undo(self, inverse: Callable[[], Any]) -> None:
        """Run `inverse` when everything attached after it has been undone."""
        self._undo.append(inverse)

    def hook(self, handle: Any) -> None:
        """Record a torch hook by the handle that registering it returned."""
        self.on_undo(handle.remove)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute on an instance; undo restores the old value or removes the attribute again."""
        own = vars(owner)
        if name in own:
            old = own[name]
            self.on_undo(lambda: setattr(owner, name, old))
        else:
            # the value came from the class: shadow it, and uncover it again
            self.on_undo(lambda: own.pop(name, None))
        setattr(owner, name, value)

    def wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace a bound function by `make(the old one)` on this instance alone."""
        self.set(owner, name, make(getattr(owner, name)))

    def replace_module(self, parent: nn.Module, name: str, new: nn.Module) -> None:
        """Put `new` in the place of the child `name`; undo puts the old one back."""
        old = parent.get_submodule(name)
        self.on_undo(lambda: setattr(parent, name, old))
        setattr(parent, name, new)

    def flags(self, parameters: Iterable[nn.Parameter]) -> None:
        """Remember `requires_grad` of these parameters; undo restores it."""
        old = [(parameter, parameter.requires_grad) for parameter in parameters]

        def restore() -> None:
            for parameter, flag in old:
                parameter.requires_grad_(flag)

        self.on_undo(restore)

    def values(self, tensors: Iterable[torch.Tensor]) -> None:
        """Remember the content of these tensors (a copy); undo writes it back in place, bit for bit."""
        old = [(tensor, tensor.detach().clone()) for tensor in tensors]

        def restore() -> None:
            with torch.no_grad():
                for tensor, value in old:
                    tensor.copy_(value)

        self.on_undo(restore)

    def forget(self) -> None:
        """Keep everything as it is now: nothing will be undone, and what was remembered for it is freed."""
        self._undo.clear()

    def undo(self) -> None:
        """Undo everything, last first. Every inverse runs, also when one of them fails.

        Raises:
            ExceptionGroup: with the errors of the inverses that failed.
        """
        errors: list[Exception] = []
        while self._undo:
            inverse = self._undo.pop()
            try:
                inverse()
            except Exception as error:  # noqa: BLE001 - collected and raised below, so that the rest is undone
                errors.append(error)
        if errors:
            raise ExceptionGroup("undo failed in part", errors)
