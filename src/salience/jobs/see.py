"""The job of `salience see`: one question about pictures, read with all image tokens and with each method."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salience.core.errors import ParameterError, require
from salience.core.evidence import about
from salience.core.files import write_bytes_atomic, write_json_atomic
from salience.core.method import Method
from salience.core.spec import describe_method
from salience.hosts import checkpoints, seeing
from salience.hosts.kept_pictures import KeptPictures, draw
from salience.jobs.asking import command_line, own_folder, parse_methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

DEFAULTS = ("pyramiddrop", "fastv")
# the sandbox's models read the image from their third layer on, so nothing can be told before it
SANDBOX_DEFAULTS = ("pyramiddrop:ratios=(0.5,0.2),layers=(2,3)", "fastv:keep=0.25,layer=3")
PLAIN = "plain"
_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class SeeSettings:
    """Everything that decides what `salience see` does.

    Attributes:
        model (str | None): local checkpoint or hub id; None takes the sandbox's model, which is trained in place.
        images (tuple[str, ...]): files; none with the sandbox's model takes one of its scenes.
        prompt (str | None): the question; None with a scene of the sandbox asks one of the scene's.
        methods (tuple[str, ...]): `SLUG:key=value,...`; none takes `DEFAULTS`, or `SANDBOX_DEFAULTS`.
        max_new_tokens (int): of an answer, >= 1.
        max_pixels (int): of a picture file.
        device (str): "auto", "cpu", "cuda", ...
        dtype (str): of the weights; "auto" is the checkpoint's own.
        repeats (int): readings of the prompt whose median time is told, >= 1.
        seed (int): of the sandbox, >= 0.
        quick (bool): the sandbox in its short form.
    """

    model: str | None = None
    images: tuple[str, ...] = ()
    prompt: str | None = None
    methods: tuple[str, ...] = ()
    max_new_tokens: int = 32
    max_pixels: int = 40_000_000
    device: str = "auto"
    dtype: str = "auto"
    repeats: int = 3
    seed: int = 0
    quick: bool = False

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("repeats", 1), ("seed", 0)):
            require(getattr(self, name) >= least, name, f">= {least}", getattr(self, name))
        most = seeing.MOST_PIXELS
        require(1 <= self.max_pixels <= most, "max_pixels", f"in [1, {most}]", self.max_pixels)
        require(self.dtype in _DTYPES, "dtype", f"one of {', '.join(_DTYPES)}", self.dtype)
        if self.model is not None and not self.images:
            raise ParameterError("image must be given together with model, got none: --image FILE")
        if self.images and self.prompt is None:
            raise ParameterError("prompt must be given together with image, got none: --prompt TEXT")
        if self.prompt is not None:
            require(bool(self.prompt.strip()), "prompt", "a text", self.prompt)

    def command(self, out: Path) -> str:
        """The command line that does the same."""
        return command_line("see", self, out, {"images": "image", "methods": "method"})


@dataclass(frozen=True)
class _Asked:
    """A model and what it is asked."""

    model: Any
    processor: Any
    name: str
    source: str
    pictures: dict[str, Image]
    prompt: str
    right: str | None = None


def see(
    settings: SeeSettings,
    out: Path,
    *,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Answer the question plainly and with each method, and write what each kept and cost into `out`.

    Args:
        settings (SeeSettings): what to do.
        out (Path): gets `result.json`, `report.html` and, where the pictures can be told, `kept.png`; what it held
            under these names is replaced.
        say (Callable): told in a sentence what happens now.
        progress (Callable): told how many of how many readings are done.

    Returns:
        dict: what `result.json` holds.

    Raises:
        SalienceError: for bad input, before anything is written.
    """
    usual = DEFAULTS if settings.model is not None else SANDBOX_DEFAULTS
    methods = parse_methods(settings.methods or usual, "token", "drop image tokens for see")
    device = checkpoints.check_device(settings.device)
    own_folder(out)
    asked = _given(settings, device, say) if settings.model is not None else _sandbox(settings, device, say)
    model = asked.model
    question = seeing.ask_about(
        model,
        asked.processor,
        list(asked.pictures.values()),
        asked.prompt,
        max_new_tokens=settings.max_new_tokens,
    )
    for method in methods:
        seeing.check_method(model, method)
    ways: dict[str, Method | None] = {PLAIN: None, **{describe_method(method): method for method in methods}}
    done, readings = 0, len(ways) * (1 + settings.repeats)
    looks, seconds = {}, {name: list[float]() for name in ways}
    for name, way in ways.items():
        say(f"reading: {name}")
        looks[name] = seeing.look(
            model, asked.processor, question, way, max_new_tokens=settings.max_new_tokens
        )
        done += 1
        progress(done, readings)
    say("timing")
    for _ in range(settings.repeats):
        # in turns, so that a machine that slows down does so for all
        for name, way in ways.items():
            seconds[name] += seeing.prefill_seconds(model, question, way)
            done += 1
            progress(done, readings)
    arms = {name: _arm(look, seconds[name]) for name, look in looks.items()}
    plain, unseen = arms[PLAIN], next((look.unseen for look in looks.values() if look.unseen), "")
    for arm in arms.values():
        spent, full = sum(arm["image_tokens"]), sum(plain["image_tokens"])
        arm["share_of_token_layers"] = spent / full
        arm["prefill_ratio"] = arm["prefill_seconds"] / plain["prefill_seconds"]
        arm["kv_ratio"] = arm["kv_bytes"] / plain["kv_bytes"] if plain["kv_bytes"] else None
    result = {
        "prompt": asked.prompt,
        "text": question.text,
        "right": asked.right,
        "pictures": [
            {"name": name, "width": one.width, "height": one.height} for name, one in asked.pictures.items()
        ],
        "model": {
            "name": asked.name,
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "layers": len(plain["image_tokens"]),
            "dtype": str(model.dtype).removeprefix("torch."),
            "source": asked.source,
        },
        "prompt_tokens": question.tokens,
        "image_tokens": question.image_tokens,
        "arms": arms,
        "unseen": unseen,
        "command": settings.command(out),
        "about": {**about(str(device)), "device": str(device)},
    }
    say("writing the page")
    _write(out, result, {name: look.pictures for name, look in looks.items() if look.pictures is not None})
    return result


