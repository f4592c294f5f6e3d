"""NestedDropout: the law of prefixes, exact masks, K by one running sum, and co-teaching."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_trainer
from torch import nn

import salience as sal
from salience.core.errors import ConflictError, ParameterError, StructureError
from salience.hosts.classifier import find_classifier

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "nested-dropout.md"
CONTRACT = {
    "method": sal.NestedDropout(std=8.0, keep=8),
    "model": tiny_llama,
    "bad": {
        "std": (0.0, "std must be > 0 and finite, got 0.0"),
        "std:2": (math.inf, "std must be > 0 and finite, got inf"),
        "mu": (math.nan, "mu must be finite, got nan"),
        "convention": ("paper", "convention must be one of code, gauss, got 'paper'"),
        "keep": (0, "keep must be None or >= 1, got 0"),
        "penalty": (-1.0, "penalty must be >= 0 and finite, got -1.0"),
    },
}


class Net(nn.Module):
    """Inputs [B, 6] to logits [B, 3] over 8 features, with dropout and batch normalisation if asked for."""

    loss_type = "ForSequenceClassification"

    def __init__(self, seed=0, std=4.0, norm=False, dropout=0.0, bias=False, mask=True):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh())
        self.drop = nn.Dropout(dropout)
        self.mask = sal.NestedMask(8, std=std) if mask else nn.Identity()
        self.classifier = nn.Linear(8, 3, bias=bias)

    def forward(self, x):
        return self.classifier(self.mask(self.drop(self.body(x))))


def batch(size=12, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 6, generator=draw), "labels": torch.randint(3, (size,), generator=draw)}


def test_worked_example_and_limits_of_the_law():
    wanted = [0.613038, 0.289579, 0.082966, 0.014417]
    assert sal.prefix_law(4, 2.0).tolist() == pytest.approx(wanted, abs=1e-6)
    torch.testing.assert_close(
        sal.prefix_law(4, 2.0 / math.sqrt(2), convention="gauss"), sal.prefix_law(4, 2.0)
    )
    torch.testing.assert_close(sal.prefix_law(50, 1e9), torch.full((50,), 0.02, dtype=torch.float64))
    assert sal.prefix_law(50, 1e-3).tolist() == [1.0] + [0.0] * 49
    law = sal.prefix_law(512, 100.0)
    assert float(law.sum()) == pytest.approx(1, abs=1e-12) and bool((law.diff() < 0).all())
    assert bool(sal.prefix_law(512, 1.0, mu=5000.0).isfinite().all())


def test_draws_follow_the_law_and_depend_on_seed_and_call_alone():
    mask = sal.NestedMask(6, std=3.0)
    draws = torch.tensor([int(mask.draw(call)) for call in range(3000)])
    shares = torch.bincount(draws, minlength=7)[1:] / len(draws)
    torch.testing.assert_close(shares.double(), sal.prefix_law(6, 3.0), atol=0.03, rtol=0)
    kept = torch.stack([draws >= feature for feature in range(1, 7)], 1).double().mean(0)
    torch.testing.assert_close(kept, sal.training_share(sal.prefix_law(6, 3.0)), atol=0.03, rtol=0)
    again = sal.NestedMask(6, std=3.0)
    assert [int(again.draw(call)) for call in range(50)] == draws[:50].tolist()
    other = sal.NestedMask(6, std=3.0, seed=1)
    assert [int(other.draw(call)) for call in range(50)] != draws[:50].tolist()


def test_order_puts_what_is_trained_most_first():
    method = sal.NestedDropout(std=3.0)
    share = sal.training_share(method.law(32))
    order = method.order(32)
    assert bool((share[order].diff() <= 0).all()) and order.sort().values.tolist() == list(range(32))
    assert torch.equal(method.order(tiny_llama()), order), "the model's classifier reads 32 features"
    assert torch.equal(sal.NestedMask(32).order(), order)


def test_a_prefix_is_kept_bit_for_bit_and_nothing_flows_to_the_rest():
    net = Net()
    net.mask.fixed = 3
    x = batch()["x"]
    features = net.body(x).detach().requires_grad_()
    out = net.classifier(net.mask(features))
    torch.testing.assert_close(out, features[:, :3] @ net.classifier.weight[:, :3].T)
    out.square().sum().backward()
    assert bool((features.grad[:, 3:] == 0).all()) and bool((features.grad[:, :3] != 0).any())
    assert bool((net.classifier.weight.grad[:, 3:] == 0).all())
    poisoned = torch.full((2, 8), torch.nan)
    poisoned[:, :3] = 1
    assert bool(net.mask(poisoned).isfinite().all())
    net.eval()
    assert torch.equal(net.mask(features), features), "all features outside of training"
    net.mask.limit(2)
    assert torch.equal(net.mask(features)[:, 2:], torch.zeros(12, 6))


@pytest.mark.parametrize("bias", [False, True])
def test_one_running_sum_gives_the_accuracy_of_every_prefix(bias, monkeypatch):
    from salience.methods.features import _nested_dropout_layer as layer

    nets, data = [Net(seed, bias=bias).eval() for seed in range(2)], batch(40)
    nets[0].mask.limit(2)  # what is kept now must not hide what could be kept
    expected = []
    for keep in range(1, 9):
        logits = sum(
            net.classifier(net.body(data["x"]).masked_fill(torch.arange(8) >= keep, 0)) for net in nets
        )
        expected.append(float((logits.argmax(1) == data["labels"]).double().mean()))
    halves = [{key: value[rows] for key, value in data.items()} for rows in (slice(25), slice(25, 40))]
    assert sal.accuracy_of_prefixes(nets, halves).tolist() == pytest.approx(expected)
    monkeypatch.setattr(layer, "_CHUNK", 50)
    assert sal.accuracy_of_prefixes(nets, halves).tolist() == pytest.approx(expected)
    assert int(nets[0].mask.keep) == 2


def test_k_is_the_smallest_of_the_best_and_the_penalty_flips_no_real_difference():
    assert sal.choose_prefix(torch.tensor([0.1, 0.9, 0.9, 0.9])) == 2
    assert sal.choose_prefix(torch.tensor([0.5, 0.5])) == 1
    assert sal.choose_prefix(torch.tensor([0.5, 0.5]), one_means_all=True) == 2
    better = torch.full((512,), 0.8)
    better[511] += 1e-5 * 512 + 1e-6
    assert sal.choose_prefix(better) == 512
    assert sal.choose_prefix(torch.tensor([0.5, 0.6]), penalty=0.2) == 1


def test_truncated_layers_compute_what_the_masked_ones_do():
    net, x = Net(bias=True).eval(), batch()["x"]
    net.mask.limit(3)
    classifier, first = sal.truncate(net.classifier, 3, net.body[0])
    assert (classifier.in_features, first.out_features) == (3, 3)
    torch.testing.assert_close(classifier(first(x).tanh()), net(x))
    with pytest.raises(ParameterError, match=r"keep must be in \[1, 8\], got 9"):
        sal.truncate(net.classifier, 9)
    with pytest.raises(ParameterError, match="before must be a layer with 8 outputs"):
        sal.truncate(net.classifier, 3, nn.Linear(2, 5))


def test_small_losses_are_the_smallest_in_a_stable_order():
    losses = torch.tensor([3.0, 1.0, torch.nan, 1.0, 2.0])
    assert sal.small_losses(losses, 4).tolist() == [1, 3, 4, 0]
    assert [sal.remembered(10, rate) for rate in (0.0, 0.2, 0.7, 0.9)] == [10, 8, 3, 1]
    with pytest.raises(ParameterError, match="forget_rate must be small enough to keep one of 4 samples"):
        sal.remembered(4, 0.9)


def test_each_network_trains_only_on_rows_that_the_other_one_scored():
    pair, data = sal.CoTeaching(Net(0), Net(1), forget_rate=0.5), batch(13)
    found = pair.train()(**data)
    first, second = pair.picked
    assert len(first) == len(second) == 3 and found["logits"].shape == (6, 3)
    assert set(first.tolist()) <= set(range(6, 12)) and set(second.tolist()) <= set(range(6))
    assert len(set(first.tolist())) == 3
    # by hand: the second scores rows 6..11 in eval mode
    net = pair.second.eval()
    with torch.no_grad():
        losses = nn.functional.cross_entropy(net(data["x"][6:12]), data["labels"][6:12], reduction="none")
    assert first.tolist() == (6 + losses.argsort(stable=True)[:3]).tolist()


def test_the_two_losses_touch_their_own_network_and_share_the_prefix():
    pair, data = sal.CoTeaching(Net(0), Net(1), forget_rate=0.25).train(), batch()
    pair.second.mask.calls.add_(5)  # the two were trained for different numbers of steps
    keep = int(pair.first.mask.draw())
    loss = pair(**data)["loss"]
    parts = [
        nn.functional.cross_entropy(
            net.classifier(net.body(data["x"][rows]).masked_fill(torch.arange(8) >= keep, 0)),
            data["labels"][rows],
        )
        for net, rows in zip((pair.first, pair.second), pair.picked)
    ]
    torch.testing.assert_close(loss, sum(parts))
    wanted = torch.autograd.grad(parts[0], pair.first.classifier.weight)[0]
    loss.backward()
    torch.testing.assert_close(pair.first.classifier.weight.grad, wanted)
    assert bool((pair.second.classifier.weight.grad[:, keep:] == 0).all())


def test_selection_is_in_eval_mode_and_moves_no_statistics():
    pair = sal.CoTeaching(
        Net(0, norm=True, dropout=0.5), Net(1, norm=True, dropout=0.5), forget_rate=0.5
    ).train()
    before = {name: value.clone() for name, value in pair.state_dict().items() if "running" in name}
    assert before and not pair.first.body[1].training and pair.first.drop.training
    assert not pair.first.body[1].weight.requires_grad
    data = batch()
    pair(**data)
    picked = [rows.tolist() for rows in pair.picked]
    torch.manual_seed(5)
    pair(**data)
    assert [rows.tolist() for rows in pair.picked] == picked, "dropout must not move the selection"
    for name, value in before.items():
        assert torch.equal(pair.state_dict()[name], value), name


def test_the_forget_rate_rises_along_the_ramp():
    pair = sal.CoTeaching(Net(0), Net(1), forget_rate=0.5, ramp_steps=4).train()
    rates = []
    for _ in range(6):
        rates.append(pair.rate())
        pair(**batch())
    assert rates == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5] and len(pair.picked[0]) == 3


def test_whole_batches_can_be_scored_by_both():
    pair = sal.CoTeaching(Net(0), Net(1), forget_rate=0.5, split_batch=False).train()
    data = batch(9)
    pair(**data)
    for net, picked in zip((pair.second, pair.first), pair.picked):
        with torch.no_grad():
            logits = net.eval()(data["x"])
        losses = nn.functional.cross_entropy(logits, data["labels"], reduction="none")
        assert picked.tolist() == losses.argsort(stable=True)[:4].tolist()


def test_prediction_is_the_mean_with_the_chosen_prefix():
    pair, data = sal.CoTeaching(Net(0), Net(1)), batch(60)
    keep, accuracy = pair.choose([data])
    assert keep == sal.choose_prefix(accuracy) and int(pair.second.mask.keep) == keep
    logits = pair.eval()(x=data["x"])["logits"]
    torch.testing.assert_close(logits, (pair.first(data["x"]) + pair.second(data["x"])) / 2)
    assert float((logits.argmax(1) == data["labels"]).double().mean()) == pytest.approx(
        float(accuracy[keep - 1])
    )
    found = pair(**data)
    torch.testing.assert_close(found["loss"], nn.functional.cross_entropy(logits, data["labels"]))
    again, _ = pair.choose([data])
    assert again == keep, "choosing twice must see all features again"


def test_a_pair_trains_on_a_trainer_and_resumes_exactly(tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [{"x": x, "labels": y} for x, y in zip(*batch(32).values())]

    def run(folder, resume=None):
        pair = sal.CoTeaching(Net(0), Net(1), forget_rate=0.25, ramp_steps=3)
        args = TrainingArguments(
            output_dir=str(folder), max_steps=6, per_device_train_batch_size=8, learning_rate=1e-2, report_to=[],
            save_steps=3, logging_steps=1, disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = Trainer(model=pair, args=args, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return pair, trainer

    whole, trainer = run(tmp_path / "whole")
    assert trainer.evaluate()["eval_loss"] > 0 and int(whole.passes) == 12
    assert trainer.model_accepts_loss_kwargs is False, "or gradients would add up over micro-batches"
    again, _ = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: sal.CoTeaching(Net(), Net(), forget_rate=1.0), r"forget_rate must be in \[0, 1\), got 1.0"),
        (lambda: sal.CoTeaching(Net(), Net(), ramp_steps=-1), "ramp_steps must be >= 0, got -1"),
        (
            lambda: sal.CoTeaching(*[Net()] * 2),
            "first and second must be two networks without shared parameters",
        ),
        (lambda: sal.CoTeaching(Net(), Net()).train()(**batch(1)), "batch must be of two rows at least"),
        (lambda: sal.NestedMask(0), "features must be >= 1, got 0"),
        (lambda: sal.NestedMask(4).limit(5), r"keep must be in \[1, 4\], got 5"),
        (
            lambda: sal.prefix_accuracy(
                [torch.zeros(2, 3)], [torch.zeros(5, 4)], torch.zeros(2, dtype=torch.long)
            ),
            r"features and weights must be \[B, N\] and \[C, N\], alike for all models",
        ),
        (lambda: sal.focus(Net(), sal.NestedDropout(keep=9)), r"keep must be in \[1, 8\], got 9"),
    ],
)
def test_bad_input_is_one_clear_error(call, text):
    with pytest.raises(ParameterError, match=text):
        call()


def test_what_cannot_be_chosen_or_found_says_so():
    with pytest.raises(ConflictError, match="data must be validation batches with labels where keep is None"):
        sal.focus(Net(), sal.NestedDropout())
    with pytest.raises(StructureError, match="batches must hold labels, got x"):
        sal.focus(Net(), sal.NestedDropout(), data=[{"x": torch.zeros(2, 6)}])
    with pytest.raises(StructureError, match="each network must hold one NestedMask, got 0 and 0"):
        sal.CoTeaching(Net(mask=False), Net(mask=False)).choose([batch()])
    with pytest.raises(StructureError, match="model must end in a linear layer, got Tanh without any"):
        find_classifier(nn.Tanh())
    with pytest.raises(StructureError, match=r"classifier must be one of .*classifier, got 'head'"):
        sal.focus(Net(), sal.NestedDropout(keep=2, classifier="head"))


def test_focus_on_a_model_chooses_on_validation_data_and_can_be_made_final():
    net, data = Net(mask=False).eval(), batch(60)
    x = data["x"]
    plain = net(x)
    with sal.focus(net, sal.NestedDropout(), data=[data]) as handle:
        spent = handle.spent["nested-dropout"]
        masked = net(x)
    assert torch.equal(net(x), plain)
    accuracy = sal.accuracy_of_prefixes([net], [data])
    assert spent["kept"] == sal.choose_prefix(accuracy)
    with sal.focus(net, sal.NestedDropout(), data=[data]) as handle:
        handle.finish()
    torch.testing.assert_close(net(x), masked)
    assert bool((net.classifier.weight[:, spent["kept"] :] == 0).all())


def test_on_a_trainer_a_whole_step_keeps_one_prefix_and_the_rest_gets_no_gradient(tmp_path):
    from transformers import TrainerCallback

    kept = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            alive = kwargs["model"].lm_head.weight.grad.abs().sum(0) > 0
            kept.append((int(alive.sum()), bool(alive[: int(alive.sum())].all())))

    trainer = tiny_trainer(
        tmp_path,
        tiny_llama(),
        callbacks=[Look()],
        max_steps=4,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
    )
    sal.focus(trainer, sal.NestedDropout(std=10.0))
    trainer.train()
    mask = sal.NestedMask(32, std=10.0, seed=trainer.args.seed)
    assert [count for count, _ in kept] == [int(mask.draw(step)) for step in range(4)]
    assert all(front for _, front in kept) and len({count for count, _ in kept}) > 1


def test_the_loops_on_the_page_run_and_learn():
    space = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[:2]
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), space)
    assert float(space["accuracy"].max()) > 0.6 and 1 <= space["keep"] <= 128
    assert space["logits"].shape == (200, 10)


def test_compiled_gives_what_eager_gives():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    eager, other = sal.NestedMask(8, std=4.0), sal.NestedMask(8, std=4.0)
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(4):
        assert torch.equal(fast(x), eager(x))
    assert int(other.calls) == 4


def test_bf16_autocast_selects_and_weighs_like_fp32():
    data = batch(16)
    exact, near = (sal.CoTeaching(Net(0), Net(1), forget_rate=0.25).train() for _ in range(2))
    loss = exact(**data)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        other = near(**data)["loss"]
    assert other.dtype == torch.float32
    torch.testing.assert_close(other, loss, rtol=0.02, atol=0)
