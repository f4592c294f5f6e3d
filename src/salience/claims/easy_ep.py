"""EASY-EP: do a few demonstrations find the experts that a domain needs, better than counting what routers choose?

A Qwen2-MoE of three layers with 16 experts, two for each token, and a shared one, is trained in place on source code,
the prose of Python's manual and small tasks. For each domain all arms score the experts of the same model on the same
pieces of text, keep 8 or 4 of 16 in each layer, train nothing, and read held-out text of that domain and the others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import salience as sal
from salience.claims.harness import Experiment, Statement, Values
from salience.sandbox.mixture import DOMAINS, mixture_world

_KEPT = (8, 4)
_DEMONSTRATIONS, _FEW = 32, 5
_DRAWS = 2
_WINDOWS, _LENGTH = 32, 128

_ARMS: dict[str, Callable[[int, int], Any]] = {
    "random": lambda keep, draw: sal.RandomExperts(keep=keep, seed=draw),
    "frequency": lambda keep, draw: sal.FrequencyExperts(keep=keep),
    "router score": lambda keep, draw: sal.RouterScoreExperts(keep=keep),
    "reap": lambda keep, draw: sal.REAP(keep=keep),
    "no token weight": lambda keep, draw: sal.EasyEP(keep=keep, token_weight=False),
    "no norm": lambda keep, draw: sal.EasyEP(keep=keep, use_norm=False),
    "easy-ep": lambda keep, draw: sal.EasyEP(keep=keep),
}


@lru_cache(maxsize=1)
def _loaded(seed: int, device: str) -> Any:
    return mixture_world(seed=seed).model().to(device)


@lru_cache(maxsize=16)
def _read(domain: str, seed: int) -> Tensor:
    """Windows of held-out text, evenly spaced: [32, 128]."""
    world = mixture_world(seed=seed)
    stream = world.stream(domain, held_out=True)
    starts = torch.linspace(0, len(stream) - _LENGTH, _WINDOWS).long()
    return stream[starts[:, None] + torch.arange(_LENGTH)]


@lru_cache(maxsize=16)
def _demonstrations(domain: str, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Many pieces of text, and a few others that are not among them."""
    batches = mixture_world(seed=seed).batches(domain, _DEMONSTRATIONS + _FEW, seed=seed)
    return batches[:-1], batches[-1:]


def kept(arm: str, keep: int, seed: int, device: str) -> Values:
    """One arm of the experiment at any number of experts: means over the domains that they are kept for."""
    model = _loaded(seed, device)

    def losses() -> dict[str, float]:
        rows = {domain: _read(domain, seed).to(device) for domain in DOMAINS}
        with torch.no_grad():
            return {name: float(model(input_ids=ids, labels=ids).loss) for name, ids in rows.items()}

    if arm == "full":
        return dict.fromkeys(("loss", "other loss"), fmean(losses().values()))
    values: dict[str, list[float]] = {}
    for domain in DOMAINS:
        many, few = _demonstrations(domain, seed)
        for draw in range(_DRAWS if arm == "random" else 1):
            method = _ARMS[arm](keep, seed * _DRAWS + draw)
            with sal.focus(model, method, data=many) as handle:
                found = losses()
                chosen = handle.parts[0].kept
            values.setdefault("loss", []).append(found[domain])
            values.setdefault("other loss", []).extend(found[d] for d in DOMAINS if d != domain)
        if arm != "random":
            with sal.focus(model, method, data=few) as handle:
                same = (chosen[:, :, None] == handle.parts[0].kept[:, None, :]).any(-1)
            values.setdefault("found by few", []).append(float(same.double().mean()))
    return {name: fmean(several) for name, several in values.items()}


def _run(arm: str, seed: int, rate: float, device: str) -> Values:
    found = {keep: kept(arm, keep, seed, device) for keep in _KEPT}
    return {f"{name} {keep}": value for keep, values in found.items() for name, value in values.items()}


EXPERIMENT = Experiment(
    slug="easy-ep",
    question="Are the experts that EASY-EP keeps for a domain the ones that it needs, at equal size?",
    setting="Qwen2-MoE, 3 layers, 16 experts of which 2 read a token, one shared, trained in place on code, prose "
    f"and tasks; {_DEMONSTRATIONS} pieces of 128 tokens of one domain, 8 or 4 experts a layer kept, no recovery.",
    paper="DeepSeek-R1, 128 of 256 experts, mean of 8 benchmarks: EASY-EP 66.55, gate scores 56.49, frequency 31.59, "
    "random 17.44, all experts 67.20 (table 2); 64 of 256: 45.22 against 8.75 by gate scores.",
    arms=("full", *_ARMS),
    metrics={
        **{
            f"loss {keep}": f"nats a token on held-out text of the domain that {keep} of 16 experts were kept for, "
            "mean of the three domains"
            for keep in _KEPT
        },
        **{f"other loss {keep}": f"the same on the two other domains, {keep} of 16" for keep in _KEPT},
        **{
            f"found by few {keep}": f"share of the {keep} experts that {_FEW} other pieces choose as well"
            for keep in _KEPT
        },
    },
    statements=(
        Statement(
            says="With a quarter of the experts the domain's loss is lower than by router scores",
            metric="loss 4", arm="easy-ep", against="router score", direction="lower", headline=True,
        ),
        Statement(
            says="With half of them it is lower than by router scores",
            metric="loss 8", arm="easy-ep", against="router score", direction="lower",
        ),
        Statement(
            says="With a quarter it is lower than by frequency",
            metric="loss 4", arm="easy-ep", against="frequency", direction="lower",
        ),
        Statement(
            says="With half it is lower than by frequency",
            metric="loss 8", arm="easy-ep", against="frequency", direction="lower",
        ),
        Statement(
            says="With a quarter it is lower than of random experts",
            metric="loss 4", arm="easy-ep", against="random", direction="lower",
        ),
        Statement(
            says="With half it is lower than of random experts",
            metric="loss 8", arm="easy-ep", against="random", direction="lower",
        ),
        Statement(
            says="With a quarter it is lower than without the token weight",
            metric="loss 4", arm="easy-ep", against="no token weight", direction="lower",
        ),
        Statement(
            says="With a quarter it is lower than without the norm",
            metric="loss 4", arm="easy-ep", against="no norm", direction="lower",
        ),
        Statement(
            says="With a quarter it is lower than by REAP",
            metric="loss 4", arm="easy-ep", against="reap", direction="lower",
        ),
        Statement(
            says="The other domains get worse than in the full model: half kept for one",
            metric="other loss 8", arm="easy-ep", against="full", direction="higher",
        ),
        Statement(
            says=f"{_FEW} demonstrations find at least 90 % of the half that {_DEMONSTRATIONS} find",
            metric="found by few 8", arm="easy-ep", against="", direction="higher", size=0.9,
        ),
    ),
    run=_run,
    seeds=3,
    notes="The mixture is small and its experts overlap: load balancing keeps all of them busy in every domain. "
    "Random is the mean of two draws for each domain. No arm trains after pruning.",
)  # fmt: skip
