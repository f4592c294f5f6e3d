"""What every method has to keep, whatever it does. A new method is picked up by itself.

Each `tests/methods/test_<slug>.py` defines `CONTRACT`: `method`, an instance fit for a tiny model; `model`, a
function that makes that model; `bad`, a map from a parameter to (bad value, expected text); and optionally
`trainer`, settings for the Trainer, `trainer_model`, a function that makes another model for it, and `inputs`, one
that makes a batch for the model. Methods on datasets give `dataset`, a function that makes one, and `picks`, one that
makes an instance which can pick of it. Methods on image tokens
also give `keep_all`, an instance that drops nothing: tests/test_visual_tokens.py runs them over every family.
"""

import importlib
import sys
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import collate, losses_of, ragged_samples, tiny_trainer

import salience as sal
from salience.core.errors import ParameterError
from salience.core.method import JOBS, SPENDS, UNITS, Method
from salience.core.registry import entries, load

sys.path.insert(0, str(Path(__file__).parent / "methods"))
SLUGS = sorted(entries())
TRAINING = [slug for slug in SLUGS if "trainer" in entries()[slug].targets]
MODELS = [slug for slug in SLUGS if "model" in entries()[slug].targets]
DATASETS = [slug for slug in SLUGS if "dataset" in entries()[slug].targets]


def contract(slug):
    return importlib.import_module(f"test_{slug.replace('-', '_')}").CONTRACT


def trainer_for(slug, folder, **settings):
    case = contract(slug)
    model = case.get("trainer_model", case["model"])()
    return tiny_trainer(folder, model, **{**case.get("trainer", {}), **settings})


def snapshot(model):
    """Everything that attaching may not leave behind: weights, flags, modes, hooks, modules, instance attributes."""
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": [(name, id(module), module.training) for name, module in model.named_modules()],
        "hooks": {
            name: [len(getattr(module, kind)) for kind in vars(module) if kind.endswith("_hooks")]
            for name, module in model.named_modules()
        },
        "own": {name: sorted(k for k in vars(module)) for name, module in model.named_modules()},
        "config": repr(getattr(model, "config", None)),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }


def same(before, after):
    for key in ("flags", "modules", "hooks", "own", "config", "attention"):
        assert after[key] == before[key], f"{key} changed"
    for name, value in before["state"].items():
        assert torch.equal(after["state"][name], value), f"{name} changed"


def outputs(model, slug=None):
    make = contract(slug).get("inputs") if slug else None
    batch = make() if make else collate(ragged_samples(3, seed=5))
    with torch.no_grad():
        return model(**batch).logits.clone()


@pytest.mark.parametrize("slug", SLUGS)
def test_is_a_frozen_keyword_only_dataclass_with_defaults(slug):
    cls, entry = load(slug), entries()[slug]
    method = cls()
    assert is_dataclass(cls) and issubclass(cls, Method)
    assert cls.slug() == slug and getattr(sal, cls.__name__) is cls
    assert entry.unit == cls.unit and cls.unit in UNITS and cls.spends in SPENDS and cls.job in JOBS
    assert entry.targets == cls.targets() and cls.targets()
    assert entry.summary and entry.arxiv == cls.arxiv and entry.title == cls.title
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(cls)[0].name, None)
    with pytest.raises(TypeError):
        cls(1)
    with pytest.raises(TypeError, match="no_such_parameter"):
        cls(no_such_parameter=1)


@pytest.mark.parametrize("slug", SLUGS)
def test_repr_round_trips(slug):
    method = contract(slug)["method"]
    assert eval(repr(method), {type(method).__name__: type(method)}) == method
    assert replace(method) == method


@pytest.mark.parametrize("slug", SLUGS)
def test_every_bad_value_is_refused(slug):
    bad = contract(slug)["bad"]
    assert bad, f"{slug} documents no bad value"
    for name, (value, text) in bad.items():
        # a key may end in ":2" to try a second value of the same parameter
        with pytest.raises(ParameterError, match=text):
            load(slug)(**{name.partition(":")[0]: value})


@pytest.mark.parametrize("slug", TRAINING)
def test_trainer_attach_and_undo_leave_no_trace(slug, tmp_path):
    trainer = trainer_for(slug, tmp_path)
    before, logits = snapshot(trainer.model), outputs(trainer.model)
    own, callbacks = dict(vars(trainer)), list(trainer.callback_handler.callbacks)
    random = torch.get_rng_state()
    handle = sal.focus(trainer, contract(slug)["method"])
    assert type(contract(slug)["method"]).__name__ in repr(handle)
    handle.undo()
    handle.undo()
    assert torch.equal(torch.get_rng_state(), random), "attaching moved the global random state"
    same(before, snapshot(trainer.model))
    assert vars(trainer) == own and trainer.callback_handler.callbacks == callbacks
    assert torch.equal(outputs(trainer.model), logits)


