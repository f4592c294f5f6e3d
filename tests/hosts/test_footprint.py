"""What a checkpoint needs is measured by a process that cannot import salience, and checked against its logits."""

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import save_file

from salience.hosts.footprint import Checkpoint, CheckpointError, bytes_on_disk, measure, stored_dtype
from salience.hosts.shrinking import _write_probe

SIZES = {"tokens": 16, "new_tokens": 4, "repeats": 2}


@pytest.fixture
def written(tmp_path):
    """A checkpoint of a tiny Llama with its expected logits."""

    def write(name, **settings):
        model = tiny_llama(**settings).eval()
        model.save_pretrained(tmp_path / name)
        _write_probe(model, tmp_path / f"{name}.safetensors")
        return Checkpoint(tmp_path / name, "LlamaForCausalLM", tmp_path / f"{name}.safetensors")

    return write


def test_two_checkpoints_are_measured_in_turns(written):
    # 17 MB and 2 MB of weights: far more than what a process's memory wavers by
    many = {"large": written("large", layers=2, hidden=512), "small": written("small", layers=2, hidden=128)}
    steps = []
    found = measure(many, **SIZES, progress=lambda *step: steps.append(step))
    for name, one in many.items():
        told = found[name]
        assert told["parameters"] == sum(
            p.numel() for p in tiny_llama(hidden=512 if name == "large" else 128).parameters()
        )
        assert told["bytes_on_disk"] == bytes_on_disk(one.folder) > 4 * told["parameters"]
        assert told["logits_difference"] <= 1e-5
        assert len(told["prefill_seconds"]) == len(told["decode_seconds"]) == 2
        assert told["prefill_tokens_per_second"] > 0 and told["decode_tokens_per_second"] > 0
    large, small = (4 * found[name]["parameters"] for name in many)
    assert found["large"]["peak_bytes"] > 0.8 * large
    assert found["large"]["peak_bytes"] - found["small"]["peak_bytes"] > 0.5 * (large - small)
    assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))


def test_other_logits_are_an_error(written):
    one = written("one")
    other = torch.zeros(2, 12, 64)
    ids = torch.zeros(2, 12, dtype=torch.long)
    save_file({"input_ids": ids, "logits": other}, str(one.logits))
    with pytest.raises(
        CheckpointError, match="must give the logits of the model that it was written from within"
    ):
        measure({"one": one}, **SIZES)


def test_a_folder_that_does_not_load_is_an_error(tmp_path):
    tiny_llama().config.save_pretrained(tmp_path / "empty")
    with pytest.raises(
        CheckpointError, match="must be a checkpoint that from_pretrained loads without salience"
    ):
        measure({"empty": Checkpoint(tmp_path / "empty", "LlamaForCausalLM")}, **SIZES)


def test_factors_are_loaded_as_stock_layers(tmp_path):
    from salience.hosts.factored import write_factors

    model = tiny_llama().eval()
    down = model.model.layers[0].mlp.down_proj
    left, right = torch.randn(down.out_features, 4), torch.randn(4, down.in_features)
    layers = torch.nn.Sequential(
        torch.nn.Linear(down.in_features, 4, bias=False), torch.nn.Linear(4, down.out_features, bias=False)
    )
    with torch.no_grad():
        layers[0].weight.copy_(right)
        layers[1].weight.copy_(left)
    model.model.layers[0].mlp.down_proj = layers
    write_factors(model, tmp_path / "factors")
    _write_probe(model, tmp_path / "probe.safetensors")
    one = Checkpoint(tmp_path / "factors", "LlamaForCausalLM", tmp_path / "probe.safetensors")
    found = measure({"factors": one}, **SIZES)["factors"]
    assert found["logits_difference"] <= 1e-5
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_the_dtype_of_a_checkpoint_is_that_of_most_of_its_numbers(tmp_path):
    tensors = {
        "big": torch.zeros(8, 8, dtype=torch.bfloat16),
        "small": torch.zeros(3),
        "ids": torch.zeros(99).long(),
    }
    save_file(tensors, str(tmp_path / "model.safetensors"))
    assert stored_dtype(tmp_path) == torch.bfloat16
    assert stored_dtype(tmp_path / "none") == torch.float32
