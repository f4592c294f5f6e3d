"""Random image tokens: counts, nesting, and draws that do not depend on the batch, the beams or anyone else."""

import pytest
import torch
from conftest import llava_batch, tiny_llava

import salience as sal
from salience.methods.tokens.random_tokens import score, spend

CONTRACT = {
    "method": sal.RandomTokens(ratios=(0.5, 0.25), layers=(1, 3)),
    "keep_all": sal.RandomTokens(ratios=(1.0,), layers=(1,)),
    "model": tiny_llava,
    "inputs": llava_batch,
    "bad": {
        "ratios": ((1.5,), r"ratios must be in \[0, 1\] and not rising, got \(1.5,\)"),
        "ratios:2": ((0.2, 0.5), r"ratios must be in \[0, 1\] and not rising, got \(0.2, 0.5\)"),
        "ratios:3": ((), r"ratios must be in \[0, 1\] and not rising, got \(\)"),
        "layers": ((-1,), r"layers must be rising and >= 0, got \(-1,\)"),
        "layers:2": ((1, 2), r"layers must be one for each of the 1 ratios, got \(1, 2\)"),
        "positions": ("shift", "positions must be one of auto, renumber, keep, got 'shift'"),
        "seed": (-1, "seed must be an integer >= 0, got -1"),
    },
}


def kept(model, method, *batches):
    """Places kept at each stage, for one batch after another."""
    found = []
    with torch.no_grad(), sal.focus(model, method) as handle:
        for batch in batches:
            model(**batch)
            found.append([stage.kept for stage in handle.parts[0].stages])
    return found


def ranks(batch, places):
    """Kept image tokens of each row, counted among its image tokens."""
    vision = batch["input_ids"] == 63
    return [row[of].nonzero().flatten().tolist() for row, of in zip(places, vision, strict=True)]


def test_kept_sets_are_nested_drawn_anew_and_the_same_for_the_same_seed():
    model, batch = tiny_llava(), llava_batch()
    method = sal.RandomTokens(ratios=(0.75, 0.5, 0.2), layers=(0, 1, 4))
    first, second = kept(model, method, batch, batch)
    for stages in (first, second):
        for stage, ratio in zip(stages, method.ratios, strict=True):
            assert stage.sum(-1).tolist() == spend(torch.tensor([16, 32, 0]), ratio).tolist()
        assert not bool((stages[1] & ~stages[0]).any()) and not bool((stages[2] & ~stages[1]).any())
    assert ranks(batch, first[2]) != ranks(batch, second[2]), "the next prompt is drawn for anew"
    torch.manual_seed(99)
    again = kept(model, method, batch, batch)
    for one, other in zip(first + second, again[0] + again[1], strict=True):
        assert torch.equal(one, other)
    other = kept(model, sal.RandomTokens(ratios=(0.75, 0.5, 0.2), layers=(0, 1, 4), seed=1), batch)
    assert ranks(batch, first[2]) != ranks(batch, other[0][2])


def test_the_second_prompt_does_not_depend_on_the_size_of_the_first():
    model = tiny_llava()
    small, large, last = llava_batch((1,)), llava_batch((2, 2)), llava_batch((1, 2))
    after = [kept(model, sal.RandomTokens(), one, last)[1] for one in (small, large)]
    assert torch.equal(after[0][0], after[1][0])


def test_every_row_has_the_same_draws_by_rank():
    vision = torch.zeros(3, 40, dtype=torch.bool)
    vision[0, 4:14] = vision[1, 20:40] = True
    scores = score(vision, torch.Generator().manual_seed(5))
    assert torch.equal(scores[0, 4:14], scores[1, 20:30]) and not bool(scores[2].any())
    alone = score(vision[:1, :15], torch.Generator().manual_seed(5))
    assert torch.equal(alone[0, 4:14], scores[0, 4:14]), "draws do not depend on the padding"
    assert float(scores.min()) >= 0 and float(scores.max()) < 1


def test_no_place_is_preferred():
    """Over 600 prompts each of 16 tokens is kept a quarter of the time; 5 standard deviations are allowed."""
    vision = torch.ones(1, 16, dtype=torch.bool)
    times = torch.zeros(16)
    for seed in range(600):
        times[score(vision, torch.Generator().manual_seed(seed))[0].argsort(descending=True)[:4]] += 1
    assert float((times / 600 - 0.25).abs().max()) < 5 * (0.25 * 0.75 / 600) ** 0.5


@torch.no_grad()
def test_beams_of_a_prompt_agree():
    model, batch = tiny_llava(), llava_batch((1, 1))
    with sal.focus(model, CONTRACT["method"]) as handle:
        model.generate(**batch, max_new_tokens=3, do_sample=False, num_beams=3)
        places = handle.parts[0].stages[-1].kept
    repeated = {k: v.repeat_interleave(3, 0) for k, v in batch.items() if k == "input_ids"}
    found = ranks(repeated, places) if len(places) == 6 else ranks(batch, places)
    assert all(one == found[0] for one in found) and len(found[0]) == 4


@pytest.mark.parametrize("layer", [0, 1])
@torch.no_grad()
def test_everything_may_be_dropped(layer):
    model, batch = tiny_llava(), llava_batch()
    with sal.focus(model, sal.RandomTokens(ratios=(0.0,), layers=(layer,))) as handle:
        answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert int(handle.parts[0].stages[0].kept.sum()) == 0
    assert answer.shape[1] == batch["input_ids"].shape[1] + 3


def test_a_baseline_is_listed_as_one(cli):
    for command in (("methods", "--search", "baseline random"), ("show", "random-tokens")):
        code, out, _ = cli(*command)
        assert code == 0 and "baseline" in out and "arXiv" not in out
