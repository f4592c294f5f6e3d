"""AttentionInfluence: documents that a small model predicts much worse once it can no longer copy from the context.

Scored: each document x by the relative rise of its loss when the model's retrieval heads are switched off,
`s(x) = (L_ref(x) - L_base(x)) / L_base(x)`, L the mean loss per token of its first `max_length` tokens. The retrieval
heads are found once for each model: on questions whose answer is a sentence of the context, head h collects
`1 / len(passage)` at every step of the answer where its strongest attention is on a token of that passage which is
the token being produced; the mean over questions is R_h in [0, 1], and the best `head_fraction` of all heads are
taken.
Spent: the best `keep` of the corpus, or of each domain (`Reading.domain_column`), stay.

Paper: arXiv 2505.07293. No official code was published; the detector is nightdessert/Retrieval_Head's (3ac171a).
`uniform` follows AIR (arXiv 2512.13279, a_ij = 1/N); `zero` takes the head's output away.

Differs from Retrieval_Head in:
- the answer is given to the model (teacher forcing) rather than decoded, so a head is judged also where a small base
  model would have answered wrongly, and one forward pass is enough for a question;
- a head is switched off by setting its query to 0 after rotary and norms. The detector's own masking writes 0 over
  logits behind the causal mask: in a pass over a whole document such a head averages over what comes later, and the
  loss of the weakened model is too low.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from salience.core.attach import Attachment
from salience.core.budget import check_keep
from salience.core.documents import Documents, Scorer
from salience.core.errors import ParameterError, require
from salience.core.files import write_json_atomic
from salience.core.method import Method
from salience.core.part import Part
from salience.core.places import cache_folder
from salience.core.token_scores import nll
from salience.hosts import head_masks
from salience.hosts.attention import AttentionCall, attention_module, observe
from salience.hosts.language import TokenMeter, fingerprint, longest, vocabulary
from salience.hosts.selecting import pick
from salience.methods.samples._attention_influence_probes import Probe, probes

_VERSION = 1  # of the probes: what is cached under another is found anew
_NORMALISE = ("base", "ref", "none")


@dataclass(frozen=True, kw_only=True)
class AttentionInfluence(Method):
    """Keep the documents whose loss rises most when a small model's retrieval heads are switched off.

    Attributes:
        model (Any): checkpoint folder, hub id, a causal language model, or a pair of it and its tokenizer.
        tokenizer (Any): None takes the model's own.
        keep (int | float): documents that stay: a share in (0, 1], rounded up, or a count.
        head_fraction (float): share of all heads that is switched off, in (0, 1).
        heads (tuple[tuple[int, int], ...]): (layer, head) from 0, instead of detecting them.
        mask_mode (str): "uniform": they attend to all visible tokens alike; "zero": they put out nothing.
        normalise (str): the rise is divided by the "base" loss or the weakened model's, "ref" (the same order), or
            by "none".
        loss_floor (float): smallest loss that is divided by, in nats, > 0: boiler-plate has almost none.
        min_tokens (int): shorter documents are not scored and not kept, >= 2: their scores are noise.
        probes (int): questions of the detection, >= 1.
        probe_length (int): longest of them in tokens; the model's positions if it has fewer.
        shots (int): worked questions in each, >= 0.
        seed (int): of the questions, >= 0.
    """

    unit: ClassVar[str] = "sample"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "select"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "datasets")
    needs: ClassVar[tuple[str, ...]] = ("model",)
    arxiv: ClassVar[str] = "2505.07293"
    title: ClassVar[str] = (
        "AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection"
    )

    model: Any = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    keep: int | float = 0.2
    head_fraction: float = 0.05
    heads: tuple[tuple[int, int], ...] = ()
    mask_mode: str = "uniform"
    normalise: str = "base"
    loss_floor: float = 0.05
    min_tokens: int = 64
    probes: int = 800
    probe_length: int = 4096
    shots: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_keep(self.keep)
        require(0.0 < self.head_fraction < 1.0, "head_fraction", "in (0, 1)", self.head_fraction)
        pairs = all(len(one) == 2 and min(one) >= 0 for one in self.heads)
        require(pairs, "heads", "pairs of a layer and a head, both >= 0", self.heads)
        modes = head_masks.MODES
        require(self.mask_mode in modes, "mask_mode", f"one of {', '.join(modes)}", self.mask_mode)
        known = self.normalise in _NORMALISE
        require(known, "normalise", f"one of {', '.join(_NORMALISE)}", self.normalise)
        finite = math.isfinite(self.loss_floor)
        require(finite and self.loss_floor > 0, "loss_floor", "> 0 and finite", self.loss_floor)
        for name, least in (("min_tokens", 2), ("probes", 1), ("probe_length", 2), ("shots", 0), ("seed", 0)):
            require(getattr(self, name) >= least, name, f">= {least}", getattr(self, name))

    def attach_dataset(self, dataset: Any, data: Any = None) -> tuple[Part, Any]:
        """Two passes for every document, the lower layers shared; `data` may be a `Reading`."""
        return pick(dataset, self, data)

    def scorer(self, model: Any, tokenizer: Any = None) -> Scorer:
        """The score and, beside it, both losses."""
        heads = head_masks.check_heads(model, self.retrieval_heads(model, tokenizer))
        meter, fork = TokenMeter(model), head_masks.Fork(model, heads, self.mask_mode)

        def scored(batch: Documents) -> dict[str, Tensor]:
            with fork.intact():
                base = meter.means(batch, nll)
            with fork.weakened():
                ref = meter.means(batch, nll)
            short = batch.lengths < self.min_tokens
            values = score(base, ref, normalise=self.normalise, floor=self.loss_floor)
            return {
                "score": values.masked_fill(short, torch.nan),
                "loss": base,
                "masked_loss": ref,
                "floored": base < self.loss_floor,
                "short": short,
            }

        return scored

    def retrieval_heads(self, model: Any, tokenizer: Any = None) -> list[tuple[int, int]]:
        """The heads that are switched off: those that were named, else the model's best, found once and kept.

        Raises:
            ParameterError: if the fraction gives all heads, or there are none that were named.
        """
        if self.heads:
            return [(int(layer), int(head)) for layer, head in self.heads]
        found = self.head_scores(model, tokenizer)
        return important(found, self.head_fraction)

    def head_scores(self, model: Any, tokenizer: Any = None) -> Tensor:
        """R_h of every head, [L, H], from the cache if this model was asked before."""
        tokenizer = tokenizer if tokenizer is not None else self.tokenizer
        require(tokenizer is not None, "tokenizer", "given, to ask for retrieval heads", tokenizer)
        length = longest(model, min(self.probe_length, longest(model, None)))
        asked_for = (_VERSION, self.probes, length, self.shots, self.seed)
        name = "-".join([fingerprint(model), vocabulary(tokenizer), *map(str, asked_for)])
        path = cache_folder() / "retrieval-heads" / f"{name}.json"
        if path.is_file():
            return torch.tensor(json.loads(path.read_text(encoding="utf-8")))
        asked = probes(tokenizer, self.probes, length, shots=self.shots, seed=self.seed)
        scores = detect(model, asked)
        write_json_atomic(path, scores.tolist())
        return scores


def score(base: Tensor, ref: Tensor, *, normalise: str = "base", floor: float = 0.05) -> Tensor:
    """The relative rise of the loss.

    Args:
        base (Tensor): [B] mean loss of the intact model, nats.
        ref (Tensor): [B] mean loss of the weakened one.
        normalise (str): "base", "ref" or "none".
        floor (float): smallest divisor.

    Returns:
        Tensor: [B]; NaN where a loss is.
    """
    rise = ref - base
    if normalise == "none":
        return rise
    return rise / (base if normalise == "base" else ref).clamp_min(floor)


def retrieval_score(attention: Tensor, prompt: Tensor, produced: Tensor, passage: tuple[int, int]) -> Tensor:
    """R_h of one question from the attention of the newest query at every step of the answer.

    Args:
        attention (Tensor): [S, L, H, K] rows over the prompt and what was produced so far; the rest 0.
        prompt (Tensor): [N] tokens, N <= K.
        produced (Tensor): [S] the token of each step.
        passage (tuple[int, int]): where in the prompt the answer stands, [start, end).

    Returns:
        Tensor: [L, H] float32.
    """
    return hits(attention.argmax(-1), prompt, produced, passage)


def hits(strongest: Tensor, prompt: Tensor, produced: Tensor, passage: tuple[int, int]) -> Tensor:
    """`sum_t [i_t in passage and prompt[i_t] = produced_t] / len(passage)`, i_t the strongest of [S, L, H]."""
    start, end = passage
    inside = (strongest >= start) & (strongest < end)
    copied = prompt[strongest.clamp_max(len(prompt) - 1)] == produced[:, None, None]
    return (inside & copied).sum(0).float() / (end - start)


def important(scores: Tensor, fraction: float) -> list[tuple[int, int]]:
    """The `max(1, round(fraction L H))` heads with the highest scores; ties go to the lower layer, then head.

    Args:
        scores (Tensor): [L, H].
        fraction (float): in (0, 1).

    Raises:
        ParameterError: if that is all of them.
    """
    total = scores.numel()
    number = max(1, round(fraction * total))
    if number >= total:
        raise ParameterError(
            f"head_fraction must leave heads of the model's {total} in force, got {fraction} ({number} of them)"
        )
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices[:number].sort().values
    return [(int(place) // scores.shape[1], int(place) % scores.shape[1]) for place in order]


@torch.no_grad()
def detect(model: Any, asked: list[Probe]) -> Tensor:
    """R_h of every head: the mean of `hits` over questions whose answers the model is given.

    Args:
        model (Any): a decoder, in eval mode.
        asked (list[Probe]): questions; the attention of an answer's rows alone is computed, layer by layer.

    Returns:
        Tensor: [L, H] float32 on the CPU.
    """
    layers = head_masks.decoder_heads(model)
    widest = max(heads for _, heads in layers)
    total = torch.zeros(len(layers), widest)
    device = next(model.parameters()).device
    for probe in asked:
        ids = torch.tensor([probe.ids], device=device)
        found: dict[int, Tensor] = {}
        record = Attachment()
        try:
            for index in range(len(layers)):
                observe(attention_module(model, index), record, _strongest(found, index, probe))
            model(input_ids=ids, use_cache=False)
        finally:
            record.undo()
        produced = ids[0, probe.answer :]
        for index, places in found.items():
            part = hits(places.T.unsqueeze(1), ids[0, : probe.answer], produced, probe.passage)
            total[index, : part.shape[1]] += part[0].cpu()
    return total / len(asked)


def _strongest(found: dict[int, Tensor], index: int, probe: Probe) -> Any:
    def see(call: AttentionCall) -> None:
        # the row in front of a token is the one that produces it
        found[index] = call.logits(probe.answer - 1, len(probe.ids) - 1)[0].argmax(-1)

    return see
