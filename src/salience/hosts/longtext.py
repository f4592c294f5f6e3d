"""Asks a language model about a long text, with and without a method on key blocks, and measures each way.

The answer and the times come from the same call, `generate`: a time to the first token is what a user waits for, the
prompt read and one token chosen. What a method costs only because it is being looked at (sampled recall, maps) is in
the reading that answers and in no time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from salience.core.errors import ConflictError, ParameterError, first_line, require
from salience.core.evidence import measured
from salience.hosts.checkpoints import check_positions
from salience.hosts.kept_keys import LayerRecord
from salience.hosts.prefill import Prefill
from salience.verb import focus

if TYPE_CHECKING:
    from salience.core.method import Method

MOST_BYTES = 64 << 20  # of a file: beyond every model's positions, and minutes for a tokenizer


@dataclass(frozen=True)
class Question:
    """A long text and a question as the model reads them.

    Attributes:
        text (str): the prompt, with the chat template if there is one.
        ids (Tensor): [1, T] on the model's device.
        chat (bool): whether a chat template made it.
        limit (int | None): positions that the model has; None without a limit.
        unknown (int): tokens that the tokenizer does not know.
    """

    text: str
    ids: Tensor
    chat: bool
    limit: int | None
    unknown: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.ids.shape[1]


@dataclass(frozen=True)
class Answer:
    """One way of reading a question.

    Attributes:
        text (str): decoded greedily, without special tokens.
        tokens (int): of it.
        layers (tuple[LayerRecord, ...]): what each layer that was asked kept; empty without a method.
        spent (dict): what the method says of itself; empty without one.
    """

    text: str
    tokens: int
    layers: tuple[LayerRecord, ...]
    spent: dict[str, Any]


@dataclass(frozen=True)
class FirstToken:
    """Wall time of one reading, in seconds.

    Attributes:
        seconds (float): until the first token of the answer is there.
        choosing (float): of them, in choosing keys.
        attending (float): of them, in attending to keys; both are 0 without a method.
    """

    seconds: float
    choosing: float
    attending: float


def open_text(path: str | Path) -> str:
    """The text of a file.

    Args:
        path (str | Path): UTF-8, with or without a byte order mark, at most 64 MiB.

    Raises:
        ParameterError: if there is no such file, it cannot be read, is too large, empty or not UTF-8.
    """
    path = Path(path)
    if not path.is_file():
        raise ParameterError(f"file must be an existing file, got {path}")
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise ParameterError(f"file must have at most {MOST_BYTES:,} bytes, got {path} with {size:,}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ParameterError(f"file must be one that can be read, got {path} ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ParameterError(
            f"file must be UTF-8 text, got {path} with byte 0x{error.object[error.start]:02x} at {error.start}: "
            f"iconv -f LATIN1 -t UTF-8 converts one of Latin letters"
        ) from error
    if not text.strip():
        raise ParameterError(f"file must hold text, got {path} without any")
    return text


def positions(model: Any) -> int | None:
    """Positions that the config promises: `max_position_embeddings`, or YaRN's factor times the original number,
    which many configs leave to the reader; None for a model without a limit."""
    limit = check_positions(model)
    scaled = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if limit is None or scaled.get("rope_type") != "yarn":
        return limit
    return max(limit, int(scaled["factor"] * scaled["original_max_position_embeddings"]))


def ask_about(model: Any, tokenizer: Any, text: str, question: str, *, max_new_tokens: int = 32) -> Question:
    """Build what the model is called with: the text, an empty line, the question.

    A tokenizer with a chat template makes a user's message of it; without one a line break follows.

    Args:
        model (PreTrainedModel): a language model.
        tokenizer (PreTrainedTokenizerBase): its own.
        text (str): not empty.
        question (str): not empty.
        max_new_tokens (int): that an answer may add, for the check against the model's positions.

    Raises:
        ParameterError: for an empty text or question, a template that does not take them, or more tokens than
            positions.
    """
    require(bool(text.strip()), "file", "a text", text)
    require(bool(question.strip()), "ask", "a text", question)
    content = f"{text.rstrip()}\n\n{question.strip()}"
    chat = bool(getattr(tokenizer, "chat_template", None))
    if chat:
        try:
            prompt: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except TemplateError as error:
            raise ParameterError(
                f"ask must be one that the model's chat template takes, got {first_line(error)}"
            ) from error
    else:
        prompt = f"{content}\n"
    # a template writes the special tokens itself
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt", verbose=False)["input_ids"]
    limit, tokens = positions(model), ids.shape[1]
    if limit is not None and tokens + max_new_tokens > limit:
        held = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        # a little less, since tokens are not equally long
        keep = int(0.98 * len(text) * max(limit - max_new_tokens - (tokens - held), 0) / max(held, 1))
        raise ParameterError(
            f"file, question and answer must fit the model's {limit:,} positions, got {tokens:,} and "
            f"{max_new_tokens} tokens: cut the file to about its first {keep:,} of {len(text):,} characters, or take "
            "a model with more positions"
        )
    unknown = getattr(tokenizer, "unk_token_id", None)
    return Question(
        prompt, ids.to(model.device), chat, limit, 0 if unknown is None else int((ids == unknown).sum())
    )


def check_method(model: Any, method: Method) -> None:
    """Attach a method and take it off again, so that what it refuses is known before any work.

    Raises:
        ConflictError, ParameterError, StructureError: as the method has it; for a method that chooses no key blocks.
    """
    with _focused(model, method):
        pass


def answer(
    model: Any,
    tokenizer: Any,
    question: Question,
    method: Method | None = None,
    *,
    max_new_tokens: int = 32,
    chunk: int | None = None,
) -> Answer:
    """Answer a question, and tell what was kept while the prompt was read.

    Args:
        model (PreTrainedModel): in eval mode.
        tokenizer (PreTrainedTokenizerBase): its own.
        question (Question): as `ask_about` gives it for this model.
        method (Method | None): that chooses key blocks; None reads as the model does.
        max_new_tokens (int): the longest answer, >= 1.
        chunk (int | None): tokens of the prompt that are read at a time; None reads all at once.

    Raises:
        ParameterError: if the prompt does not fit the memory of a GPU.
        SalienceError: as the method has it.
    """
    require(max_new_tokens >= 1, "max_new_tokens", ">= 1", max_new_tokens)
    with _focused(model, method) as part:
        made = _generate(model, question, max_new_tokens, chunk)
        layers = () if part is None else tuple(part.layers[layer] for layer in sorted(part.layers))
        spent = {} if part is None else part.spent()
    new = made[0, question.tokens :]
    return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), len(new), layers, spent)


def first_token(
    model: Any, question: Question, method: Method | None = None, *, chunk: int | None = None
) -> FirstToken:
    """Time one reading of the prompt up to the first token of the answer; attaching the method is not in it.

    Args:
        model (PreTrainedModel): in eval mode.
        question (Question): as `ask_about` gives it for this model.
        method (Method | None): that chooses key blocks; None reads as the model does.
        chunk (int | None): as for `answer`.

    Returns:
        FirstToken: on a GPU each layer is waited for, which the parts and the whole pay for.
    """
    with _focused(model, method) as part:
        if part is not None:
            # sampling is ours and not the method's
            part.sampling, part.timed = False, True
        with measured(str(model.device)) as meter:
            _generate(model, question, 1, chunk)
        layers = () if part is None else tuple(part.layers.values())
    return FirstToken(
        meter.seconds, sum(layer.choosing for layer in layers), sum(layer.attending for layer in layers)
    )


@contextmanager
def _focused(model: Any, method: Method | None) -> Iterator[Prefill | None]:
    if method is None:
        yield None
        return
    with focus(model, method) as handle:
        (part,) = handle.parts
        if not isinstance(part, Prefill):
            raise ConflictError(f"method must choose key blocks for read, got {method.slug()}")
        yield part


def _generate(model: Any, question: Question, max_new_tokens: int, chunk: int | None) -> Tensor:
    """[1, T + new], greedily; what else the checkpoint's generation settings say stays."""
    pieces = {} if chunk is None else {"prefill_chunk_size": chunk}
    try:
        made: Tensor = model.generate(
            input_ids=question.ids,
            attention_mask=torch.ones_like(question.ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            **pieces,
        )
    except torch.OutOfMemoryError as error:
        raise ParameterError(
            f"file must fit the memory of {model.device}, got {question.tokens:,} tokens: a smaller --chunk, "
            "--dtype bfloat16, or a shorter file"
        ) from error
    return made
