"""EL2N: the length of the error, against float64 and at its ends."""

import math

import pytest
import torch
from corpora import small_corpus, tiny_reader

import salience as sal
from salience.core.token_scores import el2n, row_means
from salience.methods.samples.el2n import score


def _dataset():
    from datasets import Dataset

    return Dataset.from_dict({"text": small_corpus(12)})


CONTRACT = {
    "method": sal.EL2N(keep=0.3, prefer="low"),
    "picks": lambda: sal.EL2N(model=tiny_reader(), keep=0.3),
    "dataset": _dataset,
    "bad": {
        "keep": (0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0"),
        "prefer": ("middle", "prefer must be one of high, low, got 'middle'"),
    },
}


def test_is_the_length_of_the_difference():
    logits, targets = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)), torch.arange(50) % 7
    wanted = [
        math.dist(row.softmax(-1).tolist(), [float(place == target) for place in range(7)])
        for row, target in zip(logits.double(), targets.tolist())
    ]
    torch.testing.assert_close(el2n(logits, targets), torch.tensor(wanted), rtol=1e-5, atol=1e-6)


def test_its_ends():
    sure = torch.tensor([[100.0, 0.0, 0.0]])
    assert float(el2n(sure, torch.tensor([0]))) == 0.0
    assert float(el2n(sure, torch.tensor([1]))) == pytest.approx(2**0.5)


def test_only_active_tokens_count():
    errors = torch.tensor([[9.0, 0.2, 0.4], [9.0, 9.0, 9.0]])
    active = torch.tensor([[False, True, True], [False, False, False]])
    found = score(row_means(errors, active))
    assert float(found[0]) == pytest.approx(0.3) and math.isnan(float(found[1]))
    assert float(score(found, "low")[0]) == pytest.approx(-0.3)


def test_scores_a_dataset_by_the_models_own_logits():
    model, tokenizer = tiny_reader()
    data = _dataset()
    scores = sal.focus(data, sal.EL2N(model=(model, tokenizer))).scores["el2n.score"]
    for text, found in zip(data["text"], scores.tolist()):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        assert found == pytest.approx(float(el2n(logits[:-1], ids[1:]).mean()), rel=1e-4)
