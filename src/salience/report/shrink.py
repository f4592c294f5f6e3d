"""The page of `salience shrink`: each smaller model beside the untouched one, and what was removed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import quantiles
from typing import TYPE_CHECKING, Any

from salience.core import drawing
from salience.core.errors import ParameterError, first_line
from salience.core.pictures import bytes_text
from salience.report import words, write_page
from salience.report.view import _THEME, drawn, variable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Arms = Mapping[str, Mapping[str, Any]]

# key of a figure, name on screen, note, how it is written, whether less of it is a saving
_ROWS: tuple[tuple[str, str, str, Callable[[Any], str], bool], ...] = (
    ("parameters", "parameters", "", words.count_text, True),
    ("bytes_on_disk", "on disk", "weights", bytes_text, True),
    ("peak_bytes", "peak memory", "of a forward pass, weights included", bytes_text, True),
    (
        "prefill_tokens_per_second",
        "reading",
        "prompt tokens a second",
        lambda value: words.number(value, 3),
        False,
    ),
    (
        "decode_tokens_per_second",
        "writing",
        "new tokens a second",
        lambda value: words.number(value, 3),
        False,
    ),
)
# colours that matplotlib and figures of methods use for ink, as the page's theme has them
_INKS = {
    "#000000": "--ink",
    "#262626": "--ink",
    "#666666": "--muted",
    "#808080": "--muted",
    "#333333": "--ink",
}
_WIDE_SPREAD = 0.1  # of the timed rounds, between their quartiles


def build_shrink(folder: str | Path) -> Path:
    """Write `folder/report.html`, whole or not at all: one file that needs no network and no other file.

    Args:
        folder (str | Path): a run folder with `result.json`, `recipe.json` and the arms' pictures, as
            `salience.jobs.shrink` leaves it.

    Returns:
        Path: the page.

    Raises:
        ParameterError: if a file is missing or broken; the text says which.
        FileError: if the page cannot be written; an earlier one is intact.
    """
    folder = Path(folder)
    return write_page(folder / "report.html", "shrink.html", page(folder))


def page(folder: Path) -> dict[str, Any]:
    """Everything that the template shows, by the names it uses."""
    result, recipe = _read(folder / "result.json"), _read(folder / "recipe.json")
    arms, first = result["arms"], result["untouched"]
    others = [name for name in arms if name != first]
    paint = {name: variable(colour) for name, colour in drawing.colours(arms, first).items()}
    sentences = [words.tied(headline(result, name)) for name in others]
    return {
        "title": result["title"],
        "headline": sentences[0] if len(sentences) == 1 else result["title"],
        "sentences": sentences if len(sentences) > 1 else [],
        "tiles": _tiles(result, others[0]) if len(others) == 1 else [],
        "facts": _facts(result),
        "columns": [
            {"label": arm["label"], "colour": paint[name], "first": name == first}
            for name, arm in arms.items()
        ],
        "rows": rows(result),
        "fair": _fair(result),
        "shaky": _shaky(arms),
        "timed": f"{result['repeats']} rounds" if result["repeats"] > 1 else "one round",
        "prompt_tokens": result["prompt_tokens"],
        "new_tokens": result["new_tokens"],
        "chart": drawn(
            lambda width: share_bars(result, width=width), "what is left of the untouched model", "left"
        ),
        "tasks": _tasks(result),
        "removed": [_removed(folder, name, arms[name]) for name in others],
        "loading": [_loading(folder, result, name) for name in others],
        "recipe": json.dumps(recipe, indent=2, ensure_ascii=False),
        "command": _command(folder),
        "about": {name: str(value) for name, value in result["about"].items() if value},
    }


def headline(result: Mapping[str, Any], name: str) -> str:
    """One arm in a sentence."""
    arm, first = result["arms"][name], result["arms"][result["untouched"]]
    parts = [
        words.change_words(arm["parameters"], first["parameters"], "parameters").replace("less", "fewer"),
        words.change_words(arm["peak_bytes"], first["peak_bytes"], "memory"),
    ]
    quality, alone = result["quality"], trained_alone(result, arm)
    if quality:
        # what training gains is not the method's: it is compared with as much training where that was done
        against = first if alone is None else alone
        parts.append(f"{quality['name']} {_two(arm, against, quality['unit'], ' against ')}")
        parts[-1] += "" if alone is None else " with as much training and nothing removed"
    return f"{arm['label']}: {', '.join(parts)}."


def trained_alone(result: Mapping[str, Any], arm: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The run that trained as this arm did with nothing removed; None if there was none."""
    found = (one for one in result["tuned"].values() if arm["trained"] and one["lora"] == arm["lora"])
    return next(found, None)


def rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The table: a row for each figure, a cell for each model, with what changed."""
    arms, first, quality = result["arms"], result["untouched"], result["quality"]
    shown: list[dict[str, Any]] = []
    if quality:
        unit = quality["unit"]
        note = "higher is better" if quality["higher_is_better"] else "lower is better"
        if unit != "%":
            # with the name, once, and not beside every figure
            unit, note = "", f"{unit}, {note}"
        shown.append(_quality_row(arms, first, quality["name"], note, "overall", unit))
        if result["tuned"]:
            shown.append(_alone_row(result, unit))
        if quality["name"] != "held-out loss":
            shown.append(_quality_row(arms, first, "held-out loss", "lower is better", "loss", ""))
        if "perplexity" in arms[first]["quality"]:
            shown.append(_quality_row(arms, first, "perplexity", "lower is better", "perplexity", ""))
    for key, name, note, text, cost in _ROWS:
        if all(arm[key] is None for arm in arms.values()):
            continue
        cells = []
        for one, arm in arms.items():
            value, before = arm[key], arms[first][key]
            small, tone = ("", "") if one == first else _change(value, before, cost)
            share = words.ratio(value, before) or 1.0
            if abs(share - 1) < max(_spread(arm, key), _spread(arms[first], key)):
                tone = ""  # the rounds themselves lie further apart
            cells.append({"text": words.tied(text(value)) if value is not None else words.NONE, "small": small,
                          "tone": tone})  # fmt: skip
        shown.append({"name": name, "note": note, "cells": cells})
    return shown


def share_bars(result: Mapping[str, Any], *, width: int = drawing.WIDE) -> Figure:
    """What is left of the untouched model's size and memory, and how many times as fast each is.

    Args:
        result (Mapping): as `result.json` has it.
        width (int): pixels at 96 an inch.

    Returns:
        Figure: one panel, a group of bars for each figure; the dashed line is the untouched model.
    """
    arms, first = result["arms"], result["untouched"]
    paint = drawing.colours(arms, first)
    others = [name for name in arms if name != first]
    shown = [(key, name) for key, name, *_ in _ROWS if all(arm[key] for arm in arms.values())]
    high = 0.8 / len(others)
    narrow = width <= 1.5 * drawing.NARROW
    columns = 1 if narrow else min(len(others), 3)
    with drawing.style():
        figure = drawing.new_figure(
            width, 70 + (22 + 18 * len(others)) * len(shown) + 17 * -(-len(others) // columns)
        )
        axes = figure.subplots()
        for place, name in enumerate(others):
            shares = [arms[name][key] / arms[first][key] for key, _ in shown]
            at = [row - 0.4 + high * (place + 0.5) for row in range(len(shown))]
            label = drawing.short(arms[name]["label"], width // 8 - 6)
            axes.barh(at, shares, 0.86 * high, color=paint[name], label=label)
            for y, share in zip(at, shares):
                inside = share > 0.25
                axes.annotate(
                    f"{share:.2f}×", (share, y), (-5 if inside else 5, 0), textcoords="offset points", va="center",
                    ha="right" if inside else "left", fontsize=9, color=drawing.PAPER if inside else drawing.INK,
                )  # fmt: skip
        axes.axvline(1, color=drawing.MUTED, linewidth=1.2, linestyle=(0, (4, 1.6)))
        axes.set_yticks(range(len(shown)), [name for _, name in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        most = max(arms[name][key] / arms[first][key] for name in others for key, _ in shown)
        axes.set_xlim(0, max(1.05, 1.02 * most))
        axes.tick_params(left=False)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.set_xlabel("times the untouched model")
        if len(others) > 1:
            figure.legend(
                loc="outside upper left", ncols=columns, borderpad=0, columnspacing=1.6, handlelength=1.2
            )
    return figure


def themed(svg: str) -> str:
    """A figure of a method with its inks left to the page's theme."""
    for colour, name in {**_THEME, **_INKS}.items():
        svg = svg.replace(f": {colour}", f": var({name})")
    # text that states no colour is black
    return svg.replace("<svg ", '<svg fill="var(--ink)" ', 1)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"folder must be a run of salience shrink, got {path} ({first_line(error)})"
        ) from error
    if not isinstance(found, dict):
        raise ParameterError(f"folder must be a run of salience shrink, got {path} with no object in it")
    return found


