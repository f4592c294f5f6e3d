"""SALE: codes, estimates and choices against a float64 transcription, their bounds, causality, and calibration."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

import salience as sal
from salience import kernels
from salience.core.errors import ParameterError
from salience.core.spec import describe_method, parse_method
from salience.methods.keys import _sale_scores
from salience.methods.keys._sale_calibration import output_error
from salience.methods.keys._sale_scores import (
    Estimator,
    Grid,
    block_log_ras,
    estimate,
    quantise_key,
    quantise_query,
    spend,
    statistics,
)
from salience.methods.keys.sale import choose

# blocks that leave a middle in short prompts
SMALL = {"q_block": 16, "k_block": 8, "local_window": 24, "segment": 16, "dense_below": 0}
GRID = Grid(q_block=16, k_block=8, local_window=24, segment=16)


def make_model(seed=3):
    """Its attention is sharper than at random weights, in each head differently."""
    model = tiny_llama(seed=seed).eval()
    model.config.max_position_embeddings = model.generation_config.max_length = 256
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight *= 10
            for head in range(4):
                layer.self_attn.q_proj.weight[8 * head : 8 * head + 8] *= 20 * (1 + head)
    return model


def ragged_prompts():
    draw = torch.Generator().manual_seed(7)
    lengths = (200, 131, 163)
    ids = torch.randint(3, 64, (3, 200), generator=draw)
    mask = torch.stack([(torch.arange(200) >= 200 - length).long() for length in lengths])
    return {"input_ids": ids * mask, "attention_mask": mask}


CONTRACT = {
    "method": sal.SALE(tau=0.08, **SMALL),
    "keep_all": sal.SALE(tau=0.0, **SMALL),
    "model": make_model,
    "inputs": ragged_prompts,
    "bad": {
        "tau": (-0.1, "tau must be finite and >= 0, got -0.1"),
        "tau:2": (float("nan"), "tau must be finite and >= 0, got nan"),
        "tau:3": (((0.1, 0.2), (0.1,)), "tau must be of as many heads in each layer"),
        "tau:4": ("tau.pt", "tau must be a number or the name of a .safetensors file, got 'tau.pt'"),
        "tau:5": ((0.1, 0.2), "tau must be a number, or one for each layer and head"),
        "theta": (0.0, "theta must be finite and > 0, got 0.0"),
        "q_block": (24, "q_block must be a positive multiple of 16, got 24"),
        "k_block": (12, "k_block must be a positive multiple of 8, got 12"),
        "k_block:2": (0, "k_block must be a positive multiple of 8, got 0"),
        "sink_blocks": (0, "sink_blocks must be >= 1, got 0"),
        "local_window": (130, "local_window must be a positive multiple of 32, got 130"),
        "local_window:2": (64, r"local_window must be >= q_block \+ k_block = 96, got 64"),
        "segment": (48, "segment must be a positive multiple of 32, got 48"),
        "bits": (2, "bits must be 4, 8 or None, got 2"),
        "dense_below": (-1, "dense_below must be >= 0, got -1"),
        "centre": ("mean", "centre must be one of prompt, prefix, got 'mean'"),
    },
}


def states(queries=200, keys=None, heads=4, groups=2, width=16, seed=0, dtype=torch.float32, batch=1):
    """Queries and keys with topics, so that some blocks matter, and with offsets that centring has to remove."""
    draw = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    topics = torch.randn(6, width, generator=draw)
    of = torch.randint(6, (keys // 8 + 1,), generator=draw).repeat_interleave(8)[:keys]
    key = torch.randn(batch, groups, keys, width, generator=draw) + 2 * topics[of] + 3
    asked = torch.randint(6, (queries,), generator=draw)
    query = torch.randn(batch, heads, queries, width, generator=draw) + 1.5 * topics[asked] - 1
    value = torch.randn(batch, groups, keys, width, generator=draw)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def reference(query, key, grid, scaling, *, bits=4, softcap=None, prefix=False):
    """[B, H, N, M] float64 largest log scores and the regions, in loops over blocks, NaN outside of the middle."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    batch, heads, length, _ = query.shape
    keys, size, width = key.shape[2], grid.q_block, grid.k_block
    blocks, top = math.ceil(keys / width), 2 ** ((bits or 4) - 1) - 1
    segment, local = grid.segment // width, grid.local_window // width
    found = torch.full((batch, heads, math.ceil(length / size), blocks), math.nan, dtype=torch.float64)
    ends, middles = [], []
    for b in range(batch):
        for h in range(heads):
            for i in range(found.shape[2]):
                rows = range(i * size, min((i + 1) * size, length))
                last = min(keys, (i + 1) * size + keys - length)
                seen = last if prefix else keys
                asked = min((i + 1) * size, length) if prefix else length
                q, k = query[b, h], key[b, h, :seen] - key[b, h, :seen].mean(0)
                mean = q[:asked].mean(0)
                end = min(blocks, math.ceil(last / width))
                count = math.ceil((end - grid.sink_blocks) / segment)
                rest = end - grid.sink_blocks - count * segment
                count -= math.ceil((local - rest) / segment)
                middle = grid.sink_blocks + segment * max(count, 0)
                if b == h == 0:
                    ends.append(end)
                    middles.append(middle)
                for r in rows:
                    near = [
                        j
                        for j in range(min(r + keys - length + 1, seen))
                        if j < grid.sink_blocks * width or j >= middle * width
                    ]
                    raw = torch.stack(
                        [q[r] @ (k[j] + (key[b, h, :seen].mean(0) if softcap else 0)) for j in near]
                    )
                    z = scaling * raw
                    z = softcap * torch.tanh(z / softcap) if softcap else z
                    total = z.logsumexp(0)
                    pair = [x for x in (r, r + 8 if r % 16 < 8 else r - 8) if x < asked]
                    s_q = max(float((q[x] - mean).abs().max()) for x in pair) / top
                    for block in range(grid.sink_blocks, middle):
                        for j in range(block * width, (block + 1) * width):
                            group = [
                                x
                                for x in range(block * width, (block + 1) * width)
                                if x % 8 // 2 == j % 8 // 2
                            ]
                            s_k = max(float(k[x].abs().max()) for x in group) / top
                            if bits is None:
                                guess = q[r] @ k[j]
                            else:
                                dot = ((q[r] - mean) / s_q).round() @ (k[j] / s_k).round()
                                guess = s_q * s_k * (dot + ((mean @ k[j]) / s_k / s_q).round())
                            z = scaling * (guess + (q[r] @ key[b, h, :seen].mean(0) if softcap else 0))
                            z = softcap * torch.tanh(z / softcap) if softcap else z
                            ras = z - total
                            found[b, h, i, block] = torch.fmax(found[b, h, i, block], ras)
    return found, torch.tensor(ends), torch.tensor(middles)


