"""What `salience shrink` does, in one checked object: by options, by a YAML file, or by both (options win)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from salience.jobs.recipe import read_recipe

World = Literal["text", "instructions", "mixture"]


class ShrinkRecipe(BaseModel):
    """Everything that decides the result of `salience shrink`.

    Attributes:
        model (str | None): local checkpoint or hub id; None takes the sandbox's.
        data (str | None): file or datasets name: trained on, or shown as demonstrations, and held out for quality.
        test_data (str | None): held-out data; None holds out a part of `data`.
        columns (dict[str, str]): our name -> the data's column.
        methods (list[str]): an arm each: `SLUG:key=value,...`, several together joined by "+"; none: the default.
        baseline (bool): where an arm trains, also train as much with nothing removed.
        world (str | None): of the sandbox: "text", "instructions" or "mixture"; None chooses by the methods.
        rank (int): of LoRA, for methods that tune it.
        alpha (int | None): LoRA's scaling numerator; None is twice the rank.
        learning_rate (float | None): of methods that train; None is 3e-4, with LoRA 3e-3 on the sandbox's model.
        steps (int | None): optimizer steps of methods that train; None means `epochs`.
        epochs (float): passes over the data.
        batch_size (int): samples of a micro-batch, and of a batch of demonstrations.
        accumulation (int): micro-batches of an optimizer step.
        samples (int): demonstrations for methods that do not train.
        max_length (int | None): longest sample in tokens; None is what the model has positions for.
        truncate (bool): cut longer samples instead of refusing them.
        eval_samples (int): held-out samples that are scored.
        save_every (int): optimizer steps between resumable states.
        prompt_tokens (int | None): of the prompt whose reading is timed; None is 512 or what the model has positions
            for.
        new_tokens (int): written behind it.
        repeats (int): timed rounds.
        seed (int): of everything.
        device (str): "auto", "cpu" or "cuda".
        dtype (str): of the weights while they are worked on; what is written has the checkpoint's own.
        quick (bool): the sandbox in its short form.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    model: str | None = None
    data: str | None = None
    test_data: str | None = None
    columns: dict[str, str] = Field(default_factory=dict)
    methods: list[str] = Field(default_factory=list)
    baseline: bool = True
    world: World | None = None
    rank: int = Field(default=8, ge=1)
    alpha: int | None = Field(default=None, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    epochs: float = Field(default=1.0, gt=0)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1)
    samples: int = Field(default=64, ge=1)
    max_length: int | None = Field(default=None, ge=2)
    truncate: bool = False
    eval_samples: int = Field(default=200, ge=1)
    save_every: int = Field(default=50, ge=1)
    prompt_tokens: int | None = Field(default=None, ge=1)
    new_tokens: int = Field(default=32, ge=1)
    repeats: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    quick: bool = False


def make_shrink_recipe(file: str | Path | None, options: dict[str, Any]) -> ShrinkRecipe:
    """A recipe to shrink by, as `read_recipe` makes it."""
    return read_recipe(ShrinkRecipe, file, options)
