"""What labels of classes have to be, said in one line before any work starts."""

from __future__ import annotations

import torch
from torch import Tensor

from salience.core.errors import require
from salience.core.losses import IGNORE


def check_indices(labels: Tensor, classes: int, ignore_index: int | None = IGNORE) -> None:
    """Class indices on the CPU are in range; on other devices torch itself stops on one that is not.

    Args:
        labels (Tensor): any shape.
        classes (int): they have to be in [0, classes).
        ignore_index (int | None): one index that may also occur.

    Raises:
        ParameterError: if they are no integers, or one is out of range.
    """
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    require(whole, "labels", "class indices of an integer dtype", str(labels.dtype).removeprefix("torch."))
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return  # asking would wait for the device
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if bool(wrong.any()):
        require(False, "labels", f"class indices in [0, {classes})", int(labels[wrong][0]))
