"""What SALE computes: regions of keys, 4-bit codes, exact statistics over near keys, and estimates of the others.

Query block i holds the rows `i q_block` to `(i + 1) q_block`; row r stands at position K - Q + r. Everything is
computed in at least fp32, a slice of query blocks and of keys at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# scores held at a time, in elements: 2 MiB in fp32, what a CPU core's cache holds
_HELD_CPU = 1 << 19
_HELD = 1 << 25
_ROWS = 256
# a head with a smaller threshold sees everything
DENSE = 1e-5
# of rows that only fill up the last block: below every score
_NEVER = -1e30


@dataclass(frozen=True)
class Grid:
    """How rows and keys are cut into blocks, and which keys of a query block are near.

    Attributes:
        q_block, k_block (int): rows and keys in a block.
        sink_blocks (int): first key blocks, which every row sees.
        local_window (int): keys before the end of a query block that are near, at least.
        segment (int): keys by which the region between both grows.
    """

    q_block: int = 64
    k_block: int = 32
    sink_blocks: int = 1
    local_window: int = 128
    segment: int = 128

    @property
    def widest(self) -> int:
        """Most blocks of the local region."""
        return (self.local_window + self.segment) // self.k_block - 1

    def regions(
        self, queries: int, keys: int, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """`ends` and `middles`, [N] int64: query block i sees the key blocks before `ends[i]`.

        Blocks from `sink_blocks` to before `middles[i]`, whole segments, are estimated; the ones before and behind
        are always seen. The middle lies wholly before the query block's first row.
        """
        index = torch.arange(-(-queries // self.q_block), device=device)
        last = ((index + 1) * self.q_block + keys - queries).clamp_max(keys)
        ends = (last + self.k_block - 1) // self.k_block
        segment, local = self.segment // self.k_block, self.local_window // self.k_block
        inner = ends - self.sink_blocks
        count = -(-inner // segment)
        short = inner - count * segment
        count = count + (short - local) // segment
        return ends, self.sink_blocks + segment * count.clamp_min(0)


_GRID = Grid()


def quantise_query(centred: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Symmetric codes; the rows r and r + 8 of each tile of 16 rows share a scale over all channels.

    Args:
        centred (Tensor): [..., Q, D], queries without their mean.
        bits (int): 4 gives codes in [-7, 7], 8 in [-127, 127].

    Returns:
        tuple: codes [..., Q, D] int8, rounded half to even; scales [..., Q], `max |x| / 7`, 1 of a group of zeros.
    """
    return _quantise(centred, (2, 8), (-3, -1), bits)


