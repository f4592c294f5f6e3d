"""What the page says, section by section, as text and SVG for the template."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from salience.core import drawing, pictures
from salience.core.errors import ParameterError
from salience.core.pictures import bytes_text, memory_total
from salience.report import words
from salience.report.read import Recorded, Run

_SHOWN_SAMPLES = 6
# colours of the pictures that the page sets anew for dark screens
_THEME = {
    drawing.INK: "--ink",
    drawing.MUTED: "--muted",
    drawing.GRID: "--line",
    drawing.PAPER: "--paper",
    drawing.BASELINE: "--base",
    pictures.MEMORY[0][2]: "--parameters",
    drawing.ARMS[0]: "--arm-0",
}
Arms = Mapping[str, Mapping[str, Any]]


def page(run: Run) -> dict[str, Any]:
    """Everything that the template shows, by the names it uses."""
    result, arms = run.result, run.result["arms"]
    baseline = result["baseline"] if len(arms) > 1 else None
    others = [name for name in arms if name != baseline]
    sentences = [words.tied(_headline(result, name, baseline)) for name in others]
    samples = [_sample(arms, sample) for sample in run.tokens]
    return {
        "title": result["title"],
        "headline": sentences[0] if len(sentences) == 1 else result["title"],
        "sentences": sentences if len(sentences) > 1 else [],
        "verdict": result.get("verdict") or [],
        "facts": _facts(result),
        "tiles": _tiles(result, others[0], baseline) if len(others) == 1 else [],
        "fair": _fair(arms) if baseline else "",
        "chance": _chance(result) if baseline else "",
        "slugs": list(dict.fromkeys(slug for name in others for slug in arms[name].get("slugs") or [])),
        "columns": _columns(arms, baseline),
        "rows": _rows(result, baseline),
        "loss": _loss(run, baseline),
        "loss_notes": _loss_notes(run),
        "memory": _memory(arms, baseline),
        "memory_rows": _memory_rows(arms, baseline),
        "maps": [_map(arms, place, one) for place, one in enumerate(run.recorded)],
        "samples": samples[:_SHOWN_SAMPLES],
        "more_samples": samples[_SHOWN_SAMPLES:],
        "tasks": _tasks(result, baseline),
        "done": [_done(arm) for arm in arms.values() if arm.get("methods")],
        "recipe": json.dumps(run.recipe, indent=2, ensure_ascii=False),
        "command": _command(run),
        "about": {name: str(value) for name, value in (result.get("about") or {}).items() if value},
    }


# the top of the page


def _headline(result: Mapping[str, Any], name: str, baseline: str | None) -> str:
    arm, quality = result["arms"][name], result["quality"]
    unit, memory = quality.get("unit", ""), memory_total(arm["memory"])
    shown = f"{quality['name']} {words.quality_text(arm['quality'], unit)}"
    if baseline is None:
        step = words.seconds_text(arm["step_seconds"])
        return f"{arm['label']}: {shown}, {bytes_text(memory)} of training memory, {step} per step."
    base = result["arms"][baseline]
    return (
        f"{arm['label']}: {words.change_words(memory, memory_total(base['memory']), 'training memory')}, "
        f"{words.change_words(arm['step_seconds'], base['step_seconds'], 'time per step')}, "
        f"{shown} against {words.quality_text(base['quality'], unit)}."
    )


def _tiles(result: Mapping[str, Any], name: str, baseline: str | None) -> list[dict[str, str]]:
    arm, quality = result["arms"][name], result["quality"]
    unit, memory, seconds = quality.get("unit", ""), memory_total(arm["memory"]), arm["step_seconds"]
    values = [bytes_text(memory), words.seconds_text(seconds), words.quality_text(arm["quality"], unit)]
    small = ["", "", ""]
    if baseline is not None:
        base = result["arms"][baseline]
        before = memory_total(base["memory"])
        firsts = [
            bytes_text(before),
            words.seconds_text(base["step_seconds"]),
            words.quality_text(base["quality"], unit),
        ]
        small = [f"{first} → {value}" for first, value in zip(firsts, values)]
        small[2] += ", one run"
        values = [
            words.change_share(memory, before),
            words.change_share(seconds, base["step_seconds"]),
            words.change_quality(arm["quality"], base["quality"], unit),
        ]
    names = ["training memory", "time per step", quality["name"]]
    return [{"name": n, "value": v, "small": s} for n, v, s in zip(names, values, small)]


def _facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    model, data = result.get("model") or {}, result.get("data") or {}
    facts = []
    if model.get("name"):
        size, layers = model.get("parameters"), model.get("layers")
        parts = [
            f"{words.count_text(size)} parameters" if size else "",
            f"{layers} layers" if layers else "",
            model.get("source"),
        ]
        facts.append(("Model", _joined(model["name"], parts)))
    if data.get("name"):
        train, test = data.get("train"), data.get("test")
        parts = [
            f"{words.plain(train)} training samples" if train else "",
            f"{words.plain(test)} held out" if test else "",
            data.get("description"),
        ]
        facts.append(("Data", _joined(data["name"], parts)))
    steps = {arm.get("steps") for arm in result["arms"].values()} - {None}
    if len(steps) == 1:
        facts.append(("Training", f"{steps.pop():,} steps{' each' if len(result['arms']) > 1 else ''}"))
    return facts


def _joined(name: str, parts: list[Any]) -> str:
    shown = [str(part) for part in parts if part and part != name]
    return f"{name} ({'; '.join(shown)})" if shown else name


def _fair(arms: Arms) -> str:
    several = "All arms start" if len(arms) > 2 else "Both start"
    return f"{several} from the same weights and see the same data in the same order."


def _chance(result: Mapping[str, Any]) -> str:
    """How far apart two results can be by the choice of held-out samples alone."""
    quality, samples = result["quality"], (result.get("data") or {}).get("test")
    share = (result["arms"][result["baseline"]]["quality"] or 0.0) / 100
    counts_answers = (
        isinstance(samples, int)
        and quality["name"] in ("exact match", "accuracy")
        and quality.get("unit") == "%"
    )
    if not (counts_answers and samples and 0 < share < 1):
        return ""
    spread = 100 * math.sqrt(share * (1 - share) / samples)
    return words.tied(
        f"With {samples:,} held-out samples the choice of samples alone moves a value of {100 * share:.1f} % "
        f"by about {spread:.1f} points (one standard error)."
    )


# tables


def _cell(text: str, **more: Any) -> dict[str, Any]:
    return {"text": text, "small": "", "tone": "", "remark": "", "bar": None, **more}


def _columns(arms: Arms, baseline: str | None) -> list[dict[str, Any]]:
    paint = drawing.colours(arms, baseline)
    return [
        {"label": arm["label"], "colour": variable(paint[name]), "baseline": name == baseline}
        for name, arm in arms.items()
    ]


def _cells(
    arms: Arms,
    baseline: str | None,
    get: Callable[[Any], Any],
    text: Callable[[Any], str],
    *,
    cost: bool = True,
) -> list[dict[str, Any]]:
    """One table row: each arm's figure and, beside a baseline, its difference."""
    first = get(arms[baseline]) if baseline else None
    values = {name: get(arm) for name, arm in arms.items()}
    return [
        _cell(
            words.tied(text(value)),
            **({} if name == baseline else words.difference(value, first, text, cost)),
        )
        for name, value in values.items()
    ]


