"""The job of `salience read`: one question about a long text, read with all keys and with each method."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salience.core.errors import ParameterError, require
from salience.core.evidence import about
from salience.core.files import write_json_atomic
from salience.core.method import Method
from salience.core.registry import load
from salience.core.spec import describe_method
from salience.hosts import checkpoints, longtext
from salience.hosts.kept_keys import LayerRecord
from salience.hosts.transformers import structure
from salience.jobs.asking import command_line, own_folder, parse_methods

PLAIN = "plain"
SANDBOX_TOKENS, QUICK_TOKENS = 4096, 512  # of a text that the sandbox makes; its quick model answers at 512
_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class ReadSettings:
    """Everything that decides what `salience read` does.

    Attributes:
        model (str | None): local checkpoint or hub id; None takes the sandbox's model, which is trained in place.
        file (str | None): UTF-8 text; None with the sandbox's model takes one of its texts.
        ask (str | None): the question; None with a text of the sandbox asks what its notes hold.
        methods (tuple[str, ...]): `SLUG:key=value,...`; none takes `usual_methods`.
        max_new_tokens (int): of an answer, >= 1.
        device (str): "auto", "cpu", "cuda", ...
        dtype (str): of the weights; "auto" is the checkpoint's own.
        repeats (int): readings whose median time is told, >= 1.
        chunk (int | None): tokens of the prompt that are read at a time, >= 1; None reads all at once.
        seed (int): of the sandbox, >= 0.
        quick (bool): the sandbox in its short form.
    """

    model: str | None = None
    file: str | None = None
    ask: str | None = None
    methods: tuple[str, ...] = ()
    max_new_tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 3
    chunk: int | None = None
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("repeats", 1), ("seed", 0)):
            require(getattr(self, name) >= least, name, f">= {least}", getattr(self, name))
        require(self.chunk is None or self.chunk >= 1, "chunk", ">= 1", self.chunk)
        require(self.dtype in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}", self.dtype)
        if self.model is not None and self.file is None:
            raise ParameterError("file must be given together with model, got none: --file FILE")
        if self.file is not None and self.ask is None:
            raise ParameterError("ask must be given together with file, got none: --ask TEXT")
        if self.ask is not None:
            require(bool(self.ask.strip()), "ask", "a text", self.ask)

    def command(self, out: Path) -> str:
        """The command line that does the same."""
        return command_line("read", self, out, {"methods": "method"})


@dataclass(frozen=True)
class _Asked:
    """A model, what it reads, and what it is asked."""

    model: Any
    tokenizer: Any
    name: str
    source: str
    file: str
    text: str
    question: str
    right: str | None = None


def read(
    settings: ReadSettings,
    out: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Answer the question plainly and with each method, and write what each kept and cost into `out`.

    Args:
        settings (ReadSettings): what to do.
        out (Path): gets `result.json` and `report.html`; what it held under these names is replaced.
        say (Callable): told in a sentence what happens now.
        progress (Callable): told how many of how many readings are done.

    Returns:
        dict: what `result.json` holds.

    Raises:
        SalienceError: for bad input, before anything is written.
    """
    methods = parse_methods(settings.methods, "key", "choose key blocks for read")
    device = checkpoints.check_device(settings.device)
    own_folder(out)
    asked = _given(settings, device, say) if settings.model is not None else _sandbox(settings, device, say)
    model, tokenizer, chunk = asked.model, asked.tokenizer, settings.chunk
    most = settings.max_new_tokens
    question = longtext.ask_about(model, tokenizer, asked.text, asked.question, max_new_tokens=most)
    depth = len(structure(model).layers)
    if not methods:
        usual = usual_methods(question.tokens, depth, device.type)
        methods = parse_methods(usual, "key", "choose key blocks for read")
    for method in methods:
        longtext.check_method(model, method)
    ways: dict[str, Method | None] = {PLAIN: None, **{describe_method(method): method for method in methods}}
    done, readings = 0, len(ways) * (1 + settings.repeats) + 1

    def advance() -> None:
        nonlocal done
        done += 1
        progress(done, readings)

    answers: dict[str, longtext.Answer] = {}
    timed: dict[str, list[longtext.FirstToken]] = {name: [] for name in ways}
    for name, way in ways.items():
        say(f"reading: {name}")
        answers[name] = longtext.answer(model, tokenizer, question, way, max_new_tokens=most, chunk=chunk)
        advance()
    say("timing")
    for _ in range(settings.repeats):
        # in turns, so that a machine that slows down does so for all
        for name, way in ways.items():
            timed[name].append(longtext.first_token(model, question, way, chunk=chunk))
            advance()
    # the plain model does not tell its attention's part: the same attention through the engine does
    dense = longtext.first_token(model, question, load("dense-attention")(), chunk=chunk)
    advance()
    arms = {name: _arm(answers[name], timed[name]) for name in ways}
    plain = arms[PLAIN]
    seconds = plain["first_token_seconds"]
    plain["seconds"] = _split(seconds, 0.0, seconds * dense.attending / dense.seconds)
    plain["kept_share"] = plain["recall"] = 1.0
    for arm in arms.values():
        arm["first_token_ratio"] = arm["first_token_seconds"] / plain["first_token_seconds"]
    result = {
        "prompt": asked.question,
        "text": _ends(question.text),
        "right": asked.right,
        "file": {"name": asked.file, "characters": len(asked.text)},
        "model": {
            "name": asked.name,
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": depth,
            "dtype": str(model.dtype).removeprefix("torch."),
            "source": asked.source,
        },
        "prompt_tokens": question.tokens,
        "unknown_tokens": question.unknown,
        "positions": question.limit,
        "chat": question.chat,
        "chunk": chunk,
        "arms": arms,
        "command": settings.command(out),
        "about": {**about(str(device)), "device": str(device)},
    }
    say("writing the page")
    _write(out, result, {name: one.layers for name, one in answers.items() if one.layers})
    return result


