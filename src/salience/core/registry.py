"""Finds the methods: every module under `methods/<units>/` that defines a subclass of `Method`.

What the index shows (unit, job, paper) stands in the method files as literal class attributes and is read from
their source, so that listing the methods imports neither torch nor the methods. Nothing is registered by hand.
"""

from __future__ import annotations

import ast
import difflib
import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salience.core.errors import ParameterError

if TYPE_CHECKING:
    from salience.core.method import Method

_FOLDER = Path(__file__).parent.parent / "methods"


@dataclass(frozen=True)
class Entry:
    """What is known of a method without importing it."""

    slug: str
    name: str
    module: str
    unit: str
    spends: str
    job: str
    hosts: tuple[str, ...]
    needs: tuple[str, ...]
    targets: tuple[str, ...]
    arxiv: str
    title: str
    summary: str
    exports: tuple[str, ...]


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """Every method by slug, sorted by unit folder and then by slug."""
    found = (_read(path) for path in sorted(_FOLDER.glob("*/*.py")) if not path.name.startswith("_"))
    return {entry.slug: entry for entry in found}


def find(name: str) -> Entry:
    """The entry of a slug, of a module name (`loss_reweighting`) or of a class name (`LossReweighting`).

    Raises:
        ParameterError: if there is no such method; the text suggests the nearest ones.
    """
    known = entries()
    wanted = name.strip().lower().replace("_", "-")
    by_class = {entry.name.lower(): entry for entry in known.values()}
    if wanted in known:
        return known[wanted]
    if wanted in by_class:
        return by_class[wanted]
    close = difflib.get_close_matches(wanted, [*known, *by_class], n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise ParameterError(f"method must be one of {', '.join(sorted(known))}, got {name!r}{hint}")


def load(name: str) -> type[Method]:
    """Import one method and return its class."""
    entry = find(name)
    cls: type[Method] = getattr(importlib.import_module(entry.module), entry.name)
    return cls


def exported(name: str) -> Any:
    """The public object of this name that some method file defines (see its `__all__`), or None."""
    for entry in entries().values():
        if name == entry.name or name in entry.exports:
            return getattr(importlib.import_module(entry.module), name)
    return None


def _read(path: Path) -> Entry:
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and _is_method(node)]
    if len(classes) != 1:
        raise ImportError(f"{path} must define exactly one subclass of Method, found {len(classes)}")
    node = classes[0]
    values = _literals(node.body)
    missing = [key for key in ("unit", "spends", "job", "arxiv", "title") if key not in values]
    if missing:
        raise ImportError(f"{path}: class {node.name} must set {', '.join(missing)} to a literal")
    functions = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    return Entry(
        slug=path.stem.replace("_", "-"),
        name=node.name,
        module=f"salience.methods.{path.parent.name}.{path.stem}",
        unit=values["unit"],
        spends=values["spends"],
        job=values["job"],
        hosts=values.get("hosts", ("transformers",)),
        needs=values.get("needs", ()),
        targets=tuple(kind for kind in ("trainer", "model", "dataset") if f"attach_{kind}" in functions),
        arxiv=values["arxiv"],
        title=values["title"],
        summary=(ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " "),
        exports=tuple(_literals(tree.body).get("__all__", ())),
    )


def _is_method(node: ast.ClassDef) -> bool:
    return any(isinstance(base, ast.Name) and base.id == "Method" for base in node.bases)


def _literals(body: list[ast.stmt]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            name, value = item.targets[0].id, item.value
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value is not None:
            name, value = item.target.id, item.value
        else:
            continue
        try:
            found[name] = ast.literal_eval(value)
        except ValueError:
            continue  # not a literal: a field default or a computed constant, which the index does not show
    return found
