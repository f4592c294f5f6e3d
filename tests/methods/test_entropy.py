"""Entropy: of the predicted distribution, against float64 and at its ends."""

import math

import pytest
import torch
from corpora import small_corpus, tiny_reader

import salience as sal
from salience.core.token_scores import entropy


def _dataset():
    from datasets import Dataset

    return Dataset.from_dict({"text": small_corpus(12)})


CONTRACT = {
    "method": sal.Entropy(keep=0.3, prefer="low"),
    "picks": lambda: sal.Entropy(model=tiny_reader(), keep=0.3),
    "dataset": _dataset,
    "bad": {
        "keep": (0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0"),
        "prefer": ("middle", "prefer must be one of high, low, got 'middle'"),
    },
}


def test_is_the_entropy_whatever_came():
    logits = 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    wanted = torch.distributions.Categorical(logits=logits.double()).entropy().float()
    torch.testing.assert_close(
        entropy(logits, torch.zeros(50, dtype=torch.int64)), wanted, rtol=1e-5, atol=1e-6
    )


def test_its_ends():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1e4, 0.0, 0.0, 0.0]])
    assert entropy(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(4), 0.0])


def test_scores_a_dataset_by_the_models_own_logits():
    model, tokenizer = tiny_reader()
    data = _dataset()
    scores = sal.focus(data, sal.Entropy(model=(model, tokenizer), prefer="low")).scores["entropy.score"]
    for text, found in zip(data["text"], scores.tolist()):
        ids = torch.tensor(tokenizer(text)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        assert found == pytest.approx(-float(entropy(logits[:-1], ids[1:]).mean()), rel=1e-4)
