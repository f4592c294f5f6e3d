"""Trains the boundary predictor of DHSA on the keys and the attention of a frozen language model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import StructureError, require
from salience.core.loop import evaluating
from salience.core.progress import bar
from salience.core.selection import generator
from salience.hosts.prefill import Prompt, prefill
from salience.hosts.transformers import structure, unwrap
from salience.methods.keys._dhsa_boundaries import (
    BoundaryPredictor,
    defined,
    features_of,
    focal_loss,
    mass_ratio,
    soft_label,
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How the predictor is trained; see `train_dhsa`."""

    window: int = 4
    hidden: int = 256
    heads: int = 4
    epochs: int = 2
    lr: float = 1e-4
    pos_weight: float = 1.3
    gamma: float = 2.0
    seed: int = 42
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("window", "hidden", "heads", "epochs"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        for name in ("lr", "pos_weight"):
            require(getattr(self, name) > 0, name, "> 0", getattr(self, name))
        for name in ("gamma", "seed"):
            require(getattr(self, name) >= 0, name, ">= 0", getattr(self, name))


def key_channels(model: nn.Module) -> int:
    """Width of all key heads of a layer side by side, the same in all layers.

    Raises:
        StructureError: if layers differ, so that one predictor cannot read them all.
    """
    widths = {
        attention.num_kv_heads * attention.head_dim
        for layer in structure(model).layers
        for attention in layer.attentions
    }
    if len(widths) != 1:
        raise StructureError(f"key heads of all layers must be equally wide together, got {sorted(widths)}")
    return widths.pop()


def train_dhsa(
    model: nn.Module,
    data: Iterable[Any],
    *,
    file: str | Path | None = None,
    window: int = 4,
    hidden: int = 256,
    heads: int = 4,
    epochs: int = 2,
    lr: float = 1e-4,
    pos_weight: float = 1.3,
    gamma: float = 2.0,
    seed: int = 42,
    progress: bool | None = None,
) -> BoundaryPredictor:
    """Train the predictor of chunk borders for a frozen language model.

    Each prompt is read once with dense attention. In every layer a gap is a border if later queries attend to the
    `window` tokens on one side of it at least twice as much as to those on the other; the predictor learns that from
    the layer's keys, with one step of Adam on the focal loss of all layers together for each prompt.

    Args:
        model (nn.Module): a causal language model; its weights do not change.
        data (Iterable): prompts, as tensors of ids or mappings with input_ids; of 512 to 8192 tokens as a rule. Those
            shorter than 4 windows are left out.
        file (str | Path | None): where the predictor is written, for `DHSA(predictor=...)`.
        window (int): tokens on each side of a gap.
        hidden (int): width of the predictor's MLP.
        heads (int): of its window attention, a divisor of the width of all key heads together.
        epochs (int): passes over the prompts.
        lr (float): of Adam.
        pos_weight (float): weight of borders.
        gamma (float): exponent of the focal loss.
        seed (int): of the predictor's first weights and the order of prompts.
        progress (bool | None): show a bar; None where there is a terminal.

    Returns:
        BoundaryPredictor: with the loss of each step in `losses`.

    Raises:
        ParameterError: for values out of range, or without a prompt that is long enough.
        FileError: if the file cannot be written.

    Example:
        >>> sal.train_dhsa(model, prompts, file="borders.safetensors")  # doctest: +SKIP
        >>> sal.focus(model, sal.DHSA(predictor="borders.safetensors"))  # doctest: +SKIP
    """
    plan = Training(window, hidden, heads, epochs, lr, pos_weight, gamma, seed, progress)
    predictor = _train(model, data, plan)
    if file is not None:
        predictor.save(file)
    return predictor


def _train(model: nn.Module, data: Iterable[Any], plan: Training) -> BoundaryPredictor:
    prompts = [prompt for item in _items(data) for prompt in _prompts(item)]
    shortest = 4 * plan.window
    prompts = [prompt for prompt in prompts if prompt["input_ids"].shape[1] >= shortest]
    wanted = f"prompts of at least {shortest} tokens (512 to 8192 are usual)"
    require(bool(prompts), "data", wanted, "none")
    draw = generator(plan.seed)
    device = next(model.parameters()).device
    predictor = fresh(key_channels(model), plan, draw).to(device)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=plan.lr)
    learning = _Learning(predictor, plan)
    record = Attachment()
    try:
        prefill(model, record, learning.see)
        with evaluating(model), bar("dhsa: prompts", plan.epochs * len(prompts), plan.progress) as advance:
            for _ in range(plan.epochs):
                for number in torch.randperm(len(prompts), generator=draw).tolist():
                    optimizer.zero_grad()
                    learning.losses.clear()
                    _run(model, prompts[number], device)
                    optimizer.step()
                    if not learning.losses:
                        raise StructureError(
                            "attention must see all keys in some layer, got sliding windows only"
                        )
                    predictor.losses.append(sum(learning.losses) / len(learning.losses))
                    advance()
    finally:
        record.undo()
    _log.info("boundary predictor: loss %.4f after %d steps", predictor.losses[-1], len(predictor.losses))
    return predictor.eval().requires_grad_(False)


