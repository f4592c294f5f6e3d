"""Whatever a user gets wrong is one line that says what must be, exit code 2, before any work, with nothing left."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file


def refused(cli, *arguments):
    code, _, err = cli(*arguments)
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


@pytest.fixture
def tune(cli, checkpoint, rows, tmp_path):
    """`salience tune` on the small checkpoint with some options replaced; nothing may be written."""

    def run(**options):
        given = {
            "model": checkpoint,
            "data": rows,
            "out": tmp_path / "out",
            "device": "cpu",
            "steps": 2,
            **options,
        }
        arguments = []
        for name, value in given.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    arguments += [f"--{name.replace('_', '-')}", str(one)]
        text = refused(cli, "tune", *arguments)
        assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.safetensors"))
        return text

    return run


def test_data_that_cannot_be_read(tune, tmp_path):
    assert "data must be an existing file" in tune(data=tmp_path / "missing.jsonl")
    for name, content, text in (
        ("empty.jsonl", "", "data must be"),
        ("broken.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": \n', "line 2"),
        ("columns.jsonl", '{"frage": "a", "antwort": "b"}\n', "frage"),
        ("list.jsonl", "[1, 2]\n", "line 1"),
    ):
        path = tmp_path / name
        path.write_text(content)
        message = tune(data=path)
        assert text in message and "data must be" in message, message
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"text": "\xe9t\xe9"}\n'.encode("latin-1"))
    assert "UTF-8" in tune(data=path)


def test_data_that_does_not_fit(tune, tmp_path):
    masked = tmp_path / "masked.jsonl"
    masked.write_text('{"messages": [{"role": "user", "content": "the cat"}]}\n' * 4)
    assert "data must" in tune(data=masked)
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": "cat " * 500}) + "\n" + '{"text": "the cat"}\n')
    assert "got 501 in row 1" in tune(data=long)
    assert "max_length must be at most 128 (the model's positions), got 4096" in tune(max_length=4096)
    assert "prompt" in tune(column="prompt=instruction")
    assert "column must be written OURS=THEIRS, got 'prompt'" in tune(column="prompt")


def test_methods(tune):
    assert "did you mean ist" in tune(method="iist")
    assert "parameter of ist must be one of" in tune(method="ist:activ_layers=2")
    assert "did you mean active_layers" in tune(method="ist:activ_layers=2")
    assert "keep must be a share in (0, 1] or a count >= 1, got 1.5" in tune(method="sstoken:keep=1.5")
    assert "active_layers of ist must be" in tune(method="ist:active_layers=many")
    assert "method must be written SLUG:key=value" in tune(method="ist:4")
    assert "methods must not contradict each other, got ist with lisa" in tune(method=["ist", "lisa"])
    assert "got IST twice" in tune(method=["ist", "ist:active_layers=1"])
    assert "active_layers must be" in tune(method="ist:active_layers=7")
    assert "adapter must be lora for ist" in tune(method="ist", adapter="none")
    assert "model without PEFT adapters" in tune(method="lisa")


def test_options(tune):
    assert "rank must be" in tune(rank=0)
    assert "learning_rate must be" in tune(learning_rate=-1)
    assert "adapter must be" in tune(adapter="dora")
    assert "data must be given together with model" in tune(data=None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_that_is_absent(tune):
    assert "device must be" in tune(device="cuda") and "cuda" in tune(device="cuda")


def test_recipe_files(cli, tmp_path):
    path = tmp_path / "recipe.yaml"
    assert "recipe must be an existing YAML file" in refused(cli, "tune", "--recipe", path)
    path.write_text("methods: [ist\n")
    assert "recipe must be a readable YAML file" in refused(cli, "tune", "--recipe", path)
    path.write_text("- 1\n")
    assert "recipe must be a mapping of fields, got list" in refused(cli, "tune", "--recipe", path)
    path.write_text("lerning_rate: 0.1\n")
    assert "did you mean learning_rate" in refused(cli, "tune", "--recipe", path)
    path.write_text("rank: many\n")
    assert "rank must be" in refused(cli, "tune", "--recipe", path)


def copied(checkpoint, tmp_path):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint, folder)
    return folder, folder / "model.safetensors"


def test_checkpoints(tune, checkpoint, tmp_path):
    assert "model must be" in tune(model=tmp_path / "nowhere" / "model")
    folder, weights = copied(checkpoint, tmp_path)
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in tune(model=folder)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone().fill_(float("nan"))
    save_file(tensors, weights, metadata={"format": "pt"})
    assert name in tune(model=folder)
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not read")
    message = tune(model=folder)
    assert "pickle" in message and "safetensors" in message
    config = json.loads((checkpoint / "config.json").read_text())
    (folder / "pytorch_model.bin").unlink()
    small = {**config, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps(small))
    weights.write_bytes(whole)
    assert tune(model=folder)


def test_a_vocabulary_that_is_too_small(tune, checkpoint, tmp_path):
    from conftest import tiny_llama

    folder, _ = copied(checkpoint, tmp_path)
    tiny_llama(layers=2, vocab=8).save_pretrained(folder)
    message = tune(model=folder)
    assert "8" in message and "tokenizer" in message


def test_folders(cli, checkpoint, rows, tmp_path):
    out = tmp_path / "out"
    base = ("tune", "--model", checkpoint, "--data", rows, "--device", "cpu", "--out")
    out.write_text("a file")
    assert "out must be" in refused(cli, *base, out)
    out.unlink()
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "out must be an empty or a run folder" in refused(cli, *base, out)
    (out / "thesis.txt").rename(tmp_path / "thesis.txt")
    (out / "recipe.json").write_text(json.dumps({"rank": 3}))
    assert "out must be a folder of the same recipe" in refused(cli, *base, out)


def test_other_commands(cli):
    assert "did you mean ist" in refused(cli, "show", "iist")
    assert "unit must be one of" in refused(cli, "methods", "--unit", "tokn")
    assert "seeds must be >= 2" in refused(cli, "bench", "ist", "--seeds", "1")
    assert "method must be one or several, or --all and none" in refused(cli, "bench")
    code, _, err = cli("tune", "--no-such-option")
    assert code == 2 and "No such option" in err
