"""Every kernel against the specification: odd sizes, heads, windows, tails, soft caps, gradients, and memory."""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from salience import kernels
from salience.core.errors import ParameterError
from salience.kernels import KeyBlocks, dense, gather, naive
from salience.kernels.blocks import joined, lists

# queries, keys, q_block, k_block, window, tail, heads, key heads, heads of the lists
CASES = {
    "one token": (1, 1, 64, 32, 0, 0, 1, 1, 1),
    "less than a block": (63, 63, 64, 32, 0, 0, 2, 1, 2),
    "a block and one": (65, 65, 64, 32, 0, 0, 4, 2, 4),
    "pairs of keys and a window": (200, 200, 64, 2, 33, 0, 4, 2, 4),
    "single keys for all heads": (200, 200, 64, 1, 0, 0, 4, 2, 1),
    "behind a cache": (130, 300, 32, 16, 7, 0, 4, 4, 4),
    "shared lists behind a cache": (130, 300, 32, 16, 7, 0, 4, 4, 1),
    "one query": (1, 77, 1, 2, 5, 0, 2, 1, 2),
    "one query, single keys": (1, 77, 1, 1, 0, 0, 2, 1, 1),
    "a window longer than the prompt": (70, 70, 16, 2, 200, 0, 2, 1, 1),
    "a tail": (200, 200, 64, 32, 0, 13, 4, 2, 4),
    "nothing but a tail": (50, 90, 64, 32, 0, 50, 4, 2, 4),
    "query blocks of no power of two": (150, 170, 24, 8, 3, 5, 6, 2, 6),
    "key blocks larger than query blocks": (150, 150, 16, 64, 0, 0, 2, 2, 2),
}


