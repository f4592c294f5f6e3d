"""DEFT: fine-tuning that also learns to leave the MLPs' activations at zero.

Scored: the activations `a` (neuron x token) right after the non-linearity of every MLP; a zero can be skipped.
Spent: a penalty that counts, smoothly, those that are not zero, `c[b,l] = mean over tokens and neurons of
a^2 / (a^2 + eps)`, and `loss = task + weight * mean over b and l of c` (encoder-decoder: the mean over the encoder's
layers plus the mean over the decoder's). The adapter learns it; base weights have no gradient and get none.
Measured: the density, `count(a != 0) / (tokens * neurons)`, mean over samples and then layers. On a bare model
`focus` only measures.

Paper: arXiv 2402.01911. Official code: IBM/DEFT (193cdef), GLUE/*.py and SQuAD/*.py.

Differs from the official code in:
- the smooth count is `1 - eps / (a^2 + eps)` in fp32 with its gradient `2 a eps / (a^2 + eps)^2` in closed form: the
  gradient of the quotient cancels (at eps 1e-7 it is noise for |a| > 10 sqrt(eps)), and fp16 squares underflow;
- nothing is kept from evaluation or generation, where the official lists grow until somebody clears them, and a
  second forward pass before the penalty was taken is an error;
- it works under gradient checkpointing, whose second forward pass is not counted again; reentrant checkpointing,
  under which the penalty would have no gradient, is refused;
- `mask_padding` leaves padding out of both numbers (the official ones include it: off by default);
- eps is 1e-7 everywhere (one official script has 20 as its default).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, StructureError, require
from salience.core.loop import Loop
from salience.core.losses import IGNORE
from salience.core.method import Method
from salience.core.part import Batch, Part, Site
from salience.core.scores import History
from salience.hosts.transformers import activation_modules, unwrap

__all__ = ["density", "smooth_density", "total_density"]
_RECORD_EVERY = 10
_FLUSH_EVERY = 4096
_SAY_PADDING = ("attention_mask", "decoder_attention_mask", "labels")


@dataclass(frozen=True, kw_only=True)
class DEFT(Method):
    """Fine-tune with a penalty on the number of non-zero MLP activations, for sparsity-aware inference.

    On a model it is a meter: it measures the density of every forward pass in eval mode.

    Attributes:
        weight (float): lambda, >= 0; 0 trains as if it were not there and only measures.
        eps (float): > 0; activations much smaller than its root count as zero, those near it feel the penalty most.
        mask_padding (bool): whether padding (`attention_mask` 0) is left out of penalty and density.
        tau (float): >= 0; if positive, the share of `|a| > tau` is reported beside the exact density.
        modules (tuple[str, ...] | None): parts of the names of the activation modules ("intermediate_act_fn",
            "DenseReluDense.act"); None finds the non-linearities of all MLPs.
    """

    unit: ClassVar[str] = "feature"
    spends: ClassVar[str] = "drop"
    job: ClassVar[str] = "regularize"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "peft", "torch")
    arxiv: ClassVar[str] = "2402.01911"
    title: ClassVar[str] = (
        "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers"
    )

    weight: float = 1.0
    eps: float = 1e-7
    mask_padding: bool = False
    tau: float = 0.0
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require(math.isfinite(self.weight) and self.weight >= 0, "weight", ">= 0 and finite", self.weight)
        require(math.isfinite(self.eps) and self.eps > 0, "eps", "> 0 and finite", self.eps)
        require(math.isfinite(self.tau) and self.tau >= 0, "tau", ">= 0 and finite", self.tau)
        words = self.modules is None or (isinstance(self.modules, tuple) and bool(self.modules))
        valid = words and all(isinstance(word, str) and word for word in self.modules or ())
        require(valid, "modules", "None or a tuple of parts of module names", self.modules)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Adds the penalty to every training step; evaluation sees nothing of it."""
        if site.trainer is not None and site.trainer.args.n_gpu > 1:
            raise ConflictError(
                f"one process must use one GPU (launch with torchrun), got {site.trainer.args.n_gpu}"
            )
        return _Penalty(self, site.model, record)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any) -> Part:
        """Measures the density of every forward pass in eval mode until it is undone."""
        return _Watch(self, model, record)


def smooth_density(a: Tensor, *, eps: float = 1e-7, mask: Tensor | None = None) -> Tensor:
    """Smooth share of non-zero entries of each sample, `mean(1 - eps / (a^2 + eps))`.

    Args:
        a (Tensor): [B, T, D] activations, any float dtype.
        eps (float): > 0.
        mask (Tensor | None): [B, T] bool, the tokens that count; a sample without any gives 0.

    Returns:
        Tensor: [B] in [0, 1], fp32 (float64 for float64), with graph; only `a` is kept for the backward pass.
    """
    return _SmoothDensity.apply(a, _token_shares(a, mask), eps)


