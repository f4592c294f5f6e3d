"""LISA: what trains when, what the optimizer holds, and a run against a float64 oracle."""

from types import SimpleNamespace

import pytest
import torch
from conftest import losses_of, tiny_gpt2, tiny_llama, tiny_trainer, with_lora
from torch import nn

import salience as sal
from salience.core.errors import ConflictError, ParameterError, TargetError
from salience.core.part import optimizer_bytes
from salience.hosts.freezing import refuse_fixed_training
from salience.methods.layers.lisa import held_bytes, needed_bytes, units

CONTRACT = {
    # the checkpoint of step 3 lies inside of a period
    "method": sal.LISA(active_layers=1, interval=2),
    "model": lambda: tiny_llama(layers=3),
    "bad": {
        "active_layers": (-1, "active_layers must be a whole number >= 0, got -1"),
        "active_layers:2": (1.5, "active_layers must be a whole number >= 0, got 1.5"),
        "interval": (0, "interval must be a whole number >= 1, got 0"),
        "state": ("free", "state must be one of drop, keep, reset, got 'free'"),
        "seed": (-1, "seed must be >= 0 or None, got -1"),
        "probabilities": ((1.0, -1.0, 1.0), "probabilities must be finite and >= 0"),
        "probabilities:2": (
            (1.0, 0.0),
            "probabilities must be positive in at least active_layers = 2 places",
        ),
    },
}


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


class Stack(nn.Module):
    """An embedding, blocks, a norm and a head, in float64."""

    def __init__(self, blocks=4, width=5, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Layer(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11)
        self.double()

    def forward(self, inputs, labels=None):
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(self.norm(hidden))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def batches(count, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(11, (2, 6), generator=random) for _ in range(count)]
    return [{"inputs": row[0], "labels": row[1]} for row in rows]


def adamw(model, rate=1e-2, decay=0.1):
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)


def steps(loop, data, watch=None):
    """Run a loop that has begun; `watch(step)` is called before each forward pass."""
    for step, batch in enumerate(data):
        loop.start_step([batch])
        if watch is not None:
            watch(step)
        loop.loss(batch).backward()
        loop.finish_step()
        loop.optimizer.step()
        loop.optimizer.zero_grad()


def started(model, method, sets=None, **settings):
    loop = sal.loop(model, method, optimizer=adamw(model, **settings), shifted=False)
    if sets is not None:
        loop.parts[0].force(sets)
    loop.begin()
    return loop


def block_of(name):
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


