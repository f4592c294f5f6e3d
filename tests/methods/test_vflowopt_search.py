"""The search of VFlowOpt: budgets, the objective, recipes, refusals, and going on after a kill."""

import json
import math
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import llava_batch, tiny_llava

import salience as sal
from salience.core.errors import ParameterError
from salience.core.spec import describe_method, parse_method
from salience.jobs.recipe import make_recipe
from salience.methods.tokens._vflowopt_search import Objective, average, bounds, settle, third_ratio

METHOD = sal.VFlowOpt(ratios=(0.5, 0.7, 0.6), t=1.0, alpha=0.2, cell=2.0)
SMALL = {"t": (0.0, 4.0), "cell": (1.5, 4.0)}  # fit for 16 tokens


def prompts_of(count, start=0):
    return [llava_batch((1,), seed=start + seed) for seed in range(count)]


def test_budgets():
    assert third_ratio(0.25, 0.3, 0.9, (9, 18), 28) == pytest.approx(0.6926, abs=5e-5)
    assert third_ratio(0.9, 0.3, 0.9, (9, 18), 28) == 1.0 and third_ratio(0.1, 0.5, 0.9, (9, 18), 28) < 0
    released = {(0.7233, 0.7487, 0.487): 0.501, (0.2651, 0.9833, 0.8773): 0.251, (0.1166, 1.0, 0.6011): 0.100}
    for ratios, share in released.items():
        assert average(ratios, (9, 18), 28) == pytest.approx(share, abs=5e-4)
        assert sal.VFlowOpt().stage_layers(28) == (9, 18)
    found = settle(sal.VFlowOpt(), {"r1": 0.3, "r2": 0.9, "t": 1.0, "alpha": 0.0, "cell": 4.0}, 0.25, 28)
    assert average(found.ratios, found.stage_layers(28), 28) == pytest.approx(0.25, abs=1e-6)
    assert (
        settle(sal.VFlowOpt(), {"r1": 0.9, "r2": 1.0, "t": 1.0, "alpha": 0.0, "cell": 4.0}, 0.25, 28) is None
    )
    assert bounds(0.25, None)["r1"] == (0.25, 0.375) and bounds(0.5, {"t": (1, 2)})["t"] == (1.0, 2.0)


@torch.no_grad()
def test_the_objective_is_the_sum_of_cosines_of_the_last_states():
    model, method = tiny_llava(), METHOD
    prompts = [llava_batch((1, 2)), llava_batch((1, 2), seed=4, side="right")]
    expected = 0.0
    states = []
    for focused in (False, True):
        handle = sal.focus(model, method) if focused else None
        for prompt in prompts:
            hidden = model.model(**prompt).last_hidden_state
            last = prompt["attention_mask"].cumsum(-1).argmax(-1)
            states.append(hidden[torch.arange(2), last].double())
        if handle:
            handle.undo()
    for full, pruned in zip(states[:2], states[2:], strict=True):
        expected += float(torch.cosine_similarity(full, pruned).sum())
    model.train()
    objective = Objective(model, [{**prompts[0], "labels": prompts[0]["input_ids"]}, prompts[1]])
    assert objective(method) == pytest.approx(expected, abs=1e-5) and objective.count == 4
    assert objective(sal.VFlowOpt(ratios=(1.0, 1.0, 1.0))) == pytest.approx(4.0, abs=1e-5)
    assert model.training, "the mode must come back"
    with torch.no_grad():
        model.model.language_model.norm.weight.fill_(math.nan)
    assert objective(method) == 0.0


