"""The Triton kernels in Triton's interpreter, against their torch twins and the golden files; no GPU is needed.

The interpreter has to be switched on before triton is imported, and another test may have imported triton already:
this file is its own worker, which computes every case in a process of its own and prints what it measured.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# the worker's first argument says where it computes
DEVICE = "cuda" if sys.argv[1:] == ["cuda"] else "cpu"
COMPILER = Path(__file__).parents[1] / "workers" / "compile_triton.py"
GOLDEN = Path(__file__).parents[1] / "golden"
# queries, keys, q_block, k_block, window, heads, key heads, heads of the lists, head size, value size, density
ATTEND = {
    "one token": (1, 1, 64, 32, 0, 1, 1, 1, 64, 64, 1.0),
    "single keys for all heads": (20, 50, 16, 1, 5, 4, 2, 1, 64, 64, 0.5),
    "pairs of keys and a window": (70, 101, 32, 2, 33, 2, 1, 2, 64, 80, 0.5),
    "blocks of three keys": (21, 90, 11, 3, 4, 2, 2, 2, 16, 16, 0.5),
    "blocks of 16 keys": (150, 150, 64, 16, 0, 2, 1, 2, 128, 128, 0.4),
    "blocks of 32 keys and a wide head": (65, 97, 64, 32, 7, 2, 1, 1, 256, 256, 0.5),
    "blocks of 64 keys": (130, 200, 64, 64, 0, 2, 2, 2, 80, 80, 0.5),
    "blocks of 128 keys": (40, 333, 16, 128, 20, 2, 1, 1, 32, 32, 0.6),
    "query blocks of more rows than a tile": (300, 300, 300, 48, 5, 1, 1, 1, 16, 128, 0.3),
    "one row a query block, packed heads": (5, 140, 1, 64, 3, 4, 1, 1, 64, 64, 0.7),
    "a window longer than the prompt": (70, 70, 16, 2, 200, 2, 1, 1, 32, 32, 0.5),
    "nothing listed": (20, 40, 16, 16, 0, 2, 2, 2, 32, 32, 0.0),
    "nothing but a window": (20, 60, 16, 16, 9, 2, 2, 2, 32, 32, 0.0),
}
# what rounding the weights and the output to so many bits costs
BOUNDS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
GRID = {"q_block": 64, "k_block": 32, "sink_blocks": 1, "local_window": 128, "segment": 128}
# queries, keys, heads, key heads, head size, type, grid, and what the choice is asked
SALE = {
    "grouped heads, one dense": (300, 300, 4, 2, 32, "float32", {}, {"tau": (0.25, 0.0, 5.0, 0.25)}),
    "behind a cache": (70, 400, 2, 2, 48, "bfloat16", {}, {"tau": (0.2, 0.105)}),
    "a soft cap": (330, 330, 2, 1, 16, "float32", {}, {"tau": (0.065, 0.083), "softcap": 3.0}),
    "8 bits, other blocks": (
        *(300, 300, 1, 1, 16, "float16"),
        {"q_block": 48, "k_block": 24, "sink_blocks": 2, "local_window": 96, "segment": 48},
        {"tau": (0.115,), "bits": 8},
    ),
}
PLAIN = {"mask_k": 16, "q_block": 16, "q_stride": 2, "q_offset": 1, "k_block": 2, "window": 8}
# queries, keys, heads, key heads, head size, type, and what the search is asked
HIP = {
    "sinks and the last block": (70, 70, 2, 1, 16, "float32", {"sink_tokens": 5, "representative": "last"}),
    "heads that search together": (33, 90, 4, 2, 16, "bfloat16", {"head_group": 4}),
    "strides, behind a cache": (
        *(20, 130, 2, 2, 48, "float32"),
        {"mask_k": 24, "k_block": 8, "k_stride": 3, "representative": "first"},
    ),
    "one query": (1, 100, 2, 1, 32, "float16", {"q_block": 1, "q_stride": 1, "q_offset": 0}),
    "dense queries, slots of no power of two": (
        64,
        64,
        1,
        1,
        16,
        "float32",
        {"mask_k": 10, "dense_queries": 40},
    ),
    "equal scores": (40, 40, 1, 1, 16, "equal", {}),
}


def measure_attend(case, dtype="float32", softcap=None):
    from salience.kernels import naive, triton_attend
    from salience.kernels.blocks import KeyBlocks

    queries, keys, q_block, k_block, window, heads, groups, listed, width, deep, density = ATTEND[case]
    draw = torch.Generator().manual_seed(3)
    sizes = {"q_block": q_block, "k_block": k_block, "queries": queries, "keys": keys, "window": window}
    batch = 1 if queries > 100 else 2
    mask = torch.rand(batch, listed, -(-queries // q_block), -(-keys // k_block), generator=draw) < density
    blocks = KeyBlocks.from_mask(mask.to(DEVICE), **sizes)
    # places beyond the counts may hold anything
    blocks.index[~blocks.listed] = blocks.keys // k_block - 1 if keys >= k_block else 0
    # rows side by side in memory, as a model's projection leaves them
    query = torch.randn(batch, queries, heads, width, generator=draw).transpose(1, 2)
    key = torch.randn(batch, groups, keys, width, generator=draw)
    value = torch.randn(batch, groups, keys, deep, generator=draw)
    inputs = [one.to(DEVICE, getattr(torch, dtype)) for one in (query, key, value)]
    expected = naive.attend(*inputs, blocks, scaling=width**-0.5, softcap=softcap)
    found = triton_attend.attend(*inputs, blocks, scaling=width**-0.5, softcap=softcap)
    blind = ~blocks.visible().any(-1).expand(batch, heads, queries)
    return {
        "error": (found.double() - expected.double()).abs().max().item(),
        "largest": expected.double().abs().max().item(),
        "blind": int(blind.sum()),
        "of blind rows": found[blind].double().abs().sum().item(),
        "dtype": str(found.dtype),
    }


def differ(one, other):
    return int((one != other).sum()) + abs(one.numel() - other.numel())


def lists_differ(one, other):
    return differ(one.count, other.count) + differ(one.to_mask(), other.to_mask())


def measure_sale(case):
    from salience.kernels import triton_sale
    from salience.methods.keys import _sale_scores as twin
    from salience.methods.keys.sale import choose

    queries, keys, heads, groups, width, dtype, sizes, asked = SALE[case]
    grid = twin.Grid(**GRID | sizes)
    draw = torch.Generator().manual_seed(5)
    query = torch.randn(1, queries, heads, width, generator=draw).transpose(1, 2) + 0.5
    key = torch.randn(1, groups, keys, width, generator=draw) - 0.5
    # a block that stands out, and a group of zeros: some keys are the mean of all
    key[:, :, 40:42] *= 4
    query, key = (one.to(DEVICE, getattr(torch, dtype)) for one in (query, key))
    asked = {"scaling": width**-0.5, "grid": grid, **asked, "tau": torch.tensor(asked["tau"], device=DEVICE)}
    softcap, bits = asked.get("softcap"), asked.get("bits", 4)
    found, expected = triton_sale.choose(query, key, **asked), choose(query, key, **asked)

    query, key = query.float(), key.float()
    means = query.mean(2, keepdim=True), key.mean(2, keepdim=True)
    key[:, :, 16:18] = means[1]
    ways = []
    for centre, side in ((False, twin), (True, triton_sale)):
        mine, theirs = (query, key) if centre else (query - means[0], key - means[1])
        with_means = [{"mean": mean} if centre else {} for mean in means]
        # a soft cap looks at keys as they are
        near = {} if softcap is not None else with_means[1]
        ways.append(
            (
                side.quantise_query(mine, bits, **with_means[0]),
                side.quantise_key(theirs, grid.k_block, bits, **with_means[1]),
                side.statistics(
                    query,
                    key if centre or softcap is not None else theirs,
                    grid,
                    scaling=asked["scaling"],
                    softcap=softcap,
                    **near,
                ),
            )
        )
    codes, statistics = [], []
    for kind in range(2):
        codes.append(differ(ways[0][kind][0], ways[1][kind][0]))
        statistics.append((ways[0][kind][1] - ways[1][kind][1]).abs().max().item())
    (peak, total), (other_peak, other_total) = ways[0][2], ways[1][2]
    statistics += [(peak - other_peak).abs().max().item(), (total / other_total - 1).abs().max().item()]
    middle = ~twin.block_log_ras(
        query, key, scaling=asked["scaling"], softcap=softcap, grid=grid, bits=bits
    ).isnan()
    return {
        "lists": lists_differ(found, expected),
        "codes": codes,
        "statistics": statistics,
        "kept": expected.to_mask()[middle].double().mean().item(),
    }


def measure_sale_threshold():
    """A tau a thousandth below and above a block's score keeps it and drops it: much less than rounding moves it."""
    from salience.kernels import triton_sale
    from salience.methods.keys import _sale_scores as twin

    draw = torch.Generator().manual_seed(6)
    query, key = (torch.randn(1, 1, 300, 32, generator=draw).to(DEVICE) + 0.5 for _ in range(2))
    asked = {"scaling": 32**-0.5, "grid": twin.Grid(**GRID)}
    scores = twin.block_log_ras(query, key, **asked)
    level = scores[~scores.isnan()].sort().values[1]
    below, above = (
        triton_sale.choose(query, key, (level + step).exp().view(1), **asked).to_mask()
        for step in (-1e-3, 1e-3)
    )
    wrong = differ(below & ~above, scores == level) + differ(above & ~below, torch.zeros_like(above))
    kept = below[~scores.isnan()].double().mean().item()
    return {"lists": wrong, "codes": [0, 0], "statistics": [0.0], "kept": kept}


