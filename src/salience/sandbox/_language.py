"""What worlds with a language model share: Python's library as texts, a tokenizer, a rate over steps, a bar."""

from __future__ import annotations

import hashlib
import itertools
import json
import string
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from salience.core.errors import SalienceError
from salience.sandbox.tasks import BASE_TASKS, TUNING_TASKS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerFast

Size = Literal["small", "tiny"]

_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
_FILE_BYTES = (500, 60_000)
_WARMUP_STEPS = 20
_DECAY_SHARE = 0.4


@dataclass(frozen=True)
class LanguageWorld:
    """A trained language model's folder.

    Attributes:
        folder (Path): an ordinary checkpoint: config, weights, tokenizer, and about.json. To be read only.
        size (str): "small" or "tiny".
        seed (int): what the model was trained with.
    """

    folder: Path
    size: Size
    seed: int

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A fresh copy of the tokenizer. It puts <bos> before a text and pads on the right."""
        from transformers import PreTrainedTokenizerFast

        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(self.folder)
        return tokenizer

    @cached_property
    def about(self) -> dict[str, Any]:
        """Recipe and result: parameters, steps, seconds, held_out_loss, bytes_per_token ..."""
        about: dict[str, Any] = json.loads((self.folder / "about.json").read_text(encoding="utf-8"))
        return about


def library_texts(*, held_out: bool) -> list[str]:
    """Python's own library, in order of path: the files to learn from, or the one in twenty that are held out.

    Raises:
        SalienceError: if this Python came without the sources of its library.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        small, large = _FILE_BYTES
        if _SKIPPED.intersection(name.parts) or not small <= path.stat().st_size <= large:
            continue
        # by path and not by content, so that a patched file stays on its side
        chosen = hashlib.sha256(name.as_posix().encode()).digest()[0] < 256 // 20
        if chosen is held_out:
            # a few files are in other encodings on purpose
            found.append(path.read_text(encoding="utf-8", errors="replace"))
    if len(found) < 10:
        raise SalienceError(f"Python's library must be there as sources, found {len(found)} files in {root}")
    return found


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of the texts, with the tasks' symbols and names as tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # symbols are repeated so often that each becomes one token with the space before it
    symbols = " " + " ".join(string.ascii_letters + string.digits + "*")
    names = " ".join(f"{name}:" for name in (*BASE_TASKS, *TUNING_TASKS)) + " ->"
    tokenizer.train_from_iterator([*texts, *[symbols, names] * 300], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def with_end(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, and an end token."""
    return [[*ids, tokenizer.eos_token_id] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]


def stream(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """All texts one behind the other, with an end token after each: [N] int64."""
    import torch

    return torch.tensor(list(itertools.chain.from_iterable(with_end(tokenizer, texts))))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights that are made in the block are of this seed; the global random state stays as it was."""
    import torch

    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would move the states of GPUs as well
        torch.default_generator.manual_seed(seed)
        yield


def rate_factor(step: int, steps: int) -> float:
    """Of the learning rate: a linear start, a plateau, a linear end."""
    return min(1.0, (step + 1) / _WARMUP_STEPS, (steps - step) / (_DECAY_SHARE * steps))
