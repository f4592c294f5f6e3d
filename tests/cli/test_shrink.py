"""`salience shrink` from the command to the checkpoints and the page, and one line for whatever a user gets wrong."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from salience.hosts.footprint import bytes_on_disk
from salience.jobs.shrink import make_arms, shrink
from salience.jobs.shrink_recipe import ShrinkRecipe

METHODS = ["loraprune:keep=0.5,units=channels", "loraprune:keep=0.5,units=channels,metric=random"]
NAMES = ["loraprune-units-channels", "loraprune-units-channels-metric-random"]
FAST = {"steps": 4, "batch_size": 4, "save_every": 2, "repeats": 1, "prompt_tokens": 16, "new_tokens": 4}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """Prompts with completions as a .jsonl file."""
    words = "the a cat dog sits runs on under mat tree".split()  # noqa: SIM905
    rows = [
        {"prompt": f"{words[i % 10]} {words[i % 7]}", "completion": f" {words[i % 9]} {words[i % 8]}"}
        for i in range(40)
    ]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


@pytest.fixture(scope="module")
def ran(checkpoint, lines, tmp_path_factory):
    """A run with two rivals: its recipe, its folder and its result."""
    out = tmp_path_factory.mktemp("run") / "out"
    recipe = ShrinkRecipe(model=str(checkpoint), data=str(lines), methods=METHODS, device="cpu", **FAST)
    return recipe, out, shrink(recipe, out)


def test_rivals_are_smaller_and_load_as_they_were_in_memory(ran, checkpoint):
    from transformers import AutoTokenizer, LlamaForCausalLM

    _, out, result = ran
    assert list(result["arms"]) == ["untouched", *NAMES]
    first, *others = result["arms"].values()
    assert first["bytes_on_disk"] == bytes_on_disk(checkpoint) and first["logits_difference"] is None
    for name, arm in zip(NAMES, others):
        folder = out / "models" / name
        model = LlamaForCausalLM.from_pretrained(folder)
        assert model.config.intermediate_size == 32
        assert sum(p.numel() for p in model.parameters()) == arm["parameters"] < first["parameters"]
        assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(checkpoint))
        assert arm["bytes_on_disk"] == bytes_on_disk(folder) < first["bytes_on_disk"]
        assert arm["logits_difference"] <= 1e-5
        assert arm["quality"]["overall"] == arm["quality"]["loss"] > 0
        assert arm["prefill_tokens_per_second"] > 0 and arm["decode_tokens_per_second"] > 0
        assert arm["trained"] and arm["steps"] == 4
    weights = [(out / "models" / name / "model.safetensors").read_bytes() for name in NAMES]
    assert weights[0] != weights[1]
    (alone,) = result["tuned"].values()
    assert alone["lora"] and alone["steps"] == 4 and alone["quality"]["overall"] > 0


def test_the_page_shows_every_arm_and_needs_nothing_else(ran):
    _, out, result = ran
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "@import" not in text
    assert not re.search(r'(?:src|href)="(?!#|data:)', text)
    for shown in (
        "LoRAPrune (keep=0.5, units=channels)",
        "metric=random",
        "with nothing removed",
        "peak memory",
    ):
        assert shown in text
    # a chart for a page and for a phone, and what each arm removed
    assert text.count("<svg") == 2 + 2 * len(METHODS)
    assert json.loads((out / "result.json").read_text()) == result


def test_a_finished_arm_is_not_repeated(ran):
    recipe, out, result = ran
    paths = [out / "arms" / name / "done.json" for name in NAMES] + [
        out / "models" / NAMES[0] / "config.json"
    ]
    before = [path.stat().st_mtime_ns for path in paths]
    steps = []
    again = shrink(recipe, out, progress=lambda *step: steps.append(step))
    assert not steps and [path.stat().st_mtime_ns for path in paths] == before
    assert again["arms"] == result["arms"]


def test_arms_are_named_by_what_differs_and_joined_by_a_plus():
    arms = make_arms(
        ShrinkRecipe(model="m", data="d", methods=["loraprune+sstoken:keep=0.7", "maestro:eps=1e-5"])
    )
    assert [arm.name for arm in arms] == ["loraprune-sstoken-keep-0.7", "maestro-eps-1e-05"]
    assert [method.slug() for method in arms[0].methods] == ["loraprune", "sstoken"]
    assert arms[0].label == "LoRAPrune (keep=0.5) + SsToken (keep=0.7)"


@pytest.fixture
def refused(cli, checkpoint, rows, tmp_path):
    def run(**options):
        given = {
            "model": checkpoint,
            "data": rows,
            "method": "loraprune",
            "out": tmp_path / "out",
            "device": "cpu",
        }
        arguments = []
        for name, value in {**given, **options}.items():
            for one in value if isinstance(value, list) else [value]:
                if one is not None:
                    arguments += [f"--{name.replace('_', '-')}", str(one)]
        code, out, err = cli("shrink", *arguments)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in err and not out, err
        assert "out" in options or not (tmp_path / "out").exists()
        return lines[0]

    return run


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"method": "ist"}, "method must be one that shrinks ("),
        ({"method": "darex"}, "which is what `salience delta` is for"),
        ({"method": "lorapune"}, "did you mean loraprune"),
        ({"method": None}, "method must be given together with model, got none: --method"),
        (
            {"method": ["loraprune", "loraprune"]},
            "method must be given once with the same parameters, got loraprune",
        ),
        ({"method": "loraprune+easy-ep"}, "methods joined by + must all act on training, got easy-ep"),
        ({"data": None}, "data must be given for loraprune, got none: --data FILE_OR_DATASET"),
        ({"data": None, "method": "easy-ep"}, "data must be given for easy-ep"),
        ({"world": "text"}, "world must be left out with model or data, got text"),
        ({"model": "/nowhere"}, "model must be an existing folder or a hub id, got /nowhere"),
        (
            {"prompt_tokens": 120},
            "prompt_tokens must be at most 96 (128 positions less 32 new_tokens), got 120",
        ),
        ({"repeats": 0}, "repeats must be greater than or equal to 1, got 0"),
        ({"method": "easy-ep"}, "model must have layers with a router and experts, got LlamaForCausalLM"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_nothing_is_written(refused, options, expected):
    assert expected in refused(**options)


def test_a_folder_with_other_files_is_refused_and_kept(refused, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "with other files in it" in refused(out=tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_tokenizer_of_another_model_is_refused(refused, checkpoint, tmp_path):
    import shutil

    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["far"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer must be of ids below 64" in refused(model=folder)


def test_a_run_of_another_recipe_is_refused(ran, checkpoint, lines, refused):
    _, out, _ = ran
    before = (out / "result.json").read_bytes()
    assert "out must be a folder of the same recipe" in refused(data=lines, out=out)
    assert (out / "result.json").read_bytes() == before


def test_experts_are_removed_at_once(checkpoint, lines, tmp_path):
    from transformers import AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM

    source, out = tmp_path / "mixture", tmp_path / "out"
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=2,
        shared_expert_intermediate_size=16, num_attention_heads=2, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, decoder_sparse_step=1,
    )  # fmt: skip
    Qwen2MoeForCausalLM(config).bfloat16().save_pretrained(source)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(source)
    recipe = ShrinkRecipe(
        model=str(source), data=str(lines), methods=["easy-ep:keep=0.5"], device="cpu", samples=8, **FAST
    )
    result = shrink(recipe, out)
    first, arm = result["arms"].values()
    assert arm["spent"]["easy-ep"]["experts"] == 2 and arm["spent"]["easy-ep"]["demonstrations"] == 8
    # worked on in float32, written as the checkpoint is, and checked in float32
    assert first["dtype"] == arm["dtype"] == "bfloat16" and arm["logits_difference"] <= 1e-5
    made = Qwen2MoeForCausalLM.from_pretrained(out / "models" / "easy-ep")
    assert made.config.num_experts == 2 and made.dtype == torch.bfloat16
    assert not arm["trained"] and not result["tuned"] and not (out / "metrics.jsonl").exists()
    assert "salience" not in (out / "models" / "easy-ep" / "config.json").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_losses(checkpoint, lines, tmp_path):
    def losses(out):
        path = out / "metrics.jsonl"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [{k: v for k, v in row.items() if k != "seconds"} for row in found]

    settings = {"model": str(checkpoint), "data": str(lines), "methods": METHODS[:1], "device": "cpu", **FAST}
    recipe = ShrinkRecipe(**{**settings, "steps": 24, "save_every": 3, "baseline": False})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    shrink(recipe, whole)
    stored = tmp_path / "recipe.json"
    stored.write_text(recipe.model_dump_json())
    command = [sys.executable, "-m", "salience", "shrink", "--recipe", str(stored), "--out", str(broken)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(losses(broken)) < 10:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed: give it more steps"
    assert not (broken / "models").exists()
    shrink(recipe, broken)
    assert losses(broken) == losses(whole)
    paths = [folder / "models" / NAMES[0] / "model.safetensors" for folder in (whole, broken)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
