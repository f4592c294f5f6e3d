"""Numbers as words and figures that people read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from salience.core.pictures import bytes_text, three_digits

NONE = "–"
_SAME = 0.005  # a change below half a percent is called none


def number(value: float | None, digits: int = 4) -> str:
    """A number in so many significant digits, thousands apart, with a real minus sign."""
    if value is None or not math.isfinite(value):
        return NONE
    if isinstance(value, int) or (abs(value) >= 10**digits and float(value).is_integer()):
        text = f"{int(value):,}"
    elif value and not 1e-4 <= abs(value) < 10**7:
        text = f"{value:.{digits - 1}g}"
    else:
        places = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        text = f"{value:,.{max(min(places, digits), 0)}f}"
    return text.replace("-", "−")


def bytes_or_none(value: float | None) -> str:
    """Bytes, or a dash."""
    return NONE if value is None else bytes_text(value)


def seconds_text(value: float | None) -> str:
    """A time: 85.0 ms, 1.25 s, 3 min 20 s, 2 h 5 min."""
    if value is None or not math.isfinite(value):
        return NONE
    if value < 120:
        return f"{three_digits(value)} s" if value >= 1 else f"{three_digits(1000 * value)} ms"
    minutes, seconds = divmod(round(value), 60)
    return f"{minutes} min {seconds} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def quality_text(value: float | None, unit: str) -> str:
    """A quality with its unit."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.1f} %" if unit == "%" else f"{number(value)} {unit}".strip()


def count_text(value: float) -> str:
    """A large count: 3.38 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if value >= size:
            return f"{three_digits(value / size)} {word}"
    return f"{value:,.0f}"


def ratio(new: float | None, old: float | None) -> float | None:
    """New over old; None if one is not known or there is nothing to compare with."""
    if new is None or old is None or not (math.isfinite(new) and math.isfinite(old)) or old <= 0:
        return None
    return new / old


def change_words(new: float | None, old: float | None, what: str) -> str:
    """A change in a sentence: "49 % less training memory"."""
    share = ratio(new, old)
    if share is None:
        return f"{what} not known"
    if abs(share - 1) < _SAME:
        return f"the same {what}"
    return f"{_percent(abs(share - 1))} {'less' if share < 1 else 'more'} {what}"


def change_share(new: float | None, old: float | None) -> str:
    """A change as a figure: "−49 %"."""
    share = ratio(new, old)
    if share is None:
        return NONE
    return signed(share - 1, _percent) if abs(share - 1) >= _SAME else "no change"


def change_quality(new: float | None, old: float | None, unit: str) -> str:
    """The signed difference of two qualities; of percentages in points."""
    if new is None or old is None or not (math.isfinite(new) and math.isfinite(old)):
        return NONE
    if unit == "%":
        return signed(new - old, lambda size: f"{size:.1f}") + " points"
    return signed(new - old, lambda size: number(size, 3))


def difference(
    new: float | None, old: float | None, text: Callable[[Any], str], cost: bool
) -> dict[str, str]:
    """What stands under a figure: the signed difference and, of a cost, the ratio and whether it is a saving.

    Args:
        new (float | None): the method's.
        old (float | None): the baseline's.
        text (Callable): how the figure is written.
        cost (bool): whether less is saved and more is spent: bytes, seconds.

    Returns:
        dict[str, str]: "small" the text, "tone" `less`, `more` or nothing; empty if one is not known.
    """
    if new is None or old is None or not (math.isfinite(new) and math.isfinite(old)):
        return {}
    if new == old:
        return {"small": "no change"}
    share = ratio(new, old)
    if share is None or not cost:
        return {"small": tied(signed(new - old, text))}
    tone = "" if abs(share - 1) < _SAME else "less" if new < old else "more"
    return {"small": f"{tied(signed(new - old, text))} · {share:.2f}×", "tone": tone}


def signed(value: float, text: Callable[[float], str]) -> str:
    """With its sign, or with ± where its text shows nothing but zeros."""
    shown = text(abs(value))
    if not any(char in "123456789" for char in shown):
        return f"±{shown}"
    return f"{'+' if value > 0 else '−'}{shown}"


def plain(value: Any, name: str = "") -> str:
    """A value that a method reports; its name tells bytes and shares."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        if "bytes" in name and math.isfinite(value):
            return bytes_text(value)
        share = name.startswith("share") and isinstance(value, float) and 0 <= value <= 1
        return f"{100 * value:.3g} %" if share else number(value)
    if isinstance(value, list | tuple):
        shown = ", ".join(plain(one) for one in value[:16])
        return f"{shown} … ({len(value)} in all)" if len(value) > 16 else shown or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(one, str(key))}" for key, one in value.items()) or "none"
    return NONE if value is None else str(value)


def tied(text: str) -> str:
    """Numbers and their units do not part at the end of a line."""
    return re.sub(r"(\d) (?=%|bytes|[KMGT]iB|ms|s\b|min|h\b|points)", "\\1\u00a0", text)


def visible(token: str) -> str:
    """Control characters as their pictures; a line break is shown and made."""
    shown = "".join(
        chr(0x2400 + ord(char)) if ord(char) < 32 and char not in "\n\t" else char for char in token
    )
    return shown.replace("\n", "↵\n")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.0995 else f"{100 * share:,.0f} %"
