"""DHSA: borders, their predictor and its training, lists against the plain rule, official faults, fixed blocks."""

import itertools
import math

import pytest
import torch
from conftest import tiny_llama
from torch.nn import functional as F

import salience as sal
from salience import kernels
from salience.core.errors import ParameterError, StructureError
from salience.kernels import naive
from salience.methods.keys import _dhsa_boundaries as borders
from salience.methods.keys import _dhsa_fixed as fixed
from salience.methods.keys import _dhsa_lists as lists
from salience.methods.keys import _dhsa_official as official
from salience.methods.keys import _dhsa_training as training
from salience.methods.keys import dhsa as module
from salience.methods.keys.dhsa import score, select

SMALL = {"q_block": 16, "budget": 48, "local": 16, "global_tokens": 8, "instruction_tokens": 8}


def model():
    return tiny_llama(layers=3).eval()


def prompts(lengths=(150, 121, 40), seed=0):
    """A batch of prompts with padding on the left."""
    draw = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = torch.randint(3, 64, (length,), generator=draw)
        mask[row, longest - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


CONTRACT = {
    "method": sal.DHSA(chunks="uniform", **SMALL),
    "keep_all": sal.DHSA(pattern="a-shape", density=1.0, q_block=16, k_block=8),
    "model": model,
    "inputs": prompts,
    "bad": {
        "pattern": (
            "v1",
            "pattern must be one of chunks, top-k, a-shape, vertical-slash, vertical-slash-blockwise, got 'v1'",
        ),
        "q_block": (0, "q_block must be an integer >= 1, got 0"),
        "q_block:2": (64.0, "q_block must be an integer >= 1, got 64.0"),
        "budget": (255, "budget must be >= local \\+ global_tokens, which is 256, got 255"),
        "budget:2": (0, "budget must be an integer >= 1, got 0"),
        "local": (-1, "local must be an integer >= 0, got -1"),
        "global_tokens": (-1, "global_tokens must be an integer >= 0, got -1"),
        "instruction_tokens": (-1, "instruction_tokens must be an integer >= 0, got -1"),
        "pooling": ("max", "pooling must be one of mean_sqrt, mean, got 'max'"),
        "chunks": ("sentences", "chunks must be one of learned, uniform, got 'sentences'"),
        "boundary_window": (0, "boundary_window must be an integer >= 1, got 0"),
        "logit_threshold": (math.nan, "logit_threshold must be finite, got nan"),
        "nms": (-1, "nms must be an integer >= 0, got -1"),
        "chunk_beta": (0, "chunk_beta must be an integer >= 1, got 0"),
        "k_block": (64, "k_block must be left out with pattern='chunks', got 64"),
        "density": (0.5, "density must be left out with pattern='chunks', got 0.5"),
        "vertical_ratio": (0.2, "vertical_ratio must be left out with pattern='chunks', got 0.2"),
    },
}


def states(length, heads=4, groups=2, width=8, batch=1, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, width, generator=draw, dtype=dtype)
    key, value = (torch.randn(batch, groups, length, width, generator=draw, dtype=dtype) for _ in "kv")
    return query, key, value


def attention(query, key):
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2)
    later = torch.ones(logits.shape[-2:]).triu(1).bool()
    return (logits * query.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"pattern": "a-shape", "budget": 512}, "budget must be left out with pattern='a-shape', got 512"),
        ({"pattern": "top-k", "density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        (
            {"pattern": "vertical-slash", "vertical_ratio": 1.5},
            r"vertical_ratio must be in \[0, 1\], got 1.5",
        ),
        ({"pattern": "top-k", "k_block": 0}, "k_block must be an integer >= 1, got 0"),
        (
            {"chunks": "uniform", "predictor": "a"},
            "predictor must be left out with uniform chunks, got 'a'",
        ),
    ],
)
def test_what_belongs_to_chunks_and_to_fixed_blocks_does_not_mix(settings, text):
    with pytest.raises(ParameterError, match=text):
        sal.DHSA(**settings)


# labels


