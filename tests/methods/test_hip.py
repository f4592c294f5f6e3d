"""HiP: its search against a transcription of the algorithm, what it promises, and the traps of its code."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from conftest import tiny_llama
from decoder_families import prompts

import salience as sal
from salience import kernels
from salience.core.errors import ParameterError
from salience.core.spec import parse_method
from salience.hosts.prefill import Prompt
from salience.methods.keys import _hip_search
from salience.methods.keys._hip_search import candidates, descend, keep_best, nodes, rounds, search

CONTRACT = {
    "method": sal.HiP(mask_k=16, q_block=16, window=12, sink_tokens=2, dense_layers=1),
    "keep_all": sal.HiP(mask_k=256, q_block=16, window=12, sink_tokens=2, dense_layers=0),
    "model": lambda: tiny_llama(layers=3).eval(),
    "inputs": prompts,
    "bad": {
        "mask_k": (7, "mask_k must be a multiple of k_block = 2, got 7"),
        "mask_k:2": (0, "mask_k must be a multiple of k_block = 2, got 0"),
        "mask_k:3": (64.0, "mask_k must be a multiple of k_block = 2, got 64.0"),
        "q_block": (0, "q_block must be an integer >= 1, got 0"),
        "q_block:2": (33, "q_block must be a multiple of q_stride = 2, got 33"),
        "q_stride": (3, "q_block must be a multiple of q_stride = 3, got 64"),
        "q_offset": (2, r"q_offset must be an integer in \[0, 2\), got 2"),
        "q_offset:2": (-1, r"q_offset must be an integer in \[0, 2\), got -1"),
        "k_block": (0, "k_block must be an integer >= 1, got 0"),
        "k_stride": (4, "k_block must be a multiple of k_stride = 4, got 2"),
        "window": (-1, "window must be an integer >= 0, got -1"),
        "sink_tokens": (513, r"sink_tokens must be an integer in \[0, 512\], got 513"),
        "sink_tokens:2": (-1, r"sink_tokens must be an integer in \[0, 512\], got -1"),
        "representative": ("mean", "representative must be one of first, center, last, got 'mean'"),
        "dense_layers": (-1, "dense_layers must be an integer >= 0, got -1"),
        "dense_queries": (-1, "dense_queries must be an integer >= 0, got -1"),
        "refresh_interval": (0, "refresh_interval must be an integer >= 1, got 0"),
        "head_group": (0, "head_group must be an integer >= 1, got 0"),
        "attend_block": (3, "attend_block must be a multiple of k_block = 2, got 3"),
        "decode": (1, "decode must be True or False, got 1"),
    },
}
PLAIN = {"scaling": 1.0, "mask_k": 16, "q_block": 16, "q_stride": 2, "q_offset": 1, "k_block": 2, "window": 8}


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_hand(
    query,
    key,
    block,
    *,
    scaling,
    mask_k,
    q_block,
    k_block,
    window,
    q_stride=1,
    q_offset=0,
    k_stride=1,
    sink_tokens=0,
    representative="center",
    causal_scores=True,
):
    """Start tokens of one query block; `query` [G][Q, D] and `key` [G][K, D] of the heads that search together."""
    length, keys = len(query[0]), len(key[0])
    offset = keys - length
    rows = range(block * q_block, min(length, (block + 1) * q_block))
    wide = max(0, min(keys, (block + 1) * q_block + offset) - window)
    blocks, slots = math.ceil(wide / k_block), mask_k // k_block
    if wide <= mask_k:
        return [a * k_block for a in range(blocks)]
    asking = list(rows)[q_offset::q_stride] or [rows[-1]]

    def measured(a, size):
        if size == 0:
            return -math.inf
        if a * k_block < sink_tokens:
            return math.inf
        rho = {"first": a, "center": a + size // 2, "last": a + size - 1}[representative]
        found = []
        for q, k in zip(query, key):
            for row in asking:
                for j in range(rho * k_block, (rho + 1) * k_block, k_stride):
                    hidden = j > row + offset - window if causal_scores else j >= keys
                    found.append(-32000.0 if hidden else float(q[row] @ k[j]) * scaling)
        return max(found)

    bounds = [blocks * j // slots for j in range(slots + 1)]
    held = [(a, b - a) for a, b in pairwise(bounds)]
    left = blocks / slots
    while left > 1:
        halves = []
        for a, size in held:
            h = int(a + 0.5 * size) - a
            halves += [(a, h), (a + h, size - h)]
        held = sorted(sorted(halves, key=lambda half: -measured(*half))[:slots])
        left /= 2
    assert all(size == 1 for _, size in held)
    return [a * k_block for a, _ in held]


def starts(blocks, batch, head, block):
    count = int(blocks.count[batch, head, block])
    return (blocks.index[batch, head, block, :count] * blocks.k_block).tolist()


@pytest.mark.parametrize("representative", ["first", "center", "last"])
@pytest.mark.parametrize(
    ("queries", "keys"), [(1, 1), (1, 90), (63, 63), (65, 65), (143, 143), (40, 90), (35, 131)]
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"k_block": 1, "mask_k": 5, "q_stride": 1, "q_offset": 0, "window": 0},
        {
            "k_block": 4,
            "k_stride": 2,
            "mask_k": 12,
            "q_block": 8,
            "q_offset": 0,
            "window": 5,
            "sink_tokens": 6,
        },
        {"head_group": 2, "causal_scores": False, "mask_k": 6},
        {"head_group": 4, "window": 0, "k_block": 3, "mask_k": 9},
    ],
    ids=["plain", "single keys", "strides and sinks", "groups", "all heads"],
)
def test_the_search_is_the_algorithm(representative, queries, keys, settings):
    settings = {**PLAIN, "representative": representative, **settings}
    query, key = random(2, 4, queries, 8), random(2, 2, keys, 8, seed=1)
    blocks = search(query, key, **settings)
    assert (blocks.window, blocks.q_block, blocks.k_block) == tuple(
        settings[name] for name in ("window", "q_block", "k_block")
    )
    group = settings.pop("head_group", 1)
    for batch in range(2):
        for head in range(4):
            first = head // group * group
            members = range(first, first + group)
            for block in range(blocks.count.shape[2]):
                expected = by_hand(
                    [query[batch, h] for h in members],
                    [key[batch, h // 2] for h in members],
                    block,
                    **settings,
                )
                assert starts(blocks, batch, head, block) == expected, (batch, head, block)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 333])
def test_lists_are_exact_in_number_sorted_and_inside(length):
    blocks = search(random(1, 2, length, 4), random(1, 2, length, 4, seed=1), **PLAIN)
    wide = candidates(length, length, q_block=16, window=8)
    for block, keys in enumerate(wide):
        for head in range(2):
            found = starts(blocks, 0, head, block)
            assert len(found) == (math.ceil(keys / 2) if keys <= 16 else 8)
            assert found == sorted(set(found)) and all(0 <= a < keys and a % 2 == 0 for a in found)


@pytest.mark.parametrize("representative", ["first", "center", "last"])
@pytest.mark.parametrize("slots", [1, 3, 8, 49])
def test_rounds_and_scores_are_counted(representative, slots):
    for blocks in (slots + 1, 2 * slots, 2 * slots + 1, 5 * slots, 64 * slots + 1):
        asked = []

        def measure(numbers, asked=asked):
            assert bool((numbers.diff(dim=-1) >= 0).all()) and int(numbers.min()) >= 0
            asked.append(numbers.shape[-1])
            return torch.zeros(numbers.shape)

        turns = rounds(blocks, slots)
        kept = descend(torch.tensor([blocks]), slots, turns, measure, representative=representative)
        assert turns == len(asked) == math.ceil(math.log2(blocks / slots))
        assert asked[0] == 2 * slots and max(asked) <= 2 * slots
        # everything ties: the leftmost blocks of all
        assert kept.tolist() == [list(range(slots))]
        if representative != "center":
            assert all(count == slots for count in asked[1:])
    assert rounds(slots, slots) == rounds(0, slots) == 0


def test_first_nodes_tile_the_candidates():
    for slots in (1, 7, 49):
        blocks = torch.arange(slots, 6 * slots)
        start, size = nodes(blocks, slots)
        assert torch.equal(start[:, 1:], (start + size)[:, :-1]) and bool((start[:, 0] == 0).all())
        assert torch.equal(size.sum(-1), blocks) and bool((size.amax(-1) - size.amin(-1) <= 1).all())


def test_the_worked_example():
    table = torch.tensor([[1.0, 0, 0, 0, 2, 0, 5, 0]])

    def found(representative):
        asked = []

        def measure(numbers):
            asked.append(numbers.tolist()[0])
            return table.gather(1, numbers)

        kept = descend(torch.tensor([8]), 2, 2, measure, representative=representative)
        return kept.tolist()[0], asked

    # the first rounds score 0 2 4 6; then of (4, 2) and (6, 2) the left halves are known and 5, 7 are scored
    assert found("first") == ([4, 6], [[0, 2, 4, 6], [5, 7]])
    # 1 3 5 7 are all zero, the leftmost stay, and both winners are lost
    kept, asked = found("center")
    assert kept == [0, 1] and asked[0] == [1, 3, 5, 7]


def test_a_score_constant_on_intervals_gives_the_exact_top():
    for size, slots in ((4, 8), (8, 8), (8, 4)):
        steps = random(5, slots, seed=size).repeat_interleave(size, 1)
        for representative in ("first", "center", "last"):
            kept = descend(
                torch.full((5,), slots * size),
                slots,
                rounds(slots * size, slots),
                lambda numbers, steps=steps: steps.gather(1, numbers),
                representative=representative,
            )
            best = steps.sort(dim=-1, descending=True, stable=True).indices[:, :slots].sort(-1).values
            assert torch.equal(kept, best)


def test_the_best_are_kept_as_a_stable_sort_keeps_them():
    generator = torch.Generator().manual_seed(0)
    for levels in (1, 2, 5, 1000):
        scores = torch.randint(0, levels, (40, 30), generator=generator).float()
        scores[::7, ::3] = -torch.inf
        scores[::5, 4] = torch.inf
        for count in (1, 15, 30):
            order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :count]
            expected = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, True)
            assert torch.equal(keep_best(scores, count), expected)


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 24), (24, 24), (63, 63), (65, 65), (17, 80)])
def test_what_fits_is_dense(queries, keys):
    query, key, value = random(2, 4, queries, 8), random(2, 2, keys, 8, seed=1), random(2, 2, keys, 8, seed=2)
    for window in (0, 8):
        blocks = search(query, key, **{**PLAIN, "window": window, "mask_k": 80 - window})
        assert float(blocks.share().min()) == 1.0
        found = kernels.attend(query, key, value, blocks, scaling=0.3)
        dense = kernels.dense.attend(query, key, value, scaling=0.3)
        torch.testing.assert_close(found, dense, rtol=0, atol=1e-12)


def test_heads_and_samples_are_independent_and_the_future_is_not_read():
    query, key = random(2, 4, 150, 8), random(2, 2, 150, 8, seed=1)
    blocks = search(query, key, **PLAIN)
    order = torch.tensor([2, 3, 0, 1])
    turned = search(query[:, order], key[:, [1, 0]], **PLAIN)
    assert torch.equal(turned.index, blocks.index[:, order])
    alone = search(query[1:], key[1:], **PLAIN)
    assert torch.equal(alone.index, blocks.index[1:])
    changed = key.clone()
    changed[:, :, 96:] = 100 * random(2, 2, 54, 8, seed=2)
    for causal in (True, False):
        before = search(query, key, **PLAIN, causal_scores=causal)
        after = search(query, changed, **PLAIN, causal_scores=causal)
        assert torch.equal(before.index[:, :, :6], after.index[:, :, :6])
        assert not torch.equal(before.index[:, :, 6:], after.index[:, :, 6:])


@pytest.mark.parametrize("representative", ["first", "center", "last"])
def test_chunks_find_what_the_whole_prompt_finds(representative):
    """A chunk that starts on the grid of query blocks: the same rows, the same candidates, block by block."""
    query, key = random(1, 4, 150, 8), random(1, 2, 150, 8, seed=1)
    settings = {**PLAIN, "representative": representative}
    whole = search(query, key, **settings)
    for start, stop in ((0, 48), (48, 112), (112, 150)):
        part = search(query[:, :, start:stop], key[:, :, :stop], **settings)
        for head in range(4):
            for block in range(part.count.shape[2]):
                assert starts(part, 0, head, block) == starts(whole, 0, head, start // 16 + block)
    # off the grid other rows ask together: the lists are as long, not the same
    part = search(query[:, :, 40:], key, **settings)
    assert bool((part.count[..., -1] == 8).all())
    assert not torch.equal(part.index[:, :, :6], whole.index[:, :, 3:9])


def test_strong_keys_keep_their_order():
    """In half precision the sigmoid of every score above 8 is 1: the best would be the leftmost."""
    key = torch.zeros(1, 1, 128, 1)
    key[0, 0, :, 0] = 10 + torch.arange(128) / 128
    blocks = search(torch.ones(1, 1, 128, 1), key, **{**PLAIN, "k_block": 1, "mask_k": 4})
    assert starts(blocks, 0, 0, 7) == [116, 117, 118, 119]
    assert len(set(torch.sigmoid(key.half()).flatten().tolist())) == 1


def test_a_product_of_zero_is_a_score():
    # whole nodes are zero here, so that the descent cannot miss what is above the others
    key = torch.tensor([-1.0, -1, -1, -1, 0, 0, 0, 0]).repeat(16).view(1, 1, 128, 1)
    blocks = search(torch.ones(1, 1, 128, 1), key, **{**PLAIN, "mask_k": 40})
    assert bool((key[0, 0, torch.tensor(starts(blocks, 0, 0, 7))] == 0).all())


def test_of_constant_keys_the_leftmost_are_kept():
    for representative in ("first", "center", "last"):
        settings = {**PLAIN, "representative": representative}
        blocks = search(torch.ones(1, 1, 128, 1), torch.ones(1, 1, 128, 1), **settings)
        assert starts(blocks, 0, 0, 7) == list(range(0, 16, 2))


def test_rows_that_see_nothing_give_zero():
    query, key, value = (random(1, 2, 70, 8, seed=seed).requires_grad_() for seed in range(3))
    blocks = replace(search(query, key, **PLAIN), window=0)
    out = kernels.attend(query, key, value, blocks, scaling=1.0)
    out.sum().backward()
    # the first block has 16 - 8 candidates: its first row sees key 0, and rows of later blocks see something
    assert bool(out.isfinite().all()) and all(bool(one.grad.isfinite().all()) for one in (query, key, value))
    blocks = replace(search(query, key, **{**PLAIN, "window": 16}), window=0)
    out = kernels.attend(query, key, value, blocks, scaling=1.0)
    assert bool((out[:, :, :16] == 0).all()) and bool(out.isfinite().all())


def test_what_is_not_a_number_displaces_nothing():
    query, key = random(1, 1, 128, 8), random(1, 1, 128, 8, seed=1)
    key[0, 0, 3] = torch.nan
    found = starts(search(query, key, **PLAIN), 0, 0, 7)
    assert len(found) == 8 and found == sorted(set(found))


def test_sinks_are_always_among_them():
    query, key = random(1, 2, 333, 8), random(1, 2, 333, 8, seed=1)
    for sinks, expected in ((0, 0), (1, 1), (5, 3), (16, 8)):
        blocks = search(query, key, **PLAIN, sink_tokens=sinks)
        assert bool((blocks.count[:, :, 2:] == 8).all())
        held = blocks.index[:, :, 2:, :expected]
        assert torch.equal(held, torch.arange(expected, dtype=torch.int32).expand_as(held))
    assert not torch.equal(
        search(query, key, **PLAIN).index, search(query, key, **PLAIN, sink_tokens=1).index
    )


def test_half_precision_is_ranked_in_full():
    query, key = (random(1, 2, 200, 8, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    assert torch.equal(search(query, key, **PLAIN).index, search(query.float(), key.float(), **PLAIN).index)


def test_slices_change_nothing(monkeypatch):
    query, key = random(2, 4, 300, 8), random(2, 2, 300, 8, seed=1)
    whole = search(query, key, **PLAIN)
    monkeypatch.setattr(_hip_search, "_ROOM_CPU", 1)
    assert torch.equal(search(query, key, **PLAIN).index, whole.index)


def test_gradients_flow_through_what_is_kept():
    query, key, value = (random(1, 2, 90, 8, seed=seed).requires_grad_() for seed in range(3))
    blocks = search(query, key, **PLAIN)
    weight = random(1, 2, 90, 8, seed=3)
    found = torch.autograd.grad(
        (kernels.attend(query, key, value, blocks, scaling=0.4) * weight).sum(), (query, key, value)
    )
    logits = (query @ key.transpose(-1, -2) * 0.4).masked_fill(~blocks.visible(), -torch.inf)
    expected = torch.autograd.grad((logits.softmax(-1) @ value * weight).sum(), (query, key, value))
    for name, one, other in zip("qkv", found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10, msg=lambda m, n=name: f"d{n}: {m}")


def prompt(query, key, layer=0, state=None):
    return Prompt(query, key, key, 1.0, None, layer, 4, {}, {} if state is None else state)


def test_layers_and_queries_may_stay_dense():
    query, key = random(1, 2, 100, 8), random(1, 2, 100, 8, seed=1)
    method = sal.HiP(mask_k=8, q_block=16, window=8, sink_tokens=0, dense_layers=2, dense_queries=64)
    assert method.choose(prompt(query, key, layer=1)) is None
    blocks = method.choose(prompt(query, key, layer=2))
    seen = blocks.visible()[0, 0].sum(-1)
    assert seen[:64].tolist() == list(range(1, 65)) and int(seen[64:].max()) <= 16
    state = {}
    for keys in (63, 64, 65):
        token = method.choose(prompt(query[:, :, :1], key[:, :, :keys], layer=2, state=state))
        assert int(token.visible().sum()) == 2 * (keys if keys <= 64 else 16) and bool(state) == (keys > 64)
    larger = replace(method, attend_block=16).choose(prompt(query, key, layer=2))
    assert larger.k_block == 16 and not bool((blocks.visible() & ~larger.visible()).any())


def test_new_tokens_search_every_few_steps_and_the_window_goes_on():
    method = sal.HiP(mask_k=8, window=8, sink_tokens=2, dense_layers=0, refresh_interval=3)
    query, key = random(1, 4, 140, 8), random(1, 2, 140, 8, seed=1)
    state, searched = {}, []
    for keys in range(10, 40):
        blocks = method.choose(prompt(query[:, :, keys - 1 : keys], key[:, :, :keys], state=state))
        assert (blocks.queries, blocks.keys, blocks.q_block) == (1, keys, 1)
        seen = blocks.visible()[0, 0, 0]
        assert bool(seen[-8:].all())
        if keys <= 16:
            assert bool(seen.all()) and not state
            continue
        fresh = method.search(query[:, :, keys - 1 : keys], key[:, :, :keys], 1.0)
        assert int(blocks.count.max()) == 4
        searched.append(torch.equal(blocks.index, fresh.index))
    # a list that happens to be the same cannot be told from a new search: those of every third step must be new
    assert all(searched[::3]) and not all(searched)
    whole = method.choose(prompt(query, key, state=state))
    assert whole.queries == 140 and not state, "a chunk of a prompt ends what was found before it"


def test_one_search_serves_the_interval():
    calls = []

    class Counted(sal.HiP):
        def search(self, query, key, scaling):
            calls.append(key.shape[2])
            return super().search(query, key, scaling)

    query, key, state = random(1, 2, 60, 8), random(1, 2, 60, 8, seed=1), {}
    method = Counted(mask_k=8, window=8, sink_tokens=0, dense_layers=0, refresh_interval=4)
    for keys in range(30, 42):
        method.choose(prompt(query[:, :, :1], key[:, :, :keys], state=state))
    assert calls == [30, 34, 38]
    method.choose(prompt(query[:, :, :1], key[:, :, :35], state=state))
    assert calls[-1] == 35, "a cache cut short is searched again"


@torch.no_grad()
def test_in_a_model():
    model = tiny_llama(layers=3).eval()
    ids = torch.randint(3, 60, (1, 120), generator=torch.Generator().manual_seed(4))
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)
    whole = sal.HiP(mask_k=256, window=0, dense_layers=0)
    with sal.focus(model, whole):
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), plain)
    small = sal.HiP(mask_k=16, q_block=16, window=8, sink_tokens=2, dense_layers=0, refresh_interval=4)
    told = {}
    for name, method in (("both", small), ("prompt", replace(small, decode=False)), ("none", whole)):
        with sal.focus(model, method):
            read = model(ids, use_cache=True)
            told[name] = read.logits, model(ids[:, :1], past_key_values=read.past_key_values).logits
    assert torch.equal(told["both"][0], told["prompt"][0])
    assert not torch.allclose(told["both"][1], told["prompt"][1], atol=1e-5)
    assert not torch.allclose(told["both"][0], told["none"][0], atol=1e-5)
    with pytest.raises(ParameterError, match=r"dense_layers must be in \[0, 3\] for 3 layers, got 4"):
        sal.focus(model, sal.HiP(dense_layers=4))
    with pytest.raises(ParameterError, match="head_group must be a divisor of 4 heads, got 3"):
        sal.focus(model, sal.HiP(head_group=3))
    assert parse_method("hip:mask_k=64,window=32") == sal.HiP(mask_k=64, window=32)


def captured(smooth, seed, name):
    """Share of attention in 64 of 512 keys, for a block of 32 queries that resemble each other; mean of 16 heads."""
    draw = torch.Generator().manual_seed(seed)
    made = {"generator": draw, "dtype": torch.float64}
    # each key shares seven of its eight pieces with the next one, or none
    pieces = torch.randn(1, 16, 519, 64, **made)
    key = pieces.unfold(2, 8, 1).sum(-1) / math.sqrt(8) if smooth else pieces[:, :, :512]
    query = 1.5 * (torch.randn(1, 16, 1, 64, **made) + torch.randn(1, 16, 32, 64, **made) / 2)
    seen = torch.arange(512) <= torch.arange(480, 512).unsqueeze(-1)
    logits = (query @ key.transpose(-1, -2) / 8).masked_fill(~seen, -torch.inf)
    if name in ("oracle", "random"):
        scores = logits.amax(2).unflatten(-1, (-1, 2)).amax(-1)
        scores = torch.rand(scores.shape, generator=draw) if name == "random" else scores
        kept = torch.zeros_like(scores).scatter(-1, scores.topk(32).indices, 1).bool()
    elif name == "ends":
        kept = (torch.arange(256) < 8) | (torch.arange(256) >= 256 - 24)
    else:
        settings = {**PLAIN, "scaling": 0.125, "mask_k": 64, "q_block": 32, "window": 0}
        kept = search(query, key, **settings, representative=name).to_mask()[:, :, 0]
    return float((logits.softmax(-1) * kept.repeat_interleave(2, -1).unsqueeze(-2)).sum(-1).mean())


def test_locality_is_what_it_lives_on():
    """Where neighbours score alike it is near the best blocks there are; without, half the way from chance."""
    names = ("first", "center", "last", "oracle", "random", "ends")
    smooth, plain = (
        {name: sum(captured(kind, seed, name) for seed in range(4)) / 4 for name in names}
        for kind in (True, False)
    )
    for name in ("first", "center", "last"):
        gained = (smooth[name] - smooth["random"]) / (smooth["oracle"] - smooth["random"])
        assert 0.85 < gained < 1.0, (name, smooth)
        gained = (plain[name] - plain["random"]) / (plain["oracle"] - plain["random"])
        assert 0.3 < gained < 0.7, (name, plain)
    # the middle of an interval resembles all of it more than its ends do
    assert smooth["center"] > max(smooth["first"], smooth["last"])
    assert max(smooth["ends"], smooth["random"]) < smooth["first"] / 3