@pytest.mark.parametrize("slug", TRAINING)
def test_undo_after_an_exception_in_training(slug, tmp_path):
    from transformers import TrainerCallback

    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise RuntimeError("stop here")

    # training itself leaves things behind (accelerate wraps forward): a plain run that fails alike is the measure
    plain, focused = (trainer_for(slug, tmp_path / name) for name in ("plain", "focused"))
    for trainer in (plain, focused):
        trainer.add_callback(Fails())
    with pytest.raises(RuntimeError, match="stop here"):
        plain.train()
    with pytest.raises(RuntimeError, match="stop here"), sal.focus(focused, contract(slug)["method"]):
        focused.train()
    before, after = snapshot(plain.model), snapshot(focused.model)
    for key in ("flags", "hooks", "own", "config", "attention"):
        assert after[key] == before[key], f"{key} changed"
    assert vars(focused).keys() == vars(plain).keys()


@pytest.mark.parametrize("slug", TRAINING)
def test_the_same_seed_gives_the_same_run_and_no_global_randomness(slug, tmp_path):
    runs = []
    for index in range(2):
        torch.manual_seed(11)
        trainer = trainer_for(slug, tmp_path / str(index))
        sal.focus(trainer, contract(slug)["method"])
        trainer.train()
        runs.append((losses_of(trainer), trainer.model.state_dict(), torch.get_rng_state()))
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 3
    for name, value in runs[0][1].items():
        assert torch.equal(value, runs[1][1][name]), name
    torch.manual_seed(11)
    plain = trainer_for(slug, tmp_path / "plain")
    plain.train()
    assert torch.equal(torch.get_rng_state(), runs[0][2]), "the method drew from the global generator"


@pytest.mark.parametrize("slug", TRAINING)
def test_evaluation_is_not_touched(slug, tmp_path):
    trainer = trainer_for(slug, tmp_path)
    from conftest import Listed

    trainer.eval_dataset = Listed(ragged_samples(4, seed=9))
    plain = trainer.evaluate()["eval_loss"]
    with sal.focus(trainer, contract(slug)["method"]):
        assert trainer.evaluate()["eval_loss"] == plain


@pytest.mark.parametrize("slug", TRAINING)
def test_a_resumed_run_continues_exactly(slug, tmp_path):
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    torch.manual_seed(11)
    whole = trainer_for(slug, tmp_path / "whole", **settings)
    sal.focus(whole, contract(slug)["method"])
    whole.train()
    torch.manual_seed(12)
    again = trainer_for(slug, tmp_path / "again", **settings)
    sal.focus(again, contract(slug)["method"])
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert losses_of(again)[-3:] == losses_of(whole)[-3:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


@pytest.mark.parametrize("slug", MODELS)
def test_model_attach_and_undo_leave_no_trace(slug):
    case = contract(slug)
    model = case["model"]()
    logits = outputs(model, slug)  # first: transformers hangs hooks of its own on some models when they run
    before = snapshot(model)
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), sal.focus(model, case["method"], data=case.get("data")):
        focused = outputs(model, slug)
        raise RuntimeError("inside")
    assert torch.equal(torch.get_rng_state(), random)
    assert focused.shape == logits.shape
    if "keep_all" in case:
        assert not torch.equal(focused, logits)
    same(before, snapshot(model))
    assert torch.equal(outputs(model, slug), logits)


@pytest.mark.parametrize("slug", DATASETS)
def test_dataset_attach_picks_and_leaves_everything_else_alone(slug, tmp_path):
    case = contract(slug)
    data, method = case["dataset"](), case["picks"]()
    rows = data.to_list()
    model = method.model[0] if isinstance(getattr(method, "model", None), tuple) else None
    before = None if model is None else snapshot(model)
    random = torch.get_rng_state()
    runs = [sal.focus(data, method) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), random), "picking moved the global random state"
    assert data.to_list() == rows, "the dataset itself was changed"
    picked, again = (run.dataset.to_list() for run in runs)
    assert picked == again and 0 < len(picked) < len(rows)
    places = [rows.index(row) for row in picked]
    assert places == sorted(places), "what is kept stays in its order"
    for name, scores in runs[0].scores.items():
        assert torch.equal(scores.nan_to_num(), runs[1].scores[name].nan_to_num()), name
    assert type(method).__name__ in repr(runs[0]) and runs[0].spent[slug]["kept"] == len(picked)
    runs[0].save(tmp_path / "picked")
    assert (tmp_path / "picked" / "scores.parquet").is_file()
    if model is not None:
        same(before, snapshot(model))