@pytest.mark.parametrize(
    ("queries", "keys", "options"),
    [
        (80, 80, {}),
        (63, 63, {"bits": 8}),
        (65, 65, {"bits": None}),
        (37, 93, {}),
        (70, 70, {"prefix": True}),
        (33, 81, {"prefix": True}),
        (75, 75, {"softcap": 5.0}),
        (75, 75, {"softcap": 0.5}),
        (41, 77, {"softcap": 5.0, "prefix": True}),
    ],
    ids=str,
)
def test_scores_are_those_of_plain_loops(queries, keys, options):
    query, key, _ = states(queries, keys, heads=2, groups=1, width=8, dtype=torch.float64)
    expected, ends, middles = reference(query, key, GRID, 0.3, **options)
    options = {name: value for name, value in options.items() if name != "prefix"} | {
        "centre": "prefix" if options.get("prefix") else "prompt"
    }
    found = Estimator(query, key, GRID, scaling=0.3, **options)
    assert found.ends.tolist() == ends.tolist() and found.middles.tolist() == middles.tolist()
    assert int((~expected.isnan()).sum()) > 3
    torch.testing.assert_close(
        block_log_ras(query, key, scaling=0.3, grid=GRID, **options),
        expected,
        equal_nan=True,
        rtol=1e-9,
        atol=1e-9,
    )