def quantise_key(centred: Tensor, k_block: int = 32, bits: int = 4) -> tuple[Tensor, Tensor]:
    """As `quantise_query`; in each key block the keys with equal `(index mod 8) // 2` share a scale."""
    return _quantise(centred, (k_block // 8, 4, 2), (-4, -2, -1), bits)


def statistics(
    query: Tensor, key: Tensor, grid: Grid, *, scaling: float, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`m_i = max_j z_ij` and `l_i = sum_j exp(z_ij - m_i)` over the sink and local keys that row i sees, exactly.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D], centred or not: it moves m and not l.
        grid (Grid): the regions.
        scaling (float): `z = scaling q.k`.
        softcap (float | None): soft cap of z; keys are not centred then.

    Returns:
        tuple: row maxima and row sums, [B, H, Q] each.
    """
    (batch, heads, length, width), (groups, keys) = query.shape, key.shape[1:3]
    fold, size = heads // groups, grid.q_block
    _, middles = grid.regions(length, keys, query.device)
    count = len(middles)
    rows = (_padded(query, count * size) * scaling).view(batch, groups, fold, count, size, width)
    sinks = torch.arange(grid.sink_blocks * grid.k_block, device=query.device).expand(count, -1)
    local = (
        torch.arange(grid.widest * grid.k_block, device=query.device) + middles.unsqueeze(-1) * grid.k_block
    )
    near = torch.cat((sinks, local), 1)
    place = torch.arange(count * size, device=query.device).view(count, size, 1) + keys - length
    largest, total = [], []
    step = max(1, _held(query) // (batch * heads * size * near.shape[1]))
    for start in range(0, count, step):
        index = near[start : start + step]
        held = key.index_select(2, index.clamp_max(keys - 1).flatten()).view(
            batch, groups, *index.shape, width
        )
        part = rows[:, :, :, start : start + step].transpose(2, 3).flatten(3, 4)
        scores = part @ held.transpose(-1, -2)
        scores = scores.view(batch, groups, len(index), fold, size, -1)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = (index.unsqueeze(1) <= place[start : start + step]).unsqueeze(1)
        scores = scores.masked_fill_(~seen, -torch.inf)
        most = scores.amax(-1, keepdim=True)
        largest.append(most.squeeze(-1))
        total.append(scores.sub_(most).exp_().sum(-1))
    found = [torch.cat(one, 2).transpose(2, 3).reshape(batch, heads, -1) for one in (largest, total)]
    return found[0][..., :length], found[1][..., :length]


def estimate(
    query_codes: Tensor, query_scale: Tensor, key_codes: Tensor, key_scale: Tensor, mean_dot: Tensor
) -> Tensor:
    """`s_q s_k (a.b + rint(mean_dot / s_k / s_q))`, which estimates `q.(k - mean k)` before the scaling.

    Args:
        query_codes (Tensor): [..., R, D].
        query_scale (Tensor): [..., R].
        key_codes (Tensor): [..., S, D].
        key_scale (Tensor): [..., S].
        mean_dot (Tensor): [..., S], the mean query times each centred key.
    """
    dot = query_codes.to(query_scale.dtype) @ key_codes.to(query_scale.dtype).transpose(-1, -2)
    mean = (mean_dot / key_scale).unsqueeze(-2) / query_scale.unsqueeze(-1)
    return query_scale.unsqueeze(-1) * key_scale.unsqueeze(-2) * (dot + mean.round())


def spend(log_ras: Tensor, tau: Tensor, ends: Tensor) -> Tensor:
    """Which blocks are seen: those always seen, those with a score above the threshold, and all of dense heads.

    Args:
        log_ras (Tensor): [B, H, N, M] largest log scores, NaN outside of the middle.
        tau (Tensor): [H] thresholds.
        ends (Tensor): [N] blocks that end in a query block's past or in itself.

    Returns:
        Tensor: [B, H, N, M] bool.
    """
    # a comparison with NaN is false: sink and local blocks pass
    seen = ~(log_ras <= tau.log().view(-1, 1, 1)) | (tau < DENSE).view(-1, 1, 1)
    return seen & (torch.arange(log_ras.shape[-1], device=ends.device) < ends.unsqueeze(-1))


class Estimator:
    """The largest log relative attention score in each tile of a query block and a key block.

    `log RAS_ij = scaling S_ij - m_i - ln l_i`, S the estimate. Its threshold is one number for each head, so that
    the largest one of a tile decides. The row's own terms ride along as one more channel of the product.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D].
        grid (Grid): blocks and regions.
        scaling (float): of the logits.
        softcap (float | None): soft cap of the logits.
        bits (int | None): of the codes; None takes exact scores.
        centre (str): "prompt" takes means over all rows and keys, "prefix" over those up to the query block's end.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        grid: Grid,
        *,
        scaling: float,
        softcap: float | None = None,
        bits: int | None = 4,
        centre: str = "prompt",
    ) -> None:
        precise = torch.promote_types(query.dtype, torch.float32)
        query, key = query.detach().to(precise), key.detach().to(precise)
        self.grid, self.scaling, self.softcap, self.bits = grid, scaling, softcap, bits
        self.batch, self.heads, self.length, _ = query.shape
        self.groups, self.keys = key.shape[1:3]
        self.fold = self.heads // self.groups
        self.ends, self.middles = grid.regions(self.length, self.keys, query.device)
        self._query, self._key = query, key
        self._whole = centre == "prompt"
        if self._whole:
            # [N = 1, B, H, 1, D]
            self._means = query.mean(2, keepdim=True).unsqueeze(0), key.mean(2, keepdim=True).unsqueeze(0)
            self._key = key - self._means[1][0]
        else:
            self._means = (
                _running(query, 0, grid.q_block),
                _running(key, self.keys - self.length, grid.q_block),
            )
        # a soft cap looks at the logits themselves, which a constant would move
        self._raw = softcap is not None or not self._whole
        near = key if self._raw else self._key
        self.row_max, self.row_sum = statistics(query, near, grid, scaling=scaling, softcap=softcap)
        most = int(self.middles.max()) * grid.k_block if len(self.middles) else 0
        self._sides = self._side(0, most, 0) if self._whole else None
        self._memory: dict[str, Tensor] = {}

    def slices(self) -> Iterator[tuple[int, int]]:
        """Ranges of query blocks that fit into memory together."""
        step = max(1, _ROWS // (self.fold * self.grid.q_block)) if self._whole else 1
        if self._query.device.type != "cpu" and self._whole:
            step *= 8
        for start in range(0, len(self.ends), step):
            yield start, min(start + step, len(self.ends))

    def block_log_ras(self, start: int, stop: int) -> Tensor:
        """[B, H, stop - start, ceil(K / k_block)], NaN where a block is not in its query block's middle."""
        grid, count = self.grid, stop - start
        found = self._query.new_full(
            (self.batch, self.heads, count, -(-self.keys // grid.k_block)), torch.nan
        )
        first, last = grid.sink_blocks, int(self.middles[start:stop].max())
        if last <= first:
            return found
        side, scale, base = self._rows(start, stop)
        step = max(1, _held(side) // (self.batch * self.groups * side.shape[-1] * grid.k_block))
        for begin in range(first, last, step):
            end = min(begin + step, last)
            tiles = self._tiles(side, scale, base, begin, end, start, count)
            found[..., begin:end] = tiles
        blocks = torch.arange(found.shape[-1], device=found.device)
        return found.masked_fill_(blocks >= self.middles[start:stop].unsqueeze(-1), torch.nan)

    def _rows(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of query blocks as columns: [B, Hkv, D + 1, 2 g n P] with P = q_block / 2 pairs that share a scale.

        Also the scales [B, Hkv, 1, g, n P], and, for a soft cap, `m + ln l` as [B, Hkv, 1, 2, g, n P].
        """
        size, count = self.grid.q_block, stop - start
        low, high = start * size, min(stop * size, self.length)
        query = self._query[:, :, low:high]
        place = 0 if self._whole else start
        mean_query, mean_key = self._means[0][place], self._means[1][place]
        base = self.row_max[:, :, low:high] + self.row_sum[:, :, low:high].log()
        own = torch.zeros_like(base)
        if self._raw:
            mean = mean_key.repeat_interleave(self.fold, 1)
            own = (query @ mean.transpose(-1, -2)).squeeze(-1)
        if self.softcap is None:
            own = own - base / self.scaling
        if self.bits is None:
            codes, scale = query, torch.ones_like(base)
        else:
            codes, scale = quantise_query(query - mean_query, self.bits)
        side = torch.cat((codes.to(base.dtype), (own / scale).unsqueeze(-1)), -1)
        missing = count * size - (high - low)
        if missing:
            side = torch.nn.functional.pad(side, (0, 0, 0, missing))
            side[:, :, -missing:, -1] = _NEVER
            # a row that fills up shares the scale of its partner, if it has one
            scale = torch.nn.functional.pad(scale, (0, missing))
            # a soft cap would lift what is far below every score to minus the cap
            base = torch.nn.functional.pad(base, (0, missing), value=torch.inf)
        pairs = (self.batch, self.groups, self.fold, count * size // 16, 2, 8)
        side = side.view(*pairs, -1).permute(0, 1, 4, 2, 3, 5, 6).flatten(2, 5)
        scale = scale.view(pairs)[:, :, :, :, 0].reshape(self.batch, self.groups, 1, self.fold, -1)
        base = (
            base.view(pairs).permute(0, 1, 4, 2, 3, 5).reshape(self.batch, self.groups, 1, 2, self.fold, -1)
        )
        return side.transpose(-1, -2), scale.where(scale > 0, 1.0), base

    def _side(self, first: int, last: int, place: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys from `first` to `last`: [B, Hkv, S, D + 1], scales [B, Hkv, S], mean queries by key [B, Hkv, S, g]."""
        mean_query, mean_key = self._means[0][place], self._means[1][place]
        key = self._key[:, :, first:last]
        if not self._whole:
            key = key - mean_key
        mean = mean_query.view(self.batch, self.groups, self.fold, -1)
        if self.bits is None:
            codes, scale = key, torch.ones_like(key[..., 0])
        else:
            codes, scale = quantise_key(key, self.grid.k_block, self.bits)
        side = torch.nn.functional.pad(codes.to(key.dtype) * scale.unsqueeze(-1), (0, 1), value=1.0)
        return side, scale, (key @ mean.transpose(-1, -2)) / scale.unsqueeze(-1)

    def _tiles(
        self, rows: Tensor, scale: Tensor, base: Tensor, begin: int, end: int, start: int, count: int
    ) -> Tensor:
        """[B, H, count, end - begin], the largest log score of each tile."""
        first, last = begin * self.grid.k_block, end * self.grid.k_block
        if self._sides is None:
            keys, key_scale, dots = self._side(first, last, start)
        else:
            side, key_scale, dots = self._sides
            keys, key_scale, dots = (
                side[:, :, first:last],
                key_scale[:, :, first:last],
                dots[:, :, first:last],
            )
        # in units of the row's scale, which its pair shares: [B, Hkv, S, 2, g, n P]
        shape = (*keys.shape[:3], 2, self.fold, scale.shape[-1])
        scores = self._scratch("scores", shape)
        torch.bmm(keys.flatten(0, 1), rows.flatten(0, 1), out=scores.flatten(3).flatten(0, 1))
        carried = None
        if self.bits is not None:
            carried = self._scratch("carried", (*shape[:3], *shape[4:]))
            torch.mul(dots.unsqueeze(-1), scale.reciprocal(), out=carried).round_()
        factor = key_scale[..., None, None]
        if self.softcap is not None:
            scores = scores if carried is None else scores + (carried * factor).unsqueeze(3)
            scores = scores * (scale * self.scaling).unsqueeze(3)
            best = (self.softcap * torch.tanh(scores / self.softcap) - base).amax(3)
        else:
            best = self._scratch("best", (*shape[:3], *shape[4:]))
            torch.maximum(scores[:, :, :, 0], scores[:, :, :, 1], out=best)
            if carried is not None:
                best.addcmul_(carried, factor)
        best = best.view(self.batch, self.groups, end - begin, self.grid.k_block, self.fold, -1).amax(3)
        if self.softcap is None:
            best = best * (scale * self.scaling)
        best = best.view(*best.shape[:4], count, -1).amax(-1)
        return best.permute(0, 1, 3, 4, 2).reshape(self.batch, self.heads, count, end - begin)

    def _scratch(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Memory that is used again: fresh pages cost a CPU more than the work that is done in them."""
        held = self._memory.get(name)
        if held is None or held.numel() < math.prod(shape):
            held = self._memory[name] = self._query.new_empty(math.prod(shape))
        return held[: math.prod(shape)].view(shape)


def block_log_ras(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    grid: Grid = _GRID,
    bits: int | None = 4,
    centre: str = "prompt",
) -> Tensor:
    """All of `Estimator.block_log_ras`: [B, H, N, ceil(K / k_block)], at least fp32."""
    found = Estimator(query, key, grid, scaling=scaling, softcap=softcap, bits=bits, centre=centre)
    return torch.cat([found.block_log_ras(*part) for part in found.slices()], 2)


def _quantise(
    states: Tensor, within: tuple[int, ...], over: tuple[int, ...], bits: int
) -> tuple[Tensor, Tensor]:
    """Codes and scales; `within` cuts the rows, `over` are the dimensions behind that cut that share a scale."""
    *lead, length, width = states.shape
    whole = -(-length // math.prod(within)) * math.prod(within)
    grouped = _padded(states, whole).view(*lead, -1, *within, width)
    scale = grouped.abs().amax(over, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.where(scale > 0, 1.0)
    codes = (grouped / scale).round_().to(torch.int8).view(*lead, whole, width)
    scale = scale.expand(*grouped.shape[:-1], 1).reshape(*lead, whole)
    return codes[..., :length, :], scale[..., :length]


def _running(states: Tensor, before: int, size: int) -> Tensor:
    """Means up to the end of each block behind the first `before` rows, [N, B, H, 1, D]."""
    behind = states[:, :, before:]
    count = -(-behind.shape[2] // size)
    blocks = _padded(behind, count * size).unflatten(2, (count, size)).sum(3, dtype=torch.float64)
    total = blocks.cumsum(2) + states[:, :, :before].sum(2, keepdim=True, dtype=torch.float64)
    seen = (torch.arange(1, count + 1, device=states.device) * size + before).clamp_max(states.shape[2])
    return (total / seen.view(-1, 1)).to(states.dtype).permute(2, 0, 1, 3).unsqueeze(3)


def _padded(states: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(states, (0, 0, 0, length - states.shape[-2]))


def _held(states: Tensor) -> int:
    return _HELD_CPU if states.device.type == "cpu" else _HELD
