"""Where a classifier is: the linear layer that makes logits of features, in a transformers model or any module."""

from __future__ import annotations

from torch import Tensor, nn

from salience.core.errors import StructureError
from salience.hosts._towers import getter
from salience.hosts.transformers import unwrap

# what libraries call the last layer; the later of several wins
_NAMES = ("classifier", "head", "fc", "lm_head", "score", "embed_out")


def find_classifier(model: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """The linear layer whose output are the logits.

    Args:
        model (nn.Module): bare, or wrapped by PEFT, torch.compile or DistributedDataParallel.
        path (str | None): dotted path in the unwrapped model; None takes the output embeddings, else the last linear
            layer under a name that libraries use (classifier, head, fc, score ...), else the last linear layer.

    Returns:
        tuple[str, nn.Module]: its path in the unwrapped model, and the layer (it has a 2-D `weight` [C, N]).

    Raises:
        StructureError: if there is no linear layer, or none at `path`.
    """
    core = unwrap(model)
    linear = {name: module for name, module in core.named_modules() if _is_linear(module)}
    if path is not None:
        if path not in linear:
            raise StructureError(f"classifier must be one of {', '.join(linear) or 'none'}, got {path!r}")
        return path, linear[path]
    output = getter(core, "get_output_embeddings")
    outputs = [name for name, module in linear.items() if module is output]
    named = [name for name in linear if any(part in _NAMES for part in name.split("."))]
    places = outputs or named or list(linear)
    if not places:
        raise StructureError(f"model must end in a linear layer, got {type(core).__name__} without any")
    return places[-1], linear[places[-1]]


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    # a PEFT layer holds the linear one inside, and its own weight is that one's
    inner = isinstance(module, nn.Linear) or "Linear" in type(module).__name__
    return inner and isinstance(weight, Tensor) and weight.dim() == 2
