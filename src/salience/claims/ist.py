"""IST: is training the adapters of a quarter of the blocks as good as training all, and what does it save?

A residual network of 8 blocks reads digits; LoRA (r = 4) then teaches it to read them transposed, 150 steps of 32,
every arm with its own best rate. IST and RST train 2 blocks a step. A second test asks only whether the score finds
what matters: the network has to match its own output, to which the adapters of 4 random blocks contribute alike.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from salience import loop as make_loop
from salience.claims._digits import BATCH, BLOCKS, STEPS, pretrained, tune, with_adapters
from salience.claims.harness import Experiment, Statement, Values
from salience.methods.layers.ist import IST
from salience.sandbox.digits import Classified, ResidualMLP

_RANK, _ACTIVE, _UPDATES = 4, 2, 40
_SPARSE = {
    "rst": IST(active_layers=_ACTIVE, mode="random"),
    "ist": IST(active_layers=_ACTIVE),
    "ist equal updates": IST(active_layers=_ACTIVE),
    "ist equal time": IST(active_layers=_ACTIVE),
}


def _arm(arm: str, seed: int, rate: float, device: str, **settings: float) -> Values:
    model = with_adapters(pretrained(seed, device), _RANK)
    return tune(model, _SPARSE.get(arm), rate=rate, seed=seed, device=device, **settings)  # type: ignore[arg-type]


@lru_cache(maxsize=64)
def _seconds_of_lora(seed: int, device: str) -> float:
    return _arm("lora", seed, 1e-3, device)["seconds"]


@lru_cache(maxsize=4)
def _batch_of_equal_memory(device: str) -> int:
    """The batch with which LoRA needs no more bytes, weights aside, than IST at its most."""
    dense, sparse = (_arm(arm, 0, 1e-3, device) for arm in ("lora", "ist"))
    allowed = sum(sparse[name] for name in ("most kept for backward", "gradients", "most optimizer"))
    left = allowed - dense["gradients"] - dense["most optimizer"]
    return int(BATCH * left / dense["most kept for backward"])


class _Matched(ResidualMLP):
    """The network with a loss of 0 when its logits are the labels, and 1 when they are off by `unit` squared."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.unit = 1.0

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Classified:
        """Images [B, 64] and logits to match [B, 10]."""
        found = super().forward(images).logits
        return Classified(found, None if labels is None else (found - labels).square().mean() / self.unit)