def usual_methods(tokens: int, depth: int, device: str = "cpu") -> tuple[str, ...]:
    """HiP and block top-k with parameters for the length of a prompt and the depth of a model.

    From 8,192 tokens on they are the methods' own. A shorter prompt gets smaller blocks and fewer keys, so that
    something is left out of it, of both methods about the same share. The first tenth of the layers stays dense under
    HiP, 3 of 32 as in the paper.

    Args:
        tokens (int): of the prompt.
        depth (int): layers of the decoder.
        device (str): type of the device; GPUs attend to larger blocks.
    """
    keys, part = 512, 16 if tokens >= 1024 else 8
    while keys > 32 and keys > tokens // part:
        keys //= 2
    keep, block = (0.1, 64) if tokens >= 8192 else (0.15, 32) if tokens >= 1024 else (0.25, 16)
    large = ",attend_block=32" if device == "cuda" and keys >= 256 else ""
    return (
        f"hip:mask_k={keys},window={keys // 2},sink_tokens={min(16, keys // 4)},dense_layers={depth // 10}{large}",
        f"block-top-k:keep={keep},q_block={block},k_block={block}",
    )


def _given(settings: ReadSettings, device: Any, say: Callable[[str], None]) -> _Asked:
    """A user's model; the file is opened first, which costs little."""
    file, source = settings.file or "", settings.model or ""
    text, name = longtext.open_text(file), Path(source).name
    say(f"loading {name}")
    model, tokenizer = checkpoints.load_model(source, kind="causal", dtype=settings.dtype, device=device)
    return _Asked(model, tokenizer, name, source, Path(file).name, text, settings.ask or "")


def _sandbox(settings: ReadSettings, device: Any, say: Callable[[str], None]) -> _Asked:
    from salience.sandbox import needles

    question, right = settings.ask, None
    if settings.file is not None:
        file, text = Path(settings.file).name, longtext.open_text(settings.file)
    else:
        file = f"text {settings.seed}"
        found = needles.long_text(QUICK_TOKENS if settings.quick else SANDBOX_TOKENS, settings.seed)
        text = found.text
        if question is None:
            question, right = found.question, found.answer
    say("making the sandbox model (once on this machine)")
    model, tokenizer = needles.load(settings.seed, settings.quick)
    if settings.dtype == "bfloat16":
        model = model.bfloat16()
    source = "trained in place to find notes in texts"
    return _Asked(model.to(device), tokenizer, "the sandbox model", source, file, text, question or "", right)


def _arm(answer: longtext.Answer, timed: Sequence[longtext.FirstToken]) -> dict[str, Any]:
    seconds = statistics.median(one.seconds for one in timed)
    choosing = statistics.median(one.choosing for one in timed)
    attending = statistics.median(one.attending for one in timed)
    return {
        "answer": answer.text,
        "answer_tokens": answer.tokens,
        "first_token_seconds": seconds,
        "first_token_each": [one.seconds for one in timed],
        "seconds": _split(seconds, choosing, attending),
        "kept_share": _share(answer.layers),
        "recall": _recall(answer.layers),
        "kernel": ", ".join(sorted({one.kernel for one in answer.layers})),
        "layers": [
            {
                "layer": one.layer,
                "kernel": one.kernel,
                "share": one.share.tolist(),
                "recall": one.recall.tolist(),
            }
            for one in answer.layers
        ],
        "spent": json.loads(json.dumps(answer.spent, default=str)),
    }


def _split(seconds: float, choosing: float, attending: float) -> dict[str, float]:
    """Where the time went; medians of different readings need not leave a rest."""
    return {
        "choosing": choosing,
        "attending": attending,
        "rest": max(seconds - choosing - attending, 0.0),
    }


def _share(layers: Sequence[LayerRecord]) -> float | None:
    """Kept pairs of all pairs, over layers and heads."""
    whole = sum(one.whole * len(one.pairs) for one in layers)
    return sum(float(one.pairs.sum()) for one in layers) / whole if whole else None


def _recall(layers: Sequence[LayerRecord]) -> float | None:
    return statistics.fmean(float(one.recall.mean()) for one in layers) if layers else None


def _ends(text: str, characters: int = 700) -> str:
    """A prompt without its middle."""
    if len(text) <= 2 * characters:
        return text
    left_out = len(text) - 2 * characters
    return f"{text[:characters]}\n[… {left_out:,} characters …]\n{text[-characters:]}"


def _write(out: Path, result: Mapping[str, Any], kept: Mapping[str, Sequence[LayerRecord]]) -> None:
    from salience.report.reading import build_reading

    write_json_atomic(out / "result.json", result)
    build_reading(out, result, kept)
