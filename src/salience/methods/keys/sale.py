"""SALE: 4-bit products of queries and keys tell which key blocks a prompt needs; those get exact attention.

Scored: every pair of a query i and an earlier key j, by its relative attention score
`RAS_ij = exp(s S_ij - m_i) / l_i`, s the scaling of the logits. m and l are the softmax's maximum and sum over the
keys that are always seen, exactly: the first block (the sink) and the last 128 to 224 keys. S estimates the product
from 4-bit codes, `S_ij = s_q s_k (a_i . b_j + rint(mean q . k_j / s_k / s_q))` with `a = rint((q - mean q) / s_q)`,
`b = rint(k_j / s_k)`, keys without their mean (a constant of a row, which softmax does not see).
Spent: a block of 32 keys is kept for a block of 64 queries if one of its pairs has `RAS > tau`. Each head has a tau
of its own, found once by halving until attention's output moves less than theta; a head with tau = 0 is dense.
New tokens see everything.

Paper: arXiv 2505.24179. Official code: BirdChristopher/SALE (39d380c).

Differs from the official code in:
- any causal decoder of transformers, batches, padding, soft caps, and chunks of a prompt behind a cache: centred keys
  are then all keys so far, centred queries those of the chunk; grouped heads share their keys;
- the thresholds are compared in fp32 (official: fp16 or bf16), and groups of zeros have a scale of 1, not NaN;
- only the published way, statistics first; the official code also has one that changes them while it selects;
- attention over what is kept is exact; the official scripts quantise it to 8 bits;
- on a CPU, and on GPUs without 4-bit products, the codes are multiplied as fp32 numbers: the choice is the same;
- means over the whole prompt let the choice, not the attention, depend on later tokens; `centre="prefix"` does not.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.prefill import Prompt, prefill
from salience.kernels import KeyBlocks
from salience.kernels.blocks import joined, lists
from salience.methods.keys._sale_calibration import run_calibration, table
from salience.methods.keys._sale_scores import DENSE, Estimator, Grid, spend

__all__ = ["calibrate_sale"]
_BITS = (4, 8, None)
_CENTRES = ("prompt", "prefix")
_GRID = Grid()


@dataclass(frozen=True, kw_only=True)
class SALE(Method):
    """See the key blocks in which a 4-bit estimate finds attention, exactly.

    Attributes:
        tau (float | tuple | str): threshold of the relative attention score, >= 0: one for all heads, one for each
            layer and head as a tuple of tuples, or a .safetensors file of `calibrate_sale`. A head under 1e-5 is
            dense.
        theta (float): output error at which calibration stops, > 0, in units of the model's values: 0.4 fits
            Llama-3.1-8B, 2.0 Qwen2.5-32B.
        q_block (int): queries in a block, a multiple of 16.
        k_block (int): keys in a block, a multiple of 8.
        sink_blocks (int): first key blocks, always seen, >= 1.
        local_window (int): newest keys always seen, at least; a multiple of k_block, >= q_block + k_block.
        segment (int): keys by which the estimated region grows, a multiple of k_block.
        bits (int | None): of the codes, 4 or 8; None takes exact scores, the best that the rule can do.
        dense_below (int): prompts up to so many tokens see everything, >= 0.
        centre (str): means over the "prompt" or, for each query block, over its "prefix".
    """

    unit: ClassVar[str] = "key"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2505.24179"
    title: ClassVar[str] = (
        "SALE: Low-bit Estimation for Efficient Sparse Attention in Long-context LLM Prefilling"
    )

    tau: float | tuple[tuple[float, ...], ...] | str = 0.008
    theta: float = 0.4
    q_block: int = 64
    k_block: int = 32
    sink_blocks: int = 1
    local_window: int = 128
    segment: int = 128
    bits: int | None = 4
    dense_below: int = 1024
    centre: str = "prompt"

    def __post_init__(self) -> None:
        if isinstance(self.tau, str) and not self.tau.endswith(".safetensors"):
            # on the command line every number comes as text
            object.__setattr__(self, "tau", _number(self.tau))
        if not isinstance(self.tau, str):
            rows = self.tau if isinstance(self.tau, tuple) else ((self.tau,),)
            nested = bool(rows) and all(isinstance(row, tuple) and row for row in rows)
            require(nested, "tau", "a number, or one for each layer and head", self.tau)
            valid = all(0.0 <= one < math.inf for row in rows for one in row)
            require(valid, "tau", "finite and >= 0", self.tau)
            require(len({len(row) for row in rows}) == 1, "tau", "of as many heads in each layer", self.tau)
        require(0.0 < self.theta < math.inf, "theta", "finite and > 0", self.theta)
        units = {"q_block": 16, "k_block": 8, "local_window": self.k_block, "segment": self.k_block}
        for name, unit in units.items():
            value = getattr(self, name)
            fits = type(value) is int and value >= 1 and value % unit == 0
            require(fits, name, f"a positive multiple of {unit}", value)
        least = self.q_block + self.k_block
        # the estimated keys lie wholly before the query block
        wanted = f">= q_block + k_block = {least}"
        require(self.local_window >= least, "local_window", wanted, self.local_window)
        require(
            type(self.sink_blocks) is int and self.sink_blocks >= 1, "sink_blocks", ">= 1", self.sink_blocks
        )
        require(self.bits in _BITS, "bits", "4, 8 or None", self.bits)
        require(self.dense_below >= 0, "dense_below", ">= 0", self.dense_below)
        require(self.centre in _CENTRES, "centre", f"one of {', '.join(_CENTRES)}", self.centre)

    @property
    def grid(self) -> Grid:
        """Blocks and regions."""
        return Grid(self.q_block, self.k_block, self.sink_blocks, self.local_window, self.segment)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Every head chooses its own key blocks while a prompt is read.

        With `data`, batches of prompts, the thresholds are calibrated first; they are among the handle's scores.
        """
        taus = table(model, self.tau) if data is None else calibrate_sale(model, data, self)
        part = prefill(model, record, functools.partial(self.choose, taus=taus))
        # a record of its own: the thresholds stay among the scores after undo
        Attachment().wrap(part, "scores", lambda own: lambda: {"tau": taus, **own()})
        return part

    def choose(self, prompt: Prompt, taus: Tensor | None = None) -> KeyBlocks | None:
        """The lists of one layer, or None for all keys.

        Args:
            prompt (Prompt): what the layer asks.
            taus (Tensor | None): [layers, H] thresholds; None takes `tau`, which is then one number.
        """
        if taus is None:
            require(isinstance(self.tau, int | float), "taus", "given unless tau is one number", self.tau)
            own = torch.full((prompt.query.shape[1],), float(self.tau))  # type: ignore[arg-type]
        else:
            own = taus[prompt.layer]
        if prompt.key.shape[2] <= self.dense_below or bool((own < DENSE).all()):
            return None
        return choose(
            prompt.query,
            prompt.key,
            own.to(prompt.query.device),
            scaling=prompt.scaling,
            softcap=prompt.softcap,
            grid=self.grid,
            bits=self.bits,
            centre=self.centre,
        )


