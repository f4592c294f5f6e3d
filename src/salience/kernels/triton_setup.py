"""What the Triton kernels share: triton if it is there, and whether its kernels can run here.

`TRITON_INTERPRET=1`, set before triton is imported, makes triton run kernels in its interpreter, with numpy on the
CPU: slow, and a check of their arithmetic alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

triton: Any
tl: Any
try:
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")
except ImportError:
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without triton the function as it is, so that modules of kernels can be imported anywhere."""
    return function if triton is None else triton.jit(function)


def available(device: torch.device | str = "cuda") -> str | None:
    """Why Triton kernels cannot run on tensors of this device; None if they can."""
    if triton is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if torch.device(device).type != "cuda":
        return f"triton needs a CUDA device, the tensors are on {device}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability(torch.device(device))
    return (
        None if major >= 8 else f"triton's matrix products need compute capability 8.0, found {major}.{minor}"
    )


def padded(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`; matrix products on a GPU take no side below 16."""
    return max(least, 1 << (size - 1).bit_length())
