"""What jobs that ask a model with and without methods have in common: their methods, their folder, their command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from salience.core.errors import ConflictError, ParameterError
from salience.core.files import check_writable
from salience.core.method import Method
from salience.core.spec import describe_method, parse_method


def parse_methods(texts: Sequence[str], unit: str, wanted: str) -> list[Method]:
    """Methods on a model that score `unit`, each once.

    Args:
        texts (Sequence[str]): `SLUG:key=value,...` each.
        unit (str): "token", "key", ...
        wanted (str): read after "method must": "choose key blocks for read".

    Raises:
        ParameterError: for an unknown method or parameter, a value that does not fit, or a method given twice.
        ConflictError: for a method of another kind.
    """
    methods = [parse_method(text) for text in texts]
    shown = [describe_method(method) for method in methods]
    for place, method in enumerate(methods):
        if "model" not in method.targets() or method.unit != unit:
            raise ConflictError(f"method must {wanted}, got {method.slug()}")
        if shown[place] in shown[:place]:
            raise ParameterError(
                f"method must be given once with the same parameters, got {shown[place]} twice"
            )
    return methods


def own_folder(out: Path) -> None:
    """Refuse a folder that cannot be written, or that holds a run of `salience tune`.

    Raises:
        ParameterError: naming it.
    """
    check_writable(out)
    if (out / "recipe.json").exists():
        raise ParameterError(
            f"out must be a folder of its own, got {out}, which holds a run of salience tune"
        )


def command_line(program: str, settings: Any, out: Path, single: Mapping[str, str]) -> str:
    """The command line that does the same: every field that is not its default, then the folder.

    Args:
        program (str): of the commands of salience.
        settings (Any): a dataclass whose fields are named as the options are.
        out (Path): the folder.
        single (Mapping): field -> option, for fields that hold several values.
    """
    words = ["salience", program]
    for field in fields(settings):
        value = getattr(settings, field.name)
        option = f"--{single.get(field.name, field.name).replace('_', '-')}"
        if value is True:
            words.append(option)
        elif value != field.default:
            for one in value if isinstance(value, tuple) else (value,):
                words += [option, str(one)]
    return shlex.join([*words, "--out", str(out)])