def _tiles(result: Mapping[str, Any], name: str) -> list[dict[str, str]]:
    arm, first, quality = result["arms"][name], result["arms"][result["untouched"]], result["quality"]
    tiles = [
        (
            "parameters",
            words.change_share(arm["parameters"], first["parameters"]),
            words.count_text,
            "parameters",
        ),
        ("peak memory", words.change_share(arm["peak_bytes"], first["peak_bytes"]), bytes_text, "peak_bytes"),
    ]
    shown = [
        {"name": what, "value": value, "small": f"{text(first[key])} → {text(arm[key])}"}
        for what, value, text, key in tiles
    ]
    if quality:
        alone = trained_alone(result, arm)
        against = first if alone is None else alone
        value = words.change_quality(
            arm["quality"]["overall"], against["quality"]["overall"], quality["unit"]
        )
        small = _two(against, arm, quality["unit"], " → ")
        small += "" if alone is None else ", both trained"
        shown.append({"name": quality["name"], "value": value, "small": words.tied(small)})
    return shown


def _two(one: Mapping[str, Any], other: Mapping[str, Any], unit: str, between: str) -> str:
    """Two qualities, with a unit of several letters only once."""
    first, second = (words.quality_text(each["quality"]["overall"], unit) for each in (one, other))
    return f"{first if unit == '%' else first.removesuffix(unit).strip()}{between}{second}"


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, data = result["model"], result["data"]
    size = f"{words.count_text(model['parameters'])} parameters; {model['layers']} layers"
    source = f"; {model['source']}" if model["source"] not in ("", model["name"]) else ""
    facts = [("Model", f"{model['name']} ({size}{source})")]
    if data:
        counts = f"{data['train']:,} samples; {data['test']:,} held out"
        told = f"; {data['description']}" if data["description"] not in ("", data["name"]) else ""
        facts.append(("Data", f"{data['name']} ({counts}{told})"))
    return facts


def _quality_row(arms: Arms, first: str, name: str, note: str, key: str, unit: str) -> dict[str, Any]:
    cells = []
    for one, arm in arms.items():
        value, before = arm["quality"].get(key), arms[first]["quality"].get(key)
        small = "" if one == first else words.change_quality(value, before, unit)
        cells.append(
            {"text": words.tied(words.quality_text(value, unit)), "small": words.tied(small), "tone": ""}
        )
    return {"name": name, "note": note, "cells": cells}


def _alone_row(result: Mapping[str, Any], unit: str) -> dict[str, Any]:
    cells = []
    for arm in result["arms"].values():
        alone = trained_alone(result, arm)
        text = words.NONE if alone is None else words.quality_text(alone["quality"]["overall"], unit)
        cells.append({"text": words.tied(text), "small": "", "tone": ""})
    return {"name": "with nothing removed", "note": "after as much training", "cells": cells}