def _rows(result: Mapping[str, Any], baseline: str | None) -> list[dict[str, Any]]:
    arms, quality = result["arms"], result["quality"]
    rows: list[dict[str, Any]] = []

    def add(
        name: str, note: str, get: Callable[[Any], Any], text: Callable[[Any], str], cost: bool = True
    ) -> None:
        if any(get(arm) is not None for arm in arms.values()):
            rows.append({"name": name, "note": note, "cells": _cells(arms, baseline, get, text, cost=cost)})

    rows.append(_quality_row(result, baseline))
    if quality["name"] != "held-out loss":
        add("held-out loss", "lower is better", lambda arm: arm.get("eval_loss"), words.number, cost=False)
    add("training memory", "exact bytes, see below", lambda arm: memory_total(arm["memory"]), bytes_text)
    add("peak memory", "measured", lambda arm: arm["memory"].get("peak") or None, words.bytes_or_none)
    add("time per step", "median", lambda arm: arm["step_seconds"], words.seconds_text)
    add("training time", "with the methods' own preparation", lambda arm: arm["seconds"], words.seconds_text)
    add("trainable parameters", "", lambda arm: arm.get("trainable_parameters"), words.number)
    if len({arm.get("steps") for arm in arms.values()}) > 1:
        add("steps", "", lambda arm: arm.get("steps"), words.number, cost=False)
    return rows