def training(model):
    """(blocks of which every parameter trains, those of which any does, names outside that train)."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    every = {b for b in range(len(model.blocks)) if all(f for n, f in flags.items() if block_of(n) == b)}
    some = {block_of(n) for n, f in flags.items() if f and block_of(n) is not None}
    return every, some, {n for n, f in flags.items() if f and block_of(n) is None}


@pytest.mark.parametrize("gamma", [0, 1, 2, 4])
def test_exactly_gamma_blocks_train_and_the_rest_of_the_model_always(gamma):
    model = Stack()
    loop = started(model, sal.LISA(active_layers=gamma, interval=3))
    outside = {n for n, _ in model.named_parameters() if block_of(n) is None}
    seen, sets = [], set()

    def watch(step):
        every, some, others = training(model)
        assert every == some and len(every) == gamma and others == outside
        seen.append(frozenset(every))

    steps(loop, batches(30), watch)
    for start in range(0, 30, 3):
        assert len(set(seen[start : start + 3])) == 1, "the set changed inside of a period"
        sets.add(seen[start])
    assert len(sets) > 1 or gamma in (0, 4)
    loop.end()
    assert all(p.requires_grad for p in model.parameters())


def test_what_the_user_froze_stays_frozen_and_a_frozen_block_is_never_drawn():
    model = Stack(blocks=3)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.1.") or name in ("embed.weight", "blocks.2.linear.bias"):
            parameter.requires_grad_(False)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    loop = started(model, sal.LISA(active_layers=1, interval=1))
    drawn = set()
    steps(loop, batches(20), lambda step: drawn.update(loop.parts[0].spent()["trained now"]))
    assert drawn == {0, 2}
    for name, value in frozen.items():
        assert torch.equal(dict(model.named_parameters())[name], value), name
    loop.end()
    with pytest.raises(
        ParameterError, match="active_layers must be at most the 2 layers that may train, got 3"
    ):
        sal.loop(model, sal.LISA(active_layers=3))


@pytest.mark.parametrize("state", ["drop", "keep", "reset"])
def test_every_block_learns_in_its_own_period_and_only_there(state):
    # a block that was frozen before the optimizer was built would never change
    model = Stack(blocks=3)
    loop = started(model, sal.LISA(active_layers=1, interval=2, state=state), sets=[[0], [1], [2]])
    before = [p.clone() for p in model.parameters()]
    changed = []
    for period in range(3):
        steps(loop, batches(2, seed=period))
        after = [p.clone() for p in model.parameters()]
        names = [n for n, _ in model.named_parameters()]
        moved = {block_of(n) for n, a, b in zip(names, before, after) if not torch.equal(a, b)}
        changed.append(moved - {None})
        before = after
    assert changed == [{0}, {1}, {2}]


def test_all_blocks_is_plain_adamw_bit_for_bit():
    ours, plain = Stack(), Stack()
    steps(started(ours, sal.LISA(active_layers=4, interval=2)), batches(6))
    optimizer = adamw(plain)
    for batch in batches(6):
        plain(**batch)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters()):
        assert torch.equal(a, b), name


def oracle(init, data, sets, interval, policy, rate=1e-2, decay=0.1, eps=1e-8, betas=(0.9, 0.999)):
    """AdamW on the units that train, written from the definition; state kept, dropped or reset at each switch."""
    model = Stack()
    model.load_state_dict(init)
    held = {}
    for step, batch in enumerate(data):
        if step % interval == 0:
            active = set(sets[step // interval])
            held = {
                name: value
                for name, value in held.items()
                if policy == "keep" or (policy == "drop" and block_of(name) in active | {None})
            }
        trained = {n: p for n, p in model.named_parameters() if block_of(n) in active | {None}}
        grads = torch.autograd.grad(model(**batch)["loss"], list(trained.values()))
        with torch.no_grad():
            for (name, parameter), grad in zip(trained.items(), grads):
                t, m, v = held.get(name, (0, torch.zeros_like(grad), torch.zeros_like(grad)))
                t, m, v = t + 1, betas[0] * m + (1 - betas[0]) * grad, betas[1] * v + (1 - betas[1]) * grad**2
                held[name] = (t, m, v)
                parameter -= rate * decay * parameter
                ratio = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
                parameter -= rate * ratio
    return dict(model.named_parameters()), held


@pytest.mark.parametrize("policy", ["drop", "keep", "reset"])
def test_matches_the_oracle(policy):
    sets, model = [[0, 2], [1, 2], [0, 3], [0, 1]], Stack()
    init = {name: value.clone() for name, value in model.state_dict().items()}
    loop = started(model, sal.LISA(active_layers=2, interval=3, state=policy), sets=sets)
    steps(loop, batches(11))  # the last period is short
    expected, held = oracle(init, batches(11), sets, 3, policy)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
        entry = loop.optimizer.state.get(parameter, {})
        assert bool(entry) == (name in held), name
        if entry:
            assert int(entry["step"]) == held[name][0], name
            torch.testing.assert_close(entry["exp_avg_sq"], held[name][2], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("policy, zero", [("keep", 2), ("drop", None), ("reset", None)])
def test_worked_example(policy, zero):
    model = Stack()
    loop = started(model, sal.LISA(active_layers=1, interval=2, state=policy), sets=[[0], [2]])
    steps(loop, batches(4))

    def count(parameter):
        entry = loop.optimizer.state.get(parameter)
        return int(entry["step"]) if entry else None

    assert [count(block.linear.weight) for block in model.blocks] == [zero, None, 2, None]
    assert count(model.embed.weight) == (2 if policy == "reset" else 4)


def test_dropped_state_is_gone_right_after_a_switch_and_gradients_are_none():
    model = Stack()
    loop = started(model, sal.LISA(active_layers=1, interval=1), sets=[[0], [1], [3], [0]])
    sets = [0, 1, 3, 0]

    def watch(step):
        for name, parameter in model.named_parameters():
            if block_of(name) not in (None, sets[step]):
                assert parameter not in loop.optimizer.state and parameter.grad is None, name

    steps(loop, batches(4), watch)


def test_optimizer_bytes_of_the_blocks_stay_under_drop_and_climb_under_keep():
    shares = {}
    for policy in ("drop", "keep"):
        model = Stack(blocks=6)
        loop = started(
            model, sal.LISA(active_layers=2, interval=1, state=policy), sets=[[0, 1], [2, 3], [4, 5]]
        )
        full = Stack(blocks=6)
        whole = adamw(full)
        full(**batches(1)[0])["loss"].backward()
        whole.step()
        outside = needed_outside(full, whole)
        held = []
        for batch in batches(3):
            steps(loop, [batch])
            held.append((optimizer_bytes(loop.optimizer) - outside) / (optimizer_bytes(whole) - outside))
        shares[policy] = held
        assert loop.parts[0].spent()["optimizer bytes"] == optimizer_bytes(loop.optimizer)
    assert shares["drop"] == pytest.approx([1 / 3] * 3)
    assert shares["keep"] == pytest.approx([1 / 3, 2 / 3, 1])


def needed_outside(model, optimizer):
    blocks = {id(p) for p in model.blocks.parameters()}
    entries = [entry for p, entry in optimizer.state.items() if id(p) not in blocks]
    return sum(v.numel() * v.element_size() for entry in entries for v in entry.values())


def test_memory_model_agrees_with_what_is_held():
    model = Stack()
    loop = started(model, sal.LISA(active_layers=1, interval=1))
    batch = batches(1)[0]
    loop.start_step([batch])
    loop.loss(batch).backward()
    loop.finish_step()
    loop.optimizer.step()
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    frozen = sum(p.numel() for p in model.parameters()) - numbers
    held = held_bytes(model, loop.optimizer)
    assert held["gradients"] == 8 * numbers
    counters = 4 * len(trained)  # AdamW's step, one float32 a tensor
    expected = needed_bytes(frozen, numbers, weight=8, gradient=8, moments=16)
    assert sum(held.values()) == expected + counters
    assert needed_bytes(10, 3) == 10 * 2 + 3 * 12 and needed_bytes(0, 1, master=4) == 16


@pytest.mark.parametrize("gamma", [1, 2])
def test_blocks_are_drawn_uniformly(gamma):
    model = Stack(blocks=5)
    loop = started(model, sal.LISA(active_layers=gamma, interval=1))
    counts = torch.zeros(5)
    for step in range(2000):
        loop.step = step
        loop.before_step()
        counts[loop.parts[0].spent()["trained now"]] += 1
    share = gamma / 5
    sigma = (share * (1 - share) / 2000) ** 0.5
    assert counts.sum() == 2000 * gamma
    assert (counts / 2000 - share).abs().max() < 4 * sigma, counts
    assert loop.parts[0].histories["trained"].values().sum(0).tolist() == counts.tolist()


def test_probabilities_weight_the_draw():
    model = Stack()
    loop = started(model, sal.LISA(active_layers=2, interval=1, probabilities=(1.0, 0.0, 2.0, 0.0)))
    assert loop.parts[0].scores()["probability"].tolist() == pytest.approx([1 / 3, 0, 2 / 3, 0])
    for step in range(10):
        loop.step = step
        loop.before_step()
        assert loop.parts[0].spent()["trained now"] == [0, 2]
    with pytest.raises(ParameterError, match="probabilities must be 4 numbers, one for each unit, got 3"):
        sal.loop(model, sal.LISA(probabilities=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embedding_and_head_take_part_in_the_draw(tied):
    model = tiny_llama(layers=3, tie_word_embeddings=tied)
    found = units(model, sample_embeddings=True)
    ends = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert list(found) == [f"model.layers.{i}" for i in range(3)] + ends
    everything = [name for unit in found.values() for name in unit]
    assert len(everything) == len(set(everything))
    assert {n for n, _ in model.named_parameters()} - set(everything) == {"model.norm.weight"}
    loop = started(model, sal.LISA(active_layers=1, interval=1, sample_embeddings=True))
    trained = set()
    for step in range(40):
        loop.step = step
        loop.before_step()
        now = {n for n, p in model.named_parameters() if p.requires_grad}
        (unit,) = [path for path, names in found.items() if names <= now]
        assert now == found[unit] | {"model.norm.weight"}
        trained.add(unit)
    assert trained == set(found)


def test_a_run_that_is_saved_inside_a_period_goes_on_exactly():
    method = sal.LISA(active_layers=2, interval=4)
    whole = started(Stack(), method)
    steps(whole, batches(12))
    first = started(Stack(), method)
    steps(first, batches(12)[:6])
    again = started(Stack(seed=1), method)
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    again.load_state(first.state())
    again.step = 6
    sets = []
    steps(again, batches(12)[6:], lambda step: sets.append(again.parts[0].spent()["trained now"]))
    assert sets[0] == first.parts[0].spent()["trained now"]
    for (name, a), b in zip(again.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(a, b), name
    assert torch.equal(
        again.parts[0].histories["trained"].values(), whole.parts[0].histories["trained"].values()
    )


def test_on_a_trainer_every_block_learns(tmp_path):
    model = tiny_llama(layers=3)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = tiny_trainer(tmp_path, model, max_steps=12, gradient_accumulation_steps=2, weight_decay=0.1)
    handle = sal.focus(trainer, sal.LISA(active_layers=1, interval=1))
    trainer.train()
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
        assert parameter.requires_grad, name
    assert len(losses_of(trainer)) == 12
    spent = handle.spent["lisa"]
    assert spent["layers"] == 3 and len(spent["trained now"]) == 1
    assert 0 < spent["share of parameters"] < 1
    assert spent["optimizer bytes"] < 8 * sum(p.numel() for p in model.parameters())


def test_composes_with_a_method_that_weights(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_llama(layers=3))
    sal.focus(trainer, [sal.LISA(active_layers=1, interval=1), sal.LossReweighting()])
    trainer.train()
    assert len(losses_of(trainer)) == 3


def test_blocks_by_hand_and_the_wrong_path():
    model = tiny_gpt2(layers=3)
    assert list(units(model, layers="transformer.h")) == [f"transformer.h.{i}" for i in range(3)]
    with pytest.raises(ValueError, match="layers must be the dotted path of a ModuleList"):
        sal.loop(model, sal.LISA(layers="transformer.blocks"))


def test_refusals():
    with pytest.raises(ParameterError, match="active_layers must be at most the model's 4 layers, got 5"):
        sal.loop(Stack(), sal.LISA(active_layers=5))
    with pytest.raises(
        TargetError, match=r"without PEFT adapters \(IST is that method for adapters\), got a Peft"
    ):
        sal.loop(with_lora(tiny_llama()), sal.LISA())
    with pytest.raises(ConflictError, match="got lisa with ist: both choose the layers that train"):
        sal.loop(with_lora(tiny_llama(layers=4)), [sal.LISA(), sal.IST()])


def trainer_with(deepspeed=False, fsdp=None, ranks=2, unused=True):
    plugin = SimpleNamespace(fsdp_version=fsdp)
    return SimpleNamespace(
        is_deepspeed_enabled=deepspeed,
        is_fsdp_enabled=fsdp is not None,
        args=SimpleNamespace(world_size=ranks),
        accelerator=SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            ddp_handler=SimpleNamespace(find_unused_parameters=unused),
        ),
    )


def test_engines_that_settle_what_trains_are_refused():
    for fits in (
        None,
        trainer_with(),
        trainer_with(fsdp=2, unused=False),
        trainer_with(ranks=1, unused=False),
    ):
        refuse_fixed_training(fits, "LISA")
    for trainer, text in (
        (trainer_with(deepspeed=True), "DeepSpeed must be off for LISA"),
        (trainer_with(fsdp=1), "fsdp_version must be 2 for LISA .* got 1"),
        (trainer_with(unused=False), "ddp_find_unused_parameters must be True for LISA .* got False"),
    ):
        with pytest.raises(ConflictError, match=text):
            refuse_fixed_training(trainer, "LISA")


def test_the_same_seed_draws_the_same_and_another_seed_another():
    def drawn(seed):
        loop = started(Stack(blocks=8), sal.LISA(active_layers=2, interval=1, seed=seed))
        rows = []
        for step in range(10):
            loop.step = step
            loop.before_step()
            rows.append(loop.parts[0].spent()["trained now"])
        return rows

    assert drawn(1) == drawn(1) != drawn(2)
