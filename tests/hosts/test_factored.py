"""Factored transformers models: families, what is written, and that it loads where salience does not exist."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Listed, collate, ragged_samples, tiny_gpt2, tiny_llama, tiny_trainer
from safetensors.torch import load_file, save_file
from torch import nn

import salience as sal
from salience.core.errors import ConflictError

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "maestro.md"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=64, **SIZES, num_labels=3)).eval()


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, **SIZES, num_labels=3)).eval()


def resnet():
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3
    )
    return ResNetForImageClassification(config)


def images(count=4, size=16):
    random = torch.Generator().manual_seed(0)
    return [
        {"pixel_values": torch.randn(3, size, size, generator=random), "labels": i % 3} for i in range(count)
    ]


def classes(count=4):
    return [{**sample, "labels": index % 3} for index, sample in enumerate(ragged_samples(count))]


def collate_classes(samples):
    batch = collate([{**sample, "labels": [0] * len(sample["input_ids"])} for sample in samples])
    return {**batch, "labels": torch.tensor([sample["labels"] for sample in samples])}


def collate_images(samples):
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


FAMILIES = {
    "llama": (lambda: tiny_llama(hidden=64), "AutoModelForCausalLM", ragged_samples, collate, 14),
    "tied llama": (
        lambda: tiny_llama(hidden=64, tie_word_embeddings=True), "AutoModelForCausalLM", ragged_samples, collate, 14,
    ),
    "gpt2": (lambda: tiny_gpt2().float(), "AutoModelForCausalLM", ragged_samples, collate, 8),
    "bert": (bert, "AutoModelForSequenceClassification", classes, collate_classes, 13),
    "vit": (vit, "AutoModelForImageClassification", images, collate_images, 13),
    "resnet": (resnet, "AutoModelForImageClassification", images, collate_images, 6),
}  # fmt: skip
ELSEWHERE = """
import sys
sys.modules["salience"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
{loader}
for name, auto in {autos!r}:
    auto = getattr(transformers, auto)
    inputs = load_file(name + "/inputs.safetensors")
    dense, factors = auto.from_pretrained(name + "/dense"), load_factors(name + "/factors", auto)
    for output, model in (("dense", dense), ("factors", factors)):
        with torch.no_grad():
            logits = model.eval()(**inputs).logits
        save_file({{"logits": logits.contiguous()}}, name + "/" + output + ".safetensors")
        print(sum(p.numel() for p in model.parameters()))
"""


def trained(name, folder, method):
    make, _, samples, together, layers = FAMILIES[name]
    trainer = tiny_trainer(folder, make(), learning_rate=1e-3)
    trainer.train_dataset, trainer.data_collator = Listed(samples(4)), together
    handle = sal.focus(trainer, method)
    assert handle.spent["maestro"]["layers"] == layers
    trainer.train()
    return trainer, handle


def loader_of_the_page():
    blocks = PAGE.read_text(encoding="utf-8").split("```python\n")[1:]
    return next(block.split("```")[0] for block in blocks if "def load_factors" in block)


@pytest.mark.slow
@pytest.mark.parametrize("names", [list(FAMILIES)[:3], list(FAMILIES)[3:]], ids=" ".join)
def test_what_is_saved_loads_in_a_process_without_salience(names, tmp_path):
    logits, counts = {}, []
    for name in names:
        make, _, samples, together, _ = FAMILIES[name]
        before = sum(p.numel() for p in make().parameters())
        batch = {k: v for k, v in together(samples(4)).items() if k != "labels"}
        for output in ("dense", "factors"):
            trainer, handle = trained(name, tmp_path, sal.Maestro(keep=0.6, output=output))
            handle.save(tmp_path / name / output)
            model = trainer.model.eval()
            with torch.no_grad():
                logits[name, output] = model(**batch).logits
            counts.append(sum(p.numel() for p in model.parameters()))
            spent = handle.spent["maestro"]
            gone = spent["weights of these layers, dense"] - spent["weights of these layers, as finished"]
            assert before - counts[-1] == gone
        assert counts[-2] == before and counts[-1] < 0.9 * before
        save_file(batch, tmp_path / name / "inputs.safetensors")
    text = ELSEWHERE.format(autos=[(n, FAMILIES[n][1]) for n in names], loader=loader_of_the_page())
    done = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [int(line) for line in done.stdout.split()] == counts
    for (name, output), expected in logits.items():
        found = load_file(tmp_path / name / f"{output}.safetensors")["logits"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_folder_of_factors_is_refused_by_from_pretrained(tmp_path):
    from transformers import AutoModelForCausalLM

    _, handle = trained("llama", tmp_path, sal.Maestro(keep=0.5, output="factors"))
    handle.save(tmp_path / "saved")
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert "factors.safetensors" in names and "model.safetensors" not in names and "config.json" in names
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_the_finished_model_is_stock_and_runs_under_export(tmp_path):
    trainer, handle = trained("vit", tmp_path, sal.Maestro(keep=0.5, output="factors"))
    handle.finish()
    assert not any("salience" in type(module).__module__ for module in trainer.model.modules())
    model, batch = trainer.model.eval(), collate_images(images(2))["pixel_values"]
    program = torch.export.export(model, (batch,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch).logits, model(batch).logits)


def test_batch_norms_of_a_trainer_are_estimated_anew(tmp_path):
    trainer, handle = trained("resnet", tmp_path, sal.Maestro(keep=0.5))
    norm = next(m for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 3  # one a step
    handle.finish()
    assert int(norm.num_batches_tracked) == 2  # 4 images in batches of 2, counted from zero
    assert norm.momentum == 0.1


def test_a_copy_of_a_finished_model_writes_its_own_weights(tmp_path):
    import copy

    trainer, handle = trained("llama", tmp_path, sal.Maestro(keep=0.5, output="factors"))
    handle.finish()
    other = copy.deepcopy(trainer.model)
    with torch.no_grad():
        other.lm_head.weight.fill_(7.0)
    other.save_pretrained(tmp_path / "copy")
    assert load_file(tmp_path / "copy" / "factors.safetensors")["lm_head.weight"].eq(7).all()


def test_a_model_spread_over_devices_is_refused():
    model = tiny_llama()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ConflictError, match="device_map must be one device for Maestro"):
        sal.loop(model, sal.Maestro())
    model.hf_device_map = {"": 0}
    sal.loop(model, sal.Maestro()).record.undo()