def blocks_of(case, density, seed=0, batch=2):
    queries, keys, q_block, k_block, window, tail, _, _, lists_for = CASES[case]
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, lists_for, -(-(queries - tail) // q_block), -(-keys // k_block))
    mask = torch.rand(shape, generator=draw) < density
    made = KeyBlocks.from_mask(
        mask, q_block=q_block, k_block=k_block, queries=queries, keys=keys, window=window, tail=tail
    )
    return made, mask


def inputs_of(case, width=16, seed=0, batch=2, dtype=torch.float32, value_width=None):
    queries, keys, *_, heads, groups, _ = CASES[case]
    draw = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, heads, queries, width),
        (batch, groups, keys, width),
        (batch, groups, keys, value_width or width),
    )
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def by_hand(query, key, value, mask, blocks, scaling, softcap=None):
    """Row for row and head for head, from the map of blocks."""
    batch, heads, queries, _ = query.shape
    out = torch.zeros(batch, heads, queries, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h * key.shape[1] // heads
            for r in range(queries):
                p = blocks.keys - queries + r
                if r >= queries - blocks.tail:
                    seen = list(range(p + 1))
                else:
                    row = mask[b, h if mask.shape[1] > 1 else 0, r // blocks.q_block]
                    seen = [j for j in range(p + 1) if row[j // blocks.k_block] or p - blocks.window < j]
                if seen:
                    logits = (key[b, group, seen].double() @ query[b, h, r].double()) * scaling
                    if softcap is not None:
                        logits = softcap * (logits / softcap).tanh()
                    out[b, h, r] = logits.softmax(0) @ value[b, group, seen].double()
    return out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_naive_is_the_definition(case, density):
    blocks, mask = blocks_of(case, density)
    inputs = inputs_of(case)
    expected = by_hand(*inputs, mask, blocks, 0.25)
    torch.testing.assert_close(
        naive.attend(*inputs, blocks, scaling=0.25).double(), expected, rtol=0, atol=1e-6
    )
    seen = blocks.visible()
    assert torch.equal(seen.sum((-1, -2)).double(), blocks.pairs())
    assert torch.equal(blocks.to_mask(), mask)
    rows = torch.arange(blocks.queries // 3, blocks.queries, 3)
    assert torch.equal(blocks.visible(rows), seen[:, :, rows])
    whole = sum(blocks.offset + r + 1 for r in range(blocks.queries))
    torch.testing.assert_close(blocks.share(), blocks.pairs() / whole)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gathered_keys_agree_with_naive_in_values_and_gradients(case, density, softcap):
    blocks, _ = blocks_of(case, density)
    ways = []
    for attend in (naive.attend, kernels.attend):
        inputs = [one.requires_grad_() for one in inputs_of(case, value_width=8)]
        out = attend(*inputs, blocks, scaling=0.25, softcap=softcap)
        weights = torch.linspace(-1, 1, out.numel()).view_as(out)
        ways.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for name, one, other in zip(("out", "query", "key", "value"), *ways, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    with torch.no_grad():
        plain = kernels.attend(*inputs_of(case, value_width=8), blocks, scaling=0.25, softcap=softcap)
    torch.testing.assert_close(plain, ways[0][0].detach(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_sizes_and_types(width, dtype):
    blocks, _ = blocks_of("pairs of keys and a window", 0.2)
    inputs = inputs_of("pairs of keys and a window", width=width, dtype=dtype)
    out = kernels.attend(*inputs, blocks, scaling=width**-0.5)
    assert out.dtype == dtype
    expected = naive.attend(*[one.double() for one in inputs], blocks, scaling=width**-0.5)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)


def test_many_slices_give_the_same_as_one(monkeypatch):
    blocks, _ = blocks_of("pairs of keys and a window", 0.3)
    inputs = inputs_of("pairs of keys and a window")
    whole = kernels.attend(*inputs, blocks, scaling=0.25)
    monkeypatch.setattr(gather, "_SLICE_CPU", 1)
    torch.testing.assert_close(kernels.attend(*inputs, blocks, scaling=0.25), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", ["pairs of keys and a window", "shared lists behind a cache", "a tail"])
@pytest.mark.parametrize("attend", [naive.attend, kernels.attend])
def test_what_comes_later_changes_nothing(case, attend):
    """Also where a list names blocks of the future, as lists of whole query blocks do."""
    blocks, _ = blocks_of(case, 0.5)
    query, key, value = inputs_of(case)
    before = attend(query, key, value, blocks, scaling=0.25)
    for row in (0, 40, blocks.queries - 2):
        later = blocks.offset + row + 1
        changed = [one.clone() for one in (key, value)]
        for one in changed:
            one[:, :, later:] = 1e3
        after = attend(query, *changed, blocks, scaling=0.25)
        assert torch.equal(after[:, :, : row + 1], before[:, :, : row + 1])
        assert not torch.equal(after, before)


def test_everything_is_dense_attention():
    query, key, value = inputs_of("a block and one")
    expected = sdpa(query, key, value, is_causal=True, enable_gqa=True)
    for blocks in (
        KeyBlocks.everything(65, 65, batch=2),
        KeyBlocks.from_mask(
            torch.ones(2, 4, 2, 3, dtype=torch.bool), q_block=64, k_block=32, queries=65, keys=65
        ),
    ):
        torch.testing.assert_close(
            kernels.attend(query, key, value, blocks, scaling=0.25), expected, rtol=0, atol=1e-5
        )
        assert blocks.share().unique().tolist() == [1.0]


@pytest.mark.parametrize("window", [None, 1, 7, 64, 400])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("case", ["behind a cache", "one query", "a block and one"])
def test_dense_attention_with_windows_and_caps(case, window, softcap, monkeypatch):
    monkeypatch.setattr(dense, "_ROWS", 50)
    query, key, value = inputs_of(case)
    queries, keys = query.shape[2], key.shape[2]
    blocks = KeyBlocks.from_mask(
        torch.zeros(2, 1, queries, 1, dtype=torch.bool),
        q_block=1,
        k_block=keys,
        queries=queries,
        keys=keys,
        window=window or keys,
    )
    expected = naive.attend(query, key, value, blocks, scaling=0.3, softcap=softcap)
    out = dense.attend(query, key, value, scaling=0.3, softcap=softcap, window=window)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_coarser_lists_hold_the_same_keys_and_those_between():
    for case in CASES:
        blocks, mask = blocks_of(case, 0.3)
        wide = blocks.coarser(4 * blocks.k_block)
        groups = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % 4)).unflatten(-1, (-1, 4))
        assert torch.equal(wide.to_mask(), groups.any(-1)), case
        assert wide.k_block == 4 * blocks.k_block
    with pytest.raises(ParameterError, match="k_block must be a multiple of 32, got 48"):
        blocks_of("a tail", 0.3)[0].coarser(48)


def test_lists_of_slices_join():
    mask = torch.rand(2, 3, 7, 20, generator=torch.Generator().manual_seed(1)) < 0.4
    count, index = joined([lists(mask[:, :, :3]), lists(mask[:, :, 3:4]), lists(mask[:, :, 4:])])
    whole = lists(mask)
    assert torch.equal(count, whole[0])
    listed = torch.arange(index.shape[-1]) < count.unsqueeze(-1)
    assert torch.equal(index[listed], whole[1][listed])


def test_what_is_wrong_with_lists_is_said():
    count, index = torch.zeros(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 4, dtype=torch.int32)
    KeyBlocks(count, index, 64, 32, 128, 128)
    for change, text in (
        ({"queries": 200, "keys": 128}, r"queries must be in \[0, 128\]"),
        ({"queries": 64}, r"count must be \[B, H, 1\] for 64 rows in blocks of 64, got \[1, 1, 2\]"),
        ({"q_block": 0}, "q_block must be >= 1, got 0"),
        ({"window": -1}, "window must be >= 0, got -1"),
        ({"tail": 129}, r"tail must be in \[0, 128\], got 129"),
    ):
        with pytest.raises(ParameterError, match=text):
            KeyBlocks(count, index, **{"q_block": 64, "k_block": 32, "queries": 128, "keys": 128, **change})
    inputs = inputs_of("a block and one")
    with pytest.raises(ParameterError, match=r"blocks must be of \(65, 65\) queries and keys"):
        kernels.attend(*inputs, KeyBlocks(count, index, 64, 32, 128, 128), scaling=1.0)
    blocks, _ = blocks_of("a block and one", 0.3)
    with pytest.raises(ParameterError, match="backend must be one of auto, "):
        kernels.attend(*inputs, blocks, scaling=1.0, backend="magic")
    small, _ = blocks_of("pairs of keys and a window", 0.3)
    with pytest.raises(
        ParameterError, match="'flex': flex_attention needs blocks that are multiples of 16, got 64 x 2"
    ):
        kernels.attend(*inputs_of("pairs of keys and a window"), small, scaling=1.0, backend="flex")


def test_which_kernel_runs_is_told():
    blocks, _ = blocks_of("a block and one", 0.3)
    inputs = inputs_of("a block and one")
    assert kernels.which(*inputs, blocks) == ("gather", "")
    inputs[0].requires_grad_()
    with pytest.raises(ParameterError, match="'flex': gradients are needed"):
        kernels.which(*inputs, blocks, "flex")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="flex_attention on a CPU needs a C++ compiler")
@pytest.mark.parametrize(
    ("case", "softcap"),
    [("shared lists behind a cache", 3.0), ("a tail", None)],
)
@pytest.mark.parametrize("density", [0.0, 0.4])
def test_flex_attention_agrees_with_naive(case, softcap, density):
    blocks, _ = blocks_of(case, density)
    inputs = inputs_of(case, width=32)
    out = kernels.attend(*inputs, blocks, scaling=0.2, softcap=softcap, backend="flex")
    expected = naive.attend(*inputs, blocks, scaling=0.2, softcap=softcap)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_uncompiled_flex_attention_would_ignore_the_lists():
    """Why the flex kernel is always compiled: run as plain Python torch applies the mask function alone."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    query, key, value = (torch.randn(1, 1, 128, 16) for _ in range(3))
    # the lists hold the diagonal blocks alone
    mask = BlockMask.from_kv_blocks(
        torch.ones(1, 1, 2, dtype=torch.int32),
        torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32),
        BLOCK_SIZE=(64, 64),
        mask_mod=lambda b, h, i, j: i >= j,
    )
    plain = flex_attention(query, key, value, block_mask=mask)
    torch.testing.assert_close(plain, sdpa(query, key, value, is_causal=True), rtol=0, atol=1e-5)


_MEMORY = """
import resource, sys, torch
from salience import kernels
from salience.kernels import KeyBlocks
torch.set_num_threads(1)
length = int(sys.argv[1])
draw = torch.Generator().manual_seed(0)
query, key, value = (torch.randn(1, 2, length, 16, generator=draw) for _ in range(3))
count = torch.full((1, 2, length // 64), 8, dtype=torch.int32)
index = torch.randint(0, length // 32, (1, 2, length // 64, 8), generator=draw).int().sort(-1).values
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with torch.no_grad():
    kernels.attend(query, key, value, KeyBlocks(count, index, 64, 32, length, length), scaling=1.0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_grows_with_the_length_alone():
    """128K tokens: a map of T x T bits alone would be 2 GiB."""
    mebibytes = {}
    for length in (32768, 131072):
        done = subprocess.run(
            [sys.executable, "-c", _MEMORY, str(length)], capture_output=True, text=True, check=True
        )
        mebibytes[length] = int(done.stdout) / 1024
    inputs = 4 * 2 * 131072 * 16 * 4 / 2**20
    assert mebibytes[131072] < 4 * inputs, mebibytes
