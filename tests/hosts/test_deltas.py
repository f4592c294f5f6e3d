"""Streaming: safetensors read and written by rows, gaps, LoRA adapters, and the memory that it takes."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import tiny_gpt2, tiny_llama, with_lora
from safetensors.torch import load_file, save_file

from salience.core.errors import ParameterError
from salience.hosts._streaming import Weights, Writer, as_rows, row_blocks
from salience.hosts.deltas import (
    check_pair,
    gaps,
    open_base,
    open_tuned,
    places,
    tied_copies,
    write_checkpoint,
)


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="10KB")
    return tmp_path / "base"


@pytest.mark.parametrize("share", [0.5, 0.01, 0.001])
def test_gaps_there_and_back_also_in_pieces(share):
    mask = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) < share
    mask[[0, -1]] = True
    where = mask.nonzero().flatten()
    coded, last = gaps(where, -1)
    assert last == 199_999 and torch.equal(places(coded)[0], where)
    first, reached = gaps(where[:77], -1)
    rest, _ = gaps(where[77:], reached)
    assert torch.equal(torch.cat([first, rest]), coded)
    found, before = [], -1
    for piece in torch.cat([coded, torch.full((5,), 255, dtype=torch.uint8)]).split(13):
        some, before = places(piece, before)
        found.append(some)
    assert torch.equal(torch.cat(found), where)
    if share == 0.01:
        assert len(coded) < 1.15 * len(where)


@pytest.mark.parametrize("distance", [1, 254, 255, 256, 510, 511, 1000])
def test_gaps_at_the_escapes(distance):
    where = torch.tensor([3, 3 + distance])
    assert torch.equal(places(gaps(where, -1)[0])[0], where)
    assert gaps(torch.empty(0, dtype=torch.int64), 7) == (pytest.approx([]), 7) or gaps(where[:0], 7)[1] == 7


def test_files_are_safetensors_and_rows_are_read_alone(tmp_path):
    tensors = {
        "a": torch.randn(5, 3, dtype=torch.float64), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 3, 4).half(),
        "d": torch.tensor(3.5), "e": torch.zeros(0, 4),
    }  # fmt: skip
    writer = Writer(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        writer.align()
        writer.tensor(name, tensor)
    writer.finish({"format": "mine"})
    found = load_file(tmp_path / "x.safetensors")
    weights = Weights([tmp_path / "x.safetensors"], "base")
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and torch.equal(weights.whole(name), tensor)
    assert torch.equal(weights.rows("a", 2, 4), tensors["a"][2:4])
    assert torch.equal(weights.rows("c", 3, 6), tensors["c"].view(6, 4)[3:6])
    weights.close()
    layout = {"y.safetensors": [(n, weights.entries[n].dtype, weights.entries[n].shape) for n in ("b", "a")],
              "z.safetensors": [("c", "F16", (2, 3, 4))]}  # fmt: skip
    write_checkpoint(tmp_path, layout, weights.rows, lambda count: None)
    assert torch.equal(load_file(tmp_path / "y.safetensors")["b"], tensors["b"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"]["c"] == "z.safetensors" and index["metadata"]["total_size"] == 120 + 14 + 48


def test_blocks_cover_every_row():
    for shape in ((), (5,), (3_000_001,), (3000, 700), (3, 2, 2_000_000), (0, 7)):
        rows, _ = as_rows(shape)
        blocks = list(row_blocks(shape))
        assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])][: len(blocks)]
        assert (blocks[-1][1] if blocks else 0) == rows


def test_sharded_checkpoints(base):
    weights = open_base(base)
    whole = tiny_llama().state_dict()
    assert len(weights.paths) > 3 and weights.entries.keys() == whole.keys()
    assert all(torch.equal(weights.whole(name), value) for name, value in whole.items())


def test_truncated_missing_and_corrupt_shards_are_named(base):
    shard = base / "model-00002-of-00014.safetensors"
    shard = shard if shard.is_file() else sorted(base.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-8])
    with pytest.raises(
        ParameterError, match=rf"base must be whole weights, got .*{shard.name} truncated at "
    ):
        open_base(base)
    shard.write_bytes(content[:20])
    with pytest.raises(ParameterError, match=f"{shard.name} truncated or corrupt in its header"):
        open_base(base)
    shard.write_bytes(content[:8] + b"x" + content[9:])
    with pytest.raises(ParameterError, match=f"{shard.name} corrupt"):
        open_base(base)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ParameterError, match=f"Git LFS pointer in .*{shard.name}"):
        open_base(base)
    shard.unlink()
    with pytest.raises(
        ParameterError, match=f"base must have all shards of its index, got .* without {shard.name}"
    ):
        open_base(base)


@pytest.mark.parametrize(
    ("dtype", "text"),
    [
        (torch.int8, "got I8 in w.weight"),
        (torch.float8_e4m3fn, "got F8_E4M3 in w.weight"),
        (torch.uint8, "got U8 in w.weight"),
        (torch.int64, "got I64 in w.weight"),
    ],
)
def test_integers_are_refused(tmp_path, dtype, text):
    (tmp_path / "config.json").write_text("{}")
    save_file({"w.weight": torch.ones(4, 4).to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(ParameterError, match=f"base must be floating-point weights, {text}"):
        open_base(tmp_path)


def test_quantised_configs_and_other_formats_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ParameterError, match="base must be floating-point weights, got gptq quantisation"):
        open_base(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ParameterError, match=r"got only pytorch_model\.bin"):
        open_base(tmp_path)
    with pytest.raises(ParameterError, match="base must be an existing local folder"):
        open_base(tmp_path / "nowhere")


def test_other_architectures_are_named(base, tmp_path):
    weights = open_base(base)
    tiny_llama(layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(ParameterError, match=r"got model\.layers\.2\.\S+ and 8 more in tuned, not in base"):
        check_pair(weights, open_tuned(tmp_path / "deep", weights))
    tiny_llama(vocab=70).save_pretrained(tmp_path / "words")
    words = open_tuned(tmp_path / "words", weights)
    with pytest.raises(
        ParameterError, match=r"got lm_head\.weight of shape \[70, 32\] on a base's \[64, 32\]: extra_rows"
    ):
        check_pair(weights, words)
    check_pair(weights, words, extra_rows=True)
    tiny_llama(hidden=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ParameterError, match=r"architecture and vocabulary, got \S+ of shape"):
        check_pair(weights, open_tuned(tmp_path / "narrow", weights), extra_rows=True)


def test_tied_output_matrices_are_found(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert tied_copies(open_base(tmp_path), config) == set()  # it is not stored
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "model.safetensors")
    assert tied_copies(open_base(tmp_path), config) == {"lm_head.weight"}
    assert tied_copies(open_base(tmp_path), {}) == set()


@pytest.mark.parametrize("family", ["llama", "rank-stabilised", "gpt2"])
def test_lora_adapters_read_like_the_merged_checkpoint(tmp_path, family):
    made = {"gpt2": lambda: tiny_gpt2().float()}.get(family, tiny_llama)
    made().save_pretrained(tmp_path / "base")
    targets = ("c_attn", "c_fc") if family == "gpt2" else ("q_proj", "down_proj")
    settings = {"fan_in_fan_out": True} if family == "gpt2" else {}
    settings |= {"use_rslora": True} if family == "rank-stabilised" else {}
    model = with_lora(made(), targets=targets, lora_alpha=3, **settings)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()
    weights = open_base(tmp_path / "base")
    tuned = open_tuned(tmp_path / "adapter", weights)
    check_pair(weights, tuned)
    changed = 0
    for name, stored in tuned.entries.items():
        found = torch.cat([tuned.rows(name, *block) for block in row_blocks(stored.shape)]).view(stored.shape)
        torch.testing.assert_close(found, merged[name], rtol=0, atol=1e-6)
        changed += not torch.equal(found, weights.whole(name))
    assert changed == 4


def test_other_adapters_are_refused(base, tmp_path):
    weights = open_base(base)
    with_lora(tiny_llama(), use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(ParameterError, match="tuned must be a checkpoint or a plain LoRA adapter, got DoRA"):
        open_tuned(tmp_path / "dora", weights)
    with_lora(tiny_llama(hidden=16)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(
        ParameterError, match=r"tuned must fit the base, got an update \[\d+, \d+\] for model"
    ):
        open_tuned(tmp_path / "narrow", weights)


MEASURED = """
import json, resource, sys
from pathlib import Path
import torch
from salience.jobs.delta import DeltaSettings, apply_deltas, make_deltas

