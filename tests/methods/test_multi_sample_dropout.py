"""MultiSampleDropout: the mean of M losses, one pass of the backbone, and the head of a model that is there."""

import copy
import doctest
import math
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import collate, losses_of, ragged_samples, tiny_llama, tiny_trainer
from safetensors.torch import load_file
from torch import nn

import salience as sal
from salience.core.errors import ParameterError, StructureError
from salience.methods.features.multi_sample_dropout import MultiSampleHead, dropped, multi_sample_loss

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "multi-sample-dropout.md"
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONTRACT = {
    "method": sal.MultiSampleDropout(num_samples=3, p=0.3),
    "model": tiny_llama,
    "bad": {
        "num_samples": (0, r"num_samples must be an integer >= 1, got 0"),
        "num_samples:2": (-2, r"num_samples must be an integer >= 1, got -2"),
        "num_samples:3": (2.0, r"num_samples must be an integer >= 1, got 2.0"),
        "num_samples:4": (True, r"num_samples must be an integer >= 1, got True"),
        "p": (1.0, r"p must be None or in \[0, 1\), got 1.0"),
        "p:2": (-0.1, r"p must be None or in \[0, 1\), got -0.1"),
        "p:3": (math.nan, r"p must be None or in \[0, 1\), got nan"),
        "start": ("", r"start must be None or the name of a module, got ''"),
        "reduce": ("mean", r"reduce must be one of loss, logits, got 'mean'"),
    },
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Given(nn.Dropout):
    """A Dropout whose masks are given, one block of [B, D] for each sample; runs on as many samples as it sees."""

    def __init__(self, keep, p):
        super().__init__(p)
        self.keep, self.at = keep, 0

    def forward(self, rows):
        if not self.training:
            return rows
        count = len(rows) // self.keep.shape[1]
        keep = self.keep[self.at : self.at + count]
        self.at += count
        return dropped(rows, keep.flatten(0, 1), self.p)


def given_head(samples=4, rows=5, chunk=None, seed=0, p=(0.3, 0.2)):
    draw = seeded(seed)
    keep = [torch.rand(samples, rows, width, generator=draw) >= q for width, q in zip((6, 7), p)]
    torch.manual_seed(seed)
    layers = nn.Linear(6, 7).double(), nn.Linear(7, 3).double()
    parts = Given(keep[0], p[0]), layers[0], nn.ReLU(), Given(keep[1], p[1]), layers[1]
    head = nn.Sequential(*parts)
    features = torch.randn(rows, 6, dtype=torch.float64, generator=draw).requires_grad_()
    labels = torch.randint(0, 3, (rows,), generator=draw)
    return MultiSampleHead(head, samples, chunk=chunk), features, labels, keep, p


def by_hand(head, features, keep, p, m):
    """Logits of sample m in float64, without any of the code that is tested."""
    first, second = (layer for layer in head.head if isinstance(layer, nn.Linear))
    hidden = (features * keep[0][m] / (1 - p[0])) @ first.weight.T + first.bias
    return (hidden.relu() * keep[1][m] / (1 - p[1])) @ second.weight.T + second.bias


# --- the head -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 3, 4], ids=str)
def test_loss_and_gradients_are_the_mean_over_samples(chunk):
    head, features, labels, keep, p = given_head(chunk=chunk)
    parameters = [features, *head.parameters()]
    loss = multi_sample_loss(head(features), labels)
    got = torch.autograd.grad(loss, parameters)
    singles, gradients = [], []
    for m in range(4):
        alone = F.cross_entropy(by_hand(head, features, keep, p, m), labels)
        singles.append(alone.detach())
        gradients.append(torch.autograd.grad(alone, parameters))
    torch.testing.assert_close(loss.detach(), torch.stack(singles).mean(), rtol=1e-12, atol=1e-14)
    for grad, *several in zip(got, *gradients, strict=True):
        torch.testing.assert_close(grad, torch.stack(several).mean(0), rtol=1e-12, atol=1e-14)


def one_backward(chunk):
    """Loss and gradients of backbone and head, all samples at once (None) or in chunks."""
    head, _, labels, *_ = given_head(chunk=chunk)
    torch.manual_seed(3)
    backbone, calls = nn.Linear(9, 6).double(), []
    backbone.register_full_backward_hook(lambda *_: calls.append(1))
    features = backbone(torch.randn(5, 9, dtype=torch.float64, generator=seeded(4)))
    if chunk is None:
        loss = multi_sample_loss(head(features), labels)
        loss.backward()
    else:
        loss = head.backward(features, lambda logits: F.cross_entropy(logits, labels))
    assert calls == [1], "the backbone ran backward more than once"
    return [loss.detach(), *(one.grad for one in [*backbone.parameters(), *head.parameters()])]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_backward_in_chunks_leaves_the_same_gradients(chunk):
    for whole, cut in zip(one_backward(None), one_backward(chunk), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-14)


def test_worked_example():
    keep = torch.tensor([[[1, 0]], [[0, 1]]])
    head = MultiSampleHead(nn.Sequential(Given(keep, 0.5), nn.Identity()), 2)
    logits = head(torch.tensor([[2.0, 4.0]], dtype=torch.float64))
    assert logits.tolist() == [[[4.0, 0.0]], [[0.0, 8.0]]]
    label = torch.tensor([0])
    assert float(multi_sample_loss(logits, label)) == pytest.approx(4.0092427, abs=1e-7)
    assert float(multi_sample_loss(logits, label, reduce="logits")) == pytest.approx(2.1269280, abs=1e-7)


def test_one_sample_is_plain_dropout_bit_for_bit():
    head = nn.Sequential(nn.Dropout(0.4), nn.Linear(6, 7), nn.ReLU(), nn.Dropout(0.2), nn.Linear(7, 3))
    x, y = torch.randn(5, 6, generator=seeded()), torch.randint(0, 3, (5,), generator=seeded(1))
    torch.manual_seed(5)
    plain = F.cross_entropy(head(x), y)
    torch.manual_seed(5)
    wrapped = multi_sample_loss(MultiSampleHead(head, 1)(x), y)
    assert torch.equal(wrapped, plain)


def test_evaluation_is_one_pass_without_dropout():
    calls = []
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    head[1].register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    x = torch.randn(5, 6, generator=seeded())
    outputs = [MultiSampleHead(head, samples).eval()(x) for samples in (1, 8)]
    assert calls == [5, 5] and torch.equal(*outputs) and outputs[0].shape == (5, 3)
    assert torch.equal(outputs[0], head.eval()(x))
    labels = torch.tensor([0, 1, 2, 0, 1])
    assert torch.equal(multi_sample_loss(outputs[0], labels), F.cross_entropy(outputs[0], labels))


def test_keys_and_checkpoints_are_those_of_the_head():
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3))
    plain = nn.ModuleDict({"body": nn.Linear(4, 6), "head": head})
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    wrapped = nn.ModuleDict({"body": nn.Linear(4, 6), "head": MultiSampleHead(copy.deepcopy(head), 4)})
    assert list(wrapped.state_dict()) == list(state)
    assert sum(p.numel() for p in wrapped.parameters()) == sum(p.numel() for p in plain.parameters())
    wrapped.load_state_dict({name: value + 1 for name, value in state.items()})
    plain.load_state_dict(wrapped.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, state[name] + 1)
    alone = MultiSampleHead(head, 2)
    alone.load_state_dict(head.state_dict())
    assert list(copy.deepcopy(alone).state_dict()) == list(head.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        wrapped.load_state_dict({"body.weight": state["body.weight"], "body.bias": state["body.bias"]})


def test_masks_differ_between_samples_and_rows():
    head = MultiSampleHead(nn.Identity(), 6, p=0.5)
    seen = head(torch.ones(4, 64))
    assert len({tuple(row.tolist()) for row in seen.flatten(0, 1)}) == 24
    assert set(seen.unique().tolist()) == {0.0, 2.0}


def test_variance_over_masks_falls_with_the_number_of_samples():
    torch.manual_seed(1)
    backbone, body = nn.Linear(8, 16).double(), nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 4).double())
    x, y = torch.randn(6, 8, dtype=torch.float64), torch.randint(0, 4, (6,))
    variances = {}
    for samples in (1, 4):
        head, grads = MultiSampleHead(body, samples), []
        for _ in range(300):
            loss = multi_sample_loss(head(backbone(x)), y)
            grads.append(torch.autograd.grad(loss, backbone.weight)[0].flatten())
        variances[samples] = float(torch.stack(grads).var(0).sum())
    assert variances[1] / variances[4] == pytest.approx(4, rel=0.2)


