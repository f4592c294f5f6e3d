"""`salience delta` there and back, and one line for whatever a user gets wrong, with nothing written."""

import json
import shutil

import pytest
import torch
from conftest import tiny_llama, with_lora
from safetensors.torch import load_file, save_file

from salience.methods.weights.darex import DAREx, sparsified

NAME = "model.layers.0.mlp.up_proj.weight"


def tuned_of(model, size=0.05, seed=1):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture
def pair(tmp_path):
    """Folders of a base in shards and of a fine-tuned one in a single file."""
    tiny_llama().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    tuned_of(tiny_llama()).save_pretrained(tmp_path / "tuned")
    return tmp_path / "base", tmp_path / "tuned"


@pytest.fixture
def delta(cli, pair, tmp_path):
    """Runs `salience delta` with the pair's base."""

    def run(*arguments, base=None, code=0):
        got, out, err = cli("delta", "--base", base or pair[0], *arguments)
        assert got == code, out + err
        return out if code == 0 else next(line for line in err.splitlines() if line.startswith("error: "))

    return run


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def both(delta, pair, tmp_path, method, tuned=None):
    """State dict of base, fine-tuned and the checkpoint that came back, and the delta's folder."""
    delta("--tuned", tuned or pair[1], "--method", method, "--out", tmp_path / "delta")
    delta("--apply", tmp_path / "delta", "--out", tmp_path / "model")
    return tiny_llama().state_dict(), loaded(pair[1]), loaded(tmp_path / "model"), tmp_path / "delta"


@pytest.mark.parametrize(
    "method",
    [
        "keep=0.05",
        "keep=0.1,q=0.3,seed=4",
        "keep=0.2,score=magnitude",
        "keep=0.1,columns=0.25",
        "keep=0.1,scope=all",
    ],
)
def test_what_comes_back_is_the_sparsified_model(delta, pair, tmp_path, method):
    base, tuned, merged, _ = both(delta, pair, tmp_path, f"darex:{method}")
    from salience.core.spec import parse_method
    from salience.methods.weights.darex import in_scope

    asked = parse_method(f"darex:{method}")
    pruned = set(in_scope(base, asked))
    assert len(pruned) == (20 if "all" in method else 14)
    for name, value in merged.items():
        wanted = sparsified(name, base[name], tuned[name], asked)[0] if name in pruned else tuned[name]
        assert torch.equal(value, wanted), name


def test_everything_kept_is_the_fine_tuned_model_to_the_bit(delta, pair, tmp_path):
    _, tuned, merged, _ = both(delta, pair, tmp_path, "darex:keep=1")
    assert all(torch.equal(merged[name], value) for name, value in tuned.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(delta, tmp_path, dtype):
    tiny_llama().to(dtype).save_pretrained(tmp_path / "b")
    tuned_of(tiny_llama()).to(dtype).save_pretrained(tmp_path / "t")
    delta(
        "--tuned", tmp_path / "t", "--method", "darex:keep=0.2", "--out", tmp_path / "d", base=tmp_path / "b"
    )
    delta("--apply", tmp_path / "d", "--out", tmp_path / "m", base=tmp_path / "b")
    merged, base, tuned = loaded(tmp_path / "m"), loaded(tmp_path / "b"), loaded(tmp_path / "t")
    assert merged[NAME].dtype == dtype
    wanted = sparsified(NAME, base[NAME], tuned[NAME], DAREx(keep=0.2))[0]
    assert torch.equal(merged[NAME], wanted)


def test_size_is_near_the_share_kept(delta, tmp_path):
    for name, model in (("b", tiny_llama(hidden=256)), ("t", tuned_of(tiny_llama(hidden=256)))):
        model.bfloat16().save_pretrained(tmp_path / name)
    size = (tmp_path / "t" / "model.safetensors").stat().st_size
    delta("--tuned", tmp_path / "t", "--method", "darex:keep=0.02,scope=all,heads=()", "--out", tmp_path / "d",
          base=tmp_path / "b")  # fmt: skip
    # two bytes a value, a byte and a little for its place, and the header
    assert (tmp_path / "d" / "delta.safetensors").stat().st_size < 0.02 * 1.6 * size + 8000


def test_masks_do_not_depend_on_the_shards(delta, pair, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "one")
    tuned_of(tiny_llama()).save_pretrained(tmp_path / "many", max_shard_size="15KB")
    for number, (base, tuned) in enumerate([(pair[0], pair[1]), (tmp_path / "one", tmp_path / "many")]):
        delta("--tuned", tuned, "--method", "darex:keep=0.1", "--out", tmp_path / f"d{number}", base=base)
        delta("--apply", tmp_path / f"d{number}", "--out", tmp_path / f"m{number}", base=base)
    first, second = loaded(tmp_path / "m0"), loaded(tmp_path / "m1")
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_lora_adapters(delta, pair, tmp_path):
    model = with_lora(tiny_llama())
    model.save_pretrained(tmp_path / "adapter")
    _, _, merged, _ = both(delta, pair, tmp_path, "darex:keep=0.5", tuned=tmp_path / "adapter")
    full = model.merge_and_unload().state_dict()
    base = tiny_llama().state_dict()
    for name, value in merged.items():
        wanted = (
            sparsified(name, base[name], full[name], DAREx(keep=0.5))[0] if "proj" in name else base[name]
        )
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6, msg=name)


