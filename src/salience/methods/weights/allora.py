"""ALLoRA: LoRA without dropout and without alpha / r, whose gradients are scaled row by row of the update.

Scored: the output channels of each low-rank update, by their row norm `rho_i = ||(B A)_i||_2`.
Spent: the gradient that reaches A and B, multiplied per channel by `s_i = 1 / sqrt(rho_i + 1 / eta^2)`: eta for a row
that is still zero, less for one that has grown. The gradient of the layer's input is not scaled, so that layers do
not amplify each other. `y = W x + B A x` forward: what is saved is an ordinary LoRA adapter with lora_alpha = r.

Paper: arXiv 2410.09692, sections 4 and 5. There is no official code; the oracle is a float64 reference.

Reads the paper so:
- the abstract says "inversely proportional to the norm", the definition has the square root: the definition is used;
- third-party optimizers that cite the paper take the row norms of A and of B; rho is that of their product;
- an optimizer that divides by the gradient's own size (Adam, AdamW) undoes a factor on a row of B, and of the factors
  on A only the relative weights of the channels stay. `apply="update"` is an extension of ours: it scales what the
  optimizer did, row i of B's step by s_i and A's step by the mean of s, and so means the same with every optimizer.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, require
from salience.core.loop import Loop
from salience.core.method import Method
from salience.core.part import Part, Site
from salience.core.scores import History
from salience.hosts._parts import width

Variant = Literal["weight", "output", "asf"]
__all__ = ["adapter_branch", "row_norms", "scales"]
_RECORD_EVERY = 10
# their step does not change when a row's gradient is multiplied by a constant, or hardly
_SCALE_INVARIANT = ("adam", "adagrad", "adadelta", "adafactor", "rmsprop", "lion", "lamb")


@dataclass(frozen=True, kw_only=True)
class ALLoRA(Method):
    """Give each output channel of a LoRA update its own learning rate: high near zero, falling as its row grows.

    Attributes:
        eta (float): factor of a row that is still zero, > 0 and finite. The paper's runs use eta^2 of 1, 2 and 4.
        variant (str): "weight" is the method. Two of the paper's ablations: "output" scales each token by its own
            output, `1 / sqrt(|f_i| + 1 / eta^2)`; "asf" multiplies the output itself by that factor, in evaluation
            too, so that the adapter can neither be merged nor used without salience.
        apply (str): "gradient" (the paper) scales gradients, for SGD; "update" scales the optimizer's steps, weight
            decay in them included, for Adam and its kin. "update" goes with "weight" only.
    """

    unit: ClassVar[str] = "weight"
    spends: ClassVar[str] = "weight"
    job: ClassVar[str] = "tune"
    hosts: ClassVar[tuple[str, ...]] = ("peft", "transformers", "torch")
    needs: ClassVar[tuple[str, ...]] = ("peft",)
    arxiv: ClassVar[str] = "2410.09692"
    title: ClassVar[str] = "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws"

    eta: float = 1.0
    variant: Variant = "weight"
    apply: Literal["gradient", "update"] = "gradient"

    def __post_init__(self) -> None:
        require(math.isfinite(self.eta) and self.eta > 0, "eta", "> 0 and finite", self.eta)
        variants = get_args(Variant)
        require(self.variant in variants, "variant", f"one of {', '.join(variants)}", self.variant)
        require(self.apply in ("gradient", "update"), "apply", "one of gradient, update", self.apply)
        allowed = self.apply == "gradient" or self.variant == "weight"
        require(allowed, "apply", f"gradient with variant {self.variant!r}", self.apply)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Scales while the Trainer, or a loop of one's own, trains the model's LoRA layers."""
        return _attach(self, site.model, record)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any) -> Part:
        """Scales in every backward pass from now on; "update" needs to know the optimizer, and so a Trainer."""
        if self.apply == "update":
            raise ConflictError(
                "apply must be 'gradient' for a model (an update needs the optimizer: focus the Trainer, or use "
                "salience.loop), got 'update'"
            )
        return _attach(self, model, record)


def row_norms(A: Tensor, B: Tensor) -> Tensor:
    """Norms of the rows of B A without forming it: `rho^2 = rowsum((B (A A^T)) * B)`.

    Args:
        A (Tensor): [r, n_in], any float dtype.
        B (Tensor): [n_out, r].

    Returns:
        Tensor: [n_out] fp32 (float64 for float64), without graph.
    """
    A, B = _wide(A.detach()), _wide(B.detach())
    with torch.autocast(A.device.type, enabled=False):
        # rounding may leave a tiny negative square
        return ((B @ (A @ A.T)) * B).sum(-1).clamp_min(0).sqrt()