def density(a: Tensor, *, tau: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Share of entries of each sample with `|a| > tau`: for tau 0 of those that are not exactly zero.

    Args:
        a (Tensor): [B, T, D] activations, any float dtype; NaN is not zero.
        tau (float): >= 0.
        mask (Tensor | None): [B, T] bool, the tokens that count; a sample without any gives 0.

    Returns:
        Tensor: [B] fp32, without graph.
    """
    counted = ~(a.detach().abs() <= tau)
    return (counted.float().mean(2) * _token_shares(a, mask)).sum(1)


def total_density(values: list[Tensor], in_decoder: list[bool]) -> Tensor:
    """From each layer's numbers to one for each sample: the mean over layers.

    Args:
        values (list[Tensor]): [B] for each layer (one that ran twice is there twice), not empty.
        in_decoder (list[bool]): which of them are a decoder's. Where there are both kinds, the result is the mean
            over the others plus the mean over the decoder's.

    Returns:
        Tensor: [B] with graph.
    """
    device = values[0].device
    groups = [[v.to(device) for v, flag in zip(values, in_decoder) if flag == side] for side in (False, True)]
    return torch.stack([torch.stack(group).mean(0) for group in groups if group]).sum(0)


class _SmoothDensity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, shares: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(a, shares)
        return ((1 - eps / (_wide(a).square() + eps)).mean(2) * shares).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        a, shares = ctx.saved_tensors
        wide = _wide(a)
        slopes = 2 * ctx.eps * wide / (wide.square() + ctx.eps).square()  # [B, T, D]
        outer = grad.unsqueeze(1) * shares / a.shape[2]  # [B, T]
        return (slopes * outer.unsqueeze(2)).to(a.dtype), None, None


class _Watch(Part):
    """Sees the activations of some forward passes, and keeps their density."""

    def __init__(self, method: DEFT, model: nn.Module, record: Attachment) -> None:
        super().__init__()
        self._method = method
        self._model = model
        self._modules = _chosen(model, method)
        # for each module: sums over samples of the density, exact and above tau, and the number of samples
        self._sums = torch.zeros(len(self._modules), 3, dtype=torch.float64)
        self._pending: list[tuple[int, Tensor]] = []
        self._depth = 0
        self._watched = False
        self._inputs: dict[str, Any] = {}
        self._shape: tuple[int, int] = (1, 1)
        # PEFT's generate calls what it wraps
        for root in dict.fromkeys((model, unwrap(model))):
            record.hook(root.register_forward_pre_hook(self._enter, with_kwargs=True))
            record.hook(root.register_forward_hook(self._leave, always_call=True))
        for index, module in enumerate(self._modules.values()):
            record.hook(module.register_forward_hook(lambda _, __, a, i=index: self._look(i, a)))

    def wants(self) -> bool:
        """Whether to watch the forward pass that starts now."""
        return not self._model.training

    def sees(self, index: int, a: Tensor, mask: Tensor | None) -> None:
        """Activations [B, T, D] of one module, and which tokens count [B, T]."""
        exact = density(a, mask=mask)
        above = density(a, tau=self._method.tau, mask=mask) if self._method.tau else exact
        present = torch.ones_like(exact) if mask is None else mask.any(1)
        self._pending.append((index, torch.stack((exact, above, present)).sum(1)))
        if len(self._pending) > _FLUSH_EVERY:
            self._counted()

    def scores(self) -> dict[str, Tensor]:
        exact, above, samples = self._counted().float().T
        if not bool(samples.any()):
            return {}
        found = {"density": exact / samples}
        return found | {"density above tau": above / samples} if self._method.tau else found

    def spent(self) -> dict[str, Any]:
        means = {name: round(float(value.nanmean()), 4) for name, value in self.scores().items()}
        return {"layers": len(self._modules), **means}

    def _counted(self) -> Tensor:
        for index, row in self._pending:
            self._sums[index] += row.double().cpu()
        self._pending = []
        return self._sums

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._watched = self.wants()
        if self._watched and self._depth == 1:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
            first = tuple(tensors[0].shape) if tensors else (1,)
            self._shape = first[0], first[1] if len(first) > 1 else 1
            # not all of them: a cache must not outlive its generation
            self._inputs = {name: kwargs.get(name) for name in _SAY_PADDING}

    def _leave(self, *_: Any) -> None:
        self._depth -= 1

    def _look(self, index: int, a: Tensor) -> None:
        if self._watched and self._depth and a.numel():
            rows = self._by_sample(index, a)
            self.sees(index, rows, self._mask(index, rows))

    def _by_sample(self, index: int, a: Tensor) -> Tensor:
        """Activations [B, ..., D], or of flattened tokens [B T, D], as [B, T, D]."""
        batch = self._shape[0]
        if a.dim() < 2 or a.shape[0] % batch:
            raise ConflictError(
                f"activations of {self._name(index)} must belong to the {batch} samples of the batch, got shape "
                f"{list(a.shape)}: choose other modules=(...), grouped experts, or a batch of 1"
            )
        return a.reshape(batch, -1, a.shape[-1])

    def _mask(self, index: int, a: Tensor) -> Tensor | None:
        """[B, T] bool, the tokens of `a` [B, T, D] that are not padding; None if all count."""
        if not self._method.mask_padding:
            return None
        mask = self._inputs["attention_mask"]
        if self._decodes(index) and not all(map(self._decodes, range(len(self._modules)))):
            mask, labels = self._inputs["decoder_attention_mask"], self._inputs["labels"]
            mask = labels != IGNORE if mask is None and labels is not None else mask
        if mask is None:
            return None
        # virtual tokens of prompt tuning come first; with a cache only the newest tokens run
        virtual = getattr(getattr(self._model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        missing = a.shape[1] - mask.shape[-1]
        if mask.dim() != 2 or (missing not in (0, virtual) and a.shape[1] != self._shape[1]):
            raise ConflictError(
                f"mask_padding must be False for {self._name(index)}, whose {a.shape[1]} tokens are not those of "
                f"attention_mask {list(mask.shape)}, got True"
            )
        return F.pad(mask.to(a.device, torch.bool), (missing, 0), value=True)

    def _decodes(self, index: int) -> bool:
        return "decoder" in self._name(index).split(".")

    def _name(self, index: int) -> str:
        return list(self._modules)[index]


class _Penalty(_Watch):
    def __init__(self, method: DEFT, model: nn.Module, record: Attachment) -> None:
        super().__init__(method, model, record)
        self.penalizes = method.weight > 0
        self._in_step = self._fresh = self._again = self._checked = False
        self._values: list[tuple[int, Tensor]] = []
        self._history = History()
        self.histories = {"density of each layer": self._history}

    def before_step(self, loop: Loop) -> None:
        self._in_step = self._fresh = True

    def before_forward(self, loop: Loop, inputs: Any) -> None:
        self._values = []

    def wants(self) -> bool:
        if not torch.is_grad_enabled():
            return False  # a probe, or the reference model
        self._again = self._in_step
        if self._in_step and self._values:
            raise ConflictError(
                "the model must run once before its penalty is taken, got a second forward pass"
            )
        if self._in_step and self._fresh:
            self._sums, self._pending, self._fresh = torch.zeros_like(self._sums), [], False
        return self._in_step

    def penalty(self, batch: Batch | None, loop: Loop) -> Tensor:
        """[B]: weight times the smooth density of each sample."""
        places, values = [index for index, _ in self._values], [value for _, value in self._values]
        self._values = []
        if not values:
            raise ConflictError(f"activation modules must run in training, got none of {list(self._modules)}")
        if not self._checked and not any(value.requires_grad for value in values):
            raise ConflictError("parameters below an MLP activation must train for a penalty on it, got none")
        self._checked = True
        return self._method.weight * total_density(values, [self._decodes(index) for index in places])

    def transform_gradients(self, loop: Loop) -> None:
        self._in_step = self._again = False
        if loop.step % _RECORD_EVERY == 0:
            exact, _, samples = distributed.all_reduce_sum(self._counted()).T
            self._history.add(loop.step, exact / samples)

    def end(self, loop: Loop) -> None:
        self._in_step = self._again = False
        self._values = []

    def spent(self) -> dict[str, Any]:
        rows = self._history.rows
        first = {"density at first": round(float(rows[0].nanmean()), 4)} if rows else {}
        return {**super().spent(), **first}

    def _look(self, index: int, a: Tensor) -> None:
        super()._look(index, a)
        # outside of a forward pass this is a checkpoint's second run: the same operations, the result is known
        runs = self._watched if self._depth else self._again and torch.is_grad_enabled()
        if not (self.penalizes and runs and a.numel()):
            return
        if not torch.is_grad_enabled():
            raise ConflictError(
                "gradient checkpointing must be non-reentrant (use_reentrant=False), or modules=(...) chosen: got "
                f"activations of {self._name(index)} without a graph in training"
            )
        rows = self._by_sample(index, a)
        value = smooth_density(rows, eps=self._method.eps, mask=self._mask(index, rows))
        if self._depth:
            self._values.append((index, value))


def _chosen(model: nn.Module, method: DEFT) -> dict[str, nn.Module]:
    """The activation modules by path."""
    if method.modules is None:
        chosen = dict(activation_modules(model))
    else:
        words = method.modules
        leaves = {name: m for name, m in model.named_modules() if not any(m.children())}
        chosen = {name: module for name, module in leaves.items() if any(word in name for word in words)}
        if not chosen:
            raise StructureError(
                f"modules must match a module of {type(model).__name__}, got {words} without a match"
            )
    experts = next((name for name in chosen if "experts" in name.split(".")), None)
    if method.mask_padding and experts:
        raise ConflictError(
            f"mask_padding must be False with experts, whose tokens are reordered, got {experts}"
        )
    return chosen


def _token_shares(a: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T]: what each token adds to its sample's mean."""
    rows, tokens = a.shape[:2]
    if mask is None:
        return torch.full((rows, tokens), 1.0 / tokens, device=a.device, dtype=_wide(a).dtype)
    counted = mask.to(a.device, _wide(a).dtype)
    return counted / counted.sum(1, keepdim=True).clamp_min(1.0)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
