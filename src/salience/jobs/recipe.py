"""What a run does, in one checked object: given by options, by a YAML file, or by both (options win).

The resolved recipe is written into the run folder. It is JSON, which is YAML too, so `--recipe run/recipe.json`
repeats the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from salience.core.errors import ParameterError

Recipe = TypeVar("Recipe", bound=BaseModel)


class TuneRecipe(BaseModel):
    """Everything that decides the result of `salience tune`.

    Attributes:
        model (str | None): local checkpoint or hub id; None trains the sandbox model in place.
        data (str | None): file or datasets name; None takes the sandbox's instructions.
        test_data (str | None): held-out data; None holds out a part of `data`.
        columns (dict[str, str]): our name -> the data's column.
        methods (list[str]): `SLUG:key=value,...`; an empty list tunes without any.
        baseline (bool): also run the same without the methods, for comparison.
        adapter (str): "lora" or "none" (all weights train).
        rank (int): of LoRA.
        alpha (int | None): LoRA's scaling numerator; None is twice the rank (the rank with ALLoRA).
        learning_rate (float | None): None chooses 5e-3 for LoRA on the sandbox model (1e-2 on the quick
            one), 2e-4 on others' models, and a tenth of that without an adapter.
        steps (int | None): optimizer steps; None means `epochs`.
        epochs (float): passes over the data.
        batch_size (int): samples of a micro-batch on one device.
        accumulation (int): micro-batches of an optimizer step.
        max_length (int | None): longest sample in tokens; None is what the model has positions for.
        truncate (bool): cut longer samples instead of refusing them.
        eval_samples (int): held-out samples that are scored.
        save_every (int): optimizer steps between resumable states.
        seed (int): of everything.
        device (str): "auto", "cpu" or "cuda".
        dtype (str): of the weights.
        quick (bool): the sandbox in its short form.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str | None = None
    data: str | None = None
    test_data: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    methods: list[str] = Field(default_factory=list)
    baseline: bool = True
    adapter: Literal["lora", "none"] = "lora"
    rank: int = Field(default=8, ge=1)
    alpha: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    truncate: bool = False
    eval_samples: int = Field(default=200, ge=1)
    save_every: int = Field(default=50, ge=1)
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    quick: bool = False


def make_recipe(file: str | Path | None, options: dict[str, Any]) -> TuneRecipe:
    """A recipe to tune by, as `read_recipe` makes it."""
    return read_recipe(TuneRecipe, file, options)


def read_recipe(kind: type[Recipe], file: str | Path | None, options: dict[str, Any]) -> Recipe:
    """A recipe from a YAML file and from options that were really given.

    Args:
        kind (type[BaseModel]): the recipe's class.
        file (str | Path | None): YAML or JSON with fields of it.
        options (dict[str, Any]): field -> value; they win over the file.

    Raises:
        ParameterError: if the file cannot be read, or a field is unknown or out of range.
    """
    values = {**(_read(Path(file)) if file is not None else {}), **options}
    try:
        return kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])) or "recipe"
        if first["type"] == "extra_forbidden":
            import difflib

            close = difflib.get_close_matches(name, kind.model_fields, n=2, cutoff=0.5)
            hint = f" (did you mean {' or '.join(close)}?)" if close else ""
            known = ", ".join(kind.model_fields)
            raise ParameterError(f"recipe field must be one of {known}, got {name!r}{hint}") from error
        wanted = first["msg"].removeprefix("Input should be ")
        raise ParameterError(f"{name} must be {wanted}, got {first['input']!r}") from error


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ParameterError(f"recipe must be an existing YAML file, got {path}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = str(error).replace("\n", " ")
        raise ParameterError(f"recipe must be a readable YAML file, got {path}: {reason}") from error
    if not isinstance(loaded, dict):
        raise ParameterError(f"recipe must be a mapping of fields, got {type(loaded).__name__} in {path}")
    return loaded
