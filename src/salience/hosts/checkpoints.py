"""Loads a model and its tokenizer from a folder or the hub: safetensors only, and checked before any work.

A pickle is never loaded, because loading one can run code. What a folder holds is looked at file by file first, so
that a download that broke off, a pointer in place of the weights or a tensor of NaN is an error with the file's name
and not a loss that is not finite at step 900. What transformers only warns about (tensors that are missing or left
over) is an error too, unless it is a head that is made new on purpose.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from salience.core.errors import ParameterError, SalienceError, first_line, require
from salience.hosts._weight_files import (
    FLOATS,
    PICKLES,
    check_checkpoint,
    listed,
    refuse_pickles,
    require_finite,
)

__all__ = ["Kind", "check_checkpoint", "check_device", "check_positions", "check_tokenizer", "load_model"]

Kind = Literal["auto", "causal", "masked", "sequence", "vision"]

_AUTO_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "sequence": "AutoModelForSequenceClassification",
    "vision": "AutoModelForImageTextToText",
}
_ENDINGS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "sequence",
}
_DTYPES = ("auto", "float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


def load_model(
    source: str | Path,
    *,
    kind: Kind = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    num_labels: int | None = None,
) -> tuple[Any, Any]:
    """A model in eval mode and its tokenizer, from a local folder or a hub id.

    A local folder goes through `check_checkpoint` first. A head that the checkpoint does not hold is made new, with
    torch's global random state, for "sequence" and "masked"; a log message names its tensors.

    Args:
        source (str | Path): folder, or id on the hub such as "Qwen/Qwen3-0.6B".
        kind (str): "causal", "masked", "sequence" (classification), "vision" (reads pictures and text; its processor
            is returned in place of the tokenizer), or "auto": what the checkpoint says it is, never "vision".
        dtype (str | torch.dtype): of the weights; "auto" is the checkpoint's own.
        device (str | torch.device | None): as for `check_device`; None stays on the CPU.
        revision (str | None): branch, tag or commit on the hub.
        trust_remote_code (bool): run code that comes with the checkpoint.
        num_labels (int | None): classes, for "sequence"; a head of another size is made new.

    Returns:
        tuple: (PreTrainedModel, PreTrainedTokenizerBase or ProcessorMixin).

    Raises:
        ParameterError: for a checkpoint that is not whole, holds a pickle, an adapter, NaN, or tensors that do not
            fit; for one that cannot be reached; for a tokenizer with more ids than the model has embeddings.

    Example:
        >>> model, tokenizer = load_model("runs/tune/model", dtype="float32")  # doctest: +SKIP
    """
    require(kind in ("auto", *_AUTO_CLASSES), "kind", f"one of auto, {', '.join(_AUTO_CLASSES)}", kind)
    known = dtype in _DTYPES if isinstance(dtype, str) else dtype in FLOATS
    require(known, "dtype", f"one of {', '.join(_DTYPES)}", dtype)
    place = check_device(device) if device is not None else None
    folder = _local(source)
    if folder is not None:
        check_checkpoint(folder)
    name = str(folder or source)
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _loading(name, local=folder is not None):
        config, made = _config(name, kind, num_labels, local=folder is not None, hub=hub)
        tokenizer = _processor(name, hub) if made == "vision" else _tokenizer(name, hub)
        model = _model(name, config, made, dtype=dtype, relabelled=num_labels is not None, hub=hub)
    if folder is None:
        require_finite(model.named_parameters(), f"{name} on the hub")
    check_tokenizer(model, tokenizer.tokenizer if made == "vision" else tokenizer)
    return (model if place is None else model.to(place)), tokenizer


def check_tokenizer(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose ids go beyond the rows of the model's embedding.

    Raises:
        ParameterError: naming both numbers.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= rows:
        raise ParameterError(
            f"tokenizer must be of ids below {rows} (the rows of the model's embedding), got id {largest}: "
            "take the model's own tokenizer, or resize_token_embeddings and save the model"
        )


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine has it.

    Args:
        device (str | torch.device): "cpu", "cuda", "cuda:1", "mps", or "auto": CUDA where there is one.

    Raises:
        ParameterError: for a device that is not here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ParameterError(f"device must be one of auto, cpu, cuda, mps, got {str(device)!r}") from error
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        here = (found.index or 0) < count
        reason = f"torch sees {count} CUDA devices"
    else:
        here = found.type == "cpu" or (found.type == "mps" and torch.backends.mps.is_available())
        reason = "torch does not have it"
    if not here:
        raise ParameterError(f"device must be one of this machine, got {str(device)!r} ({reason})")
    return found


def check_positions(model: Any, length: int | None = None) -> int | None:
    """Refuse sequences that are longer than the model has positions.

    Args:
        model (PreTrainedModel): any.
        length (int | None): longest sequence in tokens; None asks for the longest possible.

    Returns:
        int | None: `length`; if that is None the model's positions, or None for a model without a limit.

    Raises:
        ParameterError: naming both numbers.
    """
    limit = _positions(model)
    if length is not None and limit is not None and length > limit:
        raise ParameterError(f"max_length must be at most {limit} (the model's positions), got {length}")
    return limit if length is None else length


def _positions(model: Any) -> int | None:
    config = model.config.get_text_config()
    if getattr(config, "relative_attention_num_buckets", None):
        return None  # T5 and its kin keep an n_positions that nothing uses
    limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa counts positions from padding_idx + 1, so that the first rows of its table are never reached
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return min(limit, module.num_embeddings - module.padding_idx - 1)
    return limit


def _local(source: str | Path) -> Path | None:
    """The folder, or None for a hub id."""
    path, text = Path(source).expanduser(), str(source)
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix in PICKLES:
            refuse_pickles(path.parent, [path.name], {})
        raise ParameterError(f"model must be a checkpoint folder or a hub id, got the file {path}")
    if isinstance(source, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or "\\" in text:
        raise ParameterError(f"model must be an existing folder or a hub id, got {source}")
    return None


@contextmanager
def _loading(name: str, *, local: bool) -> Iterator[None]:
    """Turn what the libraries raise into one line, and silence the load report: `_check_keys` reads it."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    except SalienceError:
        raise
    except (OSError, ValueError, ImportError, StrictDataclassError, SafetensorError) as error:
        wanted = (
            "a checkpoint that transformers can load" if local else "an existing folder or a reachable hub id"
        )
        raise ParameterError(f"model must be {wanted}, got {name} ({first_line(error)})") from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _config(
    name: str, kind: Kind, num_labels: int | None, *, local: bool, hub: Mapping[str, Any]
) -> tuple[Any, str]:
    from transformers import AutoConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    # from_pretrained would load an adapter that lies beside the weights, even one that is a pickle
    if not local and find_adapter_config_file(name, revision=hub["revision"]) is not None:
        raise ParameterError(f"model must be a whole checkpoint, got an adapter at {name}")
    config = AutoConfig.from_pretrained(name, **hub)
    made = _kind(name, config, kind)
    if num_labels is not None:
        require(made == "sequence", "num_labels", "left out unless kind is sequence", num_labels)
        require(num_labels >= 1, "num_labels", ">= 1", num_labels)
        config.num_labels = num_labels
    return config, made