def test_the_worked_example():
    query = torch.zeros(1, 1, 16, 2, dtype=torch.float64)
    query[0, 0, 0], query[0, 0, 8] = torch.tensor((1.0, -0.4)), torch.tensor((0.2, 0.7))
    codes, scale = quantise_query(query)
    assert codes[0, 0, 0].tolist() == [7, -3] and codes[0, 0, 8].tolist() == [1, 5]
    torch.testing.assert_close(scale[0, 0, [0, 8]], torch.full((2,), 1 / 7, dtype=torch.float64))
    key = torch.zeros(1, 1, 8, 2, dtype=torch.float64)
    key[0, 0, 0], key[0, 0, 1] = torch.tensor((0.5, 0.1)), torch.tensor((-0.7, 0.3))
    held, size = quantise_key(key, 8)
    assert held[0, 0, :2].tolist() == [[5, 1], [-7, 3]]
    torch.testing.assert_close(size[0, 0, :2], torch.full((2,), 0.1, dtype=torch.float64))
    made = estimate(codes, scale, held, size, torch.zeros(1, 1, 8, dtype=torch.float64))
    assert float(made[0, 0, 0, 0]) == pytest.approx(32 / 70)
    # with a row maximum of .9 and a sum of 1.8 a threshold of .3 keeps it, and one of .32 does not
    log_ras = (made[:, :, :1, :1] / math.sqrt(2) - 0.9 - math.log(1.8)).expand(1, 1, 1, 1)
    ends = torch.tensor([1])
    limit = (math.log(0.3 * 1.8) + 0.9) * math.sqrt(2)
    assert limit == pytest.approx(0.4014, abs=1e-4) and bool(spend(log_ras, torch.tensor([0.3]), ends))
    assert not bool(spend(log_ras, torch.tensor([0.32]), ends))


def test_groups_of_zeros_have_scale_one_and_codes_round_half_to_even():
    codes, scale = quantise_query(torch.zeros(1, 1, 20, 3))
    assert not codes.any() and bool((scale == 1).all()) and scale.shape == (1, 1, 20)
    key = torch.zeros(1, 1, 8, 2)
    key[0, 0, 0] = torch.tensor((7.0, 0.5))
    key[0, 0, 1] = torch.tensor((1.5, -2.5))
    codes, scale = quantise_key(key, 8)
    assert codes[0, 0, :2].tolist() == [[7, 0], [2, -2]] and scale[0, 0].tolist() == [1.0] * 8
    assert codes.dtype == torch.int8
    # a whole prompt of equal keys and queries: nothing is left of them, and everything is finite
    query, key = torch.ones(1, 2, 100, 4), torch.ones(1, 1, 100, 4)
    found = block_log_ras(query, key, scaling=0.5, grid=GRID)
    assert bool(found[~found.isnan()].isfinite().all()) and bool((~found.isnan()).any())


