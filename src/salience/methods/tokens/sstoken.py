"""ssToken: of each response, train only on the tokens that the run learns to predict and that heed the prompt.

Scored: the response tokens of one sample, by `s = gamma n + (1 - gamma) att`. `n` is the retrospective excess loss
`REL = loss under a history model - loss now`, scaled to [0, 1] inside the sample: tokens that improved since the
history model are learnable, tokens that stayed or rose are taken for noise. `att` is the share of a token's
attention in one deep layer, averaged over heads, that goes to the prompt.
Spent: the loss. The `ceil(rho R)` best of the R response tokens of each sample stay in it, chosen anew for every
batch; everything about the choice is detached.

Paper: arXiv 2510.18250. Official code: jianke0604/ssToken (2a0c57d8abfa).

Differs from the official code in:
- prompt and response are told by masks, so that chats of several turns and left padding are split rightly; the
  official one takes the number of ignored labels for the end of the prompt and the mask's sum for that of the sample;
- no [T, T] attention map is asked for (which would switch the model to eager attention): the layer's own queries and
  keys give the same share by two log-sum-exps, in fp32;
- `attention_only_until` counts samples seen, over ranks and epochs; the official warm-up ends at the first sample
  whose index in the data set is >= 10,000, at random under shuffling, and starts again in each epoch. It is off by
  default: the paper does not mention one, many data sets are smaller, and until something has been learnt the excess
  loss is no worse than a random choice;
- kept tokens are counted over micro-batches and ranks before dividing; a step that keeps none has loss 0, not NaN;
- of equal scores the token to the left is kept, everywhere alike.

Kept as they are: the token's own row of attention is used, not the row before it that predicted the token; and the
history is measured in eval mode against a training loss with dropout, unless `clean_current`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from salience.core import distributed
from salience.core.attach import Attachment
from salience.core.budget import check_keep, count, top_mask
from salience.core.errors import ConflictError, StructureError, TrainingError, require
from salience.core.loop import Loop, evaluating
from salience.core.losses import IGNORE, token_losses
from salience.core.method import Method
from salience.core.part import Batch, Part, Site, State
from salience.core.scores import History, masked_min_max
from salience.hosts.attention import AttentionCall, attention_mass, attention_module, observe
from salience.methods.tokens._history_losses import (
    HistoryLosses,
    attended_tokens,
    forward_losses,
    history_losses,
    manifest,
    response_tokens,
)
from salience.methods.tokens._history_sources import (
    FrozenBase,
    HistorySource,
    MovingAverage,
    StoredLosses,
    base_is_frozen,
)

__all__ = ["HistoryLosses", "history_losses"]
_RECORD_EVERY, _HEAT_SAMPLES, _TENTHS = 25, 4, 10


@dataclass(frozen=True, kw_only=True)
class SsToken(Method):
    """Fine-tune on the response tokens that are being learnt and that attend to the prompt; drop the rest.

    Attributes:
        keep (float | int): rho, the share (or number) of response tokens of each sample that stay in the loss.
        mix (float): gamma in [0, 1]: 1 scores by excess loss alone, 0 by attention alone.
        attention_layer (int): whose attention is read, counted among the layers with attention; -1 is the last.
        attention_only_until (int): samples to see with gamma = 0 first, >= 0 (the official code's 10,000; see above).
        history (str): the model that losses are compared with. "base": the model as training starts; with LoRA it is
            run beside each batch with adapters off, otherwise the training set is measured once before the first
            step. "ema": a moving average of the weights, run beside each batch. Else a path that
            `HistoryLosses.save` wrote.
        ema_decay (float | None): a in `history <- a history + (1 - a) weights`, [0, 1); for history="ema" only.
        clean_current (bool): measure the current losses without dropout too, by one more forward pass.
        eps (float): > 0, added to the range of the excess losses.
    """

    unit: ClassVar[str] = "token"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "peft", "torch")
    arxiv: ClassVar[str] = "2510.18250"
    title: ClassVar[str] = "ssToken: Self-modulated and Semantic-aware Token Selection for LLM Fine-tuning"

    keep: float | int = 0.6
    mix: float = 0.5
    attention_layer: int = -1
    attention_only_until: int = 0
    history: str = "base"
    ema_decay: float | None = None
    clean_current: bool = False
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(0.0 <= self.mix <= 1.0, "mix", "in [0, 1]", self.mix)
        whole = isinstance(self.attention_layer, int) and not isinstance(self.attention_layer, bool)
        require(whole, "attention_layer", "an int", self.attention_layer)
        require(self.attention_only_until >= 0, "attention_only_until", ">= 0", self.attention_only_until)
        named = isinstance(self.history, str) and bool(self.history)
        require(named, "history", "'base', 'ema' or a file of history losses", self.history)
        if self.history == "ema":
            decays = self.ema_decay is not None and 0.0 <= self.ema_decay < 1.0
            require(decays, "ema_decay", "in [0, 1) with history='ema'", self.ema_decay)
        else:
            require(self.ema_decay is None, "ema_decay", "None unless history='ema'", self.ema_decay)
        require(self.eps > 0, "eps", "> 0", self.eps)

    def attach_trainer(self, site: Site, record: Attachment) -> Part:
        """Observes one attention layer and weights tokens by 0 or 1 in every training step."""
        if not site.shifted:
            raise StructureError(
                f"model must predict each token from those before it, got {type(site.model).__name__}: responses of "
                "other models (classes, masked or translated text) have no prompt before them"
            )
        part = _Selection(self, _source_of(self, site))
        if self.mix < 1 or self.attention_only_until:
            observe(attention_module(site.model, self.attention_layer), record, part.see)
        return part


def prompt_share(attention: Tensor, labels: Tensor) -> Tensor:
    """`att[b, t] = sum_{j in prompt} A[b, t, j]` from a whole map; training uses `attention_mass` instead.

    Args:
        attention (Tensor): [B, T, T] causal attention, head mean, row = query.
        labels (Tensor): [B, T] unshifted, -100 on prompt and padding.

    Returns:
        Tensor: [B, T].
    """
    return attention.masked_fill((labels != IGNORE).unsqueeze(1), 0.0).sum(-1)


def score(
    history: Tensor, current: Tensor, attention: Tensor, response: Tensor, *, mix: float, eps: float = 1e-8
) -> Tensor:
    """`s = gamma n + (1 - gamma) att`, `n = (REL - min REL) / (max REL - min REL + eps)`, `REL = history - current`.

    Args:
        history (Tensor): [B, T] loss of token t under the history model.
        current (Tensor): [B, T] its loss now.
        attention (Tensor): [B, T] share of its attention that goes to the prompt.
        response (Tensor): [B, T] bool; minimum and maximum are those of a sample's response tokens.
        mix (float): gamma.
        eps (float): added to the range.

    Returns:
        Tensor: [B, T], 0 outside of responses.
    """
    learnable = masked_min_max(history - current, response, eps)
    return torch.where(response, mix * learnable + (1 - mix) * attention, 0.0)


def spend(scores: Tensor, response: Tensor, keep: float | int) -> Tensor:
    """The `ceil(rho R)` best response tokens of each sample, [B, T] bool; ties go to the left."""
    kept = [count(keep, total, at_least=1) for total in response.sum(-1).tolist()]
    return top_mask(scores, torch.tensor(kept, device=scores.device), response)


def selected_labels(
    history: Tensor,
    current: Tensor,
    attention: Tensor,
    labels: Tensor,
    *,
    keep: float | int,
    mix: float,
    eps: float = 1e-8,
) -> Tensor:
    """The labels [B, T] with -100 on every response token that is not kept; arguments as in `score` and `spend`."""
    response = labels != IGNORE
    kept = spend(score(history, current, attention, response, mix=mix, eps=eps), response, keep)
    return labels.masked_fill(~kept, IGNORE)


def mean_loss(losses: Tensor, kept: Tensor) -> Tensor:
    """The mean of the kept losses, []; NaN where none is kept (the official form: a training step has 0 there)."""
    return losses[kept].mean()


class _Selection(Part):
    def __init__(self, method: SsToken, source: HistorySource | None) -> None:
        super().__init__()
        self.weights_tokens = True
        self.heat: list[dict[str, Any]] = []
        self._method = method
        self._source = source
        self._seen = self._kept = self._total = self._clean_passes = 0
        self._mix = method.mix
        self._awaits = False
        self._attended = self._prompt = self._rows = torch.empty(0, dtype=torch.bool)
        self._history: Tensor | None = None
        self._current: Tensor | None = None
        self._attention: Tensor | None = None
        self._newest: dict[str, Tensor] = {}
        self._tenths = torch.zeros(2, _TENTHS, dtype=torch.int64)
        self._shares = History()
        self.histories = {"share kept of each tenth of the response": self._shares}

    def begin(self, loop: Loop) -> None:
        if self._source is not None:
            self._source.begin(loop)

    def before_step(self, loop: Loop) -> None:
        self._mix = 0.0 if self._seen < self._method.attention_only_until else self._method.mix
        if self._source is not None:
            self._source.before_step(loop)

    def before_forward(self, loop: Loop, inputs: Mapping[str, Any]) -> None:
        labels = inputs.get("labels")
        if labels is None or labels.dim() != 2:
            got = "none" if labels is None else list(labels.shape)
            raise StructureError(
                f"labels must be [B, T], one for each token that is selected from, got {got}"
            )
        self._attended = attended_tokens(inputs)
        self._prompt = self._attended & (labels == IGNORE)
        self._rows = response_tokens(labels).any(0)
        self._history = self._current = self._attention = None
        if self._source is not None and self._mix > 0:
            self._history = self._source.losses(loop, inputs)
            if self._method.clean_current:
                self._clean_passes += 1
                with evaluating(loop.model), torch.no_grad():
                    self._current = forward_losses(loop.model, inputs)[0]
        self._awaits = self._mix < 1

    def see(self, call: AttentionCall) -> None:
        """Takes the share from the training forward, not from a history model or a checkpoint run again."""
        if self._awaits:
            self._awaits = False
            self._attention = attention_mass(call, self._prompt, rows=self._rows, attended=self._attended)

    def token_weights(self, batch: Batch, loop: Loop) -> Tensor:
        response = batch.active
        current = self._current if self._current is not None else _plain_losses(batch, loop)
        history = self._history.to(current) if self._history is not None else current
        attention = self._attention.to(current) if self._attention is not None else torch.zeros_like(current)
        if self._awaits:
            raise StructureError("attention_layer must run in every forward pass, got one without it")
        for name, losses in (("history losses", history), ("losses", current)):
            if not bool(losses[response].isfinite().all()):
                raise TrainingError(f"{name} must be finite, got inf or nan at step {loop.step}")
        scores = score(history, current, attention, response, mix=self._mix, eps=self._method.eps)
        kept = spend(scores, response, self._method.keep)
        excess = (history - current).masked_fill(~response, 0.0)
        self._newest = {"score": scores, "excess_loss": excess, "attention": attention * response}
        self._count(response, kept)
        if loop.step % _RECORD_EVERY == 0 and not (self.heat and self.heat[0]["step"] == loop.step):
            columns = {"scores": scores, "kept": kept, "response": response, "prompt": self._prompt}
            self.heat = _heat(batch, self._attended, columns, loop.step)
        return kept.to(batch.weights.dtype)

    def _count(self, response: Tensor, kept: Tensor) -> None:
        self._seen += len(response) * distributed.size()
        self._kept += int(kept.sum())
        self._total += int(response.sum())
        lengths = response.sum(-1, keepdim=True).clamp_min(1)
        tenth = (response.cumsum(-1) - 1) * _TENTHS // lengths
        for row, mask in enumerate((kept, response)):
            self._tenths[row] += tenth[mask].bincount(minlength=_TENTHS).cpu()

    def transform_gradients(self, loop: Loop) -> None:
        if loop.step % _RECORD_EVERY == 0:
            self._shares.add(loop.step, self._tenths[0] / self._tenths[1].clamp_min(1))
            self._tenths.zero_()

    def scores(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._newest.items()}

    def spent(self) -> dict[str, float | int]:
        if not self._total:
            return {}
        passes = self._clean_passes + (self._source.passes if self._source is not None else 0)
        counts = {"response tokens": self._total, "kept": self._kept, "extra forward passes": passes}
        return {**counts, "share kept": round(self._kept / self._total, 4)}

    def state(self) -> State:
        source = self._source
        state: State = {
            "seen": self._seen,
            "kept": self._kept,
            "total": self._total,
            "tenths": self._tenths.clone(),
        }
        state |= {"clean passes": self._clean_passes, "passes": source.passes if source is not None else 0}
        if source is not None:
            state |= {f"source.{name}": value for name, value in source.state().items()}
        return state

    def load_state(self, state: State) -> None:
        values: dict[str, Any] = dict(state)
        self._seen, self._kept, self._total = values["seen"], values["kept"], values["total"]
        self._clean_passes, self._tenths = values["clean passes"], values["tenths"].clone()
        if self._source is not None:
            self._source.passes = values["passes"]
            self._source.load_state(_under("source.", values))


def _source_of(method: SsToken, site: Site) -> HistorySource | None:
    """Where history losses come from; None if only attention counts.

    Over a frozen base, running it beside each batch costs no more than measuring one epoch beforehand, needs neither
    memory nor a wait, works on streams, and gives a resumed run the same bits.
    """
    if method.mix == 0:
        return None
    if method.history == "ema" and method.ema_decay is not None:
        return MovingAverage(method.ema_decay)
    if method.history != "base":
        read = HistoryLosses.load(method.history)
        read.check(manifest(site.model, getattr(site.trainer, "processing_class", None)))
        return StoredLosses(read)
    if base_is_frozen(site.model):
        return FrozenBase()
    if site.trainer is not None and not hasattr(site.trainer.train_dataset, "__len__"):
        raise ConflictError(
            "history must be 'ema' or a file when all weights train on a stream, got 'base': use LoRA, or measure "
            "the data with history_losses"
        )
    return StoredLosses()


def _plain_losses(batch: Batch, loop: Loop) -> Tensor:
    """The training forward's losses [B, T], without the label smoothing of the loss that is trained on."""
    if loop.smoothing:
        return token_losses(batch.logits.detach(), batch.labels)[0]
    return batch.losses.detach()


def _heat(batch: Batch, attended: Tensor, columns: dict[str, Tensor], step: int) -> list[dict[str, Any]]:
    """The first samples of a batch as plain lists, one entry for each attended token, for a report to draw."""
    if "input_ids" in batch.inputs:
        columns = {"tokens": batch.inputs["input_ids"], **columns}
    rows = range(min(len(attended), _HEAT_SAMPLES))
    return [
        {"step": step, **{name: value[row][attended[row]].tolist() for name, value in columns.items()}}
        for row in rows
    ]


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