def _kind(name: str, config: Any, kind: Kind) -> str:
    architectures = list(config.architectures or [])
    if kind == "vision":
        from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

        own = _AUTO_CLASSES[kind] in (getattr(config, "auto_map", None) or {})
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not own:
            shown = ", ".join(architectures) or type(config).__name__
            raise ParameterError(f"model must be a vision-language model, got {shown} in {name}")
    if kind != "auto":
        return kind
    for architecture in architectures:
        for ending, found in _ENDINGS.items():
            if architecture.endswith(ending):
                return found
    shown = ", ".join(architectures) or "no architecture"
    raise ParameterError(f"kind must be one of {', '.join(_AUTO_CLASSES)} for {name}, got auto ({shown})")


def _tokenizer(name: str, hub: Mapping[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, ImportError) as error:
        raise ParameterError(
            f"model must be a checkpoint with its tokenizer, got {name} ({first_line(error)})"
        ) from error


def _processor(name: str, hub: Mapping[str, Any]) -> Any:
    from transformers import AutoProcessor, ProcessorMixin

    try:
        found = AutoProcessor.from_pretrained(name, **hub)
    except (OSError, ValueError, ImportError) as error:
        raise ParameterError(
            f"model must be a checkpoint with its processor, got {name} ({first_line(error)})"
        ) from error
    if not isinstance(found, ProcessorMixin):
        raise ParameterError(
            f"model must be a checkpoint with its processor, got {name} with a {type(found).__name__} alone"
        )
    return found


def _model(
    name: str,
    config: Any,
    kind: str,
    *,
    dtype: str | torch.dtype,
    relabelled: bool,
    hub: Mapping[str, Any],
) -> Any:
    import transformers

    own = tuple(config.architectures or ())
    model, report = getattr(transformers, _AUTO_CLASSES[kind]).from_pretrained(
        name,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        # what does not fit is then in the report, with all its names, instead of an error about the first
        ignore_mismatched_sizes=True,
        **hub,
    )
    adopted = type(model).__name__ not in own
    _check_keys(
        name,
        model,
        report,
        new_head=adopted and kind in ("sequence", "masked"),
        other_head=relabelled or (adopted and kind == "sequence"),
    )
    return model


def _check_keys(
    name: str, model: Any, report: Mapping[str, Any], *, new_head: bool, other_head: bool
) -> None:
    """Refuse what does not fit.

    Args:
        name (str): for the message.
        model (PreTrainedModel): as loaded.
        report (Mapping): missing_keys, unexpected_keys, mismatched_keys, error_msgs.
        new_head (bool): tensors outside the body may be missing.
        other_head (bool): tensors outside the body may be of another shape.
    """
    body = f"{model.base_model_prefix}."
    missing, shapes = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    fresh = [key for key in missing if new_head and not key.startswith(body)]
    fresh += [key for key, *_ in shapes if other_head and not key.startswith(body)]
    dropped = [key for key in sorted(report["unexpected_keys"]) if _whole_part(model, key)]
    faults = {
        "missing": [key for key in missing if key not in fresh],
        "unexpected": sorted({*report["unexpected_keys"]} - {*dropped}),
        "of another shape": [
            f"{key} ({list(stored)}, not {list(wanted)})"
            for key, stored, wanted in shapes
            if key not in fresh
        ],
        "in error": [" ".join(text.split()) for text in report["error_msgs"]],
    }
    told = "; ".join(f"{fault}: {listed(keys)}" for fault, keys in faults.items() if keys)
    if told:
        raise ParameterError(
            f"model must be a checkpoint whose tensors fit {type(model).__name__}, got {name} with {told}"
        )
    if fresh:
        _log.warning("%s: made new, to be trained: %s", name, listed(fresh))
    if dropped:
        _log.info("%s: %s has no use for %s", name, type(model).__name__, listed(dropped))


def _whole_part(model: Any, key: str) -> bool:
    """Whether a left-over tensor is of a part outside the layers that this class does not have: another head, a
    pooler. A layer too many, or a bias that a layer does not have, is a fault of the checkpoint or its config."""
    return all(_leaves(root, key.split(".")) for root in (model, model.base_model))


def _leaves(module: nn.Module, path: Sequence[str]) -> bool:
    for name in path[:-1]:
        if name.isdigit():
            return False
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            return True
        module = child
    return False
