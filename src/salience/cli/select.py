"""`salience select`: the documents of a corpus that are worth learning from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def select(
    data: Annotated[
        str | None,
        typer.Option(
            help="A .jsonl, .txt (plain, .gz or .zst) or .parquet file, a folder of such shards, or a datasets name. "
            "Without it: the sandbox's corpus."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id of the model that scores. Without it: the sandbox's."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(help="SLUG[:key=value,...], for example perplexity \\[default: attention-influence]."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share that is kept, in (0, 1] \\[default: the method's, 0.2].")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the kept documents, scores and report. The same command goes on where it stopped; "
            "salience tune --data takes it as it is."
        ),
    ] = Path("runs/select"),
    column: Annotated[
        list[str] | None, typer.Option(help="Map a column: text=content. May be repeated.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids, each once; # numbers \\[default: id, if there].")
    ] = None,
    source_column: Annotated[
        str | None, typer.Option(help="Column of sources, for the report \\[default: source, or the file].")
    ] = None,
    domain_column: Annotated[
        str | None, typer.Option(help="Column of domains: the share is kept inside each.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of a datasets name.")] = "train",
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a document that are read \\[default: the model's positions, or 4096]."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 8192,
    shard_documents: Annotated[
        int, typer.Option(help="Documents scored and written together: what a kill can cost.")
    ] = 2048,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out what cannot be read, and list it.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="local (alone, or the ranks of torchrun) or ray (workers of a cluster).")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(help="Of Ray \\[default: one for each GPU, or each CPU].")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster, HOST:PORT or auto \\[default: start one here].")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds in which the cluster has to answer.")] = 10.0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto (the checkpoint's own), float32 or bfloat16.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="Of the sandbox.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="The sandbox in its short form.")] = False,
) -> None:
    """Score the documents of a corpus, keep the best share of them, and write a report.

    Scores go to OUT/scores.parquet (id, score, decision), kept documents with all their columns to OUT/data/. Memory
    does not grow with the corpus, a killed run goes on where it was, and what is kept does not depend on how many
    machines took part. Without arguments it selects from a corpus in which the kind of each text is known.

    Examples:

        salience select

        salience select --data corpus/ --model Qwen/Qwen3-0.6B --keep 0.2 --out picked

        salience select --data web.jsonl.zst --column text=content --model ./small --method perplexity:prefer=high

        salience select --data corpus/ --model ./small --engine ray --address 10.0.0.1:6379 --out /shared/picked

        torchrun --nproc-per-node 8 -m salience select --data corpus/ --model ./small --out picked

    What there is: salience methods --unit sample. What its parameters are: salience show attention-influence.
    """
    from salience.core.errors import require

    # before anything heavy is imported
    require(dtype in ("auto", "float32", "bfloat16"), "dtype", "one of auto, float32, bfloat16", dtype)
    require(engine in ("local", "ray"), "engine", "one of local, ray", engine)
    options = {
        "data": data, "model": model, "method": method, "keep": keep, "columns": tuple(column or ()),
        "id_column": id_column, "source_column": source_column, "domain_column": domain_column, "split": split,
        "max_length": max_length, "batch_tokens": batch_tokens, "shard_documents": shard_documents,
        "skip_bad": skip_bad, "engine": engine, "workers": workers, "address": address, "timeout": timeout,
        "device": device, "dtype": dtype, "seed": seed, "quick": quick,
    }  # fmt: skip
    _run(options, out)


def _run(options: dict[str, Any], out: Path) -> None:
    from rich.console import Console

    from salience.cli._running import Bar, quiet_libraries

    console = Console(stderr=True)
    with quiet_libraries(console):
        import datasets

        from salience.jobs.select import SelectSettings
        from salience.jobs.select import select as run

    datasets.disable_progress_bars()
    settings = SelectSettings(**options)
    with Bar(console, "documents", remaining=True) as bar:
        result = run(settings, out, say=console.print, progress=bar)
    if result is not None:
        _summary(result, out)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return " and ".join(f"{name} {one:,}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}"


def _summary(result: dict[str, Any], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console, spent = Console(), result["spent"]
    console.print(Text(result.get("title", result["method"]), style="bold"))
    if result.get("sources"):
        table = Table(box=None, pad_edge=False, header_style="bold")
        for column, side in (
            ("source", "left"),
            ("documents", "right"),
            ("kept", "right"),
            ("share", "right"),
        ):
            table.add_column(column, justify=side, overflow="fold")  # type: ignore[arg-type]
        for name, (total, kept) in list(result["sources"].items())[:12]:
            table.add_row(Text(name), f"{total:,}", f"{kept:,}", f"{100 * kept / total:.1f} %")
        console.print(table)
    told = [
        f"{name} {_shown(value)}"
        for name, value in spent.items()
        if name not in ("documents", "samples", "kept", "share")
    ]
    console.print(Text(", ".join(told)))
    console.print(f"kept documents: {out / 'data'}", soft_wrap=True)
    if (out / "report.html").exists():
        console.print(f"report: {out / 'report.html'}", soft_wrap=True)