def measure_golden_sale():
    from safetensors.torch import load_file

    from salience.kernels import triton_sale
    from salience.methods.keys._sale_scores import Grid

    tensors = load_file(GOLDEN / "sale.safetensors", device=DEVICE)
    told = json.loads((GOLDEN / "sale.json").read_text())["parameters"]
    sizes = {"q_block": told["block_q"], "k_block": told["block_k"]}
    grid = Grid(**sizes, local_window=told["local_window"], segment=told["segment"])
    query, key, scaling = tensors["q"], tensors["k"], tensors["q"].shape[-1] ** -0.5
    means = [one.mean(2, keepdim=True, dtype=torch.float32) for one in (query, key)]
    query_codes, query_scale = triton_sale.quantise_query(query, mean=means[0])
    key_codes, key_scale = triton_sale.quantise_key(key, grid.k_block, mean=means[1])
    row_max, row_sum = triton_sale.statistics(query, key, grid, scaling=scaling, mean=means[1])
    chosen = triton_sale.choose(query, key, tensors["tau"], scaling=scaling, grid=grid)
    floats = {"q_scale": query_scale, "k_scale": key_scale, "row_max": row_max, "row_sum": row_sum}
    return {
        "codes": [differ(query_codes, tensors["q_codes"]), differ(key_codes, tensors["k_codes"])],
        "lists": differ(chosen.to_mask(), tensors["block_mask"]),
        "statistics": [(one / tensors[name] - 1).abs().max().item() for name, one in floats.items()],
        "kept": tensors["block_mask"][~tensors["block_log_ras"].isnan()].double().mean().item(),
    }


