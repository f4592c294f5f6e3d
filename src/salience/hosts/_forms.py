"""Which columns of a dataset hold its text, and what is wrong with a row that holds none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from salience.core.documents import Reading
from salience.hosts.data import choose_columns, is_messages, is_text


def chosen(columns: Sequence[str], reading: Reading, name: str = "data") -> dict[str, str]:
    """Our names -> the dataset's, of the form that is mapped, else a text, else another form that is there.

    Raises:
        ParameterError: if there is none.
    """
    mapped = dict(reading.columns) or ({"text": "text"} if "text" in columns else {})
    found = choose_columns(list(columns), mapped, name)
    return {ours: theirs for ours, theirs in found.items() if ours != "label"}


def wrong(values: Mapping[str, Any], columns: Mapping[str, str]) -> str | None:
    """What is wrong with a row, read after "must be documents with"; None if nothing is.

    Args:
        values (Mapping): the row.
        columns (Mapping): as from `chosen`.
    """
    for ours, theirs in columns.items():
        value = values.get(theirs)
        if not (is_messages(value) if ours == "messages" else is_text(value)):
            shown = "nothing" if value is None else repr(value)[:60]
            wanted = "a conversation" if ours == "messages" else "text"
            return f"{wanted} in column {theirs}, got {shown}"
    return None
