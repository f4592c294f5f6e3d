"""The search of HiP: which key blocks each block of queries attends to, found by halving intervals of the past.

For a query block with Bs candidate key blocks and n slots, n nodes (start, size) tile the candidates. A round splits
every node in two, scores each half by one representative block and keeps the n best halves; after
ceil(log2(Bs / n)) rounds every node is a single block. Nodes stay in the order of the keys, so that of equal scores
the leftmost is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from salience.core.errors import require
from salience.kernels.blocks import KeyBlocks

REPRESENTATIVES = ("first", "center", "last")
# a score of a key that no sampled row may see, before the maximum: low, but above an empty half
HIDDEN = -32000.0
# gathered keys and their products held at a time, in elements: 3 MiB in fp32; more falls out of a CPU's cache
_ROOM_CPU = 3 << 18
_ROOM = 1 << 26
# query blocks that are halved together on a CPU, in rooms: their small operations cost more calls than work
_ROOMS = 8


def candidates(queries: int, keys: int, *, q_block: int, window: int) -> list[int]:
    """How many keys each query block chooses among: `Tc = max(0, min(K, (i + 1) q_block + K - Q) - window)`."""
    ends = (min(keys, (i + 1) * q_block + keys - queries) for i in range(-(-queries // q_block)))
    return [max(0, end - window) for end in ends]


def rounds(blocks: int, slots: int) -> int:
    """`ceil(log2(Bs / n))`, exactly; 0 where all blocks fit."""
    return ((blocks - 1) // slots).bit_length() if blocks > slots else 0


def nodes(blocks: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The first nodes: `start_j = floor(Bs j / n)`, up to the next start.

    Args:
        blocks (Tensor): [S] int, candidates Bs >= n.
        slots (int): n.

    Returns:
        tuple: start and size, [S, n] int32 each; the sizes sum to Bs and differ by at most one.
    """
    bounds = blocks.long().unsqueeze(-1) * torch.arange(slots + 1, device=blocks.device) // slots
    bounds = bounds.int()
    return bounds[:, :-1], bounds[:, 1:] - bounds[:, :-1]