def choose(
    query: Tensor,
    key: Tensor,
    tau: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    grid: Grid = _GRID,
    bits: int | None = 4,
    centre: str = "prompt",
) -> KeyBlocks:
    """The sink, the local keys, and every block in between with a pair of `RAS > tau`.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D]; row r stands at position K - Q + r.
        tau (Tensor): [H].
        scaling (float): of the logits.
        softcap (float | None): soft cap of the logits.
        grid (Grid): blocks and regions.
        bits (int | None): of the codes.
        centre (str): see `SALE`.

    Returns:
        KeyBlocks: [B, H, N] lists without a window.

    Raises:
        ParameterError: if tau is not one number >= 0 for each head.
    """
    count = query.shape[1]
    require(tau.shape == (count,), "tau", f"[{count}], one for each head", list(tau.shape))
    require(bool((tau >= 0).all()), "tau", ">= 0", tau.tolist())
    if query.is_cuda and centre == "prompt":
        from salience.kernels import triton_sale

        if triton_sale.unfit(query, key, grid, bits) is None:
            return triton_sale.choose(query, key, tau, scaling=scaling, grid=grid, softcap=softcap, bits=bits)
    groups, fold = key.shape[1], query.shape[1] // key.shape[1]
    # key heads whose query heads are all dense need no estimate
    live = (tau >= DENSE).view(groups, fold).any(-1)
    heads = live.repeat_interleave(fold)
    how: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "bits": bits, "centre": centre}
    found = Estimator(query[:, heads], key[:, live], grid, **how) if bool(live.any()) else None
    ends, _ = grid.regions(query.shape[2], key.shape[2], query.device)
    shape = (len(query), query.shape[1], -(-key.shape[2] // grid.k_block))
    parts = []
    for start, stop in found.slices() if found is not None else [(0, len(ends))]:
        scores = query.new_full((*shape[:2], stop - start, shape[2]), torch.nan, dtype=tau.dtype)
        if found is not None:
            scores[:, heads] = found.block_log_ras(start, stop).to(tau.dtype)
        parts.append(lists(spend(scores, tau, ends[start:stop])))
    return KeyBlocks(*joined(parts), grid.q_block, grid.k_block, query.shape[2], key.shape[2])


def calibrate_sale(
    model: nn.Module,
    data: Iterable[Any],
    method: SALE | None = None,
    *,
    path: str | Path | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Find a threshold for each layer and head by halving.

    For each prompt, layer and head: while `sum |O - O'| / tokens >= theta`, O exact attention and O' that of the
    threshold so far, the threshold is halved, and is 0 (dense) from 1e-4 down. It goes on from prompt to prompt and
    only falls; the hidden states go on with the exact O. The paper takes 5 prompts of some 60K tokens in which a
    value has to be found by its key.

    Args:
        model (nn.Module): a causal decoder.
        data (Iterable): prompts longer than `dense_below`: mappings of the model's keywords, or tensors of input_ids
            [B, T]; or one of them.
        method (SALE | None): where to start and everything else; None is `SALE()`.
        path (str | Path | None): a .safetensors file to write, for `SALE(tau=path)`.
        progress (bool | None): show a bar; None shows it where standard error is a terminal.

    Returns:
        Tensor: [layers, H] fp32 on the CPU.

    Raises:
        ParameterError: if there is no prompt long enough, or `path` is no .safetensors file.

    Example:
        >>> sal.calibrate_sale(model, prompts, sal.SALE(theta=0.4), path="tau.safetensors")  # doctest: +SKIP
        >>> sal.focus(model, sal.SALE(tau="tau.safetensors"))  # doctest: +SKIP
    """
    return run_calibration(model, data, SALE() if method is None else method, path=path, progress=progress)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        require(False, "tau", "a number or the name of a .safetensors file", text)
        raise
