"""The examples in the docstrings of the parts on features and steps run and print what they say."""

import doctest

import pytest

import salience as sal

NAMES = (
    "CoTeaching", "FixedHead", "MCTemporalDropout", "NestedDropout", "NestedMask", "ProjectionHead",
    "TemporalDropout", "supervised_contrastive",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_example(name):
    thing = getattr(sal, name)
    tests = [t for t in doctest.DocTestFinder(recurse=False).find(thing, name, globs={}) if t.examples]
    assert len(tests) == 1, f"{name} has no example"
    said = []
    result = doctest.DocTestRunner().run(tests[0], out=said.append)
    assert result.failed == 0, "".join(said)
