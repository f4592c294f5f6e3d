"""Budgets: exact counts, stable ties, the ends 0 and 1."""

import math

import pytest
import torch

from salience.core.budget import check_keep, count, top_indices, top_mask
from salience.core.errors import ParameterError


@pytest.mark.parametrize(
    "keep, total, expected",
    [
        (0.6, 5, 3),
        (0.6, 6, 4),
        (1.0, 7, 7),
        (0.0, 7, 0),
        (0.1, 10, 1),
        (0.3, 10, 3),
        (1e-9, 10, 1),
        (4, 10, 4),
        (40, 10, 10),
    ],
)
def test_count_is_exact(keep, total, expected):
    assert count(keep, total) == expected


def test_count_rounds_as_asked_and_keeps_the_floor():
    assert count(0.25, 7, rounding="floor") == 1
    assert count(0.25, 7, rounding="ceil") == 2
    assert count(0.5, 7, rounding="nearest") == 4
    assert count(0.0, 7, at_least=1) == 1
    assert count(0.0, 0, at_least=1) == 0


@pytest.mark.parametrize("keep", [0.0, 1.5, -0.1, 0, -3, True, "half", None, math.nan])
def test_bad_budgets_are_refused(keep):
    with pytest.raises(ParameterError, match=r"keep must be a share in \(0, 1\] or a count >= 1, got"):
        check_keep(keep)


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert top_indices(scores, 2).tolist() == [1, 2]
    assert top_indices(scores, 0).tolist() == []
    assert top_indices(scores, 5).tolist() == [0, 1, 2, 3, 4]
    assert top_indices(torch.tensor([math.nan, 1.0]), 1).tolist() == [1]


def test_top_mask_takes_each_rows_own_count_among_the_allowed():
    scores = torch.tensor([[3.0, 3.0, 1.0, 9.0], [5.0, 1.0, 5.0, 5.0], [-math.inf, -math.inf, 0.0, 0.0]])
    among = torch.tensor([[True, True, True, False], [True, True, True, True], [True, True, False, False]])
    mask = top_mask(scores, torch.tensor([2, 3, 1]), among)
    assert mask.tolist() == [
        [True, True, False, False],
        [True, False, True, True],
        [True, False, False, False],
    ]
    assert not top_mask(scores, torch.tensor([0, 0, 0]), among).any()
    assert torch.equal(top_mask(scores, torch.tensor([9, 9, 9]), among), among)
