"""Checkpoints: whole, finite, fitting ones load; for all others one line that names the file, before any work."""

import json
import logging
import pickle
import struct

import pytest
import torch
from conftest import tiny_llama
from safetensors.torch import load_file, save_file

from salience.core.errors import ParameterError
from salience.hosts import _weight_files, checkpoints
from salience.hosts.checkpoints import (
    check_checkpoint,
    check_device,
    check_positions,
    check_tokenizer,
    load_model,
)


def tiny_tokenizer(size=64):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", eos_token="w1", pad_token="w2")


def tiny_bert(cls, **settings):
    import transformers

    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        **settings,
    )
    return getattr(transformers, cls)(config)


@pytest.fixture
def saved(tmp_path):
    """Save a model with a tokenizer; returns the folder."""

    def save(model, name="model", **settings):
        folder = tmp_path / name
        model.save_pretrained(folder, **settings)
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def llama(saved):
    return saved(tiny_llama())


def edit(folder, change):
    """Change the tensors of a checkpoint in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def configure(folder, **settings):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refusal(call, *args, **kwargs):
    with pytest.raises(ParameterError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_loads_as_it_was_saved(llama):
    model, tokenizer = load_model(llama)
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    wanted = tiny_llama().state_dict()
    assert wanted.keys() == model.state_dict().keys()
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert tokenizer("w5 w6")["input_ids"] == [5, 6]


@pytest.mark.parametrize(
    "dtype, expected",
    [("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)],
)
def test_dtype_and_device(saved, dtype, expected):
    folder = saved(tiny_llama().bfloat16())
    model, _ = load_model(str(folder), dtype=dtype, device="cpu")
    assert model.dtype == expected and model.device == torch.device("cpu")


def test_shards_load(saved):
    folder = saved(tiny_llama(), max_shard_size="20kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    model, _ = load_model(folder)
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)


@pytest.mark.parametrize(
    "cls, kind",
    [
        ("BertForMaskedLM", "masked"),
        ("BertForSequenceClassification", "sequence"),
        ("BertLMHeadModel", "causal"),
    ],
)
def test_auto_is_what_the_checkpoint_says(saved, cls, kind):
    folder = saved(tiny_bert(cls, is_decoder=kind == "causal"))
    for asked in ("auto", kind):
        model, _ = load_model(folder, kind=asked)
        assert type(model).__name__ == cls


@pytest.mark.parametrize(
    "kind, fresh",
    [
        ("sequence", "classifier.bias, classifier.weight"),
        ("masked", "cls.predictions.bias, cls.predictions.decoder.bias"),
    ],
)
def test_a_bare_encoder_gets_a_new_head_and_says_so(saved, caplog, kind, fresh):
    body = tiny_bert("BertModel")
    folder = saved(body)
    with caplog.at_level(logging.WARNING, "salience"):
        model, _ = load_model(folder, kind=kind)
    assert f"{folder}: made new, to be trained: {fresh}" in caplog.text
    wanted = body.state_dict()
    got = model.bert.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in got.items())
    text = refusal(load_model, folder)
    assert text == f"kind must be one of causal, masked, sequence, vision for {folder}, got auto (BertModel)"


def test_the_number_of_classes(saved):
    folder = saved(tiny_bert("BertForSequenceClassification", num_labels=2))
    model, _ = load_model(folder, num_labels=5)
    assert model.classifier.weight.shape == (5, 16) and model.config.num_labels == 5
    model, _ = load_model(folder)
    assert model.classifier.weight.shape == (2, 16)
    model, _ = load_model(saved(tiny_llama(), "llama"), kind="sequence", num_labels=3)
    assert model.score.weight.shape == (3, 32)
    text = refusal(load_model, folder, kind="sequence", num_labels=0)
    assert text == "num_labels must be >= 1, got 0"
    text = refusal(load_model, folder, kind="masked", num_labels=2)
    assert text == "num_labels must be left out unless kind is sequence, got 2"


def test_another_head_is_dropped(saved, caplog):
    folder = saved(tiny_bert("BertForPreTraining"))
    with caplog.at_level(logging.INFO, "salience"):
        model, _ = load_model(folder, kind="masked")
    assert type(model).__name__ == "BertForMaskedLM"
    assert "BertForMaskedLM has no use for bert.pooler.dense.bias" in caplog.text


def test_a_language_model_without_its_head_is_refused(saved):
    import transformers

    folder = saved(transformers.LlamaModel(tiny_llama().config))
    assert refusal(load_model, folder, kind="causal") == (
        f"model must be a checkpoint whose tensors fit LlamaForCausalLM, got {folder} with missing: lm_head.weight"
    )


def test_tensors_that_do_not_fit_are_listed(llama):
    def change(tensors):
        del tensors["model.layers.0.mlp.up_proj.weight"]
        tensors["model.layers.1.self_attn.q_norm.weight"] = torch.ones(8)
        tensors["model.norm.weight"] = torch.ones(7)

    edit(llama, change)
    assert refusal(load_model, llama) == (
        f"model must be a checkpoint whose tensors fit LlamaForCausalLM, got {llama} with "
        "missing: model.layers.0.mlp.up_proj.weight; unexpected: model.layers.1.self_attn.q_norm.weight; "
        "of another shape: model.norm.weight ([7], not [32])"
    )


def test_layers_that_the_config_does_not_know_are_refused(llama):
    configure(llama, num_hidden_layers=1)
    text = refusal(load_model, llama)
    assert "unexpected: model.layers.1.input_layernorm.weight" in text and text.endswith(" and 5 more")


@pytest.mark.parametrize("broken", ["config", "architecture"])
def test_what_transformers_refuses_is_one_line(llama, broken):
    configure(llama, **({"hidden_size": "wide"} if broken == "config" else {"model_type": "no-such-model"}))
    text = refusal(load_model, llama)
    assert text.startswith(f"model must be a checkpoint that transformers can load, got {llama} (")


def test_verbosity_stays_as_it_was(llama):
    import transformers

    before = transformers.logging.get_verbosity()
    load_model(llama)
    refusal(load_model, llama, kind="masked")
    assert transformers.logging.get_verbosity() == before


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"kind": "chat"}, "kind must be one of auto, causal, masked, sequence, vision, got 'chat'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"dtype": torch.int8}, "dtype must be one of auto, float32, bfloat16, float16, got torch.int8"),
    ],
)
def test_wrong_settings_are_refused(settings, text):
    assert refusal(load_model, "anything", **settings) == text


@pytest.mark.parametrize("source", ["./none", "/no/where", "~/none", "a/b/c"])
def test_a_missing_folder_is_not_asked_for_on_the_hub(source):
    assert refusal(load_model, source) == f"model must be an existing folder or a hub id, got {source}"


def test_the_hub_that_cannot_be_reached_is_one_line():
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        pytest.skip("asks the network")
    text = refusal(load_model, "nobody/nothing")
    assert text.startswith("model must be an existing folder or a reachable hub id, got nobody/nothing (")


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_text("")
    assert refusal(load_model, path) == f"model must be a checkpoint folder or a hub id, got the file {path}"


def test_a_missing_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    text = refusal(load_model, tmp_path)
    assert text.startswith(f"model must be a checkpoint with its tokenizer, got {tmp_path} (")


@pytest.mark.parametrize(
    "content, text",
    [
        (None, "model must be a folder with config.json, got {folder} without it"),
        ("{", "model must be a folder with config.json, got {folder}/config.json (Expecting property name"),
        ("[]", "model must be a folder with config.json, got {folder}/config.json (not an object)"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "model must be a folder with config.json, got {folder}/config.json (a Git LFS pointer: run git lfs pull)",
        ),
    ],
    ids=["missing", "malformed", "list", "pointer"],
)
def test_a_wrong_config_is_refused(llama, content, text):
    path = llama / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert refusal(check_checkpoint, llama).startswith(text.format(folder=llama))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_with_the_way_out(llama, name):
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(pickle.dumps({"weight": 1}))
    (llama / "training_args.bin").write_bytes(b"")
    for check in (check_checkpoint, load_model):
        assert refusal(check, llama) == (
            f"model must be safetensors weights, got the pickle {name} in {llama} "
            "(it can run code when it is loaded): if you trust it, convert it elsewhere with "
            'python -c "import transformers as t; '
            f"t.LlamaForCausalLM.from_pretrained('{llama}').save_pretrained('NEW')\""
        )


@pytest.mark.parametrize("name", ["weights.pt", "weights.pth", "last.ckpt"])
def test_other_pickles_are_refused_with_the_way_out(llama, name):
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(pickle.dumps({"weight": 1}))
    text = (
        f"model must be safetensors weights, got the pickle {name} in {llama} (it can run code when it is loaded): "
        'if you trust it, convert it elsewhere with python -c "import torch, safetensors.torch as s; '
        f"s.save_file(torch.load('{llama / name}', weights_only=True), 'model.safetensors')\""
    )
    assert refusal(check_checkpoint, llama) == text
    assert refusal(load_model, llama / name) == text


def test_pickles_beside_safetensors_are_left_alone(llama):
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (llama / name).write_bytes(b"not to be read")
    load_model(llama)


def test_the_way_out_of_a_pickle_works(saved, tmp_path):
    model = tiny_llama()
    folder = saved(model)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    command = refusal(check_checkpoint, folder).split('python -c "')[1].removesuffix('"')
    exec(command.replace("'NEW'", repr(str(tmp_path / "new"))), {})
    check_checkpoint(tmp_path / "new")


def test_an_adapter_is_refused(llama):
    (llama / "adapter_config.json").write_text("{}")
    assert refusal(load_model, llama) == (
        f"model must be a whole checkpoint, got an adapter in {llama}: "
        "load it with peft, and save what merge_and_unload() returns"
    )


@pytest.mark.parametrize(
    "left, found",
    [([], "no weights"), (["tf_model.h5", "flax_model.msgpack"], "only flax_model.msgpack, tf_model.h5")],
)
def test_a_folder_without_weights_is_refused(llama, left, found):
    (llama / "model.safetensors").unlink()
    for name in left:
        (llama / name).write_bytes(b"")
    text = refusal(check_checkpoint, llama)
    assert text == f"model must be a folder with model.safetensors, got {found} in {llama}"


def test_a_pointer_in_place_of_the_weights_is_refused(llama):
    path = llama / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n")
    text = refusal(check_checkpoint, llama)
    assert text == f"model must be real weights, got a Git LFS pointer in {path}: run git lfs pull"


@pytest.mark.parametrize("kept", ["0", "5", "header", "half", "all-but-one"])
def test_truncated_weights_are_refused(llama, kept):
    path = llama / "model.safetensors"
    content = path.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    size, expected = {
        "0": (0, 8),
        "5": (5, 8),
        "header": (header - 3, header),
        "half": (len(content) // 2, len(content)),
        "all-but-one": (len(content) - 1, len(content)),
    }[kept]
    path.write_bytes(content[:size])
    text = refusal(load_model, llama)
    assert text == f"model must be whole weights, got {path} truncated at {size} of at least {expected} bytes"


def header_of(text):
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 100,
        header_of(b"{not json"),
        header_of(b"[1]"),
        header_of(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}') + b"\0" * 4,
        header_of(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}') + b"\0" * 4,
        header_of(b"{}") + b"more",
    ],
    ids=["noise", "no-json", "list", "shape", "offsets", "too-long"],
)
def test_corrupt_weights_are_refused(llama, content):
    path = llama / "model.safetensors"
    path.write_bytes(content)
    assert refusal(check_checkpoint, llama).startswith(f"model must be whole weights, got {path} corrupt (")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite_are_refused(llama, value, dtype):
    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        tensors["model.norm.weight"][-1] = value

    edit(llama, change)
    assert refusal(check_checkpoint, llama) == (
        f"model must be finite weights, got NaN or infinity in model.norm.weight of {llama}/model.safetensors"
    )


@pytest.mark.parametrize("place", [0, 6, 7, 22])
def test_every_chunk_is_looked_at(monkeypatch, place):
    monkeypatch.setattr(_weight_files, "_CHUNK", 7)
    tensor = torch.zeros(23)
    assert _weight_files._is_finite(tensor)
    tensor[place] = float("nan")
    assert not _weight_files._is_finite(tensor)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_tensors_of_other_kinds_are_looked_at(dtype):
    assert _weight_files._is_finite(torch.ones(3).to(dtype))
    assert _weight_files._is_finite(torch.ones(0))
    assert not _weight_files._is_finite(torch.tensor([float("nan")]).to(torch.float8_e4m3fn))


def test_a_shard_that_is_missing_or_broken_is_named(saved):
    folder = saved(tiny_llama(), max_shard_size="20kB")
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    content = second.read_bytes()
    second.write_bytes(content[:-1])
    text = f"got {second} truncated at {len(content) - 1} of at least {len(content)} bytes"
    assert refusal(check_checkpoint, folder) == f"model must be whole weights, {text}"
    first.unlink()
    text = f"model must be a folder with all shards of its index, got {folder} without {first.name}"
    assert refusal(load_model, folder) == text


@pytest.mark.parametrize(
    "content, reason",
    [
        ("{", " (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
        ("{}", " without a weight_map of file names"),
        ('{"weight_map": {"a": "../other.safetensors"}}', " without a weight_map of file names"),
        ('{"weight_map": {"a": "model.bin"}}', " without a weight_map of file names"),
    ],
    ids=["malformed", "empty", "outside", "pickle"],
)
def test_a_wrong_index_is_refused(llama, content, reason):
    (llama / "model.safetensors").unlink()
    index = llama / "model.safetensors.index.json"
    index.write_text(content)
    assert refusal(check_checkpoint, llama) == (
        f"model must be a folder whose weight index names its shards, got {index}{reason}"
    )


def test_weights_that_the_config_names(llama):
    (llama / "model.safetensors").rename(llama / "own.safetensors")
    configure(llama, transformers_weights="own.safetensors")
    load_model(llama)
    configure(llama, transformers_weights="adapter_model.bin")
    (llama / "adapter_model.bin").write_bytes(b"")
    assert "got the pickle adapter_model.bin" in refusal(load_model, llama)


def test_weights_of_the_hub_are_looked_at_once_loaded(llama, monkeypatch):
    monkeypatch.setattr(checkpoints, "_local", lambda source: None)
    model, _ = load_model(llama)
    assert type(model).__name__ == "LlamaForCausalLM"
    edit(llama, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    text = f"model must be finite weights, got NaN or infinity in lm_head.weight of {llama} on the hub"
    assert refusal(load_model, llama) == text
    (llama / "adapter_config.json").write_text("{}")
    assert refusal(load_model, llama) == f"model must be a whole checkpoint, got an adapter at {llama}"


def test_a_tokenizer_of_another_model_is_refused(llama):
    model = tiny_llama(vocab=60)
    check_tokenizer(model, tiny_tokenizer(60))
    text = (
        "tokenizer must be of ids below 60 (the rows of the model's embedding), got id 63: "
        "take the model's own tokenizer, or resize_token_embeddings and save the model"
    )
    assert refusal(check_tokenizer, model, tiny_tokenizer()) == text
    tiny_tokenizer(90).save_pretrained(llama)
    assert "got id 89" in refusal(load_model, llama)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_devices_that_are_here(device):
    assert check_device(device) == torch.device("cpu")


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("auto") == torch.device("cuda")
    assert check_device("cuda:1") == torch.device("cuda:1")
    text = refusal(check_device, "cuda:2")
    assert text == "device must be one of this machine, got 'cuda:2' (torch sees 2 CUDA devices)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert check_device("auto") == torch.device("cpu")
    text = refusal(check_device, "cuda")
    assert text == "device must be one of this machine, got 'cuda' (torch sees 0 CUDA devices)"
    assert refusal(load_model, "anything", device="cuda") == text


def test_devices_that_are_nowhere():
    text = refusal(check_device, "gpu")
    assert text == "device must be one of auto, cpu, cuda, mps, got 'gpu'"
    text = refusal(check_device, "meta")
    assert text == "device must be one of this machine, got 'meta' (torch does not have it)"


def test_positions():
    import transformers

    model = tiny_llama()
    assert check_positions(model, 128) == 128
    assert check_positions(model) == 128
    text = refusal(check_positions, model, 129)
    assert text == "max_length must be at most 128 (the model's positions), got 129"
    gpt2 = transformers.GPT2Config(n_positions=16, n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    assert check_positions(transformers.GPT2LMHeadModel(gpt2)) == 16
    assert check_positions(tiny_bert("BertForMaskedLM")) == 32


def test_positions_that_are_not_all_usable_or_have_no_limit():
    import transformers

    small = {"vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    roberta = transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(**small, intermediate_size=8, max_position_embeddings=14)
    ).eval()
    limit = check_positions(roberta)
    assert limit == 12
    roberta(torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, limit + 1), 5))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=32, hidden_size=8, n_layer=1, n_head=2)
    )
    assert check_positions(bloom) is None and check_positions(bloom, 10**6) == 10**6
    t5 = transformers.T5Config(
        vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, n_positions=9
    )
    assert check_positions(transformers.T5ForConditionalGeneration(t5), 100) == 100
