"""The picture page of `salience see`: the answers side by side, what was kept of the pictures, and what it cost."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salience.core import drawing
from salience.core.pictures import bytes_text
from salience.report import answers, words, write_page
from salience.report.view import drawn, variable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arms = Mapping[str, Mapping[str, Any]]


def build_see(folder: str | Path, result: Mapping[str, Any], kept: Callable[[int], Figure] | None) -> Path:
    """Write `folder/report.html`, whole or not at all: one file that needs no network and no other file.

    Args:
        folder (str | Path): of the page.
        result (Mapping): as `salience.jobs.see` makes it; the first arm is the one that reads all image tokens.
        kept (Callable | None): draws the pictures with what was kept, so many pixels wide; None where there are none,
            and `result["unseen"]` says why.

    Returns:
        Path: the page.

    Raises:
        FileError: if the page cannot be written; an earlier one is intact.
    """
    return write_page(Path(folder) / "report.html", "see.html", _page(result, kept))


def tokens_steps(counts: list[int]) -> list[tuple[int, int]]:
    """(first layer, image tokens) wherever their number changes, the first layer included."""
    return [(layer, now) for layer, now in enumerate(counts) if layer == 0 or now != counts[layer - 1]]


def _page(result: Mapping[str, Any], kept: Callable[[int], Figure] | None) -> dict[str, Any]:
    arms = result["arms"]
    plain = next(iter(arms))
    paint = {name: variable(colour) for name, colour in drawing.colours(arms, plain).items()}
    chart = drawn(lambda width: layer_chart(arms, width=width), "image tokens in each layer", "layers")
    shown = drawn(kept, "the pictures, and what each method kept of them", "kept") if kept else None
    return {
        "prompt": result["prompt"],
        "eyebrow": _eyebrow(result),
        "right": result.get("right"),
        "answers": [
            _answer(name, arm, arms[plain], paint[name], name == plain) for name, arm in arms.items()
        ],
        "longest": max(len(arm["answer"]) for arm in arms.values()),
        "several": len(result["pictures"]) > 1,
        "names": _names(result["pictures"]),
        "kept": shown,
        "unseen": result.get("unseen") or "",
        "rows": [_row(name, arm, arms[plain], paint[name], name == plain) for name, arm in arms.items()],
        "chart": chart,
        "repeats": len(arms[plain]["prefill_each"]),
        "text": _shown_text(result["text"]),
        "command": result["command"],
        "facts": _facts(result),
        "about": {name: str(value) for name, value in result["about"].items() if value},
    }


def layer_chart(arms: Arms, *, width: int = drawing.WIDE) -> Figure:
    """Image tokens that each layer computed, one line an arm.

    Args:
        arms (Mapping): name -> {"image_tokens": a number for each layer}; the first arm is drawn grey and dashed.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel.
    """
    from matplotlib.ticker import MaxNLocator

    plain = next(iter(arms))
    paint = drawing.colours(arms, plain)
    narrow = width <= 1.5 * drawing.NARROW
    columns = 1 if narrow else min(len(arms), 3)
    with drawing.style():
        figure = drawing.new_figure(width, 190 + 17 * -(-len(arms) // columns))
        axes = figure.subplots()
        for name, arm in arms.items():
            counts = arm["image_tokens"]
            axes.step(
                [layer - 0.5 for layer in range(len(counts) + 1)],
                [*counts, counts[-1]],
                where="post",
                color=paint[name],
                linewidth=1.6 if name == plain else 2.2,
                linestyle=(0, (4, 1.6)) if name == plain and len(arms) > 1 else "-",
                label=drawing.short(name, width // 8 - 6),
            )
        depth = len(arms[plain]["image_tokens"])
        axes.set_xlim(-0.5, depth - 0.5)
        axes.set_ylim(0, 1.06 * max(max(arm["image_tokens"]) for arm in arms.values()))
        axes.xaxis.set_major_locator(MaxNLocator(min(depth, 8 if narrow else 16), integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y")
        axes.set_xlabel("layer of the decoder")
        axes.set_ylabel("image tokens")
        figure.legend(
            loc="outside upper left", ncols=columns, borderpad=0, columnspacing=1.6, handlelength=1.9
        )
    return figure


def _eyebrow(result: Mapping[str, Any]) -> str:
    count = len(result["pictures"])
    several = f"{count} pictures" if count > 1 else "one picture"
    return f"{result['model']['name']} on {several}, {result['image_tokens']:,} image tokens"


def _names(shown: list[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['name']} ({one['width']} × {one['height']})" for one in shown)


def _answer(
    name: str, arm: Mapping[str, Any], plain: Mapping[str, Any], colour: str, first: bool
) -> dict[str, Any]:
    cost = (
        f"{100 * arm['share_of_token_layers']:.0f} % of the image tokens over all layers, "
        f"prefill {arm['prefill_ratio']:.2f}×, KV cache {answers.times(arm['kv_ratio'])}"
    )
    before = None if first else plain["answer"]
    return answers.card(name, colour, arm["answer"], before, "all image tokens", cost)


def _row(
    name: str, arm: Mapping[str, Any], plain: Mapping[str, Any], colour: str, first: bool
) -> dict[str, Any]:
    steps = tokens_steps(arm["image_tokens"])
    seconds, held = arm["prefill_seconds"], arm["kv_bytes"]
    return {
        "name": name,
        "colour": colour,
        "first": first,
        "steps": [(f"from layer {layer}" if layer else "", f"{count:,}") for layer, count in steps],
        "cells": [
            answers.cell(f"{100 * arm['share_of_token_layers']:.1f} %"),
            answers.cell(words.seconds_text(seconds), None if first else arm["prefill_ratio"]),
            answers.cell(bytes_text(held), None if first else arm["kv_ratio"]),
        ],
    }


def _shown_text(text: str) -> str:
    """What the model read; a long row of the same token is told once."""
    return re.sub(
        r"(<[^<>\s]+>)(?:\1){3,}",
        lambda row: f"{row.group(1)} × {len(row.group(0)) // len(row.group(1))}",
        text,
    )


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = answers.model_facts(result["model"])
    facts.append(
        ("Prompt", f"{result['prompt_tokens']:,} tokens, {result['image_tokens']:,} of them of images")
    )
    return facts