def measure_hip(case):
    from salience.kernels import triton_hip
    from salience.methods.keys._hip_search import search

    queries, keys, heads, groups, width, dtype, asked = HIP[case]
    draw = torch.Generator().manual_seed(7)
    query = torch.randn(2, queries, heads, width, generator=draw).transpose(1, 2)
    key = torch.randn(2, groups, keys, width, generator=draw)
    if dtype == "equal":
        key, dtype = torch.ones_like(key), "float32"
    query, key = (one.to(DEVICE, getattr(torch, dtype)) for one in (query, key))
    asked = {"scaling": width**-0.5, **PLAIN, **asked}
    found, expected = triton_hip.search(query, key, **asked), search(query, key, **asked)
    return {"lists": lists_differ(found, expected), "kept": expected.to_mask().float().mean().item()}


def measure_golden_hip(name):
    from safetensors.torch import load_file

    from salience.kernels import triton_hip

    tensors = load_file(GOLDEN / "hip.safetensors", device=DEVICE)
    told = json.loads((GOLDEN / "hip.json").read_text())["parameters"]
    found = triton_hip.search(
        tensors["q"],
        tensors["k"],
        scaling=tensors["q"].shape[-1] ** -0.5,
        mask_k=told["mask_k"],
        q_block=told["bq"],
        q_stride=2,
        q_offset=1,
        k_block=told["bk"],
        window=told["sw"],
        representative="first" if name == "off_first" else "center",
        causal_scores=name != "off_first",
    )
    starts = (found.index * found.k_block).masked_fill(~found.listed, -1)
    counts = differ(found.count, tensors[f"{name}_count"])
    return {
        "lists": counts + differ(starts, tensors[f"{name}_indices"]),
        "kept": found.to_mask().double().mean().item(),
    }


WORK = {
    "attend": {
        **{case: (measure_attend, case) for case in ATTEND},
        **{
            f"{dtype}, {case}": (measure_attend, case, dtype)
            for dtype in ("float16", "bfloat16")
            for case in ("pairs of keys and a window", "blocks of 16 keys")
        },
        "a soft cap": (measure_attend, "pairs of keys and a window", "float32", 2.0),
    },
    "sale": {
        "golden": (measure_golden_sale,),
        "threshold": (measure_sale_threshold,),
        **{case: (measure_sale, case) for case in SALE},
    },
    "hip": {
        **{f"golden {name}": (measure_golden_hip, name) for name in ("off_first", "ref_center")},
        **{case: (measure_hip, case) for case in HIP},
    },
}