def test_the_groups_that_share_a_scale():
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(40, 5, generator=draw)
    _, scale = quantise_query(states)
    for row in range(40):
        partner = row + 8 if row % 16 < 8 else row - 8
        members = [states[row].abs().max()] + ([states[partner].abs().max()] if partner < 40 else [])
        assert float(scale[row]) == pytest.approx(float(max(members)) / 7)
    _, scale = quantise_key(states, 16)
    for row in range(40):
        members = [j for j in range(40) if j // 16 == row // 16 and j % 8 // 2 == row % 8 // 2]
        assert float(scale[row]) == pytest.approx(float(states[members].abs().max()) / 7)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_estimate_keeps_its_bound(bits):
    query, key, _ = states(96, heads=1, groups=1, dtype=torch.float64)
    query, key = query[0, 0], key[0, 0] - key[0, 0].mean(0)
    mean = query.mean(0)
    codes, s_q = quantise_query(query - mean, bits)
    held, s_k = quantise_key(key, 32, bits)
    error = (estimate(codes, s_q, held, s_k, key @ mean) - query @ key.T).abs()
    s_q, s_k = s_q.unsqueeze(1), s_k.unsqueeze(0)
    channels = (query - mean).abs().sum(1, keepdim=True) * s_k / 2 + key.abs().sum(1).unsqueeze(0) * s_q / 2
    bound = channels + query.shape[1] * s_q * s_k / 4 + s_q * s_k / 2
    assert bool((error <= bound + 1e-12).all()) and float(error.max()) > 0
    assert float(error.mean()) < float(bound.mean()) / 4


def test_tau_zero_is_dense_and_a_huge_one_leaves_sink_and_local_keys():
    query, key, value = states(260)
    everything = torch.ones(260, 260, dtype=torch.bool).tril()
    dense = kernels.dense.attend(query, key, value, scaling=0.25)
    for tau in (0.0, 9e-6):
        blocks = choose(query, key, torch.full((4,), tau), scaling=0.25)
        assert torch.equal(blocks.visible(), everything.expand(1, 4, -1, -1))
        torch.testing.assert_close(
            kernels.attend(query, key, value, blocks, scaling=0.25), dense, atol=1e-5, rtol=0
        )
    # heads of their own: the second key head needs an estimate, the first does not
    tau = torch.tensor([0.0, 0.0, 1e30, 0.0])
    blocks = choose(query, key, tau, scaling=0.25, grid=GRID)
    assert torch.equal(blocks.visible()[0, [0, 1, 3]], everything.expand(3, -1, -1))
    ends, middles = GRID.regions(260, 260)
    mask = blocks.to_mask()[0, 2]
    for i, (end, middle) in enumerate(zip(ends.tolist(), middles.tolist())):
        assert mask[i].nonzero().flatten().tolist() == [0, *range(middle, end)]


@pytest.mark.parametrize("bits", [4, 8, None])
def test_the_kept_set_grows_as_tau_falls(bits):
    query, key, _ = states(300)
    before, shares = None, []
    for tau in (1e30, 1e4, 1e3, 100.0, 30.0, 10.0, 1.0, 0.1, 1e-3, 2e-5, 0.0):
        mask = choose(query, key, torch.full((4,), tau), scaling=0.25, grid=GRID, bits=bits).to_mask()
        assert before is None or bool((before <= mask).all())
        before, shares = mask, [*shares, int(mask.sum())]
    assert len(set(shares)) >= 6


@pytest.mark.parametrize("size", [1, 15, 16, 63, 65, 200])
@pytest.mark.parametrize("before", [0, 1, 50])
def test_sink_and_diagonal_are_kept_and_nothing_of_the_future(size, before):
    query, key, value = states(size, size + before)
    for grid in (GRID, Grid(), Grid(q_block=32, k_block=16, sink_blocks=2, local_window=48, segment=16)):
        blocks = choose(query, key, torch.full((4,), 0.5), scaling=0.25, grid=grid)
        mask = blocks.to_mask()
        _, middles = grid.regions(size, size + before)
        assert bool(mask[..., 0].all())
        for i in range(mask.shape[2]):
            first, last = i * grid.q_block + before, min((i + 1) * grid.q_block + before, size + before) - 1
            assert bool(mask[:, :, i, first // grid.k_block : last // grid.k_block + 1].all())
            assert not bool(mask[:, :, i, last // grid.k_block + 1 :].any())
            assert int(middles[i]) * grid.k_block <= max(first, grid.sink_blocks * grid.k_block)
            end = last // grid.k_block + 1
            assert bool(mask[:, :, i, max(0, end - grid.local_window // grid.k_block) : end].all())
        assert bool(blocks.visible().any(-1).all())
        assert bool(kernels.attend(query, key, value, blocks, scaling=0.25).isfinite().all())


def test_a_constant_in_all_keys_changes_nothing():
    query, key, value = states(220, dtype=torch.float64)
    moved = key + torch.linspace(-5, 5, 16, dtype=torch.float64)
    first, second = (one - one.mean(2, keepdim=True) for one in (key, moved))
    assert torch.equal(quantise_key(first, 8)[0], quantise_key(second, 8)[0])
    tau = torch.full((4,), 0.05)
    outs = []
    for centre in ("prompt", "prefix"):
        plain, other = (
            choose(query, one, tau, scaling=0.25, grid=GRID, centre=centre) for one in (key, moved)
        )
        assert torch.equal(plain.to_mask(), other.to_mask())
        outs = [kernels.attend(query, one, value, plain, scaling=0.25) for one in (key, moved)]
        torch.testing.assert_close(*outs)


def test_statistics_are_the_softmax_over_what_is_always_seen():
    query, key, _ = states(150, 190, dtype=torch.float64)
    row_max, row_sum = statistics(query, key, GRID, scaling=0.25)
    near = choose(query, key, torch.full((4,), 1e30), scaling=0.25, grid=GRID).visible()
    scores = kernels.naive.scores(query, key, scaling=0.25, dtype=torch.float64).masked_fill(
        ~near, -torch.inf
    )
    torch.testing.assert_close(row_max, scores.amax(-1))
    torch.testing.assert_close(row_max + row_sum.log(), scores.logsumexp(-1))


def test_with_the_choice_held_later_tokens_change_nothing():
    query, key, value = states(160)
    blocks = choose(query, key, torch.full((4,), 0.1), scaling=0.25, grid=GRID)
    before = kernels.attend(query, key, value, blocks, scaling=0.25)
    query[:, :, 96:], key[:, :, 96:], value[:, :, 96:] = 9.0, -7.0, 5.0
    after = kernels.attend(query, key, value, blocks, scaling=0.25)
    assert torch.equal(before[:, :, :96], after[:, :, :96])


def test_only_prefix_means_keep_the_choice_from_later_tokens():
    """Whole blocks of queries: within a block, rows share their scales and their choice."""
    query, key, _ = states(320)
    other_query, other_key = query.clone(), key.clone()
    other_query[:, :, 160:] += 60 * torch.linspace(-1, 1, 16)
    other_key[:, :, 160:] -= 80 * torch.linspace(-1, 1, 16)
    tau = torch.full((4,), 10.0)
    same = {}
    for centre in ("prompt", "prefix"):
        how = {"scaling": 0.25, "grid": GRID, "centre": centre}
        whole = choose(query, key, tau, **how).to_mask()[:, :, :10, :20]
        changed = choose(other_query, other_key, tau, **how).to_mask()[:, :, :10, :20]
        alone = choose(query[:, :, :160], key[:, :, :160], tau, **how).to_mask()
        same[centre] = torch.equal(whole, changed), torch.equal(whole, alone)
    assert same == {"prompt": (False, False), "prefix": (True, True)}


def test_chunks_of_a_prompt_take_the_means_of_all_keys_so_far():
    query, key, _ = states(64, 256, dtype=torch.float64)
    ras = block_log_ras(query, key, scaling=0.25, grid=GRID, bits=None)
    whole = torch.cat((torch.zeros(1, 4, 192, 16, dtype=torch.float64), query), 2)
    expected = block_log_ras(whole, key, scaling=0.25, grid=GRID, bits=None)
    torch.testing.assert_close(ras, expected[:, :, 12:], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_read_as_it_is_and_scored_in_fp32(dtype):
    query, key, _ = states(180, dtype=dtype)
    made = block_log_ras(query, key, scaling=0.25, grid=GRID)
    assert made.dtype == torch.float32
    torch.testing.assert_close(
        made, block_log_ras(query.float(), key.float(), scaling=0.25, grid=GRID), equal_nan=True
    )
    expected, *_ = reference(query[:, :1, :64], key[:, :1, :64], GRID, 0.25)
    found = block_log_ras(query[:, :1, :64], key[:, :1, :64], scaling=0.25, grid=GRID)
    torch.testing.assert_close(found.double(), expected, equal_nan=True, rtol=0, atol=1e-4)


def test_grouped_heads_are_as_repeated_keys():
    query, key, _ = states(200, heads=6, groups=2, batch=2)
    tau = torch.tensor([0.02, 0.1, 0.5, 0.05, 0.0, 0.2])
    grouped = choose(query, key, tau, scaling=0.25, grid=GRID)
    repeated = choose(query, key.repeat_interleave(3, 1), tau, scaling=0.25, grid=GRID)
    assert torch.equal(grouped.to_mask(), repeated.to_mask())
    for sample in range(2):
        part = choose(query[sample : sample + 1], key[sample : sample + 1], tau, scaling=0.25, grid=GRID)
        assert torch.equal(part.to_mask()[0], grouped.to_mask()[sample])


def test_slices_do_not_matter(monkeypatch):
    query, key, _ = states(400)
    whole = block_log_ras(query, key, scaling=0.25, grid=GRID)
    row_max, row_sum = statistics(query, key, GRID, scaling=0.25)
    monkeypatch.setattr(_sale_scores, "_HELD_CPU", 1)
    monkeypatch.setattr(_sale_scores, "_ROWS", 1)
    torch.testing.assert_close(block_log_ras(query, key, scaling=0.25, grid=GRID), whole, equal_nan=True)
    torch.testing.assert_close(statistics(query, key, GRID, scaling=0.25), (row_max, row_sum))


def test_one_key_that_matters_is_found_in_its_block():
    """It is 1 of 32 keys, and a mean over the block would hide it."""
    draw = torch.Generator().manual_seed(2)
    query, key = (0.3 * torch.randn(1, 1, 1024, 32, generator=draw) for _ in range(2))
    wanted = torch.randn(32, generator=draw)
    key[0, 0, 330], query[0, 0, 1000] = 4 * wanted, 4 * wanted
    mask = choose(query, key, torch.tensor([0.1]), scaling=32**-0.5).to_mask()[0, 0]
    local = Grid().regions(1024, 1024)[1].tolist()
    assert mask[1000 // 64].nonzero().flatten().tolist() == [0, 330 // 32, *range(local[15], 32)]


@torch.no_grad()
def test_short_prompts_and_dense_heads_are_left_alone():
    model, batch = make_model(), ragged_prompts()
    plain = model(**batch).logits
    with sal.focus(model, replace(CONTRACT["method"], dense_below=1024)) as handle:
        assert torch.equal(model(**batch).logits[0], plain[0])
        assert handle.spent["sale"]["kernel"] == "dense"
    with sal.focus(model, CONTRACT["keep_all"]) as handle:
        torch.testing.assert_close(model(**batch).logits[:, -1], plain[:, -1], rtol=0, atol=1e-5)
        assert handle.spent["sale"]["kept share"] == 1.0
    with sal.focus(model, CONTRACT["method"]) as handle:
        changed = model(**batch).logits
        assert 0.3 < handle.spent["sale"]["kept share"] < 1.0
    assert not torch.allclose(changed[:, -1], plain[:, -1], atol=1e-5)


@torch.no_grad()
def test_generation_decodes_over_the_whole_cache():
    model, batch = make_model(), ragged_prompts()
    with sal.focus(model, CONTRACT["keep_all"]):
        kept = model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(kept, model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0))
    one = {name: value[:1] for name, value in batch.items()}
    with sal.focus(model, CONTRACT["method"]):
        cache = model(**one, use_cache=True).past_key_values
        step = model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits[0, 0]
    cache.crop(-1)
    torch.testing.assert_close(step, model(input_ids=torch.tensor([[5]]), past_key_values=cache).logits[0, 0])


def halved(model, prompts, method):
    """The rule in plain words, with whole maps: layer by layer, head by head."""
    seen = {}
    found = torch.full((2, 4), method.tau if isinstance(method.tau, float) else 0.0)
    for ids in prompts:
        calls = []
        record = sal_record(model, calls)
        model(input_ids=ids)
        record.undo()
        for layer, (query, key, value, scaling) in enumerate(calls):
            exact = kernels.naive.attend(
                query, key, value, kernels.KeyBlocks.everything(query.shape[2], key.shape[2]), scaling=scaling
            )
            for head in range(4):
                while float(found[layer, head]) > 0:
                    blocks = choose(query, key, found[layer], scaling=scaling, grid=method.grid)
                    out = kernels.naive.attend(query, key, value, blocks, scaling=scaling)
                    error = float((exact - out)[0, head].abs().sum() / query.shape[2])
                    seen[layer, head] = error
                    if error < method.theta:
                        break
                    found[layer, head] /= 2
                    if float(found[layer, head]) <= 1e-4:
                        found[layer, head] = 0.0
    return found


def sal_record(model, calls):
    from salience.core.attach import Attachment
    from salience.hosts.prefill import prefill

    record = Attachment()
    prefill(model, record, lambda p: calls.append((p.query, p.key, p.value, p.scaling)))
    return record


@torch.no_grad()
def test_calibration_halves_until_the_output_holds(tmp_path):
    model = make_model()
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 64, (1, length), generator=draw) for length in (200, 150)]
    method = sal.SALE(tau=0.2, theta=0.3, **SMALL)
    random = torch.get_rng_state()
    path = tmp_path / "made" / "tau.safetensors"
    taus = sal.calibrate_sale(model, [{"input_ids": ids} for ids in prompts], method, path=path)
    assert torch.equal(torch.get_rng_state(), random) and taus.dtype == torch.float32
    expected = halved(model, prompts, method)
    assert torch.equal(taus, expected)
    assert taus.shape == (2, 4) and len(taus.unique()) >= 3
    assert torch.equal(load_file(path)["tau"], taus)
    # a smaller theta never gives a larger threshold, a hopeless one none at all, an easy one what there was
    assert bool((sal.calibrate_sale(model, prompts, replace(method, theta=0.05)) <= taus).all())
    assert not bool(sal.calibrate_sale(model, prompts, replace(method, theta=1e-9)).any())
    assert bool((sal.calibrate_sale(model, prompts, replace(method, theta=1e9)) == 0.2).all())
    # from a table: further prompts only lower it
    again = sal.calibrate_sale(model, prompts, replace(method, tau=str(path)))
    assert torch.equal(again, taus)

    batch = ragged_prompts()
    with sal.focus(model, method, data=prompts) as handle:
        assert torch.equal(handle.scores["sale.tau"], taus)
        logits = model(**batch).logits
    assert torch.equal(handle.scores["sale.tau"], taus)
    nested = tuple(tuple(row) for row in taus.tolist())
    for tau in (str(path), nested):
        with sal.focus(model, replace(method, tau=tau)):
            assert torch.equal(model(**batch).logits, logits)


@torch.no_grad()
def test_calibration_reads_batches_with_padding_and_says_what_is_missing(tmp_path):
    model, batch = make_model(), ragged_prompts()
    method = sal.SALE(tau=0.2, theta=0.02, **SMALL)
    rows = [batch["input_ids"][row, batch["attention_mask"][row].bool()].unsqueeze(0) for row in range(3)]
    # counted from each first token: a rotary embedding of other positions has other codes
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    training = model.train()
    assert torch.equal(sal.calibrate_sale(model, [batch], method), sal.calibrate_sale(model, rows, method))
    assert training.training
    assert torch.equal(
        sal.calibrate_sale(model, rows[0], method), sal.calibrate_sale(model, rows[:1], method)
    )
    assert torch.equal(sal.calibrate_sale(model, batch, method), sal.calibrate_sale(model, [batch], method))
    with pytest.raises(ParameterError, match=r"data must be prompts of more than 1024 tokens"):
        sal.calibrate_sale(model, [batch])
    with pytest.raises(ParameterError, match=r"data must be prompts of more than 0 tokens"):
        sal.focus(model, method, data=[])
    with pytest.raises(ParameterError, match=r"path must be a \.safetensors file"):
        sal.calibrate_sale(model, [batch], method, path=tmp_path / "tau.pt")
    assert not vars(model.model).get("_salience_keys")


def test_a_progress_bar_counts_layers(capsys):
    model = make_model()
    sal.calibrate_sale(model, [torch.full((1, 60), 5)], sal.SALE(**SMALL), progress=True)
    shown = capsys.readouterr().err
    assert "sale: layers calibrated" in shown and "100%" in shown


def test_tables_of_another_model_are_refused(tmp_path):
    model = make_model()
    with pytest.raises(ParameterError, match=r"tau must be \[2, 4\] for the layers and heads of this model"):
        sal.focus(model, sal.SALE(tau=((0.1, 0.2),)))
    with pytest.raises(ParameterError, match=r"tau must be a readable \.safetensors file"):
        sal.focus(model, sal.SALE(tau=str(tmp_path / "none.safetensors")))
    path = tmp_path / "tau.safetensors"
    save_file({"other": torch.zeros(2, 4)}, path)
    with pytest.raises(ParameterError, match="tau must be a file that holds `tau`"):
        sal.focus(model, sal.SALE(tau=str(path)))
    save_file({"tau": torch.full((2, 4), torch.nan)}, path)
    with pytest.raises(ParameterError, match="tau must be finite and >= 0"):
        sal.focus(model, sal.SALE(tau=str(path)))
    path.write_bytes(b"no tensors")
    with pytest.raises(ParameterError, match=r"tau must be a readable \.safetensors file"):
        sal.focus(model, sal.SALE(tau=str(path)))


@pytest.mark.parametrize(
    "text",
    ["sale:tau=0.02", "sale:tau=((0.1,0.2),(0.3,0.0))", "sale:tau=t.safetensors,bits=none,centre=prefix"],
)
def test_methods_as_text(text):
    method = parse_method(text)
    assert describe_method(method) == text.replace("bits=none", "bits=none")
    assert not isinstance(method.tau, str) or method.tau == "t.safetensors"


def test_the_error_is_a_sum_over_channels_a_mean_over_tokens():
    exact = torch.zeros(1, 2, 3, 4)
    other = torch.stack((torch.ones(3, 4), torch.full((3, 4), -0.5))).unsqueeze(0)
    assert output_error(exact, other).tolist() == [[4.0, 2.0]]


def test_thresholds_are_one_number_for_each_head():
    query, key, _ = states(60)
    with pytest.raises(ParameterError, match=r"tau must be \[4\], one for each head, got \[2\]"):
        choose(query, key, torch.full((2,), 0.1), scaling=0.25)
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ParameterError, match="tau must be >= 0"):
            choose(query, key, torch.tensor([0.1, 0.1, wrong, 0.1]), scaling=0.25)


def test_no_gradient_goes_through_the_choice():
    query, key, value = (one.requires_grad_() for one in states(100))
    blocks = choose(query, key, torch.full((4,), 1.0), scaling=0.25, grid=GRID)
    kernels.attend(query, key, value, blocks, scaling=0.25).sum().backward()
    assert bool(query.grad.isfinite().all()) and bool(value.grad.any())
