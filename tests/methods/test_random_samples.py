"""Random samples: draws of the seed and the place, evenly spread."""

import torch
from corpora import small_corpus

import salience as sal
from salience.methods.samples.random_samples import score


def _dataset():
    from datasets import Dataset

    return Dataset.from_dict({"text": small_corpus(20), "n": list(range(20))})


CONTRACT = {
    "method": sal.RandomSamples(keep=0.5),
    "picks": lambda: sal.RandomSamples(keep=0.5),
    "dataset": _dataset,
    "bad": {
        "keep": (0.0, r"keep must be a share in \(0, 1\] or a count >= 1, got 0.0"),
        "seed": (-1, "seed must be an integer >= 0, got -1"),
    },
}


def splitmix(number, seed):
    """The same in Python's own integers."""
    mask = (1 << 64) - 1
    value = ((number + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1342543DE82EF95) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return ((value ^ (value >> 31)) >> 40) / (1 << 24)


def test_is_splitmix64_of_number_and_seed():
    numbers = torch.tensor([0, 1, 2, 77, 10**9, 10**15])
    for seed in (0, 1, 12345):
        wanted = torch.tensor([splitmix(int(number), seed) for number in numbers])
        assert torch.equal(score(numbers, seed), wanted)


def test_draws_are_even_and_those_of_seeds_have_nothing_in_common():
    first, second = score(torch.arange(20_000), 0).double(), score(torch.arange(20_000), 1).double()
    counts = torch.histc(first, 20, 0, 1)
    assert ((counts - 1000).square() / 1000).sum() < 43  # chi squared of 19 degrees, one in a thousand
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 4 / 20_000**0.5
    assert abs(float(torch.corrcoef(torch.stack((first[1:], first[:-1])))[0, 1])) < 4 / 20_000**0.5
