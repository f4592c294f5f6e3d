"""SsToken: does training on selected response tokens beat training on all of them when the data are noisy?

A two-layer Llama learns to copy strings and to shift their symbols by one: the base. It is then tuned on a new task
whose data have 40 % of the response tokens replaced by random symbols, and asked for clean responses. Two regimes: a
task close to what the base can do, with enough data, judged after one epoch as in the paper and again after three;
and a hard task with few data, where most tokens have not begun to improve. Base, data, order and steps are shared.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from salience.claims.harness import Experiment, Statement, Values
from salience.core.loop import Loop
from salience.core.losses import IGNORE
from salience.core.part import Batch, Part
from salience.methods.tokens.sstoken import SsToken, spend
from salience.verb import loop as focused_loop

_SYMBOLS, _FIRST, _LENGTH, _NOISE, _KEEP = 20, 8, 8, 0.4, 0.6
_SEPARATOR = 1
_TASKS = {"copy": 2, "shift by one": 3, "shift by five": 4, "reverse": 5}
_BASE_STEPS, _BASE_RATE, _MASTERED = 1000, 2e-3, 0.01
_BASE_BATCH, _HELD_OUT = 50, 500
_ARMS = ("full data", "random", "attention", "excess loss", "mix", "oracle")
_HARD_ARMS, _HARD_RATE = ("full data", "excess loss", "mix", "oracle"), 1e-3
_MIX = {"attention": 0.0, "excess loss": 1.0, "mix": 0.5}


@dataclass(frozen=True)
class _Data:
    """Strings with their responses.

    Attributes:
        inputs (Tensor): [N, T] token ids: task, string, separator, response.
        clean (Tensor): [N, T] bool, response tokens that are right; the others of the response are noise.
    """

    inputs: Tensor
    clean: Tensor

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        ids = self.inputs[rows]
        labels = ids.clone()
        labels[:, : _LENGTH + 2] = IGNORE
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _data(task: str, count: int, noise: float, random: torch.Generator) -> _Data:
    string = torch.randint(_SYMBOLS, (count, _LENGTH), generator=random)
    moved = {"copy": 0, "shift by one": 1, "shift by five": 5, "reverse": 0}[task]
    right = (string.flip(1) if task == "reverse" else string + moved) % _SYMBOLS
    replaced = torch.rand(count, _LENGTH, generator=random) < noise
    response = torch.where(replaced, torch.randint(_SYMBOLS, (count, _LENGTH), generator=random), right)
    head, middle = torch.full((count, 1), _TASKS[task]), torch.full((count, 1), _SEPARATOR)
    inputs = torch.cat((head, string + _FIRST, middle, response + _FIRST), 1)
    clean = torch.zeros_like(inputs, dtype=torch.bool)
    clean[:, -_LENGTH:] = response == right
    return _Data(inputs, clean)


def _model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_FIRST + _SYMBOLS,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@lru_cache(maxsize=2)
def _base(seed: int, device: str) -> dict[str, Tensor]:
    """Weights of a model that copies and shifts by one."""
    random = torch.Generator().manual_seed(1000 + seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_RATE, weight_decay=0.0)
    losses: list[float] = []
    # how soon it masters both tasks depends on the seed
    while len(losses) < _BASE_STEPS and not (len(losses) > 20 and sum(losses[-20:]) < 20 * _MASTERED):
        data = _data(("copy", "shift by one")[len(losses) % 2], _BASE_BATCH, 0.0, random)
        batch = {name: value.to(device) for name, value in data.batch(torch.arange(_BASE_BATCH)).items()}
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class _Given(Part):
    """Keeps a share of the response tokens at random, or exactly the right ones."""

    def __init__(self, random: torch.Generator | None) -> None:
        super().__init__()
        self.weights_tokens = True
        self.clean = torch.empty(0)
        self.kept = torch.empty(0)
        self._random = random

    def token_weights(self, batch: Batch, loop: Loop) -> Tensor:
        self.kept = self.clean
        if self._random is not None:
            drawn = torch.rand(batch.active.shape, generator=self._random).to(batch.active.device)
            self.kept = spend(drawn, batch.active, _KEEP)
        return self.kept.to(batch.weights.dtype)


def _loop(arm: str, model: Any, optimizer: Any, data: _Data, size: int, seed: int) -> Loop:
    if arm in _MIX:
        blocks = [data.batch(rows) for rows in torch.arange(len(data.inputs)).split(size)]
        return focused_loop(model, SsToken(keep=_KEEP, mix=_MIX[arm]), optimizer=optimizer, data=blocks)
    given = {"random": [_Given(torch.Generator().manual_seed(seed))], "oracle": [_Given(None)]}
    return Loop(model, given.get(arm, []), optimizer=optimizer)


def _tuned(
    arm: str, task: str, count: int, size: int, epochs: int, seed: int, rate: float, device: str
) -> tuple[float, float]:
    """Accuracy on clean held-out responses; share of noise among the tokens dropped in the last epoch."""
    random = torch.Generator().manual_seed(2000 + seed)
    data, held = _data(task, count, _NOISE, random), _data(task, _HELD_OUT, 0.0, random)
    model = _model().to(device)
    model.load_state_dict(_base(seed, device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    steps = epochs * -(-count // size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, total_iters=steps)
    loop = _loop(arm, model, optimizer, data, size, seed)
    loop.begin()
    noisy = dropped = 0
    for epoch in range(epochs):
        for rows in torch.randperm(count, generator=random).split(size):
            batch = {name: value.to(device) for name, value in data.batch(rows).items()}
            clean = data.clean[rows].to(device)
            for part in loop.parts:
                if isinstance(part, _Given):
                    part.clean = clean
            loop.start_step([batch])
            loop.loss(batch).backward()
            loop.finish_step()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            for part in loop.parts if epoch == epochs - 1 else ():
                left = (batch["labels"] != IGNORE) & ~_kept(part, batch)
                dropped += int(left.sum())
                noisy += int((left & ~clean).sum())
    loop.end()
    loop.record.undo()
    return _accuracy(model, held, device), noisy / dropped if dropped else 0.0


def _kept(part: Part, batch: dict[str, Tensor]) -> Tensor:
    if isinstance(part, _Given):
        return part.kept
    response = batch["labels"] != IGNORE
    return spend(part.scores()["score"].to(response.device), response, _KEEP)


@torch.no_grad()
def _accuracy(model: Any, held: _Data, device: str) -> float:
    ids = held.inputs.to(device)
    answers = model(input_ids=ids).logits.argmax(-1)[:, -_LENGTH - 1 : -1]
    return float((answers == ids[:, -_LENGTH:]).double().mean())


@lru_cache(maxsize=len(_HARD_ARMS))
def _hard(arm: str, seed: int, device: str) -> tuple[float, float]:
    return _tuned(arm, "reverse", 250, 25, 40, seed, _HARD_RATE, device)


def _run(arm: str, seed: int, rate: float, device: str) -> Values:
    early, _ = _tuned(arm, "shift by five", 1200, 50, 1, seed, rate, device)
    late, noise = _tuned(arm, "shift by five", 1200, 50, 3, seed, rate, device)
    values = {"accuracy": early, "final accuracy": late, "noise dropped": noise}
    if arm in _HARD_ARMS:
        values["hard accuracy"], values["hard noise dropped"] = _hard(arm, seed, device)
    return values


EXPERIMENT = Experiment(
    slug="sstoken",
    question="Does training on the tokens that ssToken keeps beat training on all of them, when 40 % are noise?",
    setting="2-layer Llama of width 48, base trained here on copying and shifting; tuned on 1,200 noisy strings of a "
    "related task, 24 steps of AdamW an epoch, rate falling to 0, keep 0.6; and on 250 of a hard task",
    paper="up to +4.3 % average over full-data fine-tuning, +2.8 % over earlier token selection, 3B-14B models, one "
    "epoch (as reported with the ICLR 2026 paper)",
    arms=_ARMS,
    metrics={
        "accuracy": "right symbols in clean held-out responses, one epoch, each arm at its own best rate",
        "final accuracy": "the same with three epochs",
        "noise dropped": "share of planted noise among the tokens dropped in the last epoch (chance: 0.38)",
        "hard accuracy": "right symbols after 40 epochs on 250 reversed strings, at rate 0.001, four arms",
        "hard noise dropped": "share of planted noise among the tokens dropped there in the last epoch",
    },
    statements=(
        Statement(
            says="ssToken (mix 0.5, keep 0.6) is more accurate than full data after one epoch",
            metric="accuracy", arm="mix", against="full data", direction="higher", headline=True,
        ),
        Statement(
            says="ssToken is more accurate than keeping as many tokens at random",
            metric="accuracy", arm="mix", against="random", direction="higher",
        ),
        Statement(
            says="excess loss alone is more accurate than full data",
            metric="accuracy", arm="excess loss", against="full data", direction="higher",
        ),
        Statement(
            says="attention to the prompt alone is more accurate than full data",
            metric="accuracy", arm="attention", against="full data", direction="higher",
        ),
        Statement(
            says="both signals together are more accurate than excess loss alone",
            metric="accuracy", arm="mix", against="excess loss", direction="higher",
        ),
        Statement(
            says="ssToken is still a point more accurate than full data after three epochs",
            metric="final accuracy", arm="mix", against="full data", direction="higher", size=0.01,
        ),
        Statement(
            says="what ssToken drops holds more planted noise than chance",
            metric="noise dropped", arm="mix", against="random", direction="higher",
        ),
        Statement(
            says="on a hard task with few data ssToken is not worse than full data by more than two points",
            metric="hard accuracy", arm="mix", against="full data", direction="higher", size=-0.02,
        ),
    ),
    run=_run,
    rates=(2e-3, 4e-3, 8e-3),
    tuned_on="accuracy",
    seeds=6,
    notes="Symmetric noise does not hurt full-data training that lasts: all reach the ceiling of the easy task. On a "
    "hard one the excess loss feeds on what is learnt already and starves tokens that have not begun to improve. The "
    "oracle arm, which knows the noise, shows how much there is to gain.",
)  # fmt: skip
