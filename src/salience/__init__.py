"""Find what matters in a model and its data, and spend only there.

    import salience as sal

    sal.focus(trainer, [sal.IST(), sal.SsToken(keep=0.6)])   # two lines in an existing script
    trainer.train()

Every method is an attribute of this module and is imported when it is asked for; importing `salience` itself
imports neither torch nor transformers. `salience.methods()` lists them.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["Focus", "__version__", "focus", "loop", "methods"]

_VERB = ("Focus", "focus", "loop")


def methods() -> list[Any]:
    """Every method as an entry with slug, name, unit, spends, job, targets, paper and summary."""
    from salience.core.registry import entries

    return list(entries().values())


class _Package(ModuleType):
    """This module. Importing a file under `salience/methods/` must not put that package in the function's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "methods" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _VERB:
        from salience import verb

        return getattr(verb, name)
    if not name.startswith("_"):
        from salience.core.registry import exported

        found = exported(name)
        if found is not None:
            return found
    raise AttributeError(f"module 'salience' has no attribute {name!r}; salience.methods() lists the methods")


def __dir__() -> list[str]:
    from salience.core.registry import entries

    return sorted([*__all__, *(entry.name for entry in entries().values())])
