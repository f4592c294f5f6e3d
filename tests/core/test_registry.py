"""Discovery without imports, and an import of salience that stays light."""

import subprocess
import sys

import pytest

import salience as sal
from salience.core.errors import ParameterError
from salience.core.registry import entries, find


def test_importing_salience_imports_no_torch_and_listing_neither():
    code = (
        "import sys, salience; salience.methods(); dir(salience); salience.__version__\n"
        "heavy = [m for m in ('torch', 'transformers', 'peft', 'datasets', 'numpy') if m in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_name_finds_its_method():
    entry = entries()["loss-reweighting"]
    assert find("loss_reweighting") is find("LossReweighting") is find(" Loss-Reweighting ") is entry
    assert entry.unit == "sample" and entry.targets == ("trainer",) and entry.arxiv == "2502.06733"
    assert "LossReweighting" in dir(sal)


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(ParameterError, match=r"got 'loss-reweigting' \(did you mean loss-reweighting"):
        find("loss-reweigting")
    with pytest.raises(AttributeError, match="has no attribute 'LossReweigting'"):
        sal.LossReweigting  # noqa: B018


def test_methods_lists_also_after_a_method_was_imported():
    import salience as sal
    from salience.methods.samples import loss_reweighting

    assert sal.LossReweighting is loss_reweighting.LossReweighting
    assert "loss-reweighting" in {entry.slug for entry in sal.methods()}