def test_the_search_writes_a_recipe_that_repeats_what_it_found(tmp_path):
    model, prompts = tiny_llava(), prompts_of(3)
    state = torch.get_rng_state()
    found = sal.search_vflowopt(
        model, prompts, budget=0.4, evaluations=4, random=2, space=SMALL, folder=tmp_path / "s"
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert average(found.ratios, found.stage_layers(6), 6) <= 0.4 + 1e-6
    recipe = make_recipe(tmp_path / "s" / "recipe.json", {})
    assert [parse_method(text) for text in recipe.methods] == [found]
    # the same seed finds the same without a folder; a finished search is read and not repeated
    assert sal.search_vflowopt(model, prompts, budget=0.4, evaluations=4, random=2, space=SMALL) == found
    assert (
        sal.search_vflowopt(
            model, prompts, budget=0.4, evaluations=4, random=2, space=SMALL, folder=tmp_path / "s"
        )
        == found
    )
    study = _study(tmp_path / "s")
    assert len(study.trials) == 4 == len({tuple(trial.params.values()) for trial in study.trials})
    assert found.t == round(found.t, 6) and found.ratios[0] == round(found.ratios[0], 6)
    objective = Objective(model, prompts)
    assert study.best_value == pytest.approx(objective(found), abs=1e-6)
    study.ask()  # as a process that was stopped leaves it
    more = sal.search_vflowopt(
        model, prompts, budget=0.4, evaluations=5, random=2, space=SMALL, folder=tmp_path / "s"
    )
    states = [trial.state.name for trial in _study(tmp_path / "s").trials]
    assert states == [*["COMPLETE"] * 4, "FAIL", "COMPLETE"] and objective(more) >= objective(found) - 1e-6


def test_focus_searches_first(tmp_path):
    model, prompts = tiny_llava(), prompts_of(2)
    method = sal.VFlowOpt(search=3, budget=0.3, folder=str(tmp_path), t=2.0, cell=4.0, seed=1)
    with sal.focus(model, method, data=prompts) as handle, torch.no_grad():
        model(**llava_batch((1,), seed=9))
        spent = handle.spent["vflowopt"]
    (text,) = json.loads((tmp_path / "recipe.json").read_text())["methods"]
    assert spent["found"] == text and spent["prompts"] == 1
    found = parse_method(text)
    assert found.search == 0 and found != replace(method, search=0, folder=None)
    with pytest.raises(ParameterError, match=r"prompts must be a list of at least one prompt .*, got None"):
        sal.focus(model, method)
    assert not model._forward_pre_hooks


def test_bad_searches_are_one_clear_error(tmp_path, monkeypatch):
    model, prompts = tiny_llava(), prompts_of(1)

    def refused(match, *, given=prompts, **settings):
        with pytest.raises(ParameterError, match=match):
            sal.search_vflowopt(model, given, **{"evaluations": 1, "space": SMALL, **settings})

    refused("prompts must be a list of at least one prompt", given=[])
    refused("prompt 0 must be keywords of the model with input_ids, got 'str'", given=["what?"])
    refused("prompt 1 must be one with image tokens, got 'none'", given=[*prompts, llava_batch((0,))])
    refused("budget must be in", budget=1.5)
    refused("evaluations must be >= 1, got 0", evaluations=0)
    refused("random must be >= 1, got 0", random=0)
    refused("ratios must be three to be searched for", base=sal.VFlowOpt(ratios=(0.5,)))
    refused("space must be of r1, r2, t, alpha, cell, got 'a'", space={"a": (1, 2)})
    refused("space of t must be a rising range of valid values", space={"t": (2.0, 1.0)})
    refused(r"space of cell must be \(low, high\)", space={"cell": 3})
    refused(
        "budget must be within reach of some third ratio > 0, got 0.1", budget=0.1, space={"r1": (0.9, 1.0)}
    )
    (tmp_path / "file").write_text("")
    refused("folder must be a writable folder", folder=tmp_path / "file")
    sal.search_vflowopt(model, prompts, evaluations=1, space=SMALL, folder=tmp_path / "own")
    refused(
        "folder must be new, or of the same search, got .* with other seed", folder=tmp_path / "own", seed=7
    )
    with pytest.raises(ParameterError, match="with other model"):
        sal.search_vflowopt(tiny_llava(seed=5), prompts, evaluations=1, space=SMALL, folder=tmp_path / "own")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.db").write_text("no data base" * 100)
    refused("folder must hold a readable study.db or none, got .*study.db", folder=tmp_path / "broken")
    monkeypatch.setitem(sys.modules, "optuna", None)
    refused(r"optuna must be installed to search for settings, got none: pip install 'salience\[search\]'")


_CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from methods.test_vflowopt_search import KILLED, Objective, prompts_of, sal, tiny_llava
own = Objective.__call__
Objective.__call__ = lambda self, method: (time.sleep(0.1), own(self, method))[1]
sal.search_vflowopt(tiny_llava(), prompts_of(2), folder=sys.argv[2], **KILLED)
"""
KILLED = {"budget": 0.4, "evaluations": 12, "random": 3, "space": SMALL}


def _study(folder):
    import optuna

    return optuna.load_study(study_name="vflowopt", storage=f"sqlite:///{folder}/study.db")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="kill -9")
def test_a_killed_search_goes_on_to_the_same_result(tmp_path):
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", _CHILD, tests, str(tmp_path / "cut")], env=environment)
    done = 0
    try:
        deadline = time.monotonic() + 120
        while done < 5 and time.monotonic() < deadline:
            assert child.poll() is None, "the search ended before it could be killed"
            time.sleep(0.05)
            if (tmp_path / "cut" / "study.db").exists():
                done = _finished(tmp_path / "cut")
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    before = _finished(tmp_path / "cut")
    assert 5 <= before < 12 and not (tmp_path / "cut" / "recipe.json").exists()
    found = sal.search_vflowopt(tiny_llava(), prompts_of(2), folder=tmp_path / "cut", **KILLED)
    whole = sal.search_vflowopt(tiny_llava(), prompts_of(2), folder=tmp_path / "whole", **KILLED)
    assert found == whole and _finished(tmp_path / "cut") == 12
    values = [
        [trial.params for trial in _study(tmp_path / name).trials if trial.value is not None]
        for name in ("cut", "whole")
    ]
    assert values[0] == values[1]


def _finished(folder):
    """Evaluations in the file, read without Optuna: it may be in the middle of being made."""
    try:
        with sqlite3.connect(f"file:{folder}/study.db?mode=ro", uri=True) as base:
            (count,) = base.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()
    except sqlite3.OperationalError:
        return 0
    return count


@pytest.mark.slow
def test_the_search_beats_the_median_of_random_settings():
    model, prompts = tiny_llava(), prompts_of(6)
    objective = Objective(model, prompts)
    budget, within = 0.4, bounds(0.4, SMALL)
    draw = torch.Generator().manual_seed(3)
    others = []
    while len(others) < 25:
        values = {
            n: low + (high - low) * float(torch.rand((), generator=draw)) for n, (low, high) in within.items()
        }
        method = settle(sal.VFlowOpt(), values, budget, 6)
        if method is not None:
            others.append(objective(method))
    found = sal.search_vflowopt(model, prompts, budget=budget, evaluations=25, space=SMALL, seed=0)
    assert objective(found) > statistics.median(others)
    assert describe_method(found) != "vflowopt"
