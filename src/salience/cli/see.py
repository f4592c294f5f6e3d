"""`salience see`: a vision-language model on the image tokens that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def see(
    model: Annotated[
        str | None,
        typer.Option(
            help="Local checkpoint folder or hub id of a vision-language model. Without it: the sandbox's."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="A picture file; may be repeated. Without it: a scene of the sandbox."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked about the pictures.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="SLUG[:key=value,...], for example pyramiddrop:ratios=(0.5,0.1). May be repeated; each is compared "
            "with reading all image tokens \\[default: pyramiddrop and fastv]."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html, kept.png and result.json.")] = Path(
        "runs/see"
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    max_pixels: Annotated[int, typer.Option(help="Largest picture file that is opened.")] = 40_000_000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (the checkpoint's own), float32 or bfloat16.")
    ] = "auto",
    repeats: Annotated[int, typer.Option(help="Readings of the prompt whose median time is shown.")] = 3,
    seed: Annotated[
        int, typer.Option(help="Of the sandbox: its model, its scene and which question is asked.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="The sandbox's small model.")] = False,
) -> None:
    """Ask a vision-language model about pictures, with all image tokens and with fewer, and see what was kept.

    Prints each answer, how many image tokens each layer computed, the time to read the prompt and the exact bytes of
    the KV cache, and writes a page with the pictures and what each method kept of them. Without arguments it asks a
    small model, trained in place once on this machine.

    Examples:

        salience see

        salience see --model llava-hf/llava-1.5-7b-hf --image street.jpg --prompt "What does the sign say?"

        salience see --model ./my-vlm --image a.png --image b.png --prompt "What changed?" --method
        pyramiddrop:ratios=(0.5,0.2),layers=(8,16) --method fastv
    """
    from salience.core.errors import require

    # before anything heavy is imported
    require(dtype in ("auto", "float32", "bfloat16"), "dtype", "one of auto, float32, bfloat16", dtype)
    options = {
        "model": model, "images": tuple(map(str, image or ())), "prompt": prompt, "methods": tuple(method or ()),
        "max_new_tokens": max_new_tokens, "max_pixels": max_pixels, "device": device, "dtype": dtype,
        "repeats": repeats, "seed": seed, "quick": quick,
    }  # fmt: skip
    _run(options, out)


def _run(options: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from salience.cli._running import Bar, quiet_libraries

    console = Console(stderr=True)
    with quiet_libraries(console):
        from salience.jobs.see import SeeSettings
        from salience.jobs.see import see as run

    settings = SeeSettings(**options)
    with Bar(console, "reading the prompt") as bar:
        result = run(settings, out, say=console.print, progress=bar)
    _summary(result, out)


def _summary(result: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from salience.core.pictures import bytes_text
    from salience.jobs.see import tokens_text
    from salience.report.words import seconds_text

    console = Console()
    console.print(Text(result["prompt"], style="bold"))
    said, table = (Table(box=None, pad_edge=False, header_style="bold") for _ in range(2))
    for column in ("", "answer"):
        said.add_column(column, overflow="fold")
    for column, side in (("", "left"), ("image tokens", "left"), ("prefill", "right"), ("KV cache", "right")):
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for number, (name, arm) in enumerate(result["arms"].items()):
        seconds, held = seconds_text(arm["prefill_seconds"]), bytes_text(arm["kv_bytes"])
        if number:
            seconds += f" ({arm['prefill_ratio']:.2f}x)"
            held += f" ({arm['kv_ratio']:.2f}x)" if arm["kv_ratio"] is not None else ""
        # names and answers are text, not markup
        said.add_row(Text(name), Text(arm["answer"]))
        table.add_row(Text(name), tokens_text(arm["image_tokens"]), seconds, held)
    console.print(said)
    if result["right"]:
        console.print(Text(f"the right answer: {result['right']}"))
    console.print()
    console.print(table)
    if result["unseen"]:
        Console(stderr=True).print(Text(f"no picture is drawn: {result['unseen']}"))
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)
