"""Every method against numbers of its official code.

`golden/<slug>.safetensors` + `.json` hold inputs and outputs; `golden_adapters/<slug>.py` has `run(tensors,
parameters) -> dict of tensors`, which calls only salience's public functions. Set SALIENCE_GOLDEN to another folder
to check other cases of the same form.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
# methods that have no numbers of an official code, and why
WITHOUT = {
    "block-top-k": "a baseline; its official code chooses inside a GPU kernel",
    "dense-attention": "a baseline without a paper",
    "el2n": "its official code scores images of a classifier, in JAX",
    "entropy": "a baseline without a paper",
    "fastv": "its official code is a patched model without a function of its own to call",
    "frequency-experts": "a baseline without a paper",
    "random-experts": "a baseline without a paper",
    "image-grounding": "an expert of adapt-inf; its official code blacks the image out",
    "length": "a baseline without a paper",
    "perplexity": "a baseline: the model's loss",
    "random-samples": "a baseline without a paper",
    "random-tokens": "a baseline without a paper",
    "reap": "a rival written from its paper; its official code was not compared",
    "router-score-experts": "a baseline without a paper",
    "streaming-llm": "a baseline; its official code drops keys from a cache and computes no map",
    "tome": "its official code merges in a vision transformer, ours in a decoder",
}
FOLDER = Path(os.environ.get("SALIENCE_GOLDEN", HERE / "golden"))
ADAPTERS = {
    path.stem: path for path in sorted((HERE / "golden_adapters").glob("*.py")) if path.stem != "__init__"
}


def _adapter(slug):
    spec = importlib.util.spec_from_file_location(f"golden_adapter_{slug}", ADAPTERS[slug])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("slug", ADAPTERS)
def test_matches_the_official_numbers(slug):
    path = FOLDER / f"{slug.replace('_', '-')}.safetensors"
    if not path.is_file():
        pytest.skip(f"no golden file {path}")
    tensors = load_file(path)
    parameters = json.loads(path.with_suffix(".json").read_text())
    adapter = _adapter(slug)
    outputs = adapter.run(tensors, parameters)
    skipped = set(adapter.SKIPS)
    prefixes = getattr(adapter, "SKIP_PREFIXES", ())
    expected = {k for k in tensors if k not in skipped and not k.startswith(tuple(prefixes) or ("\0",))}
    missing = expected - set(outputs)
    assert not missing, f"{slug}: the adapter gives no {sorted(missing)}"
    for name in sorted(expected):
        tolerance = getattr(adapter, "TOLERANCES", {}).get(name, adapter.TOLERANCE)
        torch.testing.assert_close(
            outputs[name],
            tensors[name],
            **tolerance,
            check_dtype=False,
            equal_nan=True,
            msg=lambda m, n=name: f"{slug}.{n}: {m}",
        )


def test_every_method_has_an_adapter():
    from salience.core.registry import entries

    adapted = {slug.replace("_", "-") for slug in ADAPTERS}
    without = sorted(set(entries()) - adapted - set(WITHOUT))
    assert not without, f"no golden adapter for {without}"
    stored = {path.stem for path in (HERE / "golden").glob("*.safetensors")}
    assert not set(WITHOUT) & (adapted | stored), "a method with stored numbers needs its adapter"
