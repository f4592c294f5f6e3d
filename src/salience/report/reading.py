"""The page of `salience read`: the answers side by side, what it cost, and which keys each layer and head saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from salience.core import drawing, key_maps
from salience.report import answers, words, write_page
from salience.report.view import drawn, variable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arms = Mapping[str, Mapping[str, Any]]

# where the time goes: key in a result, name on screen, colour; neighbours differ in lightness
PARTS = (
    ("choosing", "choosing keys", "#a05195"),
    ("attending", "attending to keys", "#d3ae23"),
    ("rest", "the rest of the model", "#85b4d1"),
)


def build_reading(
    folder: str | Path, result: Mapping[str, Any], kept: Mapping[str, Sequence[key_maps.Kept]]
) -> Path:
    """Write `folder/report.html`, whole or not at all: one file that needs no network and no other file.

    Args:
        folder (str | Path): of the page.
        result (Mapping): as `salience.jobs.read` makes it; the first arm is the one that reads with all keys.
        kept (Mapping): name of an arm -> what each of its layers kept, for the maps; none for an arm without.

    Returns:
        Path: the page.

    Raises:
        FileError: if the page cannot be written; an earlier one is intact.
    """
    return write_page(Path(folder) / "report.html", "reading.html", _page(result, kept))


def _page(result: Mapping[str, Any], kept: Mapping[str, Sequence[key_maps.Kept]]) -> dict[str, Any]:
    arms = result["arms"]
    plain = next(iter(arms))
    paint = {name: variable(colour) for name, colour in drawing.colours(arms, plain).items()}
    told = {name: arm for name, arm in arms.items() if arm["layers"]}
    return {
        "prompt": result["prompt"],
        "eyebrow": f"{result['model']['name']} on {result['file']['name']}, {result['prompt_tokens']:,} tokens",
        "right": result.get("right"),
        "answers": [
            _answer(name, arm, arms[plain], paint[name], name == plain) for name, arm in arms.items()
        ],
        "longest": max(len(arm["answer"]) for arm in arms.values()),
        "rows": [_row(name, arm, paint[name], name == plain) for name, arm in arms.items()],
        "silent": [name for name in arms if name != plain and name not in told],
        "repeats": len(arms[plain]["first_token_each"]),
        "waited": str(result["about"]["device"]).startswith("cuda"),
        "times": drawn(lambda width: time_bars(arms, width=width), "where the time goes", "times"),
        "ceiling": _ceiling(arms[plain]),
        "chart": drawn(
            lambda width: share_chart(arms, result["model"]["layers"], width=width),
            "share of the pairs kept in each layer",
            "shares",
        )
        if told
        else None,
        "maps": [
            _maps(name, records, paint[name], place) for place, (name, records) in enumerate(kept.items())
        ],
        "recall": drawn(
            lambda width: key_maps.draw_recall(kept, width=width),
            "attention recalled for what was kept",
            "recall",
        )
        if kept
        else None,
        "names": [(_named(name), paint[name]) for name in told],
        "layers": _layers(told),
        "text": result["text"],
        "command": result["command"],
        "facts": _facts(result),
        "about": {name: str(value) for name, value in result["about"].items() if value},
    }


def share_chart(arms: Arms, depth: int, *, width: int = drawing.WIDE) -> Figure:
    """Share of the (query, key) pairs that each layer kept: a line over the heads' mean, a band from least to most.

    Args:
        arms (Mapping): name -> {"layers": [{"layer", "share": one for each head}]}; the first keeps everything and is
            not drawn. Where a layer was not asked the line has a gap.
        depth (int): layers of the decoder.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel.
    """
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    plain, *others = arms
    paint = drawing.colours(arms, plain)
    narrow = width <= 1.5 * drawing.NARROW
    columns = 1 if narrow else min(len(others), 2)
    at, most = np.arange(depth), 1.0
    with drawing.style():
        figure = drawing.new_figure(width, 220 + 17 * -(-len(others) // columns))
        axes = figure.subplots()
        for name in others:
            low, mean, high = (np.full(depth, np.nan) for _ in range(3))
            for one in arms[name]["layers"]:
                share = 100 * np.asarray(one["share"])
                low[one["layer"]], mean[one["layer"]], high[one["layer"]] = (
                    share.min(),
                    share.mean(),
                    share.max(),
                )
                most = max(most, share.max())
            style = {
                "color": paint[name],
                "linewidth": 1.8,
                "marker": "o",
                "markersize": 4 if depth <= 48 else 0,
            }
            axes.plot(at, mean, label=drawing.short(name, width // (8 * columns) - 6), **style)
            axes.fill_between(at, low, high, color=paint[name], alpha=0.16, linewidth=0)
        axes.set_xlim(-0.5, depth - 0.5)
        axes.set_ylim(0, 1.06 * most)
        axes.xaxis.set_major_locator(MaxNLocator(min(depth, 8 if narrow else 16), integer=True))
        axes.grid(axis="y")
        axes.set_xlabel("layer of the decoder")
        axes.set_ylabel("pairs kept, %")
        figure.legend(
            loc="outside upper left", ncols=columns, borderpad=0, columnspacing=1.6, handlelength=1.9
        )
    return figure


def time_bars(arms: Arms, *, width: int = drawing.WIDE) -> Figure:
    """Time to the first token, one stacked bar for each arm: the parts of `PARTS`.

    Args:
        arms (Mapping): name -> {"seconds": {"choosing": seconds, ...}}; the name of the first is grey.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel.
    """
    paint = drawing.colours(arms, next(iter(arms)))
    totals = [sum(arm["seconds"].values()) for arm in arms.values()]
    unit, size = ("ms", 1e-3) if max(totals) < 1 else ("s", 1.0) if max(totals) < 180 else ("min", 60.0)
    narrow = width <= 1.5 * drawing.NARROW
    with drawing.style():
        figure = drawing.new_figure(width, 54 * len(arms) + (118 if narrow else 84))
        axes = figure.subplots()
        for place, (name, arm) in enumerate(arms.items()):
            start = 0.0
            for key, label, colour in PARTS:
                part = arm["seconds"][key] / size
                shown = None if place else label
                axes.barh(
                    place,
                    part,
                    0.42,
                    start,
                    color=colour,
                    edgecolor=drawing.PAPER,
                    linewidth=0.8,
                    label=shown,
                )
                start += part
            ink = {"color": paint[name], "fontweight": "bold"}
            axes.text(0, place - 0.28, drawing.short(name, width // 8), va="bottom", **ink)
            text = words.seconds_text(start * size)
            axes.annotate(text, (start, place), (5, 0), textcoords="offset points", va="center")
        axes.set_ylim(len(arms) - 0.65, -0.75)
        axes.set_xlim(0, max(totals) / size * (1.28 if narrow else 1.12))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel(f"time to the first token ({unit})")
        figure.legend(
            loc="outside upper left", ncols=1 if narrow else 3, handlelength=1.0, handleheight=1.0, borderpad=0,
            columnspacing=1.4, handletextpad=0.5,
        )  # fmt: skip
    return figure


def _answer(
    name: str, arm: Mapping[str, Any], plain: Mapping[str, Any], colour: str, first: bool
) -> dict[str, Any]:
    cost = [
        *([f"{_percent(arm['kept_share'])} of the pairs"] if arm["kept_share"] is not None else []),
        *([f"recall {arm['recall']:.3f}"] if arm["recall"] is not None else []),
        f"first token {arm['first_token_ratio']:.2f}×",
    ]
    before = None if first else plain["answer"]
    return answers.card(_named(name), colour, arm["answer"], before, "all keys", ", ".join(cost))


def _row(name: str, arm: Mapping[str, Any], colour: str, first: bool) -> dict[str, Any]:
    spent = arm["seconds"]
    return {
        "name": _named(name),
        "colour": colour,
        "first": first,
        "kernel": "" if first else arm["kernel"],
        "cells": [
            answers.cell(
                words.seconds_text(arm["first_token_seconds"]), None if first else arm["first_token_ratio"]
            ),
            answers.cell(_percent(arm["kept_share"])),
            answers.cell(words.NONE if arm["recall"] is None else f"{arm['recall']:.3f}"),
            *(
                answers.cell(words.NONE if first and key == "choosing" else words.seconds_text(spent[key]))
                for key, _, _ in PARTS
            ),
        ],
    }


def _percent(share: float | None) -> str:
    if share is None:
        return words.NONE
    return "100 %" if share > 0.9995 else f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2g} %"


def _named(name: str) -> Markup:
    """A method with its parameters, to be broken between these and nowhere else as long as they fit."""
    slug, colon, rest = name.partition(":")
    return Markup('<span class="slug">{}</span><wbr>{}').format(
        slug + colon, Markup(",<wbr>").join(rest.split(","))
    )


def _ceiling(plain: Mapping[str, Any]) -> str:
    """What a choice of keys that costs nothing could save at most."""
    total = plain["first_token_seconds"]
    share = plain["seconds"]["attending"] / total
    return f"{100 * share:.0f} %" if 0 < share < 1 and math.isfinite(share) else ""


def _maps(name: str, records: Sequence[key_maps.Kept], colour: str, place: int) -> dict[str, Any]:
    def draw(width: int) -> Figure:
        return key_maps.draw(records, points=False, width=width)

    shown = drawn(draw, f"which keys {name} saw", f"maps-{place}")
    return {"name": _named(name), "colour": colour, "picture": shown}


def _layers(told: Arms) -> list[dict[str, Any]]:
    """A row for each layer that was asked, a pair of cells for each arm."""
    tables = {name: {one["layer"]: one for one in arm["layers"]} for name, arm in told.items()}
    numbers = sorted({layer for table in tables.values() for layer in table})
    return [
        {"layer": layer, "cells": [_of_layer(table.get(layer)) for table in tables.values()]}
        for layer in numbers
    ]


def _of_layer(one: Mapping[str, Any] | None) -> dict[str, str]:
    if one is None:
        return {"kept": words.NONE, "kept_range": "", "recall": words.NONE, "least": ""}
    share, recall = one["share"], one["recall"]
    return {
        "kept": words.tied(_percent(sum(share) / len(share))),
        "kept_range": words.tied(f"{_percent(min(share)).removesuffix(' %')} to {_percent(max(share))}")
        if len(share) > 1 and max(share) > min(share)
        else "",
        "recall": f"{sum(recall) / len(recall):.3f}",
        "least": f"least {min(recall):.3f}" if len(recall) > 1 and min(recall) < max(recall) else "",
    }


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts, limit = answers.model_facts(result["model"]), result["positions"]
    facts.append(("Text", f"{result['file']['name']}, {result['file']['characters']:,} characters"))
    of = f" of {limit:,} positions" if limit else ""
    how = "as a user's message of the chat template" if result["chat"] else "without a chat template"
    facts.append(("Prompt", f"{result['prompt_tokens']:,} tokens{of}, {how}"))
    if result["unknown_tokens"]:
        facts.append(("Unknown", f"{result['unknown_tokens']:,} tokens are none of the tokenizer's words"))
    if result["chunk"]:
        facts.append(("Read", f"{result['chunk']:,} tokens at a time"))
    return facts
