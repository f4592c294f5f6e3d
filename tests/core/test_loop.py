"""Composition: weights, penalties and freezing act together as the formula says, however a step is cut."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from conftest import collate, ragged_samples, tiny_gpt2, tiny_llama, tiny_trainer

import salience as sal
from salience.core.errors import ConflictError, StructureError, TargetError
from salience.core.losses import sample_losses, token_losses
from salience.core.method import Method
from salience.core.part import Part


class ForwardTokens(Part):
    """Token weights that depend on the forward pass, so their sum is unknown before it."""

    def __init__(self):
        super().__init__()
        self.weights_tokens = True

    def token_weights(self, batch, loop):
        return (0.2 + batch.losses.detach()).clamp(max=4.3) * (batch.losses.detach() > 4.0)


class SampleByLength(Part):
    def __init__(self):
        super().__init__()
        self.weights_samples = True

    def sample_weights(self, batch, loop):
        return 1.0 / batch.weights.sum(-1).clamp_min(1e-6)


class LogitPenalty(Part):
    """A penalty for each sample, with graph through the whole model."""

    def __init__(self):
        super().__init__()
        self.penalizes = True
        self.captured = None

    def before_forward(self, loop, inputs):
        self.mask = inputs["attention_mask"]

    def begin(self, loop):
        loop.record.hook(loop.model.lm_head.register_forward_hook(self._keep))

    def _keep(self, module, args, output):
        self.captured = output

    def penalty(self, batch, loop):
        per_token = self.captured.square().mean(-1) * self.mask
        return 0.5 * per_token.sum(-1) / self.mask.sum(-1)


class OtherLosses(Part):
    """Half the square of the loss in the place of the loss, with graph."""

    def __init__(self):
        super().__init__()
        self.changes_losses = True

    def losses(self, batch, loop):
        return batch.losses.square() / 2


@dataclass(frozen=True, kw_only=True)
class Tokens(Method):
    unit: ClassVar[str] = "token"

    def attach_trainer(self, site, record):
        return ForwardTokens()


@dataclass(frozen=True, kw_only=True)
class Squares(Method):
    unit: ClassVar[str] = "class"

    def attach_trainer(self, site, record):
        return OtherLosses()


@dataclass(frozen=True, kw_only=True)
class Samples(Method):
    unit: ClassVar[str] = "sample"

    def attach_trainer(self, site, record):
        return SampleByLength()


@dataclass(frozen=True, kw_only=True)
class Penalty(Method):
    unit: ClassVar[str] = "feature"

    def attach_trainer(self, site, record):
        return LogitPenalty()


# the slug is the module's name: three methods of one module would count as one method given twice
for _cls in (Tokens, Samples, Penalty):
    _cls.slug = classmethod(lambda cls: cls.__name__.lower())


def gradients(methods, cuts, samples):
    model = tiny_gpt2()
    loop = sal.loop(model, methods)
    loop.begin()
    batches = [collate(samples[a:b]) for a, b in pairwise(cuts)]
    loop.start_step(batches)
    for batch in batches:
        loop.loss(batch).backward()
    loop.finish_step()
    loss = loop.reported_loss()
    loop.end()
    loop.record.undo()
    return {name: p.grad for name, p in model.named_parameters()}, loss


MIXES = {
    "tokens": [Tokens()],
    "samples": [Samples()],
    "penalty": [Penalty()],
    "tokens+samples": [Tokens(), Samples()],
    "tokens+penalty": [Tokens(), Penalty()],
    "all": [Tokens(), Samples(), Penalty()],
}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("cuts", [(0, 2, 4, 6, 8), (0, 1, 8), (0, 5, 6, 8)], ids=str)
def test_accumulated_batches_give_the_gradient_of_one(mix, cuts):
    samples = ragged_samples(8)
    whole, loss = gradients(MIXES[mix], (0, 8), samples)
    parts, loss_parts = gradients(MIXES[mix], cuts, samples)
    # alone, a penalty is added to the model's own loss, which transformers computes in float32
    close = {"rtol": 1e-5, "atol": 1e-7} if mix == "penalty" else {"rtol": 1e-9, "atol": 1e-12}
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, **close, msg=lambda m, n=name: f"{n}: {m}")
    if mix != "penalty":
        assert loss_parts == pytest.approx(loss, rel=1e-6)


def test_formula_against_a_transcription():
    samples = ragged_samples(6)
    model = tiny_gpt2()
    batch = collate(samples)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    losses, active = token_losses(logits, batch["labels"])
    known = losses.detach()
    numerator = denominator = 0.0
    for i in range(6):
        m = [
            float((0.2 + known[i, t]).clamp(max=4.3)) * float(known[i, t] > 4.0) * float(active[i, t])
            for t in range(losses.shape[1])
        ]
        w = 1.0 / max(sum(m), 1e-6)
        for t in range(losses.shape[1]):
            numerator = numerator + w * m[t] * losses[i, t]
            denominator += w * m[t]
    penalty = 0.0
    for i in range(6):
        rows = logits[i][batch["attention_mask"][i].bool()]
        penalty = penalty + 0.5 * rows.square().mean() / 6
    (numerator / denominator + penalty).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    got, _ = gradients([Tokens(), Samples(), Penalty()], (0, 6), samples)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-12)


def test_token_losses_match_the_models_own_mean():
    model = tiny_llama()
    batch = collate(ragged_samples(5))
    out = model(**batch)
    losses, active = token_losses(out.logits, batch["labels"])
    assert losses.dtype == torch.float32
    assert losses[:, 0].eq(0).all() and not active[:, 0].any()
    torch.testing.assert_close((losses * active).sum() / active.sum(), out.loss)
    smooth, _ = token_losses(out.logits, batch["labels"], smoothing=0.1)
    logp = out.logits[:, :-1].log_softmax(-1)
    shifted = batch["labels"][:, 1:]
    expected = 0.9 * losses[:, 1:] - 0.1 * logp.mean(-1) * (shifted != -100)
    torch.testing.assert_close(smooth[:, 1:], expected)


def test_sample_losses_of_an_empty_row_are_zero_and_finite():
    losses = torch.tensor([[1.0, 3.0], [5.0, 7.0]], requires_grad=True)
    mean, total = sample_losses(losses, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert mean.tolist() == [2.0, 0.0] and total.tolist() == [2.0, 0.0]
    mean.sum().backward()
    assert losses.grad.isfinite().all()


def test_a_batch_without_any_weight_gives_zero_gradients_and_no_nan():
    samples = [{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 2
    for cuts in ((0, 2), (0, 1, 2)):
        grads, loss = gradients([Tokens()], cuts, samples)
        assert loss == 0.0
        assert all(grad is None or grad.eq(0).all() for grad in grads.values())


class WeightDecay(Part):
    """A penalty once a step, on the weights."""

    def __init__(self):
        super().__init__()
        self.penalizes = True

    def penalty(self, batch, loop):
        return 0.5 * loop.model.layer.weight.square().sum()


@dataclass(frozen=True, kw_only=True)
class PlainPenalty(Method):
    unit: ClassVar[str] = "weight"

    def attach_trainer(self, site, record):
        return WeightDecay()


@dataclass(frozen=True, kw_only=True)
class NoChange(Method):
    unit: ClassVar[str] = "layer"

    def attach_trainer(self, site, record):
        return Part()


class Freezes(Part):
    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def trainable(self):
        return self.keep


def test_freezing_sets_intersect_and_come_back():
    from salience.core.loop import Loop

    model = tiny_llama()
    names = [name for name, _ in model.named_parameters()]
    model.get_parameter(names[1]).requires_grad_(False)
    loop = Loop(model, [Freezes(set(names[:4])), Freezes(set(names[1:6]))])
    loop.begin()
    loop.start_step([collate(ragged_samples(2))])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {names[2], names[3]}
    loop.record.undo()
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {names[1]}


def test_a_wrong_target_names_the_right_one():
    with pytest.raises(
        TargetError, match=r"target of Tokens must be a transformers Trainer.*got LlamaForCausalLM"
    ):
        sal.focus(tiny_llama(), Tokens())
    with pytest.raises(TargetError, match=r"target must be one of .* got int"):
        sal.focus(3, Tokens())
    with pytest.raises(TargetError, match=r"method must be an instance, got the class: write Tokens\(\)"):
        sal.focus(tiny_llama(), Tokens)


def test_the_same_method_twice_is_refused():
    with pytest.raises(ConflictError, match="got Tokens twice"):
        sal.loop(tiny_llama(), [Tokens(), Tokens()])


def test_changed_losses_take_the_place_of_cross_entropy_before_weights():
    batch, model = collate(ragged_samples(4)), tiny_llama()
    plain = tiny_llama()
    loop = sal.loop(model, [Tokens(), Squares()])
    loop.begin()
    loop.start_step([batch])
    loop.loss(batch).backward()
    loop.finish_step()
    given = {name: value for name, value in batch.items() if name != "labels"}
    losses, active = token_losses(plain(**given).logits, batch["labels"])
    losses = losses.square() / 2
    found = losses.detach()
    weights = (0.2 + found).clamp(max=4.3) * (found > 4.0) * active
    ((losses * weights).sum() / weights.sum()).backward()
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_changed_losses_have_to_keep_their_shape():
    class Short(OtherLosses):
        def losses(self, batch, loop):
            return batch.losses.sum()

    @dataclass(frozen=True, kw_only=True)
    class Sums(Method):
        unit: ClassVar[str] = "class"

        def attach_trainer(self, site, record):
            return Short()

    batch = collate(ragged_samples(2))
    loop = sal.loop(tiny_llama(), Sums())
    loop.begin()
    loop.start_step([batch])
    with pytest.raises(TypeError, match=r"Short must give losses \[2, \d+\], got \[\]"):
        loop.loss(batch)


class Plain(torch.nn.Module):
    """Knows nothing of transformers: it takes features and returns logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(5, 3).double()

    def forward(self, features):
        return self.layer(features)