def test_the_popular_variant_is_another_loss():
    head, features, labels, *_ = given_head()
    logits = head(features)
    both = [float(multi_sample_loss(logits, labels, reduce=kind).detach()) for kind in ("loss", "logits")]
    assert both[1] < both[0]
    same = features.detach()[:, :3].expand(4, 5, 3)
    equal = [multi_sample_loss(same, labels, reduce=kind) for kind in ("loss", "logits")]
    torch.testing.assert_close(*equal, rtol=1e-12, atol=1e-12)


def test_other_criteria_and_reductions():
    logits, y = torch.randn(4, 5, 3, generator=seeded()), torch.tensor([0, 1, 2, 0, -100])
    each = multi_sample_loss(logits, y, lambda z, t: F.cross_entropy(z, t, reduction="none"))
    assert each.shape == (5,) and each[4] == 0
    summed = multi_sample_loss(logits, y, lambda z, t: F.cross_entropy(z, t, reduction="sum"))
    torch.testing.assert_close(summed, each.sum())
    torch.testing.assert_close(multi_sample_loss(logits, y), summed / 4)
    many = torch.rand(5, 3, generator=seeded(1)).round()
    expected = torch.stack([F.binary_cross_entropy_with_logits(z, many) for z in logits]).mean()
    torch.testing.assert_close(multi_sample_loss(logits, many, F.binary_cross_entropy_with_logits), expected)
    soft = many.softmax(1)
    expected = torch.stack([F.cross_entropy(z, soft) for z in logits]).mean()
    torch.testing.assert_close(multi_sample_loss(logits, soft), expected)


