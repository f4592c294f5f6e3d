"""`salience tune`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def tune(
    model: Annotated[
        str | None, typer.Option(help="Local checkpoint folder or hub id. Without it: the sandbox model.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl, .txt or .parquet file or a datasets name. Without it: sandbox instructions."
        ),
    ] = None,
    test_data: Annotated[str | None, typer.Option(help="Held-out data; otherwise 5 % are held out.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Map a column: prompt=instruction. May be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="SLUG[:key=value,...], for example ist:active_layers=4. May be repeated."),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with these options; options win.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run folder. The same command goes on where it stopped.")] = Path(
        "runs/tune"
    ),
    adapter: Annotated[str | None, typer.Option(help="lora, or none to train all weights.")] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank \\[default: 8].")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate; the default depends on the model.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; otherwise --epochs decides.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data \\[default: 1].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a micro-batch \\[default: 16].")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches of a step \\[default: 1].")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Longest sample in tokens \\[default: the model's positions].")
    ] = None,
    truncate: Annotated[bool | None, typer.Option("--truncate", help="Cut longer samples.")] = None,
    eval_samples: Annotated[
        int | None, typer.Option(help="Held-out samples scored \\[default: 200].")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between resumable states \\[default: 50].")
    ] = None,
    baseline: Annotated[
        bool | None,
        typer.Option("--baseline/--no-baseline", help="Also run without methods \\[default: yes]."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything \\[default: 0].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda \\[default: auto].")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or auto \\[default: float32].")] = None,
    quick: Annotated[bool | None, typer.Option("--quick", help="The sandbox in under a minute.")] = None,
) -> None:
    """Tune a model where it matters, compare with plain tuning, and write a report.

    Without arguments it trains a small model in place, tunes it with plain LoRA and with LoRA and the recommended
    methods, and says what was saved and what it cost.

    Examples:

        salience tune

        salience tune --model ./my-model --data train.jsonl --method ist --method sstoken:keep=0.6

        salience tune --recipe runs/tune/recipe.json --seed 1 --out runs/again
    """
    from salience.cli._running import column_names

    options = {
        "model": model, "data": data, "test_data": test_data, "methods": method, "adapter": adapter, "rank": rank,
        "learning_rate": learning_rate, "steps": steps, "epochs": epochs, "batch_size": batch_size,
        "accumulation": accumulation, "max_length": max_length, "truncate": truncate,
        "eval_samples": eval_samples, "save_every": save_every, "baseline": baseline, "seed": seed,
        "device": device, "dtype": dtype, "quick": quick, "columns": column_names(column),
    }  # fmt: skip
    from salience.jobs.recipe import make_recipe

    resolved = make_recipe(recipe, {name: value for name, value in options.items() if value is not None})
    _run(resolved, out)


def _run(recipe: Any, out: Path) -> None:
    from rich.console import Console

    from salience.cli._running import Bar, quiet_libraries, stoppable

    console = Console(stderr=True)
    with quiet_libraries(console):
        from salience.jobs.tune import tune as run

    with stoppable(console) as stop, Bar(console, remaining=True) as bar:

        def progress(arm: str, step: int, steps: int, loss: float) -> None:
            bar(step, steps, arm, f"loss {loss:.3f}")

        result = run(recipe, out, progress=progress, say=console.print, stop=stop)
    _summary(result, out)


def _summary(result: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    quality, base = result["quality"], result["arms"].get(result["baseline"])
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm")
    for name in (quality["name"], "training state", "kept for backward", "time per step"):
        table.add_column(name, justify="right")
    for arm in result["arms"].values():
        memory = arm["memory"]
        state = memory["gradients"] + memory["optimizer"]
        first = base["memory"]
        table.add_row(
            arm["label"],
            f"{arm['quality']:.4g} {quality['unit']}",
            f"{state / 2**20:.2f} MiB ({_share(state, first['gradients'] + first['optimizer'])})",
            f"{memory['saved_for_backward'] / 2**20:.1f} MiB "
            f"({_share(memory['saved_for_backward'], first['saved_for_backward'])})",
            f"{1e3 * arm['step_seconds']:.0f} ms ({_share(arm['step_seconds'], base['step_seconds'])})",
        )
    console = Console()
    console.print(table)
    console.print(f"report: {out / 'report.html'}")


def _share(value: float, base: float) -> str:
    return f"{100 * value / base:.0f} %" if base else "-"