def _quality_row(result: Mapping[str, Any], baseline: str | None) -> dict[str, Any]:
    arms, quality = result["arms"], result["quality"]
    unit, cells = quality.get("unit", ""), []
    for name, arm in arms.items():
        more = {}
        if baseline not in (None, name):
            change = words.change_quality(arm["quality"], arms[baseline]["quality"], unit)
            more = {"small": change, "remark": "one run, no interval"}
        cells.append(_cell(words.quality_text(arm["quality"], unit), **more))
    note = "higher is better" if quality.get("higher_is_better", True) else "lower is better"
    return {"name": quality["name"], "note": note, "cells": cells}


def _part(key: str, arm: Mapping[str, Any]) -> float:
    return float(arm["memory"][key])


def _memory_rows(arms: Arms, baseline: str | None) -> list[dict[str, Any]]:
    rows = [
        {
            "name": name,
            "colour": variable(colour),
            "cells": _cells(arms, baseline, partial(_part, key), bytes_text),
        }
        for key, name, colour in pictures.MEMORY
    ]
    together = _cells(arms, baseline, lambda arm: memory_total(arm["memory"]), bytes_text)
    return [*rows, {"name": "together", "colour": "", "cells": together}]


def _tasks(result: Mapping[str, Any], baseline: str | None) -> list[dict[str, Any]]:
    unit = result["quality"].get("unit", "")
    by_arm = {name: arm.get("quality_by_task") or {} for name, arm in result["arms"].items()}
    rows = []
    for task in dict.fromkeys(task for values in by_arm.values() for task in values):
        cells = []
        for name, values in by_arm.items():
            value = values.get(task)
            known = value is not None and math.isfinite(value)
            change = (
                ""
                if baseline in (None, name)
                else words.change_quality(value, by_arm[baseline].get(task), unit)
            )
            bar = f"{max(0.0, min(float(value or 0), 100.0)):.1f}" if unit == "%" and known else None
            cells.append(_cell(words.quality_text(value, unit), small=change, bar=bar))
        rows.append({"name": task, "cells": cells})
    return rows


# pictures


def variable(colour: str) -> str:
    """A colour of the pictures as the page's theme has it."""
    return f"var({_THEME[colour]})" if colour in _THEME else colour


def drawn(draw: Callable[[int], Any], label: str, salt: str) -> dict[str, str]:
    """The same picture for a page and for a phone, its neutral colours left to the page's theme."""
    shown = {}
    for name, width in (("wide", drawing.WIDE), ("narrow", drawing.NARROW)):
        svg = pictures.as_svg(draw(width), label=label, salt=f"{salt}-{name}")
        for colour, variable in _THEME.items():
            svg = svg.replace(f": {colour}", f": var({variable})")
        shown[name] = svg
    return shown


def _loss(run: Run, baseline: str | None) -> dict[str, str] | None:
    rows = {arm: found for arm, found in run.metrics.items() if found}
    if not rows:
        return None
    labels = {arm: run.result["arms"][arm]["label"] for arm in rows}
    return drawn(
        lambda width: pictures.loss_curves(rows, labels=labels, baseline=baseline, width=width),
        "loss while training",
        "loss",
    )