def test_each_sample_may_see_changed_features():
    head = MultiSampleHead(nn.Flatten(), 3, p=0.0, augment=lambda rows, m: rows + m)
    x = torch.randn(2, 1, 4, generator=seeded())
    torch.testing.assert_close(head(x), torch.stack([x.flatten(1) + m for m in range(3)]))


def test_no_dropout_left_gives_the_plain_loss_and_a_warning():
    with pytest.warns(
        UserWarning, match="every Dropout of the head has p = 0: all dropout samples are equal"
    ):
        head = MultiSampleHead(nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 3)), 4)
    x, y = torch.randn(5, 6, generator=seeded()), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(multi_sample_loss(head(x), y), F.cross_entropy(head.head(x), y))


@pytest.mark.parametrize("kind", ["autocast", "compile"])
def test_autocast_and_compile_give_what_there_is_without(kind):
    head, features, labels, *_ = given_head()
    head, features = head.float(), features.float()
    plain = multi_sample_loss(head(features), labels)
    head.head[0].at = head.head[3].at = 0
    if kind == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(features)
            assert logits.dtype == torch.bfloat16
            loss = multi_sample_loss(logits, labels)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain, rtol=1e-2, atol=1e-2)
    else:
        step = torch.compile(
            lambda f: multi_sample_loss(head(f), labels), backend="aot_eager", fullgraph=True
        )
        torch.testing.assert_close(step(features), plain, rtol=1e-6, atol=1e-6)