folder = Path(sys.argv[1])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(name, method):
    settings = DeltaSettings(base=str(folder / f"{name}-base"), tuned=(str(folder / f"{name}-tuned"),), method=method)
    made = make_deltas(settings, folder / f"{name}-delta")
    apply_deltas(settings.base, [str(folder / f"{name}-delta")], folder / f"{name}-out")
    return made
run("small", sys.argv[2])
before = peak()
run("large", sys.argv[2])
print(json.dumps({"grown": peak() - before}))
"""


@pytest.mark.parametrize("method", ["darex:keep=0.05,scope=all", "darex:keep=0.3,scope=all,score=magnitude"])
def test_memory_is_a_few_tensors_and_not_models(tmp_path, method):
    # 8 tensors of 12 MB: two models are 192 MB
    for name, rows in (("small", 10), ("large", 3000)):
        for kind in ("base", "tuned"):
            folder = tmp_path / f"{name}-{kind}"
            folder.mkdir()
            (folder / "config.json").write_text('{"model_type": "llama"}')
            draw = torch.Generator().manual_seed(int(kind == "tuned"))
            tensors = {f"w{i}.weight": torch.randn(rows, 1000, generator=draw) for i in range(8)}
            save_file(tensors, folder / "model.safetensors")
    largest = 3000 * 1000 * 4
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path), method], capture_output=True, text=True, check=True
    )
    grown = json.loads(done.stdout.splitlines()[-1])["grown"]
    assert grown <= 4 * largest + (24 << 20), (
        f"{grown / 1e6:.0f} MB for a largest tensor of {largest / 1e6:.0f} MB"
    )
