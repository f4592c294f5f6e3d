"""The mixture world: domains that tell apart, texts that stay on their side, a model that has learnt all of them."""

import math

import pytest
import torch

import salience as sal
from salience.core.errors import ParameterError
from salience.hosts.experts import find_mixtures
from salience.sandbox import mixture
from salience.sandbox.mixture import DOMAINS, mixture_world
from salience.sandbox.scoring import text_loss


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny world, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALIENCE_CACHE", str(tmp_path_factory.mktemp("cache")))
        state = torch.get_rng_state()
        yield mixture_world(size="tiny", progress=False)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_texts_are_on_their_own_side(domain):
    seen, held_out = (mixture._texts(domain, 50, held_out=side) for side in (False, True))
    assert sum(map(len, seen)) > 300_000 and sum(map(len, held_out)) > 30_000
    assert seen == mixture._texts(domain, 50, held_out=False)
    if domain == "prose":
        paragraphs = [
            {part.strip() for text in side for part in text.split("\n\n")} for side in (seen, held_out)
        ]
        assert not paragraphs[0] & paragraphs[1]
    else:
        assert not set(seen) & set(held_out)


def test_bad_arguments_are_refused():
    with pytest.raises(ParameterError, match="size must be one of small, tiny, got 'huge'"):
        mixture_world(size="huge")
    with pytest.raises(ParameterError, match="seed must be >= 0, got -1"):
        mixture_world(seed=-1)


@pytest.mark.slow
def test_the_model_has_learnt_every_domain_and_is_an_ordinary_mixture(world):
    model, tokenizer = world.model(), world.tokenizer()
    found = find_mixtures(model)
    assert (len(found.layers), found.experts, found.top_k) == (2, 8, 2)
    assert not model.training and world.about["parameters"] == model.num_parameters()
    for domain in DOMAINS:
        loss = world.about["held_out_loss"][domain]
        assert loss < math.log(len(tokenizer)) - 0.8, domain
        assert text_loss(model, tokenizer, world.texts(domain, held_out=True)) == pytest.approx(
            loss, rel=1e-5
        )
    with pytest.raises(ParameterError, match="domain must be one of code, prose, tasks, got 'music'"):
        world.texts("music")


@pytest.mark.slow
def test_demonstrations_are_drawn_by_their_seed_and_tell_domains_apart(world):
    batches = world.batches("code", 20, seed=3, window=32)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(16, 32), (4, 32)]
    again, other = world.batches("code", 20, seed=3, window=32), world.batches("code", 20, seed=4, window=32)
    assert torch.equal(batches[0]["input_ids"], again[0]["input_ids"])
    assert not torch.equal(batches[0]["input_ids"], other[0]["input_ids"])
    hits = {}
    for domain in DOMAINS:
        method = sal.FrequencyExperts(keep=1.0)
        with sal.focus(world.model(), method, data=world.batches(domain, 24)) as handle:
            scores = handle.scores["frequency-experts.experts"]
            hits[domain] = scores / scores.sum(-1, keepdim=True)
    apart = (hits["code"] - hits["tasks"]).abs().sum(-1).max() / 2
    assert apart > 0.1, "some tenth of the tokens goes to other experts in another domain"