# --- bad input ------------------------------------------------------------------------------------------------


def normed():
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


BAD_HEADS = {
    "no dropout": ((nn.Linear(6, 3), 4), {}, r"head must be a module with a Dropout in it .*, got 'Linear'"),
    "p twice": (
        (nn.Dropout(0.5), 4),
        {"p": 0.5},
        r"p must be None for a head that has Dropout of its own, got 0.5",
    ),
    "p of one": ((nn.Dropout(1.0), 4), {}, r"p must be in \[0, 1\) in every Dropout of the head, got 1.0"),
    "p": ((nn.Linear(6, 3), 4), {"p": 1.0}, r"p must be None or in \[0, 1\), got 1.0"),
    "samples": ((nn.Dropout(0.5), 0), {}, r"num_samples must be an integer >= 1, got 0"),
    "chunk": ((nn.Dropout(0.5), 4), {"chunk": 5}, r"chunk must be an integer in \[1, 4\], got 5"),
    "chunk 0": ((nn.Dropout(0.5), 4), {"chunk": 0}, r"chunk must be an integer in \[1, 4\], got 0"),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_a_bad_head_is_one_clear_error(case):
    given, settings, text = BAD_HEADS[case]
    with pytest.raises(ParameterError, match=text):
        MultiSampleHead(*given, **settings)


def test_one_sample_for_batch_norm_is_refused_in_training_only():
    head = MultiSampleHead(normed(), 4)
    with pytest.raises(
        ParameterError, match=r"batch must be at least two samples for a head with BatchNorm, got 1"
    ):
        head(torch.zeros(1, 6))
    assert head.eval()(torch.zeros(1, 6)).shape == (1, 3)
    assert head.train()(torch.zeros(2, 6)).shape == (4, 2, 3)


def test_batch_norm_counts_the_batch_once():
    head = MultiSampleHead(normed(), 4)
    head(torch.randn(5, 6))
    assert int(head.head[2].num_batches_tracked) == 1


@pytest.mark.parametrize(
    "labels, text",
    [
        (torch.tensor([0, 3]), r"labels must be class indices in \[0, 3\), got 3"),
        (torch.tensor([-1, 0]), r"labels must be class indices in \[0, 3\), got -1"),
        (torch.tensor([0.0, 1.0]), r"labels must be class indices of an integer dtype, got 'float32'"),
    ],
    ids=["too large", "negative", "float"],
)
def test_bad_labels_are_one_clear_error(labels, text):
    with pytest.raises(ParameterError, match=text):
        multi_sample_loss(torch.zeros(4, 2, 3), labels)
    with pytest.raises(ParameterError, match=r"reduce must be one of loss, logits, got 'mean'"):
        multi_sample_loss(torch.zeros(4, 2, 3), torch.tensor([0, 1]), reduce="mean")


# --- in a training loop ---------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A module of one's own in float64, with the dropout beside the head."""

    def __init__(self, p=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 16).double()
        self.dropout = nn.Dropout(p)
        self.classifier = nn.Linear(16, 3).double()
        self.rows = []

    def forward(self, x, labels=None):
        features = self.body(x).tanh()
        self.rows.append(len(features))
        logits = self.classifier(self.dropout(features))
        return {"logits": logits, "loss": None if labels is None else F.cross_entropy(logits, labels)}


def batches_of(*cuts):
    draw = seeded(9)
    x = torch.randn(sum(cuts), 4, dtype=torch.float64, generator=draw)
    y = torch.randint(0, 3, (sum(cuts),), generator=draw)
    return [{"x": a, "labels": b} for a, b in zip(x.split(cuts), y.split(cuts))]


class FixedMasks:
    """Masks that depend on a row's features and the sample alone, so that they are the same however a step is cut."""

    def __init__(self, samples):
        self.samples = samples

    def __call__(self, rows, p):
        size = len(rows) // self.samples
        blocks = []
        for m, block in enumerate(rows.split(size)):
            wave = (block.detach().double() * 1e4 + m).sin() * 43758.5453
            blocks.append(dropped(block, wave - wave.floor() >= p, p))
        return torch.cat(blocks)


@pytest.mark.parametrize("cuts", [(8,), (4, 4), (3, 4, 1), (2, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("reduce", ["loss", "logits"])
def test_the_loops_gradient_is_the_mean_over_samples(cuts, reduce):
    model, plain, batches = Classifier(), Classifier(), batches_of(*cuts)
    loop = sal.loop(model, sal.MultiSampleDropout(num_samples=4, reduce=reduce), shifted=False)
    loop.parts[0]._masked = FixedMasks(4)
    loop.begin()
    for _ in range(2):
        model.zero_grad()
        loop.start_step(batches)
        for batch in batches:
            loop.loss(batch).backward()
        loop.finish_step()
    assert model.rows == [*cuts, *cuts], "the backbone did not run once on each batch"
    assert [len(batch["labels"]) for batch in batches] == list(cuts)
    reported = loop.reported_loss()
    loop.end()
    loop.record.undo()
    total = 0.0
    for batch in batches:
        features = plain.body(batch["x"]).tanh()
        stack = FixedMasks(4)(features.repeat(4, 1), 0.5) @ plain.classifier.weight.T + plain.classifier.bias
        stack = stack.view(4, -1, 3)
        if reduce == "logits":
            total = total + F.cross_entropy(stack.mean(0), batch["labels"], reduction="sum") / 8
        else:
            total = total + sum(F.cross_entropy(z, batch["labels"], reduction="sum") for z in stack) / 4 / 8
    total.backward()
    assert reported == pytest.approx(float(total.detach()), rel=1e-9)
    for (name, found), wanted in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_masks_in_a_loop_are_its_own_and_repeat():
    losses, state = [], torch.get_rng_state()
    for seed in (0, 0, 1):
        model, batches = Classifier(), batches_of(4, 4)
        torch.set_rng_state(state)
        loop = sal.loop(model, sal.MultiSampleDropout(num_samples=3), shifted=False, seed=seed)
        loop.begin()
        loop.start_step(batches)
        losses.append([float(loop.loss(batch).detach()) for batch in [batches[0], batches[0]]])
        assert torch.equal(torch.get_rng_state(), state)
        parts = loop.parts[0].scores()["loss of each dropout sample"]
        assert parts.shape == (3,) and len(parts.unique()) == 3
    assert losses[0] == losses[1] != losses[2] and losses[0][0] != losses[0][1]


def test_masks_keep_the_right_share_and_differ_by_call():
    part = sal.loop(Classifier(), sal.MultiSampleDropout(), shifted=False).parts[0]
    part._numbers = (0, 0, 0, 0)
    ones = torch.ones(300, 1000)
    drawn = [part._masked(ones, p) for p in (0.3, 0.3, 0.8)]
    for rows, p in zip(drawn, (0.3, 0.3, 0.8)):
        assert float((rows > 0).float().mean()) == pytest.approx(1 - p, abs=0.005)
        assert float(rows.max()) == pytest.approx(1 / (1 - p))
    agree = float(((drawn[0] > 0) == (drawn[1] > 0)).float().mean())
    assert agree == pytest.approx(0.7**2 + 0.3**2, abs=0.01)


def test_undo_and_eval_leave_the_model_alone():
    model, (batch,) = Classifier(), batches_of(6)
    loop = sal.loop(model, sal.MultiSampleDropout(), shifted=False)
    loop.begin()
    loop.start_step([batch])
    loop.loss(batch).backward()
    model.eval()
    assert model(batch["x"])["logits"].shape == (6, 3), "evaluation inside of a step"
    loop.finish_step()
    model.train()
    assert model(batch["x"])["logits"].shape == (6, 3), "outside of a step"
    loop.record.undo()
    assert "forward" not in vars(model.dropout) and not model.classifier._forward_hooks
    assert not model.dropout._forward_pre_hooks


def test_a_model_in_eval_mode_trains_as_it_is():
    model, (batch,) = Classifier().eval(), batches_of(6)
    loop = sal.loop(model, sal.MultiSampleDropout(), shifted=False)
    loop.begin()
    loop.start_step([batch])
    torch.testing.assert_close(loop.loss(batch), model(**batch)["loss"])


def bert(**settings):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.4}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **SIZES, num_labels=3, **zero, **settings))


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    zero = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.4}
    return RobertaForSequenceClassification(RobertaConfig(vocab_size=64, **SIZES, num_labels=3, **zero))


