"""What the commands that run a model show meanwhile."""

import io

import pytest
from rich.console import Console

from salience.cli._running import Bar


@pytest.fixture
def console():
    return Console(file=io.StringIO(), force_terminal=True, width=90)


def test_nothing_is_drawn_before_the_first_call(console):
    with Bar(console, "reading") as bar:
        # a bar of the sandbox may be drawn now
        assert not bar._bar.live.is_started
    assert console.file.getvalue() == ""


def test_each_thing_has_a_bar_of_its_own_with_its_newest_note(console):
    with Bar(console, remaining=True) as bar:
        bar(1, 4, "plain", "loss 3.000")
        bar(2, 4, "plain", "loss 2.000")
        bar(1, 7, "ist", "loss 1.000")
        first, second = bar._bar.tasks
    assert (first.description, first.completed, first.total) == ("plain: loss 2.000", 2, 4)
    assert (second.description, second.completed, second.total) == ("ist: loss 1.000", 1, 7)
    shown = console.file.getvalue()
    assert "plain: loss" in shown and "ist: loss 1.000" in shown and "1/7" in shown


def test_a_bar_goes_at_the_end_and_after_an_error(console):
    with pytest.raises(KeyError), Bar(console, "reading") as bar:
        bar(1, 2)
        raise KeyError
    assert bar._bar.live.is_started is False and bar._bar.tasks[0].description == "reading"
    with Bar(console, "again") as bar:
        bar(1, 2)
        assert bar._bar.live.is_started
