"""Schedules reach their ends exactly and refuse what makes no sense."""

from itertools import pairwise

import pytest

from salience.core.errors import ParameterError
from salience.core.schedule import constant, cosine, cubic, linear, staged


@pytest.mark.parametrize("make", [linear, cosine, cubic])
def test_ends_are_exact_and_the_way_is_monotone(make):
    schedule = make(1.0, 0.3, begin=0.2, finish=0.7)
    values = [schedule(i / 50) for i in range(51)]
    assert values[0] == schedule(0.2) == schedule(-1) == 1.0
    assert values[-1] == schedule(0.7) == schedule(2) == 0.3
    assert all(a >= b for a, b in pairwise(values))


def test_middle_values():
    assert constant(4.0)(0.3) == 4.0
    assert linear(0, 8)(0.25) == 2.0
    assert cosine(0, 1)(0.5) == pytest.approx(0.5)
    assert cubic(1, 0)(0.5) == pytest.approx(0.125)
    steps = staged((0.0, 1.0), (0.5, 0.25), (1.0, 0.1))
    assert [steps(p) for p in (0.0, 0.49, 0.5, 0.99, 1.0)] == [1.0, 1.0, 0.25, 0.25, 0.1]


def test_bad_schedules_are_refused():
    with pytest.raises(ParameterError, match="begin, finish must be 0 <= begin < finish <= 1, got"):
        linear(0, 1, begin=0.5, finish=0.5)
    for stages in ((), ((0.1, 1.0),), ((0.0, 1.0), (0.0, 2.0)), ((0.0, 1.0), (1.5, 2.0))):
        with pytest.raises(ParameterError, match="stages must be"):
            staged(*stages)