def distilbert():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3)
    return DistilBertForSequenceClassification(config)


@pytest.mark.parametrize(
    "make, settings",
    [
        (bert, {}),
        (bert, {"start": "dropout"}),
        (roberta, {}),
        (roberta, {"start": "classifier"}),
        (distilbert, {}),
        (distilbert, {"start": "pre_classifier"}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_heads_of_transformers_models_are_found(make, settings):
    model = make()
    labels = torch.tensor([0, 1, 2, 0])
    batch = {**collate(ragged_samples(4)), "labels": labels}
    seen = []
    heads = [module for name, module in model.named_modules() if name == "classifier"]
    heads[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    bodies = []
    model.base_model.register_forward_hook(lambda module, args, output: bodies.append(len(output[0])))
    loop = sal.loop(model, sal.MultiSampleDropout(num_samples=3, **settings), shifted=False)
    loop.begin()
    loop.start_step([batch])
    loss = loop.loss(batch)
    loss.backward()
    assert bodies == [4] and seen[0].shape == (12, 3)
    assert len({tuple(row) for row in seen[0].view(3, 4, 3)[:, 0].tolist()}) == 3, "the samples share a mask"
    torch.testing.assert_close(loss.detach(), multi_sample_loss(seen[0].view(3, 4, 3), labels))


@pytest.mark.parametrize(
    "make, settings, text",
    [
        (
            tiny_llama,
            {},
            r"start must be a module with a Dropout .* p for one in front of it\), got \"'lm_head' \(Linear",
        ),
        (
            Classifier,
            {"start": "fc"},
            r"start must name a module \(body, dropout, classifier or one inside\), got 'fc'",
        ),
        (Classifier, {"p": 0.2}, r"p must be None for a head that has Dropout of its own, got 0.2"),
        (lambda: Classifier(p=1.0), {}, r"p must be in \[0, 1\) in every Dropout of the head, got 1.0"),
    ],
    ids=["no dropout", "no such module", "p twice", "p of one"],
)
def test_a_model_without_a_place_for_it_is_refused(make, settings, text):
    model = make()
    with pytest.raises(ParameterError, match=text):
        sal.loop(model, sal.MultiSampleDropout(**settings))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_start_that_does_not_run_is_an_error():
    class Aside(Classifier):
        def __init__(self):
            super().__init__()
            self.aside = nn.Dropout(0.5)

    loop = sal.loop(Aside(), sal.MultiSampleDropout(start="aside"), shifted=False)
    loop.begin()
    (batch,) = batches_of(4)
    loop.start_step([batch])
    with pytest.raises(StructureError, match=r"start must run before the head .* name another start"):
        loop.loss(batch)


def test_a_bad_batch_in_training():
    class Normed(Classifier):
        def __init__(self):
            super().__init__()
            self.classifier = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 3)).double()

    for make, change, text in (
        (Normed, slice(0, 1), r"batch must be at least two samples for a head with BatchNorm, got 1"),
        (Classifier, None, r"labels must be class indices of an integer dtype, got torch.float32"),
    ):
        (batch,) = batches_of(4)
        batch = {k: v[change] for k, v in batch.items()} if change else {**batch, "labels": torch.zeros(4)}
        loop = sal.loop(make(), sal.MultiSampleDropout(), shifted=False)
        loop.begin()
        loop.start_step([batch])
        with pytest.raises(ParameterError, match=text):
            loop.loss(batch)


# --- a Trainer on images ----------------------------------------------------------------------------------------


def pictures(samples):
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


def pictures_model():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SIZES))


