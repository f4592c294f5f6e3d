"""HiP: find the top keys of every block of queries by halving intervals of the past.

Scored: key blocks of `k_block` tokens for every block of `q_block` queries and every head, by `max q k` over the
block's keys and every second query; only one block of each interval, its middle, is ever scored.
Spent: `mask_k` keys and the newest `window` keys for every query. The past starts as mask_k / k_block equal
intervals; each is halved, the better half of all halves is kept, until every interval is a single block: about
2 mask_k scores in each of log2(T / mask_k) rounds, so O(T log T) time and O(T) memory.

Paper: arXiv 2406.09827, the algorithm of its ICLR 2025 text. Official code: DeepAuto-AI/hip-attention at bc6a8c6.

Differs from the official code in:
- scores are ranked as fp32 products: the official code ranks their sigmoid in half precision, in which all strong
  keys are equal. A product of exactly 0 is a score like any other;
- of equal scores the leftmost wins, since intervals stay in the order of the keys; the first intervals are exact
  quotients, so that the last block is never lost to rounding, and are not snapped to powers of two;
- any length, also of the last block of queries: prompts need not be a multiple of anything;
- a half that is represented by its parent's block keeps the parent's score, which is not computed again;
- while decoding, a context of at most `mask_k` keys and the window stays dense between two searches;
- v1.0 (float positions, random representatives) and v1.2 (InfiniteHiP) are other algorithms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from salience.core.attach import Attachment
from salience.core.errors import require
from salience.core.method import Method
from salience.core.part import Part
from salience.hosts.prefill import Prompt, prefill
from salience.hosts.transformers import structure
from salience.kernels import KeyBlocks
from salience.methods.keys._hip_search import REPRESENTATIVES, candidates, search

_STATE = "hip"


@dataclass(frozen=True, kw_only=True)
class HiP(Method):
    """Attend to the keys that a search through halved intervals finds, and to the newest ones.

    Attributes:
        mask_k (int): keys found for each block of queries, the paper's k; a multiple of `k_block`.
        q_block (int): queries that share a search. A new token searches on its own.
        q_stride (int): every so many rows of a query block ask; divides `q_block`.
        q_offset (int | None): first of the rows that ask, in [0, q_stride); None is q_stride - 1, so that the newest
            row of a block is among them.
        k_block (int): keys that are found together.
        k_stride (int): every so many keys of a block are scored; divides `k_block`.
        window (int): newest keys that each query sees, itself included, >= 0.
        sink_tokens (int): first tokens that are always among the `mask_k`, in [0, mask_k].
        representative (str): the block scored for an interval: "first", "center" or "last".
        dense_layers (int): first layers that attend to everything; 3 for models of 32 layers, 4 for 40.
        dense_queries (int): query blocks that end before this position attend to everything.
        refresh_interval (int): a search every so many new tokens, >= 1; in between what was found is used again, and
            the window goes on.
        head_group (int): heads that share a search; divides the model's heads.
        attend_block (int | None): attend to blocks of so many keys that hold what was found, a multiple of `k_block`:
            16 or 32 for kernels that want large blocks. None attends to exactly what was found.
        decode (bool): whether new tokens are served so, too; else they see every key.
    """

    unit: ClassVar[str] = "key"
    spends: ClassVar[str] = "keep"
    job: ClassVar[str] = "run"
    hosts: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    arxiv: ClassVar[str] = "2406.09827"
    title: ClassVar[str] = "HiP Attention: Sparse Sub-Quadratic Attention with Hierarchical Attention Pruning"

    mask_k: int = 512
    q_block: int = 64
    q_stride: int = 2
    q_offset: int | None = None
    k_block: int = 2
    k_stride: int = 1
    window: int = 256
    sink_tokens: int = 16
    representative: str = "center"
    dense_layers: int = 3
    dense_queries: int = 0
    refresh_interval: int = 8
    head_group: int = 1
    attend_block: int | None = None
    decode: bool = True

    def __post_init__(self) -> None:
        for name in ("q_block", "q_stride", "k_block", "k_stride", "refresh_interval", "head_group"):
            _check(name, getattr(self, name), 1)
        for name in ("window", "dense_layers", "dense_queries"):
            _check(name, getattr(self, name), 0)
        _check_multiple("mask_k", self.mask_k, "k_block", self.k_block)
        _check_multiple("q_block", self.q_block, "q_stride", self.q_stride)
        _check_multiple("k_block", self.k_block, "k_stride", self.k_stride)
        if self.q_offset is not None:
            valid = type(self.q_offset) is int and 0 <= self.q_offset < self.q_stride
            require(valid, "q_offset", f"an integer in [0, {self.q_stride})", self.q_offset)
        valid = type(self.sink_tokens) is int and 0 <= self.sink_tokens <= self.mask_k
        require(valid, "sink_tokens", f"an integer in [0, {self.mask_k}]", self.sink_tokens)
        known = ", ".join(REPRESENTATIVES)
        require(
            self.representative in REPRESENTATIVES, "representative", f"one of {known}", self.representative
        )
        if self.attend_block is not None:
            _check_multiple("attend_block", self.attend_block, "k_block", self.k_block)
        require(type(self.decode) is bool, "decode", "True or False", self.decode)

    def attach_model(self, model: nn.Module, record: Attachment, data: Any = None) -> Part:
        """Every layer behind the dense ones searches while a prompt is read, and every few new tokens."""
        layers = structure(model).layers
        wanted = f"in [0, {len(layers)}] for {len(layers)} layers"
        require(self.dense_layers <= len(layers), "dense_layers", wanted, self.dense_layers)
        for attention in (one for layer in layers for one in layer.attentions if one.heads is not None):
            wanted = f"a divisor of {attention.num_heads} heads"
            require(attention.num_heads % self.head_group == 0, "head_group", wanted, self.head_group)
        return prefill(model, record, self.choose, decodes=self.decode)

    def choose(self, prompt: Prompt) -> KeyBlocks | None:
        """The lists of one layer, or None in the dense ones."""
        if prompt.layer < self.dense_layers:
            return None
        if prompt.query.shape[2] > 1:
            prompt.state.pop(_STATE, None)
            blocks = self.search(prompt.query, prompt.key, prompt.scaling)
        else:
            blocks = self._next(prompt)
        return blocks if self.attend_block is None else blocks.coarser(self.attend_block)

    def search(self, query: Tensor, key: Tensor, scaling: float) -> KeyBlocks:
        """The lists for these queries, before `attend_block`.

        Args:
            query (Tensor): [B, H, Q, D]; a single query is a new token and is searched for alone.
            key (Tensor): [B, Hkv, K, D].
            scaling (float): factor of the scores.
        """
        alone = query.shape[2] == 1
        offset = self.q_stride - 1 if self.q_offset is None else self.q_offset
        sizes = {
            "mask_k": self.mask_k,
            "q_block": 1 if alone else self.q_block,
            "q_stride": 1 if alone else self.q_stride,
            "k_block": self.k_block,
        }
        return _search_for(query, key, sizes)(
            query,
            key,
            **sizes,
            scaling=scaling,
            q_offset=0 if alone else offset,
            k_stride=self.k_stride,
            window=self.window,
            sink_tokens=self.sink_tokens,
            representative=self.representative,
            head_group=self.head_group,
            dense_queries=self.dense_queries,
        )

    def _next(self, prompt: Prompt) -> KeyBlocks:
        """The lists of a new token: searched for every `refresh_interval` tokens, else the last ones."""
        keys = prompt.key.shape[2]
        held: KeyBlocks | None = prompt.state.get(_STATE)
        if held is not None and 0 <= keys - held.keys < self.refresh_interval:
            return replace(held, keys=keys)
        blocks = self.search(prompt.query, prompt.key, prompt.scaling)
        # what costs no search is not kept: keys that leave the window in between would be lost without need
        wide = candidates(1, keys, q_block=1, window=self.window)[0]
        if wide > self.mask_k and keys > self.dense_queries:
            prompt.state[_STATE] = blocks
        return blocks


def _search_for(query: Tensor, key: Tensor, sizes: dict[str, int]) -> Callable[..., KeyBlocks]:
    """The search in Triton where it runs, else in torch; both find the same."""
    if query.is_cuda:
        from salience.kernels import triton_hip

        if triton_hip.unfit(query, key, **sizes) is None:
            found: Callable[..., KeyBlocks] = triton_hip.search
            return found
    return search


def _check(name: str, value: Any, least: int) -> None:
    require(type(value) is int and value >= least, name, f"an integer >= {least}", value)


def _check_multiple(name: str, value: Any, of: str, unit: int) -> None:
    valid = type(value) is int and value >= unit and value % unit == 0
    require(valid, name, f"a multiple of {of} = {unit}", value)