def plain_batches(*sizes):
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "features": torch.randn(size, 5, generator=draw, dtype=torch.float64),
            "labels": torch.randint(3, (size,), generator=draw),
        }
        for size in sizes
    ]


@pytest.mark.parametrize(
    "methods", [[Squares()], [NoChange()], [PlainPenalty()]], ids=["losses", "none", "penalty"]
)
@pytest.mark.parametrize("cuts", [(6,), (2, 4)])
def test_a_plain_module_that_returns_logits_trains_in_a_loop(methods, cuts):
    model, plain, batches = Plain(), Plain(), plain_batches(*cuts)
    loop = sal.loop(model, methods)
    loop.begin()
    loop.start_step(batches)
    for batch in batches:
        loop.loss(batch).backward()
    loop.finish_step()
    logits = torch.cat([plain(batch["features"]) for batch in batches])
    losses = torch.nn.functional.cross_entropy(
        logits, torch.cat([batch["labels"] for batch in batches]), reduction="none"
    )
    losses = losses.square() / 2 if isinstance(methods[0], Squares) else losses
    penalty = 0.5 * plain.layer.weight.square().sum() if isinstance(methods[0], PlainPenalty) else 0.0
    (losses.mean() + penalty).backward()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12)
    wanted = torch.nn.functional.cross_entropy(plain(batches[0]["features"]), batches[0]["labels"])
    assert loop.probe_loss(batches[0]) == pytest.approx(float(wanted.detach()))