def test_several_are_summed(delta, pair, tmp_path):
    tuned_of(tiny_llama(), seed=2).save_pretrained(tmp_path / "other")
    out = delta(
        "--tuned",
        pair[1],
        "--tuned",
        tmp_path / "other",
        "--method",
        "darex:keep=0.3",
        "--out",
        tmp_path / "d",
    )
    assert "tuned" in out and "other" in out and "next: salience delta" in out
    given = ["--apply", tmp_path / "d" / "tuned", "--apply", tmp_path / "d" / "other"]
    delta(*given, "--weight", 0.5, "--weight", 0.25, "--out", tmp_path / "m")
    base, merged = tiny_llama().state_dict(), loaded(tmp_path / "m")
    states = [loaded(pair[1]), loaded(tmp_path / "other")]
    for name, value in merged.items():
        wanted = base[name]
        for state, share in zip(states, (0.5, 0.25)):
            one = (
                sparsified(name, base[name], state[name], DAREx(keep=0.3))[0]
                if "proj" in name
                else state[name]
            )
            wanted = wanted + share * (one - base[name])
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-6, msg=name)


def test_a_grown_vocabulary(delta, pair, tmp_path):
    tuned_of(tiny_llama(vocab=70)).save_pretrained(tmp_path / "grown")
    error = delta("--tuned", tmp_path / "grown", "--out", tmp_path / "d", code=2)
    assert "weight of shape [70, 32] on a base's [64, 32]" in error and not (tmp_path / "d").exists()
    delta(
        "--tuned", tmp_path / "grown", "--method", "darex:extra_rows=true,keep=0.1", "--out", tmp_path / "d"
    )
    delta("--apply", tmp_path / "d", "--out", tmp_path / "m")
    merged, tuned = loaded(tmp_path / "m"), loaded(tmp_path / "grown")
    assert torch.equal(merged["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])


def test_tied_weights_are_stored_once(delta, tmp_path):
    for name, model in (
        ("b", tiny_llama(tie_word_embeddings=True)),
        ("t", tuned_of(tiny_llama(tie_word_embeddings=True))),
    ):
        model.save_pretrained(tmp_path / name)
    stored = load_file(tmp_path / "t" / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, tmp_path / "t" / "model.safetensors", metadata={"format": "pt"})
    delta(
        "--tuned",
        tmp_path / "t",
        "--method",
        "darex:keep=0.5,scope=all",
        "--out",
        tmp_path / "d",
        base=tmp_path / "b",
    )
    delta("--apply", tmp_path / "d", "--out", tmp_path / "m", base=tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    merged = loaded(tmp_path / "m")
    assert torch.equal(merged["lm_head.weight"], merged["model.embed_tokens.weight"])
    assert not torch.equal(merged["lm_head.weight"], stored["lm_head.weight"])


def test_bad_input_leaves_nothing(delta, pair, tmp_path):
    out = tmp_path / "d"

    def refused(*arguments, **settings):
        message = delta(*arguments, "--out", out, code=2, **settings)
        assert not out.exists() and not list(tmp_path.glob(".d.*")), message
        return message

    tuned = ("--tuned", pair[1])
    assert "--tuned (to make one) or --apply (to use one), got neither" in refused()
    assert "got both" in refused(*tuned, "--apply", pair[1])
    assert "weight must be left out with --tuned" in refused(*tuned, "--weight", 0.5)
    assert "method must be left out with --apply" in refused("--apply", pair[1], "--method", "darex")
    assert "keep must be a share in (0, 1], got 2.0" in refused(*tuned, "--method", "darex:keep=2")
    assert "q must be in [keep, 1]" in refused(*tuned, "--method", "darex:keep=0.5,q=0.1")
    assert "method must be darex:key=value" in refused(*tuned, "--method", "lisa")
    assert "base must be an existing local folder or an owner/name on the hub" in refused(
        *tuned, base=tmp_path / "none"
    )
    assert "tuned must be an existing local folder or an owner/name on the hub" in refused(
        "--tuned", tmp_path / "none"
    )
    assert "tuned must be folders of different names, got 'tuned'" in refused(*tuned, *tuned)
    assert "tuned must be another folder than base" in refused("--tuned", pair[0])
    assert "apply must be a folder with delta.json" in refused("--apply", pair[1])
    config = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
    assert "got a mistral on a llama" in refused(*tuned)
    (pair[1] / "config.json").write_text(json.dumps(config))
    stored = load_file(pair[1] / "model.safetensors")
    stored[NAME][0, 0] = float("nan")
    save_file(stored, pair[1] / "model.safetensors")
    assert f"tuned must be finite weights, got NaN or infinity in {NAME}" in refused(*tuned)
    content = (pair[1] / "model.safetensors").read_bytes()
    (pair[1] / "model.safetensors").write_bytes(content[:-100])
    assert "model.safetensors truncated at" in refused(*tuned)


def test_a_filled_out_folder_is_refused_and_kept(delta, pair, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").write_text("mine")
    for arguments in (("--tuned", pair[1]), ("--apply", pair[1])):
        error = delta(*arguments, "--out", tmp_path / "d", code=2)
        assert "out must be a new or empty folder" in error
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    delta("--tuned", pair[1], "--out", tmp_path / "empty")
    assert (tmp_path / "empty" / "delta.json").is_file()


def test_another_base_is_refused(delta, pair, tmp_path):
    delta("--tuned", pair[1], "--out", tmp_path / "d")
    tiny_llama(seed=5).save_pretrained(tmp_path / "strange")
    error = delta("--apply", tmp_path / "d", "--out", tmp_path / "m", base=tmp_path / "strange", code=2)
    assert "base must be what" in error and "CRC-32" in error and not (tmp_path / "m").exists()
    tiny_llama(hidden=16).save_pretrained(tmp_path / "narrow")
    error = delta("--apply", tmp_path / "d", "--out", tmp_path / "m", base=tmp_path / "narrow", code=2)
    assert "was made from, got F32 [" in error
    about = json.loads((tmp_path / "d" / "delta.json").read_text())
    (tmp_path / "d" / "delta.json").write_text(json.dumps({**about, "version": 2}))
    assert "of version 1" in delta("--apply", tmp_path / "d", "--out", tmp_path / "m", code=2)


def test_loads_where_salience_cannot_be_imported(delta, pair, tmp_path):
    import subprocess
    import sys

    both(delta, pair, tmp_path, "darex:keep=0.1")
    shutil.rmtree(pair[1])
    code = (
        "import sys; sys.modules['salience'] = None\n"
        "from transformers import AutoModelForCausalLM as A\n"
        f"m, info = A.from_pretrained({str(tmp_path / 'model')!r}, output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded" in done.stdout


@pytest.mark.parametrize(
    "method", ["q=output", "q=loss", "q=layer", "q=layer,eta=0.3", "score=wanda", "score=wanda,q=loss"]
)
def test_what_is_found_by_running_the_model(delta, checkpoint, rows, tmp_path, method):
    with_tokens = tmp_path / "tuned-words"
    shutil.copytree(checkpoint, with_tokens)
    tuned_of(tiny_llama()).save_pretrained(with_tokens)
    data = () if method == "q=output" else ("--data", rows)  # without data: random tokens
    delta("--tuned", with_tokens, "--method", f"darex:keep=0.1,{method}", *data, "--samples", 6, "--length", 16,
          "--device", "cpu", "--out", tmp_path / "d", base=checkpoint)  # fmt: skip
    about = json.loads((tmp_path / "d" / "delta.json").read_text())
    assert 0.1 <= about["q"] <= 1
    if "layer" in method:
        found = [about["tensors"][name]["q"] for name in about["tensors"] if "proj" in name]
        assert len(set(found)) > 1 and sum(found) / len(found) == pytest.approx(about["q"])
        assert bool(about["tried"]) == ("eta" not in method)
    elif "q=" in method:
        tried = {float(q): value for q, value in about["tried"].items()}
        assert len(tried) == 16 and min(tried.values()) < max(tried.values())
        assert tried[min(tried, key=lambda q: abs(q - about["q"]))] == min(tried.values())
    else:
        assert about["q"] == 1 and about["tried"] == {}
    delta("--apply", tmp_path / "d", "--out", tmp_path / "m", base=checkpoint)
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(tmp_path / "m")) > 20
    if "q=output" in method:
        # what was tried is what is written: the change of the logits at the chosen q
        from salience.hosts import _delta_models as models
        from salience.hosts.checkpoints import load_model

        (merged, tokenizer), (tuned, _) = load_model(tmp_path / "m"), load_model(with_tokens)
        batches = models.sequences(merged, tokenizer, None, 6, 16, 0)
        change = models.output_change(merged, batches, models.reference(tuned, batches))
        assert change == pytest.approx(min(tried.values()), rel=1e-4)


def test_loss_needs_data(delta, checkpoint, tmp_path):
    tuned = tmp_path / "tuned-words"
    shutil.copytree(checkpoint, tuned)
    error = delta(
        "--tuned", tuned, "--method", "darex:q=loss", "--out", tmp_path / "d", base=checkpoint, code=2
    )
    assert "data must be given for q=loss" in error and not (tmp_path / "d").exists()


def test_help_teaches(cli):
    code, out, _ = cli("delta", "--help")
    assert code == 0 and "Examples" in out and "--apply" in out and "streamed" in out


def test_gradient_takes_a_q_for_each_layer_that_fits_better_than_dare(delta, checkpoint, rows, tmp_path):
    tuned = tmp_path / "tuned-words"
    shutil.copytree(checkpoint, tuned)
    tuned_of(tiny_llama(), size=0.02).save_pretrained(tuned)
    delta("--tuned", tuned, "--method", "darex:keep=0.1,q=gradient", "--data", rows, "--samples", 24, "--length", 16,
          "--device", "cpu", "--out", tmp_path / "d", base=checkpoint)  # fmt: skip
    about = json.loads((tmp_path / "d" / "delta.json").read_text())
    found = {n: one["q"] for n, one in about["tensors"].items() if one["kind"] == "pruned"}
    assert len(found) == 14 and len(set(found.values())) > 7 and all(0.1 <= q <= 1 for q in found.values())
    assert sum(found.values()) / 14 == pytest.approx(about["q"])
    tried = {float(step): value for step, value in about["tried"].items()}
    # step 0 is DARE
    assert min(tried.values()) < 0.8 * tried[0] and set(tried) <= {0, *range(10, 201, 10)}
    # what was trained is what is written
    from salience.hosts import _delta_models as models
    from salience.hosts.checkpoints import load_model

    delta("--apply", tmp_path / "d", "--out", tmp_path / "m", base=checkpoint)
    (merged, tokenizer), (whole, _) = load_model(tmp_path / "m"), load_model(tuned)
    batches = models.sequences(merged, tokenizer, str(rows), 24, 16, 0)
    checked, wanted = batches[::5], models.reference(whole, batches)[::5]
    assert models.output_change(merged, checked, wanted) == pytest.approx(min(tried.values()), rel=1e-3)


def test_ids_on_the_hub(delta, pair, tmp_path, monkeypatch):
    """A snapshot takes the place of its id; what delta.json and the next command say is the id."""
    import huggingface_hub

    asked = []

    def snapshot(source, allow_patterns):
        asked.append((source, tuple(allow_patterns)))
        return str(pair[0] if source == "me/base" else pair[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    out = delta("--tuned", "me/mine", "--tuned", pair[1], "--out", tmp_path / "d", base="me/base")
    assert [source for source, _ in asked] == ["me/base", "me/mine"]
    assert "model.safetensors" in asked[0][1] and not any("bin" in pattern for pattern in asked[0][1])
    about = json.loads((tmp_path / "d" / "mine" / "delta.json").read_text())
    assert (about["base"], about["tuned"]) == ("me/base", "me/mine") and "--base me/base" in out
    delta("--apply", tmp_path / "d" / "mine", "--out", tmp_path / "m", base="me/base")
    assert (tmp_path / "m" / "config.json").is_file()


def test_a_hub_that_is_not_there(delta, tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(source, allow_patterns):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    error = delta("--tuned", "me/mine", "--out", tmp_path / "d", base="me/base", code=2)
    assert (
        "base must be an existing local folder or an owner/name on the hub, got me/base: no such folder"
        in error
    )
    assert "cannot be reached" in error and not (tmp_path / "d").exists()