def test_focal_loss_and_soft_label_worked():
    logits, targets = torch.tensor([[0.3, -1.2, 2.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    mask = torch.tensor([[True, True, False, True]])
    assert float(borders.focal_loss(logits, targets, mask)) == pytest.approx(0.10597, abs=1e-5)
    alone = [float(borders.focal_loss(logits, targets, mask & (torch.arange(4) == at))) for at in (0, 1, 3)]
    assert alone == pytest.approx([0.13051, 0.01411, 0.17329], abs=1e-5)
    assert float(borders.focal_loss(logits, targets, torch.zeros_like(mask))) == 0.0
    soft = borders.soft_label(torch.tensor([1.0, 2.0, 5.0]))
    assert soft.tolist() == pytest.approx([0.2, 0.5, 0.862], abs=5e-4)
    # the hard label: twice as much attention, not the logit's 1.1 nor a ratio of 1.1
    assert (borders.soft_label(torch.tensor([1.1, 1.99, 2.0, 2.01])) >= 0.5).tolist() == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("length", [1, 7, 16, 17, 63, 65])
@pytest.mark.parametrize("elements", [1, 4000, 1 << 22])
def test_mass_ratio_is_that_of_the_whole_map(monkeypatch, length, elements):
    monkeypatch.setattr(borders, "_ELEMENTS", elements)
    query, key, _ = states(length, batch=2)
    w, whole = 4, attention(query, key).mean(1)
    expected = torch.zeros(2, length, dtype=torch.float64)
    for row in range(2):
        for t in range(2 * w - 1, length - 2 * w):
            past = whole[row, t + w :, t - w + 1 : t + 1].sum()
            future = whole[row, t + w :, t + 1 : t + w + 1].sum()
            expected[row, t] = (max(past, future) + 1e-6) / (min(past, future) + 1e-6)
    torch.testing.assert_close(borders.mass_ratio(query, key), expected, rtol=1e-9, atol=0)


def test_a_change_of_topic_is_a_border():
    """Later queries look only at the second topic, so the gap in front of it divides."""
    key = torch.zeros(1, 1, 64, 2)
    key[..., :32, 0], key[..., 32:, 1] = 1.0, 1.0
    query = torch.zeros(1, 1, 64, 2)
    query[..., 1] = 8.0
    ratio = borders.mass_ratio(query, key)[0]
    assert int(ratio.argmax()) == 31 and float(ratio[31]) > 100
    assert float(ratio[15]) == pytest.approx(1.0, abs=0.2) and bool((ratio[40:55] < 2).all())


# the predictor


def predictor(channels=16, **sizes):
    draw = torch.Generator().manual_seed(1)
    plan = training.Training(hidden=8, heads=2, **sizes)
    made = training.fresh(channels, plan, draw)
    with torch.no_grad():
        for value in made.parameters():  # biases and norms that are not trivial
            value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return made


def plainly(made, features):
    """The same with every window laid out and torch's own attention."""
    w, length = made.window, features.shape[1]
    windows = F.pad(features, (0, 0, w - 1, w)).unfold(1, 2 * w, 1).transpose(-1, -2).flatten(0, 1)
    attended, _ = made.enc["mha"](windows, windows, windows, need_weights=False)
    encoded = made.enc["norm"](attended)
    left, right = encoded[:, :w].mean(1), encoded[:, w:].mean(1)
    alike = F.cosine_similarity(left, right, dim=-1, eps=1e-6).unsqueeze(-1)
    made = made.mlp(torch.cat((left, right, (left - right).abs(), left * right, alike), -1))
    return made.view(-1, length)


@pytest.mark.parametrize("length", [1, 7, 8, 63, 65])
@pytest.mark.parametrize("gaps", [1, 16, 512])
def test_the_predictor_is_window_attention(monkeypatch, length, gaps):
    monkeypatch.setattr(borders, "_GAPS", gaps)
    made = predictor().double()
    draw = torch.Generator().manual_seed(2)
    features = torch.randn(2, length, 16, generator=draw, dtype=torch.float64)
    parts = torch.cat([logits for _, _, logits in made.slices(features)], 1)
    torch.testing.assert_close(parts, plainly(made, features), rtol=1e-9, atol=1e-9)
    logits = made(features)
    ends = torch.ones(length, dtype=torch.bool)
    ends[3 : length - 4] = False
    assert bool((logits[:, ends] == -100).all())
    torch.testing.assert_close(logits[:, ~ends], parts[:, ~ends])


def test_the_predictors_gradients_are_those_of_window_attention():
    made, other = predictor().double(), predictor().double()
    features = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.cat([logits for _, _, logits in made.slices(features)], 1).square().sum().backward()
    plainly(other, features).square().sum().backward()
    for (name, one), two in zip(made.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


def test_a_predictor_is_saved_and_checked(tmp_path):
    made, path = predictor(), tmp_path / "deep" / "borders.safetensors"
    made.save(path)
    state = torch.get_rng_state()
    again = borders.BoundaryPredictor.load(path)
    assert torch.equal(state, torch.get_rng_state())
    features = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(3))
    assert torch.equal(made(features), again(features))
    with pytest.raises(
        ParameterError, match=r"predictor must be a file that train_dhsa wrote, got .*missing"
    ):
        borders.BoundaryPredictor.load(tmp_path / "missing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ParameterError, match=r"predictor must be a file that train_dhsa wrote, got .*text"):
        borders.BoundaryPredictor.load(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ParameterError, match=r"predictor must be a file that train_dhsa wrote, got .*other"):
        borders.BoundaryPredictor.load(tmp_path / "other")
    with pytest.raises(ParameterError, match="heads must be a divisor of the keys' 16 channels, got 3"):
        borders.BoundaryPredictor(16, heads=3)


# borders


def test_borders_rise_lie_apart_and_leave_the_instruction_alone():
    for seed in range(20):
        logits = torch.randn(200, generator=torch.Generator().manual_seed(seed))
        found = borders.select_boundaries(logits, threshold=0.5, chunks=12, nms=8, instruction_tokens=16)
        gaps = found.diff()
        assert found[0] == 0 and found[-1] == 200 and bool((gaps > 0).all())
        assert 200 - 16 + 1 in found.tolist() and not [one for one in found.tolist() if 185 < one < 200]
        inner = found[1:-1]
        assert len(inner) <= 12 and bool((inner.diff() > 8).all())
        assert bool((logits[inner[:-1] - 1] > 0.5).all())


def test_the_highest_logits_win_and_ties_go_left():
    logits = torch.zeros(60)
    logits[[10, 14, 30, 45]] = torch.tensor([2.0, 3.0, 2.0, 2.0])
    plain = {"threshold": 1.1, "nms": 8}
    assert borders.select_boundaries(logits, chunks=9, **plain).tolist() == [0, 15, 31, 46, 60]
    assert borders.select_boundaries(logits, chunks=2, **plain).tolist() == [0, 15, 31, 60]
    assert borders.select_boundaries(logits, threshold=1.1, chunks=9, nms=0).tolist() == [
        0,
        11,
        15,
        31,
        46,
        60,
    ]
    # a logit of 1.1 is a probability of .75: a gap that is a border with .7 is none
    logits[30] = math.log(0.7 / 0.3)
    assert 31 not in borders.select_boundaries(logits, chunks=9, **plain).tolist()


@pytest.mark.parametrize("length", [1, 5, 63])
def test_without_a_border_there_is_one_chunk(length):
    found = borders.select_boundaries(
        torch.full((length,), -100.0), threshold=1.1, chunks=8, instruction_tokens=2
    )
    assert found.tolist() == [0, length]


def test_uniform_chunks():
    assert borders.uniform_boundaries(10, 4).tolist() == [0, 4, 8, 10]
    assert borders.uniform_boundaries(8, 4).tolist() == [0, 4, 8]
    assert borders.uniform_boundaries(1, 4).tolist() == [0, 1]


# scores and lists


def test_chunks_of_one_token_are_scored_exactly():
    query, key, _ = states(48)
    bounds = torch.arange(49).view(1, -1)
    scores = score(query, key, bounds, q_block=16, pooling="mean")
    expected = query.mean(1).view(1, 3, 16, 8).mean(2) @ key.mean(1).transpose(-1, -2)
    torch.testing.assert_close(scores[:, 0], expected)
    heads = score(query, key, bounds, q_block=16, pooling="mean", per_head=True)
    assert heads.shape == (1, 4, 3, 48)
    expected = query.view(1, 4, 3, 16, 8).mean(3) @ key.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(heads, expected)


def test_constant_chunks_score_the_root_of_their_length():
    key = torch.tensor([[1.0, 2.0], [-1.0, 0.5]]).repeat_interleave(torch.tensor([9, 4]), 0).view(1, 1, 13, 2)
    query = torch.tensor([1.0, 1.0]).expand(1, 1, 4, 2)
    bounds = torch.tensor([[0, 9, 13]])
    scores = score(query, key, bounds, q_block=4)[0, 0, 0]
    # four queries alike: their root is 2
    assert scores.tolist() == pytest.approx([2 * 3 * 3.0, 2 * 2 * -0.5])
    assert score(query, key, bounds, q_block=4, pooling="mean")[0, 0, 0].tolist() == pytest.approx(
        [3.0, -0.5]
    )


def test_the_root_favours_long_chunks_only_while_scores_are_positive():
    bounds, query = torch.tensor([[0, 16, 20]]), torch.ones(1, 1, 4, 1)
    for sign in (1.0, -1.0):
        long, short = score(query, torch.full((1, 1, 20, 1), sign), bounds, q_block=4)[0, 0, 0].tolist()
        assert (long > short) == (sign > 0)


def specification(scores, bounds, last, limits):
    """Token by token: scores copied to tokens, the newest, the first, then a stable sort."""
    out = []
    for row in range(len(scores)):
        of = torch.searchsorted(bounds[row], torch.arange(int(bounds[0, -1])), right=True) - 1
        for head, block in itertools.product(*map(range, scores.shape[1:3])):
            stop = int(last[block]) + 1
            taken = (
                list(range(stop))[max(0, stop - min(limits.local, limits.budget)) :] if limits.local else []
            )
            first = [j for j in range(min(limits.first, stop)) if j not in taken]
            taken += first[: limits.budget - len(taken)]
            order = scores[row, head, block][of].argsort(descending=True, stable=True).tolist()
            best = [j for j in order if j < stop and j not in taken]
            out.append(sorted(taken + best[: limits.budget - len(taken)]))
    return out


@pytest.mark.parametrize("seed", range(24))
def test_whole_chunks_in_order_are_the_best_tokens_ties_included(seed):
    draw = torch.Generator().manual_seed(seed)
    length = int(torch.randint(1, 130, (1,), generator=draw))
    rows = []
    for _ in range(2):
        cuts = torch.randperm(length, generator=draw)[: int(torch.randint(0, 20, (1,), generator=draw))]
        rows.append(torch.tensor(sorted({0, length, *cuts.tolist()})))
    bounds = borders.stacked(rows, length)
    offset = int(torch.randint(0, length, (1,), generator=draw))
    last = lists.newest(length - offset, 16, offset=offset)
    # few different scores: ties between chunks are common
    scores = torch.randint(-2, 3, (2, 3, len(last), bounds.shape[1] - 1), generator=draw).float()
    limits = lists.Limits(*torch.randint(1, 40, (1,), generator=draw).tolist(), seed % 4 * 5, seed % 3 * 6)
    count, index = lists.spend(scores, bounds, last, limits)
    found = [
        own[:size].tolist() for own, size in zip(index.flatten(0, 2), count.flatten().tolist(), strict=True)
    ]
    assert found == specification(scores, bounds, last, limits)
    assert index.shape[-1] == min(limits.budget, length) and bool((index < length).all())


@pytest.mark.parametrize("length", [1, 63, 65, 200])
@pytest.mark.parametrize(
    "settings", [{}, {"per_head": True}, {"overwrite_global": True}, {"pooling": "mean"}]
)
def test_lists_are_unique_causal_and_hold_what_they_must(length, settings):
    query, key, _ = states(length, batch=2, dtype=torch.float32)
    method = sal.DHSA(chunks="uniform", **SMALL, **settings)
    bounds = borders.uniform_boundaries(length, 5).expand(2, -1)
    blocks = select(method, query, key, bounds)
    rows = max(0, length - 8)
    assert blocks.tail == min(8, length) and blocks.rows == rows and blocks.window == 0
    assert blocks.count.shape[1] == (4 if "per_head" in settings and rows else 1)
    for block in range(blocks.count.shape[2]):
        last = min((block + 1) * 16, rows) - 1
        for own, size in zip(
            blocks.index[:, :, block].flatten(0, 1), blocks.count[:, :, block].flatten().tolist(), strict=True
        ):
            listed = own[:size].tolist()
            assert listed == sorted(set(listed)) and listed[-1] == last
            assert set(range(max(0, last - 15), last + 1)) <= set(listed)
            assert set(range(min(8, last + 1))) <= set(listed)
            if not settings.get("overwrite_global"):
                assert size == min(48, last + 1)


def test_a_large_budget_and_a_long_tail_are_dense():
    query, key, value = states(90)
    bounds = borders.uniform_boundaries(90, 7).view(1, -1)
    dense = attention(query, key) @ value.repeat_interleave(2, 1)
    for settings in ({"budget": 90}, {"instruction_tokens": 90}, {"instruction_tokens": 500}):
        blocks = select(sal.DHSA(chunks="uniform", **SMALL | settings), query, key, bounds)
        torch.testing.assert_close(naive.attend(query, key, value, blocks, scaling=8**-0.5), dense)


def test_rows_of_a_batch_may_have_different_numbers_of_chunks():
    query, key, _ = states(100, batch=2)
    method = sal.DHSA(chunks="uniform", **SMALL)
    rows = [torch.tensor([0, 13, 40, 41, 77, 100]), torch.tensor([0, 60, 100])]
    both = select(method, query, key, borders.stacked(rows, 100))
    for row, bounds in enumerate(rows):
        alone = select(method, query[row : row + 1], key[row : row + 1], bounds.view(1, -1))
        assert torch.equal(both.count[row], alone.count[0]) and torch.equal(both.index[row], alone.index[0])


@pytest.mark.parametrize("settings", [{}, {"per_head": True}, {"overwrite_global": True}])
def test_slices_of_blocks_make_no_difference(monkeypatch, settings):
    query, key, _ = states(150, batch=2)
    method = sal.DHSA(chunks="uniform", **SMALL, **settings)
    bounds = borders.uniform_boundaries(150, 6).expand(2, -1)
    whole = select(method, query, key, bounds)
    monkeypatch.setattr(module, "_ELEMENTS", 1000)
    part = select(method, query, key, bounds)
    assert torch.equal(whole.count, part.count)
    held = whole.listed
    assert torch.equal(whole.index[held], part.index[held])


def test_positions_behind_a_cache_are_those_of_the_keys():
    """The last rows of a prompt, read behind a cache, choose as in one go where the blocks are the same."""
    query, key, _ = states(104)
    method = sal.DHSA(chunks="uniform", **SMALL)
    bounds = borders.uniform_boundaries(104, 6).view(1, -1)
    whole, part = select(method, query, key, bounds), select(method, query[:, :, 48:], key, bounds)
    assert torch.equal(whole.count[:, :, 3:], part.count) and torch.equal(whole.index[:, :, 3:], part.index)


# faults of the official code


def test_official_lists_repeat_the_last_key_and_ours_do_not():
    """b = 32 and 64 first keys: the first block holds its last key 33 times, and softmax counts them all."""
    query, key, value = states(128, heads=1, groups=1)
    bounds = borders.uniform_boundaries(128, 8).view(1, -1)
    last = official.ends(128, 128, 32)
    scores = score(query, key, bounds, q_block=32)
    before = official.chosen(scores[:, 0], bounds, last, budget=96, local=16)
    index = official.with_first(before, last, 64)
    assert int((index[0, 0] == 31).sum()) >= 33 and int((before[0, 0] == 31).sum()) == 1
    faulty = official.attend(query, key, value, index, q_block=32, instruction_tokens=0)
    exact = attention(query, key) @ value
    assert float((faulty - exact)[0, 0, 31].abs().max()) > 0.1
    settings = {"q_block": 32, "budget": 96, "local": 16, "global_tokens": 64, "instruction_tokens": 0}
    for overwrite in (False, True):
        blocks = select(
            sal.DHSA(chunks="uniform", overwrite_global=overwrite, **settings), query, key, bounds
        )
        out = kernels.attend(query, key, value, blocks, scaling=8**-0.5)
        torch.testing.assert_close(out[:, :, :32], exact[:, :, :32])


def test_overwriting_loses_chosen_keys_and_the_union_keeps_the_budget():
    query, key, _ = states(200, dtype=torch.float32)
    bounds = borders.uniform_boundaries(200, 1).view(1, -1)
    union, lossy = (
        select(sal.DHSA(chunks="uniform", overwrite_global=one, **SMALL), query, key, bounds)
        for one in (False, True)
    )
    free = select(sal.DHSA(chunks="uniform", **SMALL | {"global_tokens": 0}), query, key, bounds)
    block = 10
    best = set(free.index[0, 0, block].tolist())
    lost = best - set(lossy.index[0, 0, block].tolist())
    # the lowest chosen ones had to go, however well they scored; the union drops the worst ones
    assert lost and max(lost) < min(best & set(lossy.index[0, 0, block].tolist()) - set(range(8)))
    scores = score(query[:, :, :192], key, bounds, q_block=16)[0, 0, block]
    dropped = best - set(union.index[0, 0, block].tolist())
    middle = (best - dropped) - set(range(8)) - set(range(160, 176))
    assert dropped and scores[sorted(dropped)].max() <= scores[sorted(middle)].min()


def test_top_k_without_a_causal_filter_leaves_rows_without_keys():
    query, key = torch.ones(1, 1, 64, 1), torch.zeros(1, 1, 64, 1)
    key[:, :, 48:] = 1.0  # the future attracts everybody
    grid = fixed.Grid(64, 64, 16, 8, 2)
    faulty = fixed.top_k(query, key, grid, causal=False)
    assert not bool(faulty.visible(torch.arange(48)).any())
    ours = fixed.top_k(query, key, grid)
    assert bool(ours.visible().any(-1).all())
    # the best of what can be seen: with equal scores the left
    assert ours.index[0, 0, 1].tolist() == [0, 1] and ours.index[0, 0, 3].tolist() == [6, 7]
    # rows in front of the only block that is chosen see themselves
    narrow = fixed.top_k(query, key.cumsum(2), fixed.Grid(64, 64, 16, 8, 1))
    assert narrow.index[0, 0, 3].tolist() == [7]
    assert narrow.visible(torch.tensor([50]))[0, 0, 0].nonzero().flatten().tolist() == [50]


# fixed blocks


def best_of(scores, count):
    return scores.argsort(descending=True, stable=True)[:count]


def plain_fixed(query, key, grid, pattern, ratio=0.5):
    """Block by block and line by line, in float64; [B, H, N, M] bool."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    batch, heads, length, width = query.shape
    b, c, n, m = grid.q_block, grid.k_block, grid.rows, grid.columns
    tokens = min(grid.keys, grid.most * c)
    mask = torch.zeros(batch, heads, n, m, dtype=torch.bool)
    for row, head in itertools.product(range(batch), range(heads)):
        asked, held = query[row, head], key[row, head]
        end = attention(query, key)[row, head, -min(b, length) :]
        columns = end.sum(0)
        distances = torch.stack([end.diagonal(length - len(end) - d).sum() for d in range(length)])
        means = torch.stack([held[j * c : (j + 1) * c].mean(0) for j in range(m)])
        blockwise = means @ asked[(n - 1) * b :].mean(0) * width**-0.5
        for i in range(n):
            first, recent = i * b // c, (min((i + 1) * b, length) - 1) // c
            scores = means @ asked[i * b : (i + 1) * b].mean(0)
            if pattern == "vertical-slash":
                scores = torch.zeros(m, dtype=torch.float64)
                for at in best_of(columns, int(tokens * ratio)).tolist():
                    scores[at // c] += columns[at]
                for far in best_of(distances, tokens - int(tokens * ratio)).tolist():
                    passed = {(p - far) // c for p in range(i * b, (i + 1) * b) if p >= far}
                    scores[[j for j in passed if j < m]] += distances[far]
            elif pattern == "vertical-slash-blockwise":
                scores = torch.zeros(m, dtype=torch.float64)
                upright = best_of(blockwise, int(grid.most * ratio))
                scores[upright] += blockwise[upright]
                for at in best_of(blockwise, grid.most - int(grid.most * ratio)).tolist():
                    passed = [j - (m - 1 - at) for j in range(first, recent + 1)]
                    scores[[j for j in passed if j >= 0]] += blockwise[at]
            forced = {0, *range(first if pattern.endswith("blockwise") else recent, recent + 1)}
            spared = math.ceil(tokens / b)
            if pattern == "top-k":
                mask[row, head, i, best_of(scores[: recent + 1], grid.most)] = True
            elif recent < grid.most or ("slash" in pattern and (i < spared or i == n - 1)):
                mask[row, head, i, : recent + 1] = True
            else:
                mask[row, head, i, sorted(forced)] = True
                left = max(0, grid.most - len(forced))
                mask[row, head, i, best_of(scores[1:recent], left) + 1] = True
    return mask


@pytest.mark.parametrize("pattern", ["top-k", "a-shape", "vertical-slash", "vertical-slash-blockwise"])
@pytest.mark.parametrize(
    ("length", "b", "c", "most"), [(96, 16, 8, 4), (65, 16, 4, 5), (63, 8, 16, 2), (1, 16, 4, 1)]
)
def test_fixed_blocks_are_chosen_as_written(monkeypatch, pattern, length, b, c, most):
    monkeypatch.setattr(fixed, "_ELEMENTS", 100)
    query, key, _ = states(length, batch=2)
    grid = fixed.Grid(length, length, b, c, most)
    blocks = getattr(fixed, pattern.replace("-", "_"))(query, key, grid)
    assert torch.equal(blocks.to_mask(), plain_fixed(query, key, grid, pattern))
    assert bool(blocks.visible().any(-1).all())


def test_fixed_blocks_keep_a_share():
    assert fixed.kept_blocks(1024, 32, 0.125) == 4
    assert fixed.kept_blocks(1000, 32, 0.125) == 4
    assert fixed.kept_blocks(10, 32, 0.125) == 1


# on a model


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [SMALL, {"pattern": "a-shape", "q_block": 16, "k_block": 8, "density": 0.3}]
)
def test_a_padded_batch_is_its_rows(settings):
    lm, batch = model(), prompts()
    chunks = {} if "pattern" in settings else {"chunks": "uniform"}
    with sal.focus(lm, sal.DHSA(**settings, **chunks)) as handle:
        logits = lm(**batch).logits
        assert 0 < handle.spent["dhsa"]["kept share"] < 1
        for row, length in enumerate((150, 121, 40)):
            alone = lm(batch["input_ids"][row : row + 1, -length:]).logits
            torch.testing.assert_close(logits[row, -length:], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 8, 63, 65])
def test_prompts_within_the_budget_are_dense(length):
    lm, ids = model(), prompts((length,))["input_ids"]
    plain = lm(ids).logits
    with sal.focus(lm, sal.DHSA(chunks="uniform", **SMALL | {"budget": 65})):
        assert torch.equal(lm(ids).logits, plain)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("dhsa") / "borders.safetensors"
    lm = model()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    state = torch.get_rng_state()
    data = [prompts((length,), seed=length) for length in (90, 70, 10)]
    made = sal.train_dhsa(lm, data, file=path, epochs=8, lr=1e-3, hidden=16, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    return made, path


def test_training_learns_and_leaves_the_model_alone(trained):
    made, path = trained
    # two of the three prompts are long enough
    assert len(made.losses) == 16
    assert sum(made.losses[-2:]) < 0.8 * sum(made.losses[:2])
    assert not made.training and not any(value.requires_grad for value in made.parameters())
    again = borders.BoundaryPredictor.load(path)
    assert (again.channels, again.hidden, again.heads, again.window) == (16, 16, 4, 4)
    for name, value in made.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_training_is_repeatable_and_strips_padding():
    settings = {"epochs": 1, "hidden": 8, "progress": False}
    batch = prompts((60, 45))
    first = sal.train_dhsa(model(), [batch], **settings)
    rows = [batch["input_ids"][0], batch["input_ids"][1, 15:]]
    second = sal.train_dhsa(model(), rows, **settings)
    assert first.losses == second.losses and len(first.losses) == 2
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    other = sal.train_dhsa(model(), rows, seed=1, **settings)
    assert other.losses != first.losses


def test_gradients_of_a_step_are_those_of_all_layers_together(monkeypatch):
    """One step: slices of gaps and layers add up to the loss on the whole."""
    monkeypatch.setattr(borders, "_GAPS", 16)
    plan = training.Training(hidden=8)
    made, other = (training.fresh(16, plan, torch.Generator().manual_seed(4)) for _ in "ab")
    query, key, value = states(60, dtype=torch.float32)
    learning = training._Learning(made, plan)
    from salience.hosts.prefill import Prompt

    with torch.no_grad():
        for layer in range(2):
            learning.see(Prompt(query, key, value, 8**-0.5, None, layer, 2, {}, {}))
    border = (borders.mass_ratio(query, key) >= 2).float()
    loss = borders.focal_loss(other(borders.features_of(key)), border, borders.defined(60, 4).view(1, -1))
    (2 * loss).backward()
    assert learning.losses == pytest.approx([float(loss.detach())] * 2)
    for (name, one), two in zip(made.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "data must be prompts of at least 16 tokens .*, got 'none'"),
        ([torch.arange(3, 18)], "data must be prompts of at least 16 tokens .*, got 'none'"),
        ("text", "data must be prompts: mappings with input_ids, or tensors of ids, got 'str'"),
        (["text"], "data must be prompts: mappings with input_ids, or tensors of ids, got 'str'"),
    ],
)
def test_training_refuses_other_data(data, text):
    with pytest.raises(ParameterError, match=text):
        sal.train_dhsa(model(), data)


def test_training_needs_a_layer_that_sees_everything():
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    config = MistralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    with pytest.raises(
        StructureError, match="attention must see all keys in some layer, got sliding windows only"
    ):
        sal.train_dhsa(MistralForCausalLM(config), [torch.arange(3, 43)])


def test_pictures_beside_padded_prompts_are_refused():
    batch = prompts((60, 45)) | {"pixel_values": torch.zeros(2, 3, 4, 4)}
    text = r"data must be one prompt each, without padding, beside pixel_values, got \[2, 60\]"
    with pytest.raises(ParameterError, match=text):
        sal.train_dhsa(model(), [batch])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"gamma": -1.0}, "gamma must be >= 0, got -1.0"),
        ({"heads": 3}, "heads must be a divisor of the keys' 16 channels, got 3"),
    ],
)
def test_training_refuses_bad_values(settings, text):
    with pytest.raises(ParameterError, match=text):
        sal.train_dhsa(model(), [torch.arange(3, 43)], **settings)


@torch.no_grad()
def test_learned_chunks_share_borders_and_lists(trained, monkeypatch):
    _, path = trained
    lm, batch = model(), prompts((150,))
    calls = []
    plain = borders.BoundaryPredictor.forward
    monkeypatch.setattr(
        borders.BoundaryPredictor, "forward", lambda self, x: calls.append(x.shape) or plain(self, x)
    )
    chosen = []
    real = module.select
    monkeypatch.setattr(module, "select", lambda *given: chosen.append(given[3]) or real(*given))
    settings = {"predictor": str(path), "logit_threshold": -2.0, **SMALL}
    logits = []
    for more in ({}, {"share_boundaries": False}, {"share_sparsity_masks": True}):
        calls.clear(), chosen.clear()
        with sal.focus(lm, sal.DHSA(**settings, **more)):
            logits.append(lm(**batch).logits)
        expected = {"share_boundaries": (3, 3), "share_sparsity_masks": (1, 1)}
        assert (len(calls), len(chosen)) == expected.get(next(iter(more), ""), (1, 3))
        assert len(chosen[0][0]) > 3, "the predictor found no border"
    assert not torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"share_boundaries": False}, {"share_sparsity_masks": True}])
def test_learned_chunks_of_a_batch_are_those_of_its_rows(trained, settings):
    _, path = trained
    lm, batch = model(), prompts()
    with sal.focus(lm, sal.DHSA(predictor=str(path), logit_threshold=-2.0, **SMALL, **settings)):
        # the predictor reads keys after rotary: positions have to be the same, as in generate
        places = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        logits = lm(**batch, position_ids=places).logits
        for row, length in enumerate((150, 121, 40)):
            alone = lm(batch["input_ids"][row : row + 1, -length:]).logits
            torch.testing.assert_close(logits[row, -length:], alone[0], rtol=1e-4, atol=1e-5)
        # rows of one length go together
        both = batch["input_ids"][:1].repeat(2, 1)
        both[1] = both[1].flip(0)
        torch.testing.assert_close(lm(both).logits[:1], lm(both[:1]).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_learned_chunks_in_half_precision(trained):
    _, path = trained
    lm, batch = model().bfloat16(), prompts((150,))
    plain = lm(**batch).logits
    with sal.focus(lm, sal.DHSA(predictor=str(path), logit_threshold=-2.0, **SMALL)) as handle:
        read = lm(**batch).logits
        assert handle.spent["dhsa"]["kept share"] < 1
    assert read.dtype == torch.bfloat16 and bool(read.isfinite().all()) and not torch.equal(read, plain)


@torch.no_grad()
def test_learned_chunks_generate(trained):
    _, path = trained
    lm, batch = model(), prompts((100, 90))
    with sal.focus(lm, sal.DHSA(predictor=str(path), logit_threshold=-2.0, **SMALL)) as handle:
        answer = lm.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape == (2, 103) and handle.spent["dhsa"]["prompts"] == 2


def test_without_predictor_prompts_train_one_or_the_reason_is_told():
    with pytest.raises(
        ParameterError, match=r"predictor must be a file .* got neither: chunks='uniform' needs none"
    ):
        sal.focus(model(), sal.DHSA())
    lm, batch = model(), prompts((100,))
    with torch.no_grad(), sal.focus(lm, sal.DHSA(**SMALL, logit_threshold=-9.0), data=[batch]) as handle:
        lm(**batch)
        assert handle.spent["dhsa"]["kept share"] < 1


def test_a_predictor_of_another_model_is_refused(trained, tmp_path):
    _, path = trained
    text = "predictor must be trained for this model's 32 key channels, got 16"
    with pytest.raises(ParameterError, match=text):
        sal.focus(tiny_llama(hidden=64).eval(), sal.DHSA(predictor=str(path)))
    with pytest.raises(ParameterError, match="boundary_window must be the predictor's window of 4, got 3"):
        sal.focus(model(), sal.DHSA(predictor=str(path), boundary_window=3))