def tokens_text(counts: Sequence[int]) -> str:
    """Image tokens in each layer in short: "576, from layer 8: 288"."""
    changes = [layer for layer in range(1, len(counts)) if counts[layer] != counts[layer - 1]]
    return ", ".join([f"{counts[0]:,}", *(f"from layer {layer}: {counts[layer]:,}" for layer in changes)])


def _given(settings: SeeSettings, device: Any, say: Callable[[str], None]) -> _Asked:
    """A user's model; pictures are opened first, which costs little."""
    pictures = _opened(settings)
    source = settings.model or ""
    name = Path(source).name
    say(f"loading {name}")
    model, processor = checkpoints.load_model(source, kind="vision", dtype=settings.dtype, device=device)
    return _Asked(model, processor, name, source, pictures, settings.prompt or "")


def _sandbox(settings: SeeSettings, device: Any, say: Callable[[str], None]) -> _Asked:
    from salience.sandbox import shapes, vision

    pictures, prompt, right = _opened(settings), settings.prompt, None
    if not pictures:
        (scene,) = shapes.scenes(1, settings.seed)
        pictures = {f"scene {settings.seed}": scene.image}
        if prompt is None:
            # the word on the sign first: small text is what too few tokens lose
            question = scene.questions[-1 - settings.seed % len(scene.questions)]
            right = question.answer
            prompt = question.prompt.replace("<image>", "").strip()
    say("making the sandbox model (once on this machine)")
    model, processor = vision.load(settings.seed, settings.quick)
    if settings.dtype == "bfloat16":
        model = model.bfloat16()
    source = "trained in place on scenes of shapes and a sign"
    return _Asked(model.to(device), processor, "the sandbox model", source, pictures, prompt or "", right)


def _opened(settings: SeeSettings) -> dict[str, Image]:
    pictures: dict[str, Image] = {}
    for path in settings.images:
        name = Path(path).name
        # the same name may come from two folders, or twice
        shown = name if name not in pictures else f"{name} ({len(pictures) + 1})"
        pictures[shown] = seeing.open_picture(path, settings.max_pixels)
    return pictures


def _arm(look: seeing.Look, seconds: list[float]) -> dict[str, Any]:
    return {
        "answer": look.answer,
        "answer_tokens": look.answer_tokens,
        "image_tokens": list(look.image_tokens),
        "prefill_seconds": statistics.median(seconds),
        "prefill_each": seconds,
        "kv_bytes": look.kv_bytes,
        "spent": json.loads(json.dumps(look.spent, default=str)),
    }


def _write(out: Path, result: Mapping[str, Any], kept: Mapping[str, KeptPictures]) -> None:
    from salience.report.see import build_see

    first = next(iter(kept.values()), None)
    if first is not None and len(first.labels) == 1:
        # the counts of the only picture stand in the titles already
        kept = {name: replace(one, labels=[]) for name, one in kept.items()}

    def figure(width: int) -> Figure:
        return draw(kept, width=width)

    if kept:
        from salience.core.drawing import WIDE

        image = io.BytesIO()
        figure(WIDE).savefig(image, format="png", dpi=192)
        write_bytes_atomic(out / "kept.png", image.getvalue())
    write_json_atomic(out / "result.json", result)
    build_see(out, result, figure if kept else None)
