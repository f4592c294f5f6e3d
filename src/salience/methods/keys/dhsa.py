"""DHSA: blocks of queries attend to the tokens of the chunks that suit them, and chunks follow the content.

Scored: chunks of keys for blocks of queries, `S_c = qbar . kbar_c`, where qbar and kbar are means over heads and
tokens times the square root of the number of tokens; every token has the score of its chunk. Where chunks begin is
said by a small predictor, trained once on keys of the frozen model (`train_dhsa`), from the keys around each gap.
Spent: a budget of keys for each block of queries: the newest, the first, and the best; the same for all heads. The
last tokens of the prompt, where the instruction stands, see everything, and so does every token that is generated.

Paper: arXiv 2510.24606. Official code: xiongsiheng/DHSA (cc8e9c7), folder `legacy` for the paper's method. What the
repository runs today has fixed blocks, each head by itself, and no predictor: `pattern="a-shape"` and its like.

Differs from the official code in:
- the first keys share the budget with the others; the official code puts them over the lowest chosen ones, and where
  a block ends before them it attends to its last key several times. `overwrite_global=True` loses keys alike;
- of tokens with equal scores, such as those of a chunk, the left ones are taken;
- lists end with the newest key that the block sees, also in a last block that is not full;
- the predictor's threshold is on its logits and named so; a prompt without any border is one chunk;
- top-k of fixed blocks chooses among blocks that can be seen, and every row sees itself;
- any model, batches with padding and chunks behind a cache; layers with a sliding window keep it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from salience.core.attach import Attachment
from salience.core.errors import ParameterError, require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.prefill import Prompt, prefill
from salience.kernels.blocks import KeyBlocks, joined
from salience.methods.keys import _dhsa_fixed as fixed
from salience.methods.keys._dhsa_boundaries import (
    BoundaryPredictor,
    features_of,
    select_boundaries,
    stacked,
    uniform_boundaries,
)
from salience.methods.keys._dhsa_lists import Limits, newest, overwritten, spend, unique
from salience.methods.keys._dhsa_training import key_channels, train_dhsa

__all__ = ["train_dhsa"]
_PATTERNS = ("chunks", "top-k", "a-shape", "vertical-slash", "vertical-slash-blockwise")
_CHUNKS = ("learned", "uniform")
_POOLING = ("mean_sqrt", "mean")
# which parameters speak of chunks, and which of fixed blocks
_OF_CHUNKS = (
    "budget",
    "local",
    "global_tokens",
    "instruction_tokens",
    "pooling",
    "chunks",
    "predictor",
    "boundary_window",
    "logit_threshold",
    "nms",
    "chunk_beta",
    "share_boundaries",
    "share_sparsity_masks",
    "per_head",
    "overwrite_global",
)
_OF_BLOCKS = ("k_block", "density", "vertical_ratio")
# scores sorted at a time, in elements
_ELEMENTS = 1 << 21
_INTEGERS = {
    **dict.fromkeys(("q_block", "budget", "boundary_window", "chunk_beta", "k_block"), 1),
    **dict.fromkeys(("local", "global_tokens", "instruction_tokens", "nms"), 0),
}


@dataclass(frozen=True, kw_only=True)
class DHSA(Method):
    """Attend to the best tokens of a prompt by chunks whose borders follow the content.

    Attributes:
        pattern (str): "chunks" is the paper's method; "top-k", "a-shape", "vertical-slash" and
            "vertical-slash-blockwise" are the fixed blocks of the official repository.
        q_block (int): queries that share a list, >= 1.
        budget (int): keys of a list, >= local + global_tokens.
        local (int): newest keys that are always in it.
        global_tokens (int): first keys that are always in it.
        instruction_tokens (int): last tokens of the prompt, which see everything.
        pooling (str): of a chunk and a block, "mean_sqrt" (mean times the root of the number of tokens) or "mean".
        chunks (str): "learned" borders, or "uniform" chunks of q_block // chunk_beta tokens.
        predictor (str | None): file written by `train_dhsa`; None trains one from the prompts given as `data`.
        boundary_window (int): keys on each side of a gap that the predictor sees.
        logit_threshold (float): gaps whose logit is higher are borders; 1.1 is a probability of .75.
        nms (int): borders are more than so many tokens apart.
        chunk_beta (int): at most so many borders for each q_block tokens.
        share_boundaries (bool): the first layer's borders serve all layers.
        share_sparsity_masks (bool): the first layer's lists serve all layers.
        per_head (bool): score and choose for each head instead of for their mean.
        overwrite_global (bool): the first keys take the places of the first chosen ones, as in the official code.
        k_block (int): keys in a fixed block.
        density (float): share of the fixed blocks that a block of queries keeps, in (0, 1].
        vertical_ratio (float): share of the budget for columns, the rest is for diagonals, in [0, 1].
    """

    unit: ClassVar[str] = "key"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2510.24606"
    title: ClassVar[str] = (
        "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs"
    )

    pattern: str = "chunks"
    q_block: int = 128
    budget: int = 1024
    local: int = 128
    global_tokens: int = 128
    instruction_tokens: int = 64
    pooling: str = "mean_sqrt"
    chunks: str = "learned"
    predictor: str | None = None
    boundary_window: int = 4
    logit_threshold: float = 1.1
    nms: int = 8
    chunk_beta: int = 8
    share_boundaries: bool = True
    share_sparsity_masks: bool = False
    per_head: bool = False
    overwrite_global: bool = False
    k_block: int = 32
    density: float = 0.125
    vertical_ratio: float = 0.5

    def __post_init__(self) -> None:
        require(self.pattern in _PATTERNS, "pattern", f"one of {', '.join(_PATTERNS)}", self.pattern)
        others = _OF_BLOCKS if self.pattern == "chunks" else _OF_CHUNKS
        for item in fields(self):
            if item.name in others:
                value = getattr(self, item.name)
                unset = f"left out with pattern={self.pattern!r}"
                require(value == item.default, item.name, unset, value)
        for name, smallest in _INTEGERS.items():
            value = getattr(self, name)
            require(type(value) is int and value >= smallest, name, f"an integer >= {smallest}", value)
        least = self.local + self.global_tokens
        require(self.budget >= least, "budget", f">= local + global_tokens, which is {least}", self.budget)
        require(self.pooling in _POOLING, "pooling", f"one of {', '.join(_POOLING)}", self.pooling)
        require(self.chunks in _CHUNKS, "chunks", f"one of {', '.join(_CHUNKS)}", self.chunks)
        uniform = self.chunks == "uniform"
        require(
            self.predictor is None or not uniform, "predictor", "left out with uniform chunks", self.predictor
        )
        require(math.isfinite(self.logit_threshold), "logit_threshold", "finite", self.logit_threshold)
        require(0.0 < self.density <= 1.0, "density", "in (0, 1]", self.density)
        require(0.0 <= self.vertical_ratio <= 1.0, "vertical_ratio", "in [0, 1]", self.vertical_ratio)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Prompts are read with the chosen keys.

        With learned chunks and no file, a predictor is trained first with the prompts given as `data`.
        """
        learned = self.pattern == "chunks" and self.chunks == "learned"
        predictor = self._predictor(model, data) if learned else None
        return prefill(model, record, functools.partial(self.choose, predictor=predictor))

    def choose(self, prompt: Prompt, predictor: BoundaryPredictor | None = None) -> KeyBlocks | None:
        """The lists of one layer, or None for all keys; `predictor` finds the borders of learned chunks.

        Raises:
            ParameterError: for learned chunks without a predictor.
        """
        if self.pattern != "chunks":
            return self._blocks(prompt)
        needed = predictor is not None or self.chunks == "uniform"
        require(needed, "predictor", "given for learned chunks", predictor)
        queries, keys = prompt.query.shape[2], prompt.key.shape[2]
        if keys <= self.budget or queries <= self.instruction_tokens:
            return None
        shared: KeyBlocks | None = prompt.shared.get("lists")
        if shared is not None and _fits(shared, prompt):
            device = prompt.query.device
            return replace(shared, count=shared.count.to(device), index=shared.index.to(device))
        made = select(self, prompt.query, prompt.key, self._bounds(predictor, prompt))
        if self.share_sparsity_masks:
            prompt.shared["lists"] = made
        return made

    def _predictor(self, model: nn.Module, data: Any) -> BoundaryPredictor:
        if self.predictor is None:
            if data is None:
                raise ParameterError(
                    "predictor must be a file that train_dhsa wrote, or prompts must be given as data to train one, "
                    "for learned chunks, got neither: chunks='uniform' needs none"
                )
            return train_dhsa(model, data, window=self.boundary_window)
        found = BoundaryPredictor.load(self.predictor)
        channels = key_channels(model)
        wanted = f"trained for this model's {channels} key channels"
        require(found.channels == channels, "predictor", wanted, found.channels)
        wanted = f"the predictor's window of {found.window}"
        require(self.boundary_window == found.window, "boundary_window", wanted, self.boundary_window)
        return found.to(next(model.parameters()).device)

    def _blocks(self, prompt: Prompt) -> KeyBlocks:
        queries, keys = prompt.query.shape[2], prompt.key.shape[2]
        most = fixed.kept_blocks(keys, self.k_block, self.density)
        grid = fixed.Grid(queries, keys, self.q_block, self.k_block, most)
        if self.pattern.startswith("vertical-slash"):
            blockwise = self.pattern.endswith("blockwise")
            lines = fixed.vertical_slash_blockwise if blockwise else fixed.vertical_slash
            return lines(prompt.query, prompt.key, grid, ratio=self.vertical_ratio, scaling=prompt.scaling)
        choose = fixed.top_k if self.pattern == "top-k" else fixed.a_shape
        return choose(prompt.query, prompt.key, grid)

    def _bounds(self, predictor: BoundaryPredictor | None, prompt: Prompt) -> Tensor:
        """[B, C + 1]: where the chunks of each row begin."""
        keys, batch = prompt.key.shape[2], len(prompt.key)
        if predictor is None:
            chunk = max(1, self.q_block // self.chunk_beta)
            return uniform_boundaries(keys, chunk, device=prompt.key.device).expand(batch, -1)
        shared: Tensor | None = prompt.shared.get(f"bounds of {keys}")
        if self.share_boundaries and shared is not None:
            return shared.to(prompt.key.device)
        rows = [
            select_boundaries(
                logits,
                threshold=self.logit_threshold,
                chunks=max(1, keys // self.q_block) * self.chunk_beta,
                nms=self.nms,
                instruction_tokens=self.instruction_tokens,
            )
            for logits in predictor.to(prompt.key.device)(features_of(prompt.key))
        ]
        bounds = stacked(rows, keys)
        prompt.shared[f"bounds of {keys}"] = bounds
        return bounds


def _fits(blocks: KeyBlocks, prompt: Prompt) -> bool:
    """Whether lists of another layer are for as many rows, keys and heads."""
    lengths = (prompt.query.shape[2], prompt.key.shape[2])
    return (blocks.queries, blocks.keys) == lengths and blocks.count.shape[1] in (1, prompt.query.shape[1])


def select(method: DHSA, query: Tensor, key: Tensor, bounds: Tensor) -> KeyBlocks:
    """The lists of one layer.

    Args:
        method (DHSA): its parameters.
        query (Tensor): [B, H, Q, D] after rotary.
        key (Tensor): [B, Hkv, K, D].
        bounds (Tensor): [B, C + 1] int64, where chunks begin, rising from 0 to K.

    Returns:
        KeyBlocks: of single keys, one list for all heads unless `per_head`.
    """
    queries, keys = query.shape[2], key.shape[2]
    tail = min(method.instruction_tokens, queries)
    rows = queries - tail
    if not rows:
        return KeyBlocks.everything(queries, keys, batch=len(query), device=query.device)
    asking, chunks = representatives(
        query[:, :, :rows],
        key,
        bounds,
        q_block=method.q_block,
        pooling=method.pooling,
        per_head=method.per_head,
    )
    last = newest(rows, method.q_block, offset=keys - queries, device=query.device)
    limits = Limits(method.budget, method.local, 0 if method.overwrite_global else method.global_tokens)
    step = max(1, _ELEMENTS // (asking.shape[0] * asking.shape[1] * max(chunks.shape[2], method.budget)))
    count, index = joined(
        [
            spend(part @ chunks.transpose(-1, -2), bounds, own, limits)
            for part, own in zip(asking.split(step, 2), last.split(step), strict=True)
        ]
    )
    if method.overwrite_global:
        count, index = unique(overwritten(index, last, method.global_tokens), last)
    return KeyBlocks(count, index, method.q_block, 1, queries, keys, tail=tail)


def score(query: Tensor, key: Tensor, bounds: Tensor, **settings: Any) -> Tensor:
    """Scores of chunks for blocks of queries, `qbar . kbar_c` without scaling or softmax.

    Args:
        query, key, bounds (Tensor), settings (Any): as for `representatives`.

    Returns:
        Tensor: [B, H or 1, N, C].
    """
    asking, chunks = representatives(query, key, bounds, **settings)
    return asking @ chunks.transpose(-1, -2)


def representatives(
    query: Tensor,
    key: Tensor,
    bounds: Tensor,
    *,
    q_block: int,
    pooling: str = "mean_sqrt",
    per_head: bool = False,
) -> tuple[Tensor, Tensor]:
    """What stands for blocks of queries and for chunks of keys: means, times the root of their number of tokens.

    Args:
        query (Tensor): [B, H, R, D]; rows missing from the last block count as zeros.
        key (Tensor): [B, Hkv, K, D].
        bounds (Tensor): [B, C + 1] int64, rising from 0 to K; an empty chunk is 0.
        q_block (int): rows of a block.
        pooling (str): "mean_sqrt" or "mean".
        per_head (bool): of each head; otherwise of the means over heads.

    Returns:
        tuple: [B, H or 1, N = ceil(R / q_block), D] and [B, H or 1, C, D], in at least fp32.
    """
    rows = query.shape[2]
    precise = torch.promote_types(query.dtype, torch.float32)
    if not per_head:
        query, key = (one.mean(1, keepdim=True, dtype=precise) for one in (query, key))
    padded = F.pad(query, (0, 0, 0, -rows % q_block)).unflatten(2, (-1, q_block))
    left = padded.mean(3, dtype=precise)  # [B, h, N, D]
    right = torch.stack([_chunk_means(one, bounds) for one in key.unbind(1)], 1).to(precise)  # [B, h, C, D]
    if pooling == "mean_sqrt":
        starts = torch.arange(0, rows, q_block, device=query.device)
        left = left * (rows - starts).clamp_max(q_block).to(precise).sqrt().unsqueeze(-1)
        right = right * bounds.diff(dim=-1)[:, None, :, None].to(precise).sqrt()
    return left, right.repeat_interleave(left.shape[1] // right.shape[1], 1)


def _chunk_means(key: Tensor, bounds: Tensor) -> Tensor:
    """[B, C, D] float64 of keys [B, K, D]; 0 for empty chunks."""
    # in float64: differences of long sums are taken
    total = F.pad(key.cumsum(1, dtype=torch.float64), (0, 0, 1, 0))
    sums = total.gather(1, bounds.unsqueeze(-1).expand(-1, -1, key.shape[-1])).diff(dim=1)
    return sums / bounds.diff(dim=-1).clamp_min(1).unsqueeze(-1)