def _loss_notes(run: Run) -> list[str]:
    notes = []
    for arm, rows in run.metrics.items():
        losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        bad = [step for step, loss in losses if loss is None or not math.isfinite(loss)]
        if bad:
            more = f" and {len(bad) - 1:,} more" if len(bad) > 1 else ""
            notes.append(
                f"{run.result['arms'][arm]['label']}: the loss was not finite at step {bad[0]:,}{more}."
            )
    return notes


def _memory(arms: Arms, baseline: str | None) -> dict[str, str]:
    return drawn(
        lambda width: pictures.memory_bars(arms, baseline=baseline, width=width),
        "training memory by part",
        "memory",
    )


def _map(arms: Arms, place: int, one: Recorded) -> dict[str, str]:
    from salience.core.registry import find

    try:
        unit, method = find(one.slug).unit, find(one.slug).name
    except ParameterError:
        unit, method = "unit", one.slug
    title = f"{method}: {one.name}"
    shown, until = {title: (unit, one.history)}, arms[one.arm].get("steps")
    figures = drawn(
        lambda width: pictures.draw_histories(shown, until=until, width=width), title, f"map{place}"
    )
    return {**figures, "caption": f"{arms[one.arm]['label']}. {_map_caption(one, unit)}".strip()}


def _map_caption(one: Recorded, unit: str) -> str:
    values, steps = one.history.values(), one.history.steps
    last, parts = values[-1], []
    if len(steps) > 1:
        parts.append(f"{len(steps):,} recordings, steps {min(steps):,} to {max(steps):,}.")
    known = last[last.isfinite()]
    if unit == "layer" and len(known.unique()) > 3:
        best = last.nan_to_num(-math.inf, -math.inf, -math.inf).argsort(descending=True).tolist()
        parts.append(f"Highest at the end: layers {best[0]}, {best[1]} and {best[2]}.")
    if not bool(values.isfinite().all()):
        parts.append("Grey: no finite score.")
    return " ".join(parts)


def _sample(arms: Arms, sample: Mapping[str, Any]) -> dict[str, Any]:
    """A text as tokens; a kept token's heat is its place between the lowest and the highest score kept."""
    kinds = [
        "prompt" if prompt else "kept" if kept else "dropped"
        for prompt, kept in zip(sample["prompt"], sample["kept"])
    ]
    scores = [value if value is not None and math.isfinite(value) else None for value in sample["score"]]
    known = [value for kind, value in zip(kinds, scores) if kind == "kept" and value is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    tokens = []
    for token, kind, score in zip(sample["tokens"], kinds, scores):
        heat = 0.5 if score is None or high <= low else (score - low) / (high - low)
        tip = kind if kind == "prompt" or score is None else f"{kind}, score {words.number(score, 3)}"
        tokens.append({"text": words.visible(str(token)), "kind": kind, "heat": f"{heat:.2f}", "tip": tip})
    label = arms.get(sample.get("arm", ""), {}).get("label")
    kept = f"{kinds.count('kept'):,} of {len(kinds) - kinds.count('prompt'):,} answer tokens kept."
    return {
        "title": str(sample.get("title") or "Sample"),
        "tokens": tokens,
        "caption": f"{label}: {kept}" if label else kept,
    }


# the end of the page


def _done(arm: Mapping[str, Any]) -> dict[str, Any]:
    spent, slugs = arm.get("spent") or {}, arm.get("slugs") or []
    methods = []
    for index, shown in enumerate(arm["methods"]):
        found = spent.get(slugs[index]) if index < len(slugs) else None
        facts = [(name, words.plain(value, name)) for name, value in (found or {}).items()]
        methods.append({"shown": shown, "spent": facts})
    return {"label": arm["label"], "methods": methods}


def _command(run: Run) -> str:
    if run.result.get("command"):
        return str(run.result["command"])
    recipe, again = run.folder / "recipe.json", run.folder.with_name(run.folder.name + "-again")
    return f"salience tune --recipe {shlex.quote(str(recipe))} --out {shlex.quote(str(again))}"