def on_pictures(**given):
    from transformers import Trainer

    return Trainer(**{**given, "data_collator": pictures})


def picture_trainer(folder, model=None, count=8, **settings):
    draw = seeded()
    rows = [{"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": i % 3} for i in range(count)]
    return tiny_trainer(folder, model or pictures_model(), rows, on_pictures, **settings)


def test_a_vit_on_a_trainer(tmp_path):
    samples, rows = 4, []
    trainer = picture_trainer(tmp_path, per_device_train_batch_size=4)
    trainer.model.vit.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    handle = sal.focus(trainer, sal.MultiSampleDropout(num_samples=samples, p=0.5))
    trainer.train()
    assert rows == [4, 4, 4]
    scores = handle.scores["multi-sample-dropout.loss of each dropout sample"]
    assert scores.shape == (samples,) and float(scores.mean()) == pytest.approx(
        losses_of(trainer)[-1], abs=1e-4
    )
    assert handle.spent["multi-sample-dropout"] == {"passes of the head": 4, "passes of the rest": 1}


def test_samples_without_dropout_change_nothing(tmp_path):
    runs = []
    for focused in (False, True):
        trainer = picture_trainer(
            tmp_path / str(focused), count=7, gradient_accumulation_steps=2, per_device_train_batch_size=2
        )
        if focused:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                sal.focus(trainer, sal.MultiSampleDropout(num_samples=3, p=0.0))
        trainer.train()
        runs.append((losses_of(trainer), trainer.model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=2e-4)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_and_accumulation_are_one_batch(tmp_path):
    sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
    from test_distributed import launch

    found = {}
    for name, (batch, accumulation, ranks) in {"whole": (8, 1, 1), "ranks": (2, 2, 2)}.items():
        (tmp_path / name).mkdir()
        launch("multi_sample.py", tmp_path / name, batch, accumulation, ranks=ranks)
        found[name] = load_file(tmp_path / name / "gradients.safetensors")
    for name, grad in found["whole"].items():
        torch.testing.assert_close(
            found["ranks"][name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_loop_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    names = {}
    run = [block for block in blocks if not block.startswith("# not run")]
    for block in run:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(run) == 1 and names["logits"].shape == (8, 16, 10) and torch.isfinite(names["loss"])


@pytest.mark.parametrize("way", ["autocast", "compiled"])
def test_a_loop_under_autocast_and_compile_gives_what_it_gives_without(way):
    losses = []
    for changed in (False, True):
        model, (batch,) = Classifier().float(), batches_of(6)
        batch["x"] = batch["x"].float()
        call = torch.compile(model, backend="eager") if changed and way == "compiled" else None
        loop = sal.loop(model, sal.MultiSampleDropout(num_samples=3), shifted=False, call=call)
        loop.begin()
        loop.start_step([batch])
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=changed and way == "autocast"):
            loss = loop.loss(batch)
        loss.backward()
        loop.finish_step()
        losses.append((loss.detach(), model.body.weight.grad))
    close = {"rtol": 3e-2, "atol": 2e-2} if way == "autocast" else {"rtol": 1e-6, "atol": 1e-7}
    for mine, plain in zip(losses[1], losses[0], strict=True):
        torch.testing.assert_close(mine, plain, **close)


def test_the_examples_of_the_docstrings_run():
    for shown in (
        sal.MultiSampleDropout,
        sal.MultiSampleHead,
    ):
        names = {
            **vars(sys.modules[shown.__module__]),
            **vars(sys.modules[sal.MultiSampleDropout.__module__]),
        }
        (test,) = doctest.DocTestFinder(recurse=False).find(shown, shown.__name__, globs=names)
        assert test.examples and doctest.DocTestRunner().run(test).failed == 0