def fresh(channels: int, plan: Training, draw: torch.Generator) -> BoundaryPredictor:
    """A predictor drawn from a generator of its own, as torch's layers start."""
    with torch.device("meta"):
        made = BoundaryPredictor(channels, hidden=plan.hidden, heads=plan.heads, window=plan.window)
    made = made.to_empty(device="cpu")
    with torch.no_grad():
        for name, value in made.named_parameters():
            if name.endswith("norm.weight"):
                value.fill_(1.0)
            elif "norm" in name or "in_proj_bias" in name or "out_proj.bias" in name:
                value.zero_()
            elif "in_proj_weight" in name:
                nn.init.xavier_uniform_(value, generator=draw)
            else:
                # a bias is drawn from the range of its layer's weight
                layer: Any = made.get_submodule(name.rpartition(".")[0])
                reach = layer.in_features**-0.5
                value.uniform_(-reach, reach, generator=draw)
    return made


@dataclass
class _Learning:
    """Looks at each layer of a dense pass, and adds its gradients to the predictor's."""

    predictor: BoundaryPredictor
    plan: Training
    losses: list[float] = field(default_factory=list)

    def see(self, prompt: Prompt) -> None:
        if prompt.query.shape[2] == prompt.key.shape[2]:
            with torch.enable_grad():
                self.losses.append(self._learn(prompt))

    def _learn(self, prompt: Prompt) -> float:
        plan, length = self.plan, prompt.key.shape[2]
        ratio = mass_ratio(prompt.query, prompt.key, window=plan.window, scaling=prompt.scaling)
        border = soft_label(ratio.clamp_min(1.0)) >= 0.5
        valid = defined(length, plan.window, device=ratio.device).expand_as(border)
        total, loss = int(valid.sum()), 0.0
        for start, stop, logits in self.predictor.slices(features_of(prompt.key)):
            part, count = slice(start, stop), int(valid[:, start:stop].sum())
            mean = focal_loss(
                logits, border[:, part], valid[:, part], pos_weight=plan.pos_weight, gamma=plan.gamma
            )
            share = mean * (count / max(1, total))
            # slice by slice, so that the graph of one slice is held
            share.backward()
            loss += float(share.detach())
        return loss


def _items(data: Iterable[Any]) -> list[Any]:
    iterable = isinstance(data, Iterable) and not isinstance(data, Mapping | str | bytes | Tensor)
    require(iterable, "data", "prompts: mappings with input_ids, or tensors of ids", type(data).__name__)
    return list(data)


def _prompts(item: Any) -> Iterator[dict[str, Any]]:
    """Single prompts without padding."""
    given = {"input_ids": item} if isinstance(item, Tensor) else item
    named = isinstance(given, Mapping) and "input_ids" in given
    require(named, "data", "prompts: mappings with input_ids, or tensors of ids", type(item).__name__)
    ids = torch.as_tensor(given["input_ids"])
    ids = ids.unsqueeze(0) if ids.dim() == 1 else ids
    mask = torch.as_tensor(given.get("attention_mask", torch.ones_like(ids))).view_as(ids).bool()
    known = ("input_ids", "attention_mask", "labels")
    # pictures and the like; words beside the ids are not for the model
    beside = {k: v for k, v in given.items() if isinstance(v, Tensor) and k not in known}
    if beside:
        plain = len(ids) == 1 and bool(mask.all())
        require(
            plain, "data", f"one prompt each, without padding, beside {', '.join(beside)}", list(ids.shape)
        )
    for row, kept in zip(ids, mask, strict=True):
        yield {**beside, "input_ids": row[kept].unsqueeze(0)}


@torch.no_grad()
def _run(model: nn.Module, prompt: Mapping[str, Any], device: torch.device) -> None:
    # without the head: no logits are needed
    core: Any = unwrap(model)
    body = getattr(core, "base_model", core)
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in prompt.items()}
    if "use_cache" in inspect.signature(body.forward).parameters:
        inputs["use_cache"] = False
    body(**inputs)