def scales(norms: Tensor, eta: float) -> Tensor:
    """Factors `s = 1 / sqrt(norms + 1 / eta^2)` in (0, eta], any shape, at least fp32, with the graph of `norms`."""
    # written so that a norm of 0 gives eta to the last bit
    return eta / (1 + eta**2 * _wide(norms)).sqrt()


def adapter_branch(
    x: Tensor, A: Tensor, B: Tensor, *, eta: float = 1.0, variant: Variant = "weight"
) -> Tensor:
    """The adapter's share of a layer's output, `x A^T B^T`, with ALLoRA's backward pass.

    With "weight" and "output", A and B get the gradients of a plain adapter whose output gradient was multiplied by
    the factors; x gets the plain gradient.

    Args:
        x (Tensor): [..., n_in].
        A (Tensor): [r, n_in], dtype of `x`.
        B (Tensor): [n_out, r], dtype of `x`.
        eta (float): factor of a zero row.
        variant (str): see `ALLoRA`.

    Returns:
        Tensor: [..., n_out] with graph; for "asf" multiplied by its factors, in at least fp32.
    """
    if variant == "asf":
        f = F.linear(F.linear(x, A), B)
        return f * scales(f.abs(), eta)
    if variant == "output":
        with torch.no_grad():
            factors = scales(F.linear(F.linear(x, A), B).abs(), eta)
    else:
        factors = scales(row_norms(A, B), eta)
    return _Branch.apply(x, A, B, factors)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(x, A, B, factors)
        return F.linear(F.linear(x, A), B)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, A, B, factors = ctx.saved_tensors
        grad_x = grad_A = grad_B = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ B) @ A  # [..., n_in], unscaled
            rows = x.reshape(-1, x.shape[-1])  # [N, n_in]
            scaled = (grad * factors).to(grad.dtype).reshape(-1, grad.shape[-1])  # [N, n_out]
            if ctx.needs_input_grad[1]:
                grad_A = (scaled @ B).T @ rows
            if ctx.needs_input_grad[2]:
                grad_B = scaled.T @ (rows @ A.T)
        return grad_x, grad_A, grad_B, None


@dataclass
class _Layer:
    """A peft LoRA layer and its forward pass under ALLoRA; bound to no closure, so that models can be copied."""

    layer: Any
    path: str
    method: ALLoRA
    original: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, method = self.layer, self.method
        changes_output, learns = method.variant == "asf", torch.is_grad_enabled()
        if layer.disable_adapters:
            return self.original(x, *args, **kwargs)
        if layer.merged and changes_output:
            raise ConflictError(f"adapters must not be merged with variant 'asf', got a merged {self.path}")
        if kwargs.get("adapter_names") is not None and (learns or changes_output):
            raise ConflictError(f"adapter_names must be None while ALLoRA trains, got some at {self.path}")
        if layer.merged or not (learns or changes_output):
            return self.original(x, *args, **kwargs)
        kwargs.pop("adapter_names", None)
        result = layer.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in layer.active_adapters:
            if name in layer.lora_A:
                _refuse_other_lora(layer, name, self.path)
                inputs = _cast(x, layer.lora_A[name].weight, layer.lora_B[name].weight)
                result = result + adapter_branch(*inputs, eta=method.eta, variant=method.variant)
        return result.to(dtype)


