"""The corpus world: kinds that are what they say, and a reader whose one head copies."""

import json
from collections import Counter

import pytest
import torch

from salience.core.errors import ParameterError
from salience.sandbox import corpus


def test_documents_are_of_fixed_shares_and_the_same_again():
    found = corpus.documents(200, 3)
    assert Counter(one.kind for one in found) == {
        "reasoning": 40, "narration": 60, "code": 40, "boiler-plate": 30, "noise": 30,
    }  # fmt: skip
    assert found == corpus.documents(200, 3) and found[:50] == corpus.documents(50, 3)
    assert corpus.documents(50, 4) != found[:50]
    with pytest.raises(ParameterError, match="count must be >= 1, got 0"):
        corpus.documents(0)


def test_conclusions_repeat_facts_in_another_order():
    for one in corpus.documents(100, 1):
        if one.kind != "reasoning":
            continue
        facts = [line.split() for line in one.text.split(". ") if line.startswith("given that ")]
        names = {(line[2], line[4].rstrip(".")) for line in facts}
        because = one.text.split("because ")[1:]
        assert {(part.split()[0], part.split()[2].rstrip(",")) for part in because} == names
        assert len(names) == len(facts) == len(because) >= 5


def test_files_hold_every_document_once(tmp_path):
    corpus.write_documents(tmp_path, 50, 2, files=3)
    rows = [json.loads(line) for path in sorted(tmp_path.iterdir()) for line in path.read_text().splitlines()]
    assert sorted(row["text"] for row in rows) == sorted(one.text for one in corpus.documents(50, 2))
    assert len({row["id"] for row in rows}) == 50 and {row["source"] for row in rows} == set(corpus.KINDS)


@pytest.mark.slow
def test_the_reader_has_a_head_that_copies():
    from salience.methods.samples._attention_influence_probes import probes
    from salience.methods.samples.attention_influence import detect

    state = torch.get_rng_state()
    model, tokenizer = corpus.load(quick=True)
    assert torch.equal(torch.get_rng_state(), state)
    found = detect(model, probes(tokenizer, 10, corpus.POSITIONS, shots=0))
    best, second = found.flatten().sort(descending=True).values[:2]
    assert best > 0.2 and best > 3 * second
