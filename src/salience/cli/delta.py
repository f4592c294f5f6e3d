"""`salience delta`: a fine-tuned model as its base and a few percent of what changed, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def delta(
    base: Annotated[
        str, typer.Option(help="Checkpoint folder or hub id that the fine-tuned ones were made from.")
    ],
    out: Annotated[Path, typer.Option(help="A new or empty folder for what is written.")],
    tuned: Annotated[
        list[str] | None,
        typer.Option(
            help="Fine-tuned checkpoint or LoRA adapter: folder or hub id. May be repeated: a delta for each."
        ),
    ] = None,
    apply: Annotated[
        list[str] | None,
        typer.Option(help="Delta folder to put on the base. May be repeated: their sum."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="darex:key=value,... See `salience show darex` \\[default: darex, which keeps a tenth]."
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="With --apply: factor of each delta, as often as there are deltas \\[default: 1]."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Texts (.txt, .jsonl, .json, .csv or parquet) for q=output, q=gradient, q=layer, q=loss and "
            "score=wanda. Without it random tokens of the vocabulary, which do for all but q=loss."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Sequences of --data that are used.")] = 50,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 128,
    device: Annotated[
        str, typer.Option(help="Where models run for that: auto, cpu, cuda, cuda:1 or mps.")
    ] = "auto",
) -> None:
    """Store a fine-tuned model as a sparse delta on its base, or put deltas back on it.

    With [bold]--tuned[/bold], `tuned - base` is dropped to a share of its entries, the rest is rescaled, and a small
    delta folder is written. With [bold]--apply[/bold], an ordinary checkpoint is written that from_pretrained loads
    without salience. Tensors are streamed: a model of any size needs little memory.

    keep=0.01 with the plain rescaling by 1 / keep ruins models that changed a lot in fine-tuning: give a q between
    keep and 1, or let it be chosen (q=output: where the model's output changes least).

    Examples:

        salience delta --base ./base --tuned ./tuned --method darex:keep=0.01 --out ./delta

        salience delta --base ./base --apply ./delta --out ./model

        salience delta --base my/base --tuned ./tuned --method darex:keep=0.01,q=output --data my.jsonl --out ./delta

        salience delta --base ./base --tuned ./lora-adapter --method darex:keep=0.1,q=0.2 --out ./delta

        salience delta --base ./base --apply ./math --apply ./code --weight 0.5 --weight 0.5 --out ./both
    """
    from salience.core.errors import ParameterError, require

    if bool(tuned) == bool(apply):
        got = "both" if tuned else "neither"
        raise ParameterError(f"delta must be given --tuned (to make one) or --apply (to use one), got {got}")
    makes = (("method", method), ("data", data))
    for name, value in (*makes, ("weight", None)) if apply else (("weight", weight or None),):
        require(value is None, name, f"left out with --{'apply' if apply else 'tuned'}", value)
    require(samples >= 1, "samples", ">= 1", samples)
    require(length >= 2, "length", ">= 2", length)
    if apply:
        _apply(base, apply, weight, out)
    else:
        options = {"data": data, "samples": samples, "length": length, "device": device}
        _make(base, tuple(tuned or ()), method or "darex", out, options)


def _make(base: str, tuned: tuple[str, ...], method: str, out: Path, options: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from salience.cli._running import Bar, quiet_libraries
    from salience.core.pictures import bytes_text
    from salience.core.spec import parse_method
    from salience.jobs.delta import DeltaSettings, command, make_deltas
    from salience.report.words import seconds_text

    console = Console(stderr=True)
    settings = DeltaSettings(base=base, tuned=tuned, method=method, **options)
    if getattr(parse_method(method), "needs_inputs", False):
        with quiet_libraries(console):
            pass  # models will run: load what runs them, quietly
    with Bar(console, remaining=True) as bar:
        made = make_deltas(settings, out, say=console.print, progress=bar)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("", "delta", "base", "entries kept", "divided by", "time"):
        table.add_column(column, justify="right" if column else "left")
    for name, about in made.items():
        table.add_row(
            Text(name),
            bytes_text(about["bytes"]),
            bytes_text(about["base_bytes"]),
            f"{100 * about['kept_share']:.2f} %",
            f"{about['q']:.4g}",
            seconds_text(about["seconds"]),
        )
    shown = Console()
    shown.print(table)
    folders = [part for about in made.values() for part in ("--apply", about["folder"])]
    shown.print(Text(f"next: {command(base, [*folders, '--out', 'MODEL'])}"), soft_wrap=True)


def _apply(base: str, deltas: list[str], weight: list[float] | None, out: Path) -> None:
    from rich.console import Console
    from rich.text import Text

    from salience.cli._running import Bar
    from salience.core.pictures import bytes_text
    from salience.jobs.delta import apply_deltas
    from salience.report.words import seconds_text

    with Bar(Console(stderr=True), remaining=True) as bar:
        done = apply_deltas(base, deltas, out, weights=weight or None, progress=bar)
    text = f"{bytes_text(done['bytes'])} in {done['tensors']} tensors, {seconds_text(done['seconds'])}"
    Console().print(Text(f"checkpoint: {out} ({text})"), soft_wrap=True)
