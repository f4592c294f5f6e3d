"""Length: characters, and no model."""

import torch
from corpora import small_corpus

import salience as sal
from salience.methods.samples.length import score


def _dataset():
    from datasets import Dataset

    return Dataset.from_dict({"text": small_corpus(12)})


CONTRACT = {
    "method": sal.Length(keep=3, prefer="short"),
    "picks": lambda: sal.Length(keep=3),
    "dataset": _dataset,
    "bad": {
        "keep": (-1, r"keep must be a share in \(0, 1\] or a count >= 1, got -1"),
        "prefer": ("high", "prefer must be one of long, short, got 'high'"),
    },
}


def test_counts_characters_not_bytes():
    from datasets import Dataset

    data = Dataset.from_dict({"text": ["ab", "äöü€", "abc"]})
    handle = sal.focus(data, sal.Length(keep=1))
    assert handle.scores["length.score"].tolist() == [2, 4, 3] and handle.dataset["text"] == ["äöü€"]
    assert sal.focus(data, sal.Length(keep=1, prefer="short")).dataset["text"] == ["ab"]


def test_a_conversation_is_as_long_as_what_is_said():
    from datasets import Dataset

    data = Dataset.from_dict({"prompt": ["ab", "a"], "completion": ["cde", "b"]})
    assert sal.focus(data, sal.Length(keep=1)).scores["length.score"].tolist() == [5, 2]


def test_the_sign_says_what_is_preferred():
    assert score(torch.tensor([3, 0]), "short").tolist() == [-3.0, 0.0]
