"""A matplotlib figure as a small piece of SVG that can stand inside a page."""

from __future__ import annotations

import html
import io
import re
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def as_svg(figure: Figure, *, label: str = "", salt: str = "salience") -> str:
    """A figure as one `<svg>` element without prolog: the same figure and salt give the same text.

    Args:
        figure (Figure): any.
        label (str): what a screen reader says.
        salt (str): goes into the ids; pictures of one page need different ones.

    Returns:
        str: text stays text, numbers have two decimals, nothing points outside the element.
    """
    import matplotlib as mpl

    text = io.StringIO()
    with (
        mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False}),
        warnings.catch_warnings(),
    ):
        # the browser has the glyphs that matplotlib's own font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _compact(text.getvalue(), label)


def _compact(text: str, label: str) -> str:
    """Take out of matplotlib's SVG what a page does not need: prolog, metadata, unused ids, long numbers."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # a style element would apply to the whole page around the picture
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    spoken = f' role="img" aria-label="{html.escape(label)}"' if label else ""
    size = re.search(r'viewBox="[^"]*"', text)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size.group(0) if size else ""} stroke-linejoin="round" '
        f'font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"{spoken}>'
    )
    text = head + text[text.index(">") + 1 :]
    text = text.replace("xlink:href=", "href=")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: (?:(bold|\d00) )?([\d.]+px) [^;\"]*", _font, text)
    used = {*re.findall(r"url\(#([^)]*)\)", text), *re.findall(r'href="#([^"]*)"', text)}
    text = re.sub(r' id="([^"]*)"', lambda found: found.group(0) if found.group(1) in used else "", text)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, text)
    text = re.sub(r' transform="rotate\(-?0 [^)]*\)"', "", text)
    text = re.sub(
        r"(data:image/png;base64,)([^\"]*)", lambda m: m.group(1) + re.sub(r"\s", "", m.group(2)), text
    )
    text = re.sub(r">\s+<", "><", text)
    while "<g></g>" in text or "<defs></defs>" in text or "<g/>" in text:
        text = text.replace("<g></g>", "").replace("<defs></defs>", "").replace("<g/>", "")
    return text.strip()


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found.group(1)}; " if found.group(1) else ""
    return f"{weight}font-size: {found.group(2)}"


def _rounded(found: re.Match[str]) -> str:
    text = re.sub(r"-?\d+\.\d{3,}(?:e-?\d+)?", lambda number: f"{float(number.group(0)):.2f}", found.group(0))
    return re.sub(r"\s*\n\s*", " ", text)