def _change(value: float | None, before: float | None, cost: bool) -> tuple[str, str]:
    share = words.ratio(value, before)
    if share is None:
        return "", ""
    if abs(share - 1) < 0.005:
        return "1.00×", ""
    return f"{share:.2f}×", "less" if (share < 1) == cost else "more"


def _fair(result: Mapping[str, Any]) -> list[str]:
    """What training alone did, beside which the cost of removing is to be read."""
    quality, first, said = result["quality"], result["arms"][result["untouched"]], []
    for one in result["tuned"].values():
        said.append(
            words.tied(
                f"{one['steps']:,} steps of {'LoRA' if one['lora'] else 'training'} with nothing removed take the "
                f"untouched model from {_two(first, one, quality['unit'], ' to ')}."
            )
        )
    if said:
        said[-1] += " What a model that was trained as long differs from that is what removing cost."
    return said


def _spread(arm: Mapping[str, Any], key: str) -> float:
    """How far apart the timed rounds behind a speed lie: between their quartiles, as a share of the median."""
    if not key.endswith("_tokens_per_second"):
        return 0.0  # sizes are counted, not timed
    times = arm[key.replace("_tokens_per_second", "_seconds")] or []
    if len(times) < 3:
        return 0.0
    low, middle, high = quantiles(times, n=4)
    return float((high - low) / middle)


def _shaky(arms: Arms) -> str:
    """A warning where the timed rounds of a model lie far apart."""
    worst = max(_spread(arm, key) for arm in arms.values() for key, *_ in _ROWS if key.endswith("_second"))
    if worst < _WIDE_SPREAD:
        return ""
    return (
        f"The rounds lie up to {100 * worst:.0f} % apart (between quartiles): smaller differences in speed are "
        "chance."
    )


def _tasks(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Quality by task or domain."""
    arms, first, quality = result["arms"], result["untouched"], result["quality"]
    if not quality:
        return []
    names = [key for key in arms[first]["quality"] if key.startswith("task.")]
    unit = quality["unit"] if quality["unit"] == "%" else ""
    note = "" if unit else f"{quality['name']}, {quality['unit']}"
    return [_quality_row(arms, first, key.removeprefix("task."), note, key, unit) for key in names]


def _removed(folder: Path, name: str, arm: Mapping[str, Any]) -> dict[str, Any]:
    path = folder / "arms" / name / "pictures.json"
    shown = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    facts = [
        [(what, words.plain(value, what)) for what, value in (arm["spent"].get(slug) or {}).items()]
        for slug in arm["slugs"]
    ]
    return {
        "label": arm["label"],
        "methods": list(zip(arm["methods"], facts)),
        "pictures": [
            {"wide": themed(one["wide"]), "narrow": themed(one["narrow"]) if one["narrow"] else ""}
            for one in shown
        ],
    }


def _loading(folder: Path, result: Mapping[str, Any], name: str) -> tuple[str, str]:
    """The line that loads an arm's checkpoint, and what was seen when it was."""
    place, arm = folder / "models" / name, result["arms"][name]
    if (place / "factors.safetensors").is_file():
        return f'load_factors("{place}")', f"Factors, which no stock config can say, {_proof(result, arm)}."
    return f'{arm["class"]}.from_pretrained("{place}")', f"Loaded without salience, {_proof(result, arm)}."


def _proof(result: Mapping[str, Any], arm: Mapping[str, Any]) -> str:
    difference = arm["logits_difference"]
    told = "no difference" if not difference else f"{difference:.1e} at most"
    return (
        f"its logits beside those of the model in memory: {told} (an error above {result['tolerance']:.0e})"
    )


def _command(folder: Path) -> str:
    again = folder.with_name(folder.name + "-again")
    return (
        f"salience shrink --recipe {shlex.quote(str(folder / 'recipe.json'))} --out {shlex.quote(str(again))}"
    )
