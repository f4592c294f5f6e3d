"""A process of its own that loads one checkpoint and tells what it needs: run by `hosts/footprint.py`, by its path.

salience cannot be imported here, so whatever this process loads is an ordinary checkpoint. Commands come as lines of
JSON on standard input, answers go as lines of JSON to standard output; the process ends when its input does.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.modules["salience"] = None  # type: ignore[assignment]

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

_TWICE = (
    1 << 30
)  # smaller checkpoints are loaded twice: what libraries set aside at first is as large as they are
_FACTORS = "factors.safetensors"


def load(folder: str, name: str, dtype: str, device: str) -> Any:
    """The model in eval mode, in the checkpoint's own dtype if `dtype` is "auto"."""
    made = getattr(transformers, name)
    if (Path(folder) / _FACTORS).is_file():
        model = _from_factors(folder, made)
        return (model if dtype == "auto" else model.to(getattr(torch, dtype))).to(device).eval()
    return (
        made.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)
        .to(device)
        .eval()
    )


def _from_factors(folder: str, made: Any) -> Any:
    model = made(transformers.AutoConfig.from_pretrained(folder))
    state = load_file(str(Path(folder) / _FACTORS))
    for path in [name.removesuffix(".1.weight") for name in state if name.endswith(".1.weight")]:
        old = model.get_submodule(path)
        first, second = state[f"{path}.0.weight"], state[f"{path}.1.weight"]
        has_bias = f"{path}.1.bias" in state
        linear = torch.nn.Linear
        if first.ndim != 2 or not isinstance(old, linear):
            raise ValueError(f"factors of {path} must be those of a Linear, got {type(old).__name__}")
        inner = linear(first.shape[1], first.shape[0], bias=False)
        outer = linear(second.shape[1], second.shape[0], bias=has_bias)
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, torch.nn.Sequential(inner, outer))
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def memory(folder: str, name: str, device: str, tokens: int) -> tuple[Any, dict[str, int]]:
    """The loaded model, and the most that it and one forward pass held."""
    if device.startswith("cuda"):
        model = load(folder, name, "auto", device)
        forward(model, tokens)
        torch.cuda.reset_peak_memory_stats()
        forward(model, tokens)
        return model, {"peak_bytes": torch.cuda.max_memory_allocated()}
    if sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) < _TWICE:
        forward(load(folder, name, "auto", device), tokens)
    _give_back()
    before = _status("VmRSS")
    model = load(folder, name, "auto", device)
    gc.collect()
    _forget_peak()
    forward(model, tokens)
    peak = _status("VmHWM")
    return model, {"peak_bytes": max(peak - before, 0)}


@torch.no_grad()
def forward(model: Any, tokens: int) -> Any:
    """One pass over so many random tokens, with a cache if the model generates."""
    ids = (
        torch.arange(tokens, device=model.device)[None] * 7919 % model.get_input_embeddings().weight.shape[0]
    )
    return model(input_ids=ids, **_settings(model))


@torch.no_grad()
def speed(model: Any, tokens: int, new: int) -> dict[str, float | None]:
    """Seconds of reading a prompt and of writing `new` tokens behind it, one at a time."""
    _wait(model)
    started = time.perf_counter()
    seen = forward(model, tokens)
    _wait(model)
    prefill = time.perf_counter() - started
    cache = getattr(seen, "past_key_values", None)
    if not model.can_generate() or cache is None:
        return {"prefill": prefill, "decode": None}
    token = seen.logits[:, -1:].argmax(-1)
    started = time.perf_counter()
    for _ in range(new):
        seen = model(input_ids=token, past_key_values=cache, **_settings(model))
        cache, token = seen.past_key_values, seen.logits[:, -1:].argmax(-1)
    _wait(model)
    return {"prefill": prefill, "decode": time.perf_counter() - started}


@torch.no_grad()
def logits(model: Any, inputs: str, out: str) -> None:
    """Write the logits of a stored batch."""
    ids = load_file(inputs)["input_ids"].to(model.device)
    save_file({"logits": model(input_ids=ids).logits.float().cpu().contiguous()}, out)


def _settings(model: Any) -> dict[str, Any]:
    if not model.can_generate():
        return {}
    takes = inspect.signature(model.forward).parameters
    return {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in takes else {})}


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    rows = path.read_text().splitlines() if path.is_file() else []
    row = next((row for row in rows if row.startswith(name)), "")
    return int(row.split()[1]) * 1024 if row else 0


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return  # not Linux, or not allowed: the peak of loading is told


def _give_back() -> None:
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library


def main() -> None:
    folder, name, device, tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, held = memory(folder, name, device, int(tokens))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(model.dtype).removeprefix("torch.")
    _say({"parameters": parameters, "dtype": dtype, "generates": bool(model.can_generate()), **held})
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "speed":
            _say(speed(model, int(tokens), asked["new"]))
        else:
            wide = model if model.dtype == torch.float32 else load(folder, name, "float32", device)
            logits(wide, asked["inputs"], asked["out"])
            _say({})


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
