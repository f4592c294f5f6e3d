"""`salience shrink`: a smaller model that loads anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def shrink(
    model: Annotated[
        str | None, typer.Option(help="Local checkpoint folder or hub id. Without it: the sandbox model.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl, .txt or .parquet file or a datasets name: what the smaller model is for. Trained on, or "
            "shown as demonstrations; a part is held out. Without it: the sandbox's texts."
        ),
    ] = None,
    test_data: Annotated[str | None, typer.Option(help="Held-out data; otherwise 5 % are held out.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Map a column: prompt=instruction. May be repeated.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="SLUG[:key=value,...], for example loraprune:keep=0.5. May be repeated: rivals side by side, each "
            "from the same weights. Joined by + they work together on one model."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML or JSON file with these options; options win.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Run folder; checkpoints go to models/ in it. The same command goes on where it stopped."
        ),
    ] = Path("runs/shrink"),
    world: Annotated[
        str | None,
        typer.Option(
            help="Of the sandbox: text, instructions or mixture (of experts) \\[default: by the methods]."
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="LoRA rank, of methods that tune it \\[default: 8].")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate, of methods that train \\[default: 3e-4].")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, of methods that train; otherwise --epochs decides.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data \\[default: 1].")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples of a micro-batch \\[default: 16].")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches of a step \\[default: 1].")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Demonstrations for methods that do not train \\[default: 64].")
    ] = None,
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
        typer.Option(
            "--baseline/--no-baseline",
            help="Where a method trains, also train as much with nothing removed \\[default: yes].",
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(help="Of the prompt whose reading is timed \\[default: 512, or what fits].")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens whose writing is timed \\[default: 32].")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(help="Timed rounds; medians are told \\[default: 5].")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything \\[default: 0].")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda \\[default: auto].")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="While it is worked on: float32, bfloat16 or auto; what is written has the checkpoint's own "
            "\\[default: float32]."
        ),
    ] = None,
    quick: Annotated[bool | None, typer.Option("--quick", help="The sandbox in its short form.")] = None,
) -> None:
    """Make a model smaller in one or several ways, compare with the untouched one, and write a report.

    Each [bold]--method[/bold] ends in an ordinary checkpoint, OUT/models/..., that from_pretrained loads without
    salience: it is loaded so, its logits are checked, and its memory and speed are measured beside the untouched
    model's. Without arguments a small model, trained in place once on this machine, is pruned.

    Examples:

        salience shrink

        salience shrink --model ./my-model --data train.jsonl --method loraprune:keep=0.5 --out ./run

        salience shrink --model ./my-mixture --data demonstrations.jsonl --method easy-ep:keep=0.5 --out ./run

        salience shrink --model ./my-model --data train.jsonl --method loraprune:keep=0.5 --method
        loraprune:keep=0.5,metric=magnitude --steps 500 --out ./rivals
    """
    from salience.cli._running import column_names

    options = {
        "model": model, "data": data, "test_data": test_data, "methods": method, "world": world, "rank": rank,
        "learning_rate": learning_rate, "steps": steps, "epochs": epochs, "batch_size": batch_size,
        "accumulation": accumulation, "samples": samples, "max_length": max_length, "truncate": truncate,
        "eval_samples": eval_samples, "save_every": save_every, "baseline": baseline,
        "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats, "seed": seed,
        "device": device, "dtype": dtype, "quick": quick, "columns": column_names(column),
    }  # fmt: skip
    from salience.jobs.shrink_recipe import make_shrink_recipe

    resolved = make_shrink_recipe(
        recipe, {name: value for name, value in options.items() if value is not None}
    )
    _run(resolved, out)


def _run(recipe: Any, out: Path) -> None:
    from rich.console import Console

    from salience.cli._running import Bar, quiet_libraries, stoppable

    console = Console(stderr=True)
    with quiet_libraries(console):
        from salience.jobs.shrink import shrink as run

    with stoppable(console) as stop, Bar(console, remaining=True) as bar:

        def progress(arm: str, step: int, steps: int, loss: float) -> None:
            bar(step, steps, arm, f"loss {loss:.3f}")

        result = run(
            recipe,
            out,
            progress=progress,
            say=console.print,
            stop=stop,
            measured=lambda done, total: bar(done, total, "measuring"),
        )
    _summary(result, out)


def _summary(result: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from salience.core.pictures import bytes_text
    from salience.report.words import count_text, number, quality_text

    quality, first = result["quality"], result["arms"][result["untouched"]]
    unit = "%" if quality and quality["unit"] == "%" else ""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", overflow="fold")
    names = [quality["name"]] if quality else []
    names += ["parameters", "on disk", "peak memory", "prefill tokens/s", "decode tokens/s"]
    for name in names:
        table.add_column(name, justify="right")
    for name, arm in result["arms"].items():
        told = [quality_text(arm["quality"]["overall"], unit)] if quality else []
        for key, text in (
            ("parameters", count_text),
            ("bytes_on_disk", bytes_text),
            ("peak_bytes", bytes_text),
            ("prefill_tokens_per_second", lambda value: number(value, 3)),
            ("decode_tokens_per_second", lambda value: number(value, 3)),
        ):
            value, before = arm[key], first[key]
            ratio = f" ({value / before:.2f}x)" if name != result["untouched"] and value and before else ""
            told.append("-" if value is None else text(value) + ratio)
        table.add_row(Text(arm["label"]), *told)
    for one in result["tuned"].values():
        shown = quality_text(one["quality"]["overall"], unit)
        table.add_row(Text(one["label"]), shown, *[""] * (len(names) - 1))
    console = Console()
    console.print(table)
    for name in result["arms"]:
        if name != result["untouched"]:
            console.print(Text(f"checkpoint: {out / 'models' / name}"), soft_wrap=True)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)