class _Scaling(Part):
    def __init__(self, method: ALLoRA, layers: dict[str, Any], record: Attachment) -> None:
        super().__init__()
        self._method = method
        self._record = record
        # adapters by name: sharding replaces their parameters, so these are looked up each time
        self._adapters = {
            f"{path}.{name}": (layer.lora_A[name], layer.lora_B[name])
            for path, layer in layers.items()
            for name in layer.active_adapters
            if name in layer.lora_A
        }
        self._handles: list[Any] = []
        self._before: list[tuple[Tensor, ...]] = []
        self._means = History()
        self.histories = {"mean scale of each layer": self._means}

    def begin(self, loop: Loop) -> None:
        optimizer = loop.optimizer
        if self._method.apply == "update":
            if optimizer is None:
                raise ConflictError("optimizer must be given for apply='update', got None")
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self._remember()),
                optimizer.register_step_post_hook(lambda *_: self._scale_steps()),
            ]
            for handle in self._handles:
                self._record.hook(handle)
        elif optimizer is not None and _scale_invariant(optimizer):
            warnings.warn(
                f"ALLoRA scales gradients, and {type(optimizer).__name__} undoes that almost completely: use "
                "apply='update', or plain SGD",
                UserWarning,
                stacklevel=2,
            )

    def before_step(self, loop: Loop) -> None:
        if loop.step % _RECORD_EVERY == 0:
            means = [scales(norms, self._method.eta).mean() for norms in self._row_norms()]
            self._means.add(loop.step, torch.stack(means))

    def end(self, loop: Loop) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._before = [], []

    def scores(self) -> dict[str, Tensor]:
        return {f"{path}.row_norms": norms for path, norms in zip(self._adapters, self._row_norms())}

    def spent(self) -> dict[str, float | int]:
        every = scales(torch.cat(self._row_norms()), self._method.eta)
        return {
            "layers": len(self._adapters),
            "output channels": len(every),
            "largest factor": round(float(every.max()), 4),
            "mean factor": round(float(every.mean()), 4),
            "smallest factor": round(float(every.min()), 4),
        }

    def _row_norms(self) -> list[Tensor]:
        """Of each adapter, on the CPU."""
        pairs = self._adapters.values()
        return [_whole(row_norms(down.weight, up.weight)).cpu() for down, up in pairs]

    def _remember(self) -> None:
        for down, up in self._adapters.values():
            A, B = down.weight, up.weight
            factors = scales(row_norms(A, B), self._method.eta)
            self._before.append((A, A.detach().clone(), B, B.detach().clone(), factors))

    @torch.no_grad()
    def _scale_steps(self) -> None:
        for A, old_A, B, old_B, factors in self._before:
            A.copy_(old_A + factors.mean() * (A - old_A))
            B.copy_(old_B + factors.unsqueeze(-1) * (B - old_B))
        self._before = []


def _attach(method: ALLoRA, model: nn.Module, record: Attachment) -> Part:
    layers = _lora_layers(model)
    for path, layer in layers.items():
        for name in layer.active_adapters:
            if name in layer.lora_A:
                _refuse_other_lora(layer, name, path)
        if method.apply == "gradient":
            record.set(layer, "forward", _Layer(layer, path, method, layer.forward).forward)
    return _Scaling(method, layers, record)


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's LoRA layers by path."""
    found = {
        path: m for path, m in model.named_modules() if isinstance(getattr(m, "lora_A", None), nn.ModuleDict)
    }
    if not found:
        raise StructureError(
            f"model must have LoRA layers (peft's LoraConfig), got none in {type(model).__name__}"
        )
    for path, layer in found.items():
        # peft's other LoRA layers (embeddings, convolutions, bare parameters) compute their update in other ways
        if width(layer) is None or hasattr(layer, "parameter_name"):
            raise ConflictError(
                f"LoRA must be on Linear or Conv1D layers for ALLoRA, got {path}: {layer.base_layer}"
            )
    return found


def _refuse_other_lora(layer: Any, name: str, path: str) -> None:
    """ALLoRA has no scaling factor and no dropout, and stands for plain LoRA: nothing else may be asked for."""
    r, alpha = layer.r[name], layer.lora_alpha[name]
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    kind = type(layer.lora_variant[name]).__name__ if name in layer.lora_variant else ""
    reasons = (
        (alpha != r, "lora_alpha must be r (no scaling factor)", f"lora_alpha {alpha} with r {r}"),
        (layer.use_rslora.get(name, False), "use_rslora must be False", "True"),
        (bool(kind), "LoRA must be plain (no DoRA or other variant)", kind),
        (dropout > 0, "lora_dropout must be 0", dropout),
        (layer.lora_bias.get(name, False), "lora_bias must be False", "True"),
        (layer.scaling[name] != 1, "the adapter must not be scaled", f"scaling {layer.scaling[name]}"),
    )
    for refused, wanted, got in reasons:
        if refused:
            raise ConflictError(f"{wanted}, got {got} at {path}")


def _scale_invariant(optimizer: torch.optim.Optimizer) -> bool:
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return any(word in name for name in names for word in _SCALE_INVARIANT)


def _cast(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in the dtype that a linear layer would compute in: A's, or autocast's."""
    kind, dtype = x.device.type, A.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), A.to(dtype), B.to(dtype)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _whole(values: Tensor) -> Tensor:
    """All of a tensor that FSDP has spread over ranks."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values
