"""Methods as text: `ist:active_layers=4,mode=random`, for the command line and for recipes."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, get_type_hints

from salience.core.errors import ParameterError
from salience.core.method import Method
from salience.core.registry import find, load


def parse_method(text: str) -> Method:
    """Build a method from `SLUG[:key=value,...]`.

    Args:
        text (str): "ist", "ist:active_layers=4" or "deft:modules=(mlp.act,),weight=0.3". Values are read as the
            parameter's type; a tuple is written in round brackets; `none` is None.

    Returns:
        Method: the instance; its own checks have passed.

    Raises:
        ParameterError: for an unknown method or parameter (with the nearest names), or a value that does not fit.
    """
    name, _, rest = text.partition(":")
    entry = find(name)
    values: dict[str, Any] = {}
    for pair in _split(rest):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ParameterError(f"method must be written SLUG:key=value,key=value, got {text!r}")
        values[key.strip()] = value.strip()
    return build_method(entry.slug, values)


def build_method(name: str, values: Mapping[str, Any]) -> Method:
    """Build a method from its name and its parameters, given as text or as values.

    Raises:
        ParameterError: as for `parse_method`.
    """
    cls = load(name)
    known = {field.name: field for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            wanted = ", ".join(known) or "none: it has no parameters"
            raise ParameterError(f"parameter of {cls.slug()} must be one of {wanted}, got {key!r}{hint}")
    method: Method = cls(**{key: _convert(cls, key, hints[key], value) for key, value in values.items()})
    return method


def describe_method(method: Method) -> str:
    """The inverse of `parse_method`, with the parameters that differ from their defaults."""
    changed = {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if getattr(method, field.name) != field.default
    }
    shown = ",".join(f"{name}={_text(value)}" for name, value in changed.items())
    return f"{method.slug()}:{shown}" if shown else method.slug()


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({','.join(map(_text, value))})"
    return "none" if value is None else str(value)


def _split(text: str) -> list[str]:
    """Split at commas outside round brackets."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def _nested(value: Any) -> Any:
    """Text in round brackets as a tuple, of tuples where brackets stand in brackets; `none` as None."""
    if not isinstance(value, str):
        return value
    value = value.strip()
    if value.startswith("(") and value.endswith(")"):
        return tuple(_nested(part) for part in _split(value[1:-1]))
    return None if value.lower() == "none" else value


def _convert(cls: type[Method], key: str, hint: Any, value: Any) -> Any:
    from pydantic import TypeAdapter, ValidationError

    value = _nested(value)
    try:
        # strings are read leniently ("4" is 4); pydantic prefers the exact type of a union where one fits
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        wanted = getattr(hint, "__name__", None) or str(hint).replace("typing.", "")
        raise ParameterError(f"{key} of {cls.slug()} must be {wanted}, got {value!r}") from error
