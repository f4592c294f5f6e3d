"""StreamingLLM: sinks and a window, by the definition and in a model."""

import pytest
import torch
from conftest import tiny_llama
from decoder_families import prompts

import salience as sal
from salience.methods.keys.streaming_llm import spend

CONTRACT = {
    "method": sal.StreamingLLM(sinks=2, window=24, q_block=16),
    "keep_all": sal.StreamingLLM(sinks=0, window=512),
    "model": lambda: tiny_llama(layers=3).eval(),
    "inputs": prompts,
    "bad": {
        "sinks": (-1, "sinks must be an integer >= 0, got -1"),
        "window": (0, "window must be an integer >= 1, got 0"),
        "window:2": (3.5, "window must be an integer >= 1, got 3.5"),
        "q_block": (0, "q_block must be an integer >= 1, got 0"),
    },
}


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 63), (65, 65), (40, 90), (1, 90)])
@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (4, 16), (100, 7), (3, 200)])
def test_a_key_is_seen_iff_it_is_a_sink_or_near(queries, keys, sinks, window):
    seen = spend(queries, keys, sinks=sinks, window=window, q_block=16, batch=2).visible()
    for row in range(queries):
        place = keys - queries + row
        expected = [j <= place and (j < sinks or place - j < window) for j in range(keys)]
        assert seen[0, 0, row].tolist() == seen[1, 0, row].tolist() == expected


@torch.no_grad()
def test_decoding_sees_everything_unless_asked_not_to():
    model, batch = tiny_llama(layers=3).eval(), prompts((100,))
    told = {}
    for decode in (False, True):
        with sal.focus(model, sal.StreamingLLM(sinks=2, window=8, decode=decode)):
            out = model(**batch, use_cache=True)
            step = model(input_ids=batch["input_ids"][:, :1], past_key_values=out.past_key_values)
            told[decode] = out.logits, step.logits
            whole = model(input_ids=torch.cat((batch["input_ids"], batch["input_ids"][:, :1]), 1)).logits
    assert torch.equal(told[False][0], told[True][0])
    assert not torch.allclose(told[False][1], told[True][1], atol=1e-4)
    # with the same rule for new tokens, decoding and reading agree
    torch.testing.assert_close(told[True][1][:, -1], whole[:, -1], rtol=0, atol=1e-5)