def split(start: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of every node, side by side: [S, n] -> [S, 2n] starts and sizes.

    The left half has `size // 2` blocks, so that a node of one block goes on as its right half and its left half is
    empty.
    """
    left = size >> 1
    starts, sizes = (start, start + left), (left, size - left)
    return torch.stack(starts, -1).flatten(-2), torch.stack(sizes, -1).flatten(-2)


def representatives(start: Tensor, size: Tensor, representative: str) -> Tensor:
    """The block that stands for each node: its first, its middle (`start + size // 2`) or its last."""
    if representative == "first":
        return start
    return start + (size >> 1) if representative == "center" else (start + size - 1).clamp_min(0)


def keep_best(scores: Tensor, count: int) -> Tensor:
    """Mark the `count` best of each row; of equal scores the leftmost.

    Selecting the threshold and then filling up from the left costs a fraction of a stable sort.

    Args:
        scores (Tensor): [S, C], no NaN.
        count (int): in [1, C].

    Returns:
        Tensor: [S, C] bool with exactly `count` set in each row.
    """
    least = scores.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    kept = scores >= least
    # at least `count` in each row: more only where the threshold itself ties
    if int(kept.sum()) == count * len(scores):
        return kept
    above, level = scores > least, scores == least
    missing = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= missing))


def descend(
    blocks: Tensor,
    slots: int,
    turns: int,
    measure: Callable[[Tensor], Tensor],
    *,
    representative: str = "center",
    sinks: int = 0,
) -> Tensor:
    """Halve, score and keep, `turns` times.

    A half whose representative is its parent's is not scored again: left halves under "first", right halves under
    "last", and right halves in the last round under "center".

    Args:
        blocks (Tensor): [S] int, candidates of each query block, all with `rounds(Bs, slots) == turns`.
        slots (int): n.
        turns (int): rounds.
        measure (Callable): [S, C] numbers of blocks, in rising order in each row -> their scores, [S, C].
        representative (str): "first", "center" or "last".
        sinks (int): first blocks that are kept whatever they score, <= n.

    Returns:
        Tensor: [S, n] int32, the blocks kept, rising.
    """
    start, size = nodes(blocks, slots)
    known = None
    for turn in range(turns):
        start, size = split(start, size)
        asked = representatives(start, size, representative)
        last = turn == turns - 1
        if known is None or (representative == "center" and not last):
            scores = measure(asked)
        elif representative == "first":
            scores = torch.stack((known, measure(asked[:, 1::2])), -1).flatten(-2)
        else:
            scores = torch.stack((measure(asked[:, ::2]), known), -1).flatten(-2)
        # a score that is not a number must lose, or it would displace others at random
        ranked = scores.nan_to_num(nan=HIDDEN).masked_fill_(size == 0, -torch.inf)
        if sinks:
            # nodes are disjoint and rise: those that hold a sink are among the first halves
            lead = (start[:, : 2 * sinks] < sinks) & (size[:, : 2 * sinks] > 0)
            ranked[:, : 2 * sinks].masked_fill_(lead, torch.inf)
        kept = keep_best(ranked, slots)
        place = kept.flatten().nonzero().flatten()
        start, size, known = (
            one.flatten().index_select(0, place).view(-1, slots) for one in (start, size, scores)
        )
    return start


def score(rows: Tensor, held: Tensor, hidden: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """`max over rows and over the keys of a block of q k`, where a hidden pair counts as `HIDDEN`.

    Args:
        rows (Tensor): [S, R, D] scaled queries.
        held (Tensor): [S, C, P, D] the P keys of C representative blocks.
        hidden (Tensor | None): [S, E, P, R] bool, for the last E <= C blocks.
        out (Tensor | None): [S, C P, R], room for the products.

    Returns:
        Tensor: [S, C].
    """
    products = torch.bmm(held.flatten(1, 2), rows.transpose(1, 2), out=out).view(*held.shape[:3], -1)
    if hidden is not None:
        products[:, held.shape[1] - hidden.shape[1] :].masked_fill_(hidden, HIDDEN)
    return products.flatten(2).amax(-1)


@torch.no_grad()
def search(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    mask_k: int,
    q_block: int,
    q_stride: int = 1,
    q_offset: int = 0,
    k_block: int,
    k_stride: int = 1,
    window: int = 0,
    sink_tokens: int = 0,
    representative: str = "center",
    head_group: int = 1,
    dense_queries: int = 0,
    causal_scores: bool = True,
) -> KeyBlocks:
    """The keys that each block of queries attends to.

    Args:
        query (Tensor): [B, H, Q, D].
        key (Tensor): [B, Hkv, K, D]; row r stands at position K - Q + r.
        scaling (float): factor of the scores.
        mask_k (int): keys listed for a query block, a multiple of `k_block`; the window comes on top.
        q_block (int): rows that share a search.
        q_stride, q_offset (int): of these the rows `q_offset :: q_stride` ask; a last block too short to have one of
            them asks with its last row.
        k_block, k_stride (int): keys that are listed together, and the step between those that are scored.
        window (int): newest keys that a row sees in any case; they are no candidates.
        sink_tokens (int): first tokens that are always listed, <= mask_k.
        representative (str): "first", "center" or "last".
        head_group (int): heads that share a search, which divides H; their scores are joined by the maximum.
        dense_queries (int): query blocks that end before this position list everything.
        causal_scores (bool): hide keys later than p - window from a row at p also while searching.

    Returns:
        KeyBlocks: lists for [B, H], in blocks of q_block and k_block, with the window; all candidates where they are
            at most `mask_k`, else exactly mask_k / k_block blocks. Without gradients.
    """
    heads, length, keys = query.shape[1], query.shape[2], key.shape[2]
    require(heads % head_group == 0, "head_group", f"a divisor of {heads} heads", head_group)
    slots, owners = mask_k // k_block, query.shape[0] * heads // head_group
    width = [-(-one // k_block) for one in candidates(length, keys, q_block=q_block, window=window)]
    ends = [min(keys, (i + 1) * q_block + keys - length) for i in range(len(width))]
    turns = [0 if end <= dense_queries else rounds(one, slots) for one, end in zip(width, ends)]
    kept = [slots if turn else one for turn, one in zip(turns, width)]
    count = torch.tensor(kept, dtype=torch.int32, device=query.device)
    index = torch.arange(max(kept, default=0), dtype=torch.int32, device=query.device)
    index = index.repeat(owners * len(width), 1)
    if any(turns):
        ask = _Asking(
            query,
            key,
            scaling,
            q_block,
            q_stride,
            q_offset,
            k_block,
            k_stride,
            window,
            head_group,
            causal_scores,
        )
        blocks = torch.tensor(width, device=query.device)
        for low, high in _runs(turns):
            # all heads of a run; those of one head side by side, so that its keys stay in the cache
            items = torch.arange(owners, device=query.device).unsqueeze(-1) * len(width)
            items = (items + torch.arange(low, high, device=query.device)).flatten()
            for part in items.split(ask.slice(2 * slots)):
                index[part, :slots] = descend(
                    blocks[part % len(width)],
                    slots,
                    turns[low],
                    ask.measure(part),
                    representative=representative,
                    sinks=-(-sink_tokens // k_block),
                )
    index = index.view(query.shape[0], heads // head_group, len(width), index.shape[-1]).repeat_interleave(
        head_group, 1
    )
    return KeyBlocks(
        count.expand(index.shape[:3]).contiguous(), index, q_block, k_block, length, keys, window=window
    )


def _runs(turns: list[int]) -> Iterator[tuple[int, int]]:
    """Stretches of query blocks with the same number of rounds, which never falls, without those that need none."""
    low = 0
    for high in range(1, len(turns) + 1):
        if high == len(turns) or turns[high] != turns[low]:
            if turns[low]:
                yield low, high
            low = high


class _Asking:
    """The rows that ask and the keys they ask about, laid out for one gather and one product a round."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scaling: float,
        q_block: int,
        q_stride: int,
        q_offset: int,
        k_block: int,
        k_stride: int,
        window: int,
        head_group: int,
        causal_scores: bool,
    ) -> None:
        batch, heads, length, width = query.shape
        groups, keys = key.shape[1:3]
        precise = torch.promote_types(query.dtype, torch.float32)
        device = query.device
        self.k_block, self.k_stride = k_block, k_stride
        # heads of a search that read the same keys ask together, the others one after the other
        together = math.gcd(head_group, heads // groups)
        self.turns = head_group // together

        first = torch.arange(-(-length // q_block), device=device).unsqueeze(-1) * q_block
        have = (length - first).clamp_max(q_block)
        steps = torch.arange(q_offset, q_block, q_stride, device=device)
        # in a block that is cut off the last of its rows that ask stands for those that are missing
        newest = q_offset + (have - 1 - q_offset) // q_stride * q_stride
        places = torch.minimum(steps, torch.where(have > q_offset, newest, have - 1)) + first  # [N, R]
        self.count = len(places)
        rows = query.index_select(2, places.flatten()).to(precise) * scaling
        rows = rows.view(batch * heads // head_group, self.turns, together, self.count, -1, width)
        self.rows = rows.permute(0, 3, 1, 2, 4, 5).reshape(-1, self.turns, together * places.shape[1], width)
        limit = places + (keys - length - window) if causal_scores else torch.full_like(places, keys - 1)
        self.limit = limit.repeat(1, together)  # [N, R']
        # of each item and turn: where the blocks of its key head begin in `held`
        blocks = -(-keys // k_block)
        head = torch.arange(batch * heads, device=device)[::together].view(-1, 1, self.turns)
        self.base = (head // (heads // groups) * blocks).int().expand(-1, self.count, -1).flatten(0, 1)
        held = torch.nn.functional.pad(key.to(precise), (0, 0, 0, blocks * k_block - keys))
        held = held.view(batch * groups * blocks, k_block, width)[:, ::k_stride]
        self.points = held.shape[1]
        self.held = held.reshape(len(held), -1)
        # candidates of which some row may not see a key: as many blocks as the rows span, twice for empty halves
        self.edge = 2 * (-(-q_block // k_block) + 1)

    def slice(self, halves: int) -> int:
        """Query blocks to search at a time; makes room for a part of them, which is used again and again."""
        on_cpu = self.held.device.type == "cpu"
        # elements that one half takes: the keys of its representative, and their products
        self.sizes = (self.held.shape[1], self.points * self.rows.shape[2])
        most = (_ROOM_CPU if on_cpu else _ROOM) // (halves * sum(self.sizes))
        self.part = max(1, min(most, len(self.rows)))
        self.room = [self.held.new_empty(self.part * halves * size) for size in self.sizes]
        return self.part * (_ROOMS if on_cpu else 1)

    def measure(self, items: Tensor) -> Callable[[Tensor], Tensor]:
        """The scores of blocks for the query blocks `items`, counted over all heads, as `descend` asks for them."""
        rows, base = self.rows.index_select(0, items), self.base.index_select(0, items)
        limit = self.limit.index_select(0, items % self.count)[:, None, None]
        lowest = limit.amin((1, 2, 3)).unsqueeze(-1) - (self.points - 1) * self.k_stride
        within = torch.arange(0, self.k_block, self.k_stride, device=items.device).unsqueeze(-1)

        def scores(asked: Tensor) -> Tensor:
            # blocks rise in each row, so that those which some row may not see are the last
            edge = int((asked[:, -self.edge :] * self.k_block > lowest).sum(-1).max())
            hidden = None
            if edge:
                hidden = asked[:, -edge:, None, None] * self.k_block + within > limit
            made = [
                self._score(rows[:, turn], base[:, turn, None] + asked, hidden) for turn in range(self.turns)
            ]
            return made[0] if len(made) == 1 else torch.stack(made).amax(0)

        return scores

    def _score(self, rows: Tensor, places: Tensor, hidden: Tensor | None) -> Tensor:
        made = rows.new_empty(places.shape)
        for low in range(0, len(places), self.part):
            part = slice(low, low + self.part)
            taken = places[part]
            held, products = (room[: taken.numel() * size] for room, size in zip(self.room, self.sizes))
            torch.index_select(self.held, 0, taken.flatten(), out=held.view(taken.numel(), -1))
            made[part] = score(
                rows[part],
                held.view(*taken.shape, self.points, -1),
                None if hidden is None else hidden[part],
                out=products.view(len(taken), -1, rows.shape[1]),
            )
        return made
