"""Perplexity: the loss per token, with the sign of what is preferred."""

import math

import pytest
import torch
from corpora import small_corpus, tiny_reader

import salience as sal
from salience.methods.samples.perplexity import score


def _dataset():
    from datasets import Dataset

    return Dataset.from_dict({"text": small_corpus(12)})


CONTRACT = {
    "method": sal.Perplexity(keep=0.3, prefer="high"),
    "picks": lambda: sal.Perplexity(model=tiny_reader(), keep=0.3),
    "dataset": _dataset,
    "bad": {
        "keep": (2.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 2.0"),
        "prefer": ("middle", "prefer must be one of low, high, got 'middle'"),
    },
}


def test_low_and_high_are_opposite_and_nan_stays():
    loss = torch.tensor([1.0, 3.0, math.nan])
    assert score(loss, "low")[:2].tolist() == [-1.0, -3.0] and score(loss, "high")[:2].tolist() == [1.0, 3.0]
    assert score(loss).isnan().tolist() == [False, False, True]


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    model, tokenizer = tiny_reader()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = sal.focus(_dataset(), sal.Perplexity(model=(model, tokenizer))).scores["perplexity.score"]
    assert (-scores).exp().tolist() == pytest.approx([64.0] * 12, rel=1e-5)


def test_both_ends_can_be_kept():
    reader = tiny_reader()
    low, high = (
        sal.focus(_dataset(), sal.Perplexity(model=reader, keep=6, prefer=prefer)).dataset["text"]
        for prefer in ("low", "high")
    )
    assert sorted([*low, *high]) == sorted(small_corpus(12))
