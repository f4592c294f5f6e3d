"""A killed run goes on as if nothing had happened; what is written loads without salience."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

STEPS = 24


def command(checkpoint, rows, out):
    return [
        sys.executable, "-m", "salience", "tune", "--model", str(checkpoint), "--data", str(rows), "--out", str(out),
        "--steps", str(STEPS), "--save-every", "3", "--batch-size", "4", "--accumulation", "2", "--device", "cpu",
        "--method", "ist:active_layers=1,score_every=5,probe_batch_size=4,candidates=2",
        "--method", "sstoken:keep=0.6", "--method", "deft:weight=0.1", "--learning-rate", "0.01",
    ]  # fmt: skip


def environment(tmp_path):
    return {**os.environ, "OMP_NUM_THREADS": "1", "SALIENCE_CACHE": str(tmp_path / "cache")}


def metrics(out):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.mark.slow
def test_five_kills_give_the_losses_of_an_unbroken_run(checkpoint, rows, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(
        command(checkpoint, rows, whole), env=environment(tmp_path), check=True, capture_output=True
    )
    draw, kills = random.Random(0), 0
    while kills < 5:
        started = time.monotonic()
        process = subprocess.Popen(
            command(checkpoint, rows, broken),
            env=environment(tmp_path),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        # wait until it has moved by a random number of rows, then a random moment more: in a step, or in a save
        before, more = _lines(broken), draw.randint(1, 9)
        while process.poll() is None and _lines(broken) - before < more and time.monotonic() - started < 120:
            time.sleep(0.005)
        time.sleep(draw.random() * 0.05)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read().decode()
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 5, "the run ended before it was killed five times: give it more steps"
    subprocess.run(
        command(checkpoint, rows, broken), env=environment(tmp_path), check=True, capture_output=True
    )
    assert metrics(broken) == metrics(whole)
    for arm in ("lora", "lora-ist-sstoken-deft"):
        weights = [
            folder / "arms" / arm / "model" / "adapter_model.safetensors" for folder in (whole, broken)
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()
    assert (broken / "report.html").is_file()


def _lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


@pytest.mark.slow
def test_sigint_stops_at_a_step_and_the_same_command_goes_on(checkpoint, rows, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(checkpoint, rows, out),
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None and _lines(out) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    text = " ".join(err.decode().split())
    assert process.returncode == 130, text
    assert "stopped cleanly at step" in text and "the same command goes on from there" in text
    again = command(checkpoint, rows, out)
    done = subprocess.run(again, env=environment(tmp_path), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    other = [*again, "--seed", "5"]
    done = subprocess.run(other, env=environment(tmp_path), capture_output=True, check=False)
    assert done.returncode == 2 and b"with seed = 0 instead of 5" in done.stderr
    # in a process in which salience cannot be imported
    tuned = out / "arms" / "lora-ist-sstoken-deft" / "model"
    load = (
        "import sys; sys.modules['salience'] = None\n"
        "from peft import AutoPeftModelForCausalLM\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({str(tuned)!r})\n"
        "import torch; assert model(input_ids=torch.tensor([[1, 5, 6]])).logits.isfinite().all()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", load], env=environment(tmp_path), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_loss_that_is_not_finite_stops_with_the_step_and_keeps_the_checkpoint(
    cli, checkpoint, rows, tmp_path
):
    out = tmp_path / "out"
    arguments = (
        "tune",
        "--model",
        checkpoint,
        "--data",
        rows,
        "--device",
        "cpu",
        "--out",
        out,
        "--no-baseline",
    )
    code, _, err = cli(
        *arguments, "--adapter", "none", "--steps", 40, "--save-every", 1, "--learning-rate", 1e30
    )
    assert code == 2 and "loss must be finite, got nan at step" in err.replace("inf", "nan")
    assert "the last checkpoint is kept" in err
    assert list((out / "arms" / "full-tuning").glob("checkpoint-*/complete"))
