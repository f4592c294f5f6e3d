"""Reads a run folder and refuses what is missing or broken, naming the file.

- `recipe.json`: the recipe as resolved, any object.
- `metrics.jsonl`: one object a line, `{"arm", "step", "loss", "lr", "seconds"}` or `{"arm", "step", "eval_loss"}`.
- `result.json`: title, baseline (name of an arm), quality (name, higher_is_better, unit), arms, and optionally
  model, data, verdict, about, command. An arm has label, quality, seconds, step_seconds, memory (parameters,
  gradients, optimizer, saved_for_backward and optionally peak, in bytes), and optionally methods, slugs,
  quality_by_task, eval_loss, trainable_parameters, steps, spent.
- `scores.safetensors` (optional): `ARM/SLUG/NAME/steps` [T] and `ARM/SLUG/NAME/values` [T, U].
- `tokens.json` (optional): a list of samples: arm, slug, title, and for each token tokens, prompt, score, kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salience.core.errors import ParameterError
from salience.core.pictures import MEMORY
from salience.core.scores import History

_COLUMNS = ("tokens", "prompt", "score", "kept")


@dataclass(frozen=True)
class Recorded:
    """The history of one score."""

    arm: str
    slug: str
    name: str
    history: History


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Attributes:
        folder (Path): where it is.
        recipe (dict): as resolved.
        result (dict): the content of `result.json`, checked.
        metrics (dict[str, list]): arm -> rows, arms in the result's order.
        recorded (list[Recorded]): score histories with at least one row.
        tokens (list[dict]): samples with a score for each token.
    """

    folder: Path
    recipe: dict[str, Any]
    result: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    recorded: list[Recorded]
    tokens: list[dict[str, Any]]


def read_run(folder: Path) -> Run:
    """Read and check everything.

    Raises:
        ParameterError: if a file is missing or broken.
    """
    recipe = _object(folder / "recipe.json")
    result = _object(folder / "result.json")
    _check_result(folder / "result.json", result)
    arms = list(result["arms"])
    return Run(
        folder=folder,
        recipe=recipe,
        result=result,
        metrics=_metrics(folder / "metrics.jsonl", arms),
        recorded=_recorded(folder / "scores.safetensors", arms),
        tokens=_tokens(folder / "tokens.json"),
    )


def _refuse(path: Path, wanted: str, got: object) -> ParameterError:
    return ParameterError(f"{path.name} must be {wanted}, got {got} ({path})")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _refuse(path, "in the run folder", "none") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _refuse(path, "a readable text file", error) from error


def _object(path: Path) -> dict[str, Any]:
    loaded = _json(path)
    if not isinstance(loaded, dict):
        raise _refuse(path, "a JSON object", type(loaded).__name__)
    return loaded


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise _refuse(path, "valid JSON", error) from error


def _check_result(path: Path, result: Mapping[str, Any]) -> None:
    _check_fields(path, "", result, {"title": str, "baseline": str, "quality": dict, "arms": dict})
    _check_fields(path, "quality.", result["quality"], {"name": str})
    arms = result["arms"]
    if not arms:
        raise _refuse(path, "a result with at least one arm", "none")
    for name, arm in arms.items():
        if not isinstance(arm, dict):
            raise _refuse(path, f"a result whose arms.{name} is an object", type(arm).__name__)
        number = (int, float, type(None))
        wanted = {"label": str, "quality": number, "seconds": number, "step_seconds": number, "memory": dict}
        _check_fields(path, f"arms.{name}.", arm, wanted)
        _check_fields(
            path, f"arms.{name}.memory.", arm["memory"], {key: (int, float) for key, _, _ in MEMORY}
        )
    if result["baseline"] not in arms:
        raise _refuse(path, f"a result whose baseline is one of {', '.join(arms)}", repr(result["baseline"]))


def _check_fields(path: Path, at: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind) or (key not in found):
            got = type(found[key]).__name__ if key in found else "none"
            names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise _refuse(path, f"a result with {at}{key} ({names.replace('NoneType', 'null')})", got)


def _metrics(path: Path, arms: list[str]) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _refuse(path, "JSON on every line", f"line {number}: {error}") from error
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("step"), int)
            or not isinstance(row.get("arm"), str)
        ):
            raise _refuse(path, "objects with arm and step on every line", f"line {number}: {line[:80]}")
        for key in ("loss", "eval_loss", "seconds"):
            if not isinstance(row.get(key, 0.0), int | float | None):
                raise _refuse(path, f"lines whose {key} is a number", f"line {number}: {line[:80]}")
        if row["arm"] in rows:
            rows[row["arm"]].append(row)
    return rows


def _recorded(path: Path, arms: list[str]) -> list[Recorded]:
    if not path.is_file():
        return []
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise _refuse(path, "a readable safetensors file", error) from error
    found = []
    for key in sorted(tensors):
        arm, _, rest = key.partition("/")
        slug, _, rest = rest.partition("/")
        name, _, what = rest.rpartition("/")
        if what != "values" or arm not in arms:
            continue
        steps, values = tensors.get(key.removesuffix("values") + "steps"), tensors[key]
        if steps is None or values.ndim != 2 or steps.shape != values.shape[:1]:
            got = f"steps {None if steps is None else list(steps.shape)} with values {list(values.shape)}"
            raise _refuse(path, f"steps [T] and values [T, U] for {key.removesuffix('/values')}", got)
        if values.numel():
            history = History()
            history.load({"steps": steps, "values": values.float()})
            found.append(Recorded(arm, slug, name, history))
    return sorted(found, key=lambda one: arms.index(one.arm))


def _tokens(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    samples = _json(path)
    if not isinstance(samples, list):
        raise _refuse(path, "a list of samples", type(samples).__name__)
    for number, sample in enumerate(samples, 1):
        columns = [sample.get(name) if isinstance(sample, dict) else None for name in _COLUMNS]
        lengths = {len(column) if isinstance(column, list) else None for column in columns}
        if len(lengths) != 1 or None in lengths:
            raise _refuse(
                path, f"samples with equally long {', '.join(_COLUMNS)}", f"other in sample {number}"
            )
    return samples