def _planted(seed: int, device: str) -> tuple[torch.nn.Module, list[dict[str, Tensor]], list[int]]:
    """A network with adapters in 4 random blocks that alone change its output alike, its own output, those blocks."""
    network: Any = pretrained(seed, device, _Matched)
    model = with_adapters(network, _RANK)
    random = torch.Generator().manual_seed(seed)
    matters = torch.randperm(BLOCKS, generator=random)[: BLOCKS // 2].tolist()
    images = torch.rand(8, 16, 64, generator=random).to(device)
    rows = images.flatten(0, 1)
    up = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        bare = model(images=rows).logits
        planted = {}
        for block in matters:
            mine = [p for name, p in up.items() if f"blocks.{block}." in name]
            for parameter in mine:
                parameter.copy_(0.01 * torch.randn(parameter.shape, generator=random))
            size = (model(images=rows).logits - bare).square().mean().sqrt() / bare.std()
            planted.update({parameter: parameter * (0.1 / size) for parameter in mine})
            for parameter in mine:
                parameter.zero_()
        for parameter, value in planted.items():
            parameter.copy_(value)
        batches = [{"images": few, "labels": model(images=few).logits} for few in images]
        network.unit = float((torch.cat([one["labels"] for one in batches]) - bare).square().mean())
    return model, batches, matters


def _ranked(method: IST, seed: int, device: str) -> float:
    """Share of (block that matters, block that does nothing) pairs that the importance puts in the right order."""
    model, batches, matters = _planted(seed, device)
    loop = make_loop(model, method, data=batches, shifted=False, seed=seed)
    loop.begin()
    for step in range(_UPDATES * method.score_every + 1):
        loop.step = step
        loop.before_step()
    importance = loop.parts[0].scores().get("importance", torch.zeros(BLOCKS))
    inert = [index for index in range(BLOCKS) if index not in matters]
    gaps = importance[matters].unsqueeze(1) - importance[inert].unsqueeze(0)
    return float((gaps > 0).double().mean() + 0.5 * (gaps == 0).double().mean())


def _run(arm: str, seed: int, rate: float, device: str) -> Values:
    settings: dict[str, float] = {}
    if arm == "ist equal updates":
        settings["steps"] = STEPS * BLOCKS // _ACTIVE
    elif arm == "ist equal time":
        settings["seconds"] = _seconds_of_lora(seed, device)
    elif arm == "lora equal memory":
        settings["batch"] = _batch_of_equal_memory(device)
    values = _arm(arm, seed, rate, device, **settings)
    if arm in ("rst", "ist"):
        values["order"] = _ranked(_SPARSE[arm], seed, device)
    return values


EXPERIMENT = Experiment(
    slug="ist",
    question="Does training the adapters of two blocks a step, the important ones more often, match training all?",
    setting="LoRA r=4 on an 8-block residual MLP, digits to transposed digits, 150 steps of 32 images",
    paper="better accuracy than LoRA, DoRA and adapters with less memory, many models and tasks (abstract, tables)",
    arms=("lora", "lora equal memory", "rst", "ist", "ist equal updates", "ist equal time"),
    metrics={
        "accuracy": "held-out accuracy at each arm's own best rate, after 150 steps; 'equal updates' takes 600 steps "
        "(each adapter trained as often as LoRA's), 'equal time' as many as LoRA's 150 steps last, 'equal memory' "
        "gives LoRA a smaller batch",
        "steps": "optimizer steps",
        "seconds": "CPU seconds of the steps, probes included",
        "kept for backward": "bytes kept for the backward pass, mean of the steps",
        "most kept for backward": "the same, the step with the most",
        "gradients": "bytes of gradients in a step",
        "most gradients": "the same, the step with the most",
        "optimizer": "bytes of optimizer state at the end",
        "most optimizer": "the most there were",
        "order": "share of pairs (block whose adapters matter, block whose adapters do nothing) in the right order "
        "after 40 updates of the score; 0.5 is chance",
    },
    statements=(
        Statement(
            says="IST is more accurate than LoRA on all blocks after as many steps", metric="accuracy",
            arm="ist", against="lora", headline=True,
        ),
        Statement(
            says="IST is more accurate than random sparse tuning", metric="accuracy", arm="ist", against="rst",
        ),
        Statement(
            says="IST is more accurate than LoRA in the same time", metric="accuracy", arm="ist equal time",
            against="lora",
        ),
        Statement(
            says="IST is more accurate than LoRA in the same memory", metric="accuracy", arm="ist",
            against="lora equal memory",
        ),
        Statement(
            says="IST with as many updates of each adapter (4 times the steps) is at most 0.01 below LoRA",
            metric="accuracy", arm="ist equal updates", against="lora", size=-0.01,
        ),
        Statement(
            says="IST keeps at most 3/4 of LoRA's bytes for backward, on average", metric="kept for backward",
            arm="ist", against="lora", direction="lower", size=0.75, ratio=True,
        ),
        Statement(
            says="At its most IST keeps at most 3/4 of LoRA's bytes for backward", metric="most kept for backward",
            arm="ist", against="lora", direction="lower", size=0.75, ratio=True,
        ),
        Statement(
            says="IST's gradients take a quarter of LoRA's bytes", metric="gradients", arm="ist", against="lora",
            direction="lower", size=0.25, ratio=True,
        ),
        Statement(
            says="IST's 150 steps take less time than LoRA's, probes included", metric="seconds", arm="ist",
            against="lora", direction="lower", size=1.0, ratio=True,
        ),
        Statement(
            says="The score puts at least 95 % of the pairs in the right order", metric="order", arm="ist",
            against="", size=0.95,
        ),
    ),
    run=_run,
    rates=(2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2),
    tuned_on="accuracy",
    seeds=8,
    notes="The optimizer's state is no smaller: every adapter has some once it has been trained. The saving in "
    "activations comes from blocks below the lowest one that trains, and is lost when the embedding's output is "
    "made to want gradients, as gradient checkpointing with adapters does.",
)  # fmt: skip
