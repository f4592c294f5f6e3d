"""Asks a vision-language model about pictures, with and without a method, and measures what each way costs.

Pictures are opened with care: only formats whose decoders are part of Pillow, and never more pixels than allowed,
which is known before anything is decoded. What the model is called with is made by its own processor alone, so that
tiles, dynamic resolution and extra inputs are as the model expects them.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError

from salience.core.errors import (
    ConflictError,
    ParameterError,
    SalienceError,
    StructureError,
    first_line,
    require,
)
from salience.core.evidence import measured
from salience.hosts.checkpoints import check_positions
from salience.hosts.kept_pictures import KeptPictures, kept_pictures
from salience.hosts.pruning import Pruning
from salience.hosts.vision import cache_of, vision_language
from salience.verb import focus

if TYPE_CHECKING:
    from PIL.Image import Image

    from salience.core.method import Method

MOST_PIXELS = 178_956_970  # what Pillow takes for a decompression bomb
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# what Pillow's decoders raise for files that are not what they say
_CORRUPT = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, struct.error, zlib.error)


@dataclass(frozen=True)
class Question:
    """Pictures and a prompt as the model reads them.

    Attributes:
        text (str): the prompt with chat template and image tokens, before these are repeated.
        inputs (Any): what the processor made of it, on the model's device and in its dtype.
        tokens (int): of the prompt.
        image_tokens (int): among them.
    """

    text: str
    inputs: Any
    tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Look:
    """One way of reading a question.

    Attributes:
        answer (str): decoded greedily, without special tokens.
        answer_tokens (int): of it.
        image_tokens (tuple[int, ...]): that each layer of the decoder computed.
        kv_bytes (int): of the KV cache after the prompt.
        spent (dict): what the method says of itself; empty without one.
        pictures (KeptPictures | None): with what was kept; None without a method, or where `unseen` says why.
        unseen (str): why there are no pictures.
    """

    answer: str
    answer_tokens: int
    image_tokens: tuple[int, ...]
    kv_bytes: int
    spent: dict[str, Any]
    pictures: KeptPictures | None
    unseen: str


def open_picture(path: str | Path, max_pixels: int = 40_000_000) -> Image:
    """A picture as RGB, turned upright by what its camera noted.

    Args:
        path (str | Path): PNG, JPEG, WebP, GIF (its first frame), BMP, TIFF or PPM.
        max_pixels (int): the most that is decoded, in [1, 178956970].

    Raises:
        ParameterError: if there is no such file, it is no picture, corrupt, cut short, or has more pixels.
    """
    from PIL import Image, ImageOps

    require(1 <= max_pixels <= MOST_PIXELS, "max_pixels", f"in [1, {MOST_PIXELS}]", max_pixels)
    path = Path(path)
    if not path.is_file():
        raise ParameterError(f"image must be an existing file, got {path}")
    Image.init()
    known = [name for name in _FORMATS if name in Image.OPEN]
    too_large = f"image must have at most {max_pixels} pixels (--max-pixels), got {path}"
    with warnings.catch_warnings():
        # the limit below is the user's; oddities of metadata change nothing
        warnings.simplefilter("ignore")
        try:
            with Image.open(path, formats=known) as picture:
                width, height = picture.size
                if width * height > max_pixels:
                    raise ParameterError(f"{too_large} with {width} x {height}")
                return ImageOps.exif_transpose(picture).convert("RGB")
        except Image.DecompressionBombError as error:
            raise ParameterError(f"{too_large} with more than {MOST_PIXELS}") from error
        except SalienceError:
            raise
        except Image.UnidentifiedImageError as error:
            shown = ", ".join(known)
            raise ParameterError(f"image must be a picture ({shown}), got {path} of another kind") from error
        except _CORRUPT as error:
            raise ParameterError(
                f"image must be a whole picture, got {path} ({first_line(error)})"
            ) from error


def ask_about(
    model: Any, processor: Any, pictures: Sequence[Image], prompt: str, *, max_new_tokens: int = 32
) -> Question:
    """Build what the model is called with.

    A processor with a chat template makes a user's turn of the pictures and the prompt. Without one the image tokens
    are put in front. Where the prompt holds image tokens already, they stay where they are.

    Args:
        model (PreTrainedModel): a vision-language model.
        processor (ProcessorMixin): its own.
        pictures (Sequence[Image]): at least one.
        prompt (str): not empty.
        max_new_tokens (int): that an answer may add, for the check against the model's positions.

    Raises:
        ParameterError: if image tokens in the prompt are not as many as the pictures, none are left in what the
            model reads, or it is too long.
        StructureError: if the model is no vision-language model.
    """
    found = vision_language(model)
    require(len(pictures) > 0, "image", "given at least once", len(pictures))
    require(bool(prompt.strip()), "prompt", "a text", prompt)
    text = prompt_text(processor, prompt, len(pictures))
    settings: dict[str, Any] = {}
    start = processor.tokenizer.bos_token
    if start is not None and text.startswith(start):
        settings["add_special_tokens"] = False  # the template has written it
    try:
        inputs = processor(images=list(pictures), text=text, return_tensors="pt", **settings)
    except ValueError as error:
        raise ParameterError(
            f"image and prompt must be what {type(processor).__name__} reads, got {first_line(error)}"
        ) from error
    inputs = inputs.to(model.device, model.dtype)
    ids = inputs["input_ids"]
    marked = int(found.image_tokens(ids).sum())
    if not marked:
        token = processor.tokenizer.convert_ids_to_tokens(found.image_ids[0])
        raise ParameterError(
            f"prompt must hold an image token ({token!r}, id {found.image_ids[0]}) for each image, got none in "
            f"{text!r}"
        )
    limit = None if found.spatial_positions else check_positions(model)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise ParameterError(
            f"prompt and answer must fit the model's {limit} positions, got {ids.shape[1]} and {max_new_tokens} "
            "tokens: fewer images, or a smaller --max-new-tokens"
        )
    return Question(text, inputs, ids.shape[1], marked)


def check_method(model: Any, method: Method) -> None:
    """Attach a method and take it off again, so that what it refuses is known before any work.

    Raises:
        ConflictError, ParameterError, StructureError: as the method has it; for a method that drops no image tokens.
    """
    with _focused(model, method):
        pass


def look(
    model: Any,
    processor: Any,
    question: Question,
    method: Method | None = None,
    *,
    max_new_tokens: int = 32,
) -> Look:
    """Answer a question, and count what reading it held.

    Args:
        model (PreTrainedModel): in eval mode.
        processor (ProcessorMixin): its own.
        question (Question): as `ask_about` gives it for this model.
        method (Method | None): that drops image tokens; None reads all.
        max_new_tokens (int): the longest answer, >= 1.

    Raises:
        ParameterError: if the model cannot be called with what its processor makes.
        SalienceError: as the method has it.
    """
    require(max_new_tokens >= 1, "max_new_tokens", ">= 1", max_new_tokens)
    depth = len(vision_language(model).layers)
    with torch.no_grad(), _focused(model, method) as part:
        output = _read(model, question)
        held, counted = _kv_bytes(cache_of(output)), [question.image_tokens] * depth
        pictures, unseen, spent = None, "", {}
        if part is not None:
            spent = part.spent()
            for stage in part.stages:
                counted[stage.layer :] = [int(stage.kept.sum())] * (depth - stage.layer)
            try:
                pictures = kept_pictures(part, **_normalised(processor))
            except StructureError as error:
                unseen = str(error)
        made = model.generate(**question.inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    new = made[0, question.tokens :]
    answer = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    return Look(answer, len(new), tuple(counted), held, spent, pictures, unseen)


def prefill_seconds(
    model: Any, question: Question, method: Method | None = None, repeats: int = 1
) -> list[float]:
    """Wall time of reading the prompt, pictures included, `repeats` times; attaching the method is not in it."""
    require(repeats >= 1, "repeats", ">= 1", repeats)
    seconds = []
    with torch.no_grad(), _focused(model, method):
        for _ in range(repeats):
            with measured(str(model.device)) as meter:
                _read(model, question)
            seconds.append(meter.seconds)
    return seconds


def prompt_text(processor: Any, prompt: str, count: int) -> str:
    tokenizer = processor.tokenizer
    named = getattr(processor, "image_token", None) or getattr(tokenizer, "image_token", None)
    token = named if isinstance(named, str) else ""
    written = prompt.count(token) if token else 0
    if written not in (0, count):
        raise ParameterError(
            f"prompt must hold {token!r} as often as there are images ({count}) or not at all, got it {written} times"
        )
    missing = count - written
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * missing + [{"type": "text", "text": prompt}]
        try:
            text: str = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ParameterError(
                f"prompt must be one that the chat template of {type(processor).__name__} takes, got "
                f"{first_line(error)}"
            ) from error
        return text
    if missing and not token:
        raise ParameterError(
            f"prompt must hold the model's image token {count} times, got none, and {type(processor).__name__} does "
            "not name it"
        )
    return f"{token * missing}\n{prompt}" if missing else prompt


@contextmanager
def _focused(model: Any, method: Method | None) -> Iterator[Pruning | None]:
    if method is None:
        yield None
        return
    with focus(model, method) as handle:
        (part,) = handle.parts
        if not isinstance(part, Pruning):
            raise ConflictError(f"method must drop image tokens for see, got {method.slug()}")
        yield part


def _read(model: Any, question: Question) -> Any:
    try:
        return model(**question.inputs, use_cache=True, logits_to_keep=1)
    except SalienceError:
        raise
    except (ValueError, TypeError) as error:
        raise ParameterError(
            f"model must take what its processor makes of image and prompt, got {first_line(error)}"
        ) from error


def _kv_bytes(cache: Any) -> int:
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, torch.Tensor))


def _normalised(processor: Any) -> dict[str, Any]:
    """By which numbers the processor normalises pictures, as far as it says."""
    images = processor.image_processor
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if getattr(images, "do_normalize", None) is False:
        mean, std = [0.0] * 3, [1.0] * 3
    return {"mean": mean, "std": std} if mean is not None and std is not None else {}