def test_a_plain_module_trains_on_a_trainer(tmp_path):
    batch = plain_batches(8)[0]
    rows = [{name: value[row] for name, value in batch.items()} for row in range(8)]

    def stacked(samples):
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    model, plain = Plain(), Plain()
    trainer = tiny_trainer(
        tmp_path, model, rows, max_steps=1, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.data_collator = stacked
    handle = sal.focus(trainer, Squares())
    trainer.train()
    handle.undo()
    losses = torch.nn.functional.cross_entropy(plain(batch["features"]), batch["labels"], reduction="none")
    (losses.square() / 2).mean().backward()
    for found, start in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.detach(), start.detach() - 0.1 * start.grad, rtol=1e-6, atol=1e-9)


def test_a_model_without_loss_or_logits_says_so():
    class Silent(Plain):
        def forward(self, features, labels=None):
            return {"logits": self.layer(features)}

    class Mute(Plain):
        def forward(self, features):
            return {"hidden": features}

    batch = plain_batches(4)[0]
    for model, text in (
        (Silent(), "model must return loss, got dict"),
        (Mute(), "model must return logits, got dict"),
    ):
        loop = sal.loop(model, NoChange())
        loop.begin()
        loop.start_step([batch])
        with pytest.raises(StructureError, match=text):
            loop.loss(batch)