def asked_alone(*command, **environment):
    """What this file, or another, prints as a program of its own."""
    pytest.importorskip("triton", reason="triton is not installed")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env={**plain, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def measured():
    return asked_alone(__file__, "cpu", TRITON_INTERPRET="1")


@pytest.mark.parametrize("case", WORK["attend"])
def test_attend_agrees_with_naive(measured, case):
    found = measured["attend"][case]
    dtype = found["dtype"].removeprefix("torch.")
    assert dtype in case or dtype == "float32"
    assert found["error"] <= BOUNDS[dtype] * max(1.0, found["largest"])
    assert found["largest"] > 0.1 or case == "nothing listed"
    assert found["of blind rows"] == 0.0
    assert found["blind"] > 0 or case != "nothing listed"


@pytest.mark.parametrize("case", WORK["sale"])
def test_sale_chooses_what_its_twin_and_the_reference_choose(measured, case):
    found = measured["sale"][case]
    assert found["lists"] == 0
    assert found["codes"] == [0, 0]
    assert max(found["statistics"]) <= 1e-5
    assert 0.05 < found["kept"] < 0.95


@pytest.mark.parametrize("case", WORK["hip"])
def test_hip_finds_what_its_twin_and_the_official_code_find(measured, case):
    found = measured["hip"][case]
    assert found["lists"] == 0
    assert 0.05 < found["kept"] < 0.995


def test_without_a_gpu_and_an_interpreter_the_kernels_say_so():
    from salience.kernels import triton_attend, triton_hip, triton_sale, triton_setup
    from salience.kernels.blocks import KeyBlocks

    if triton_setup.INTERPRETED or torch.cuda.is_available():
        pytest.skip("triton runs here")
    states = torch.zeros(1, 1, 4, 16)
    reason = r"triton is not installed|CUDA device"
    assert triton_setup.available("cpu") is not None
    with pytest.raises(ValueError, match=reason):
        triton_attend.attend(states, states, states, KeyBlocks.everything(4, 4), scaling=1.0)
    with pytest.raises(ValueError, match=reason):
        triton_hip.search(states, states, scaling=1.0, mask_k=2, q_block=2, k_block=1)
    with pytest.raises(ValueError, match=reason):
        from salience.methods.keys._sale_scores import Grid

        triton_sale.choose(states, states, torch.zeros(1), scaling=1.0, grid=Grid())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "fp16, bf16 or fp32"),
        ({"width": 512}, "head sizes <= 256"),
        ({"tail": 2}, "no tail"),
        ({}, None),
    ],
)
def test_unfit_says_what_the_kernel_cannot_do(monkeypatch, change, reason):
    from salience.kernels import triton_attend
    from salience.kernels.blocks import KeyBlocks

    monkeypatch.setattr(triton_attend, "available", lambda device: None)
    states = torch.zeros(1, 1, 4, change.get("width", 16), dtype=change.get("dtype", torch.float32))
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
    sizes = {"q_block": 4, "k_block": 4, "queries": 4, "keys": 4, "tail": change.get("tail", 0)}
    found = triton_attend.unfit(states, states, states, KeyBlocks.from_mask(mask, **sizes))
    assert found is None if reason is None else reason in found


@pytest.mark.slow
def test_kernels_compile_for_a_hopper_gpu_within_its_shared_memory(tmp_path):
    """What the interpreter does not see: types that change in a loop, shapes without an instruction, big tiles."""
    found = asked_alone(str(COMPILER), TRITON_CACHE_DIR=str(tmp_path))
    assert {name for name, _ in found} == {"_attend", "_quantise", "_statistics", "_select", "_search"}
    assert all(shared <= 227 * 1024 for _, shared in found), found


@pytest.mark.gpu
def test_kernels_on_a_gpu_agree_with_their_twins(tmp_path):
    found = asked_alone(__file__, "cuda", TRITON_CACHE_DIR=str(tmp_path))
    for case, one in found["attend"].items():
        assert one["error"] <= 4 * BOUNDS[one["dtype"].removeprefix("torch.")] * max(1.0, one["largest"]), (
            case
        )
        assert one["of blind rows"] == 0.0, case
    for case, one in {**found["sale"], **found["hip"]}.items():
        assert one["lists"] == 0, case


if __name__ == "__main__":
    answers = {
        kernel: {case: work(*arguments) for case, (work, *arguments) in cases.items()}
        for kernel, cases in WORK.items()
    }
    sys.stdout.write(json.dumps(answers))
