"""`salience read`: a language model on the keys of a long text that matter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def read(
    model: Annotated[
        str | None,
        typer.Option(
            help="Local checkpoint folder or hub id of a language model. Without it: the sandbox's."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A long text in UTF-8. Without it: a text of the sandbox.")
    ] = None,
    ask: Annotated[str | None, typer.Option(help="What is asked about the text.")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="SLUG[:key=value,...], for example block-top-k:keep=0.2. May be repeated; each is compared with "
            "reading all keys \\[default: hip and block-top-k with parameters for the length]."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("runs/read"),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (the checkpoint's own), float32 or bfloat16.")
    ] = "auto",
    repeats: Annotated[
        int, typer.Option(help="Readings, taken in turns, whose median time to the first token is shown.")
    ] = 3,
    chunk: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS",
            help="Read the prompt in pieces of so many tokens, for less memory \\[default: all at once].",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sandbox: its model and its text.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="The sandbox's quickly trained model, on a short text.")
    ] = False,
) -> None:
    """Ask a language model about a long text, with all keys and with fewer, and see which ones it attended to.

    Prints each answer, the time to its first token, the share of (query, key) pairs that was kept and the share of
    attention that fell on them, and writes a page with maps of what each layer and head saw. The prompt is the text,
    an empty line and the question, as one user message where the model has a chat template. Without arguments it asks
    a small model, trained in place once on this machine.

    Examples:

        salience read

        salience read --model Qwen/Qwen3-0.6B --file report.txt --ask "When does the contract end?"

        salience read --model ./my-llm --file book.txt --ask "Who wrote the letter?" --method hip:mask_k=1024
        --method sale --method streaming-llm --chunk 8192 --device cuda --dtype bfloat16

    What there is: salience methods --unit key. What its parameters are: salience show hip.
    """
    from salience.core.errors import require

    # before anything heavy is imported
    require(dtype in ("auto", "float32", "bfloat16"), "dtype", "one of auto, float32, bfloat16", dtype)
    options = {
        "model": model, "file": None if file is None else str(file), "ask": ask, "methods": tuple(method or ()),
        "max_new_tokens": max_new_tokens, "device": device, "dtype": dtype, "repeats": repeats, "chunk": chunk,
        "seed": seed, "quick": quick,
    }  # fmt: skip
    _run(options, out)


def _run(options: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from salience.cli._running import Bar, quiet_libraries

    console = Console(stderr=True)
    with quiet_libraries(console):
        from salience.jobs.read import ReadSettings
        from salience.jobs.read import read as run

    settings = ReadSettings(**options)
    with Bar(console, "reading the prompt") as bar:
        result = run(settings, out, say=console.print, progress=bar)
    _summary(result, out)


def _summary(result: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from salience.report.words import NONE, seconds_text

    console = Console()
    console.print(Text(result["prompt"], style="bold"))
    console.print(Text(f"about {result['file']['name']}, {result['prompt_tokens']:,} tokens"))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column, side in (
        ("", "left"),
        ("answer", "left"),
        ("first token", "right"),
        ("kept", "right"),
        ("recall", "right"),
    ):
        table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
    for number, (name, arm) in enumerate(result["arms"].items()):
        seconds = seconds_text(arm["first_token_seconds"])
        if number:
            seconds += f" ({arm['first_token_ratio']:.2f}x)"
        kept, recall = arm["kept_share"], arm["recall"]
        # names and answers are text, not markup
        table.add_row(
            Text(name),
            Text(arm["answer"]),
            seconds,
            NONE if kept is None else f"{100 * kept:.1f} %",
            NONE if recall is None else f"{recall:.3f}",
        )
    console.print(table)
    if result["right"]:
        console.print(Text(f"the right answer: {result['right']}"))
    console.print(f"report: {out / 'report.html'}", soft_wrap=True)
