"""MCTemporalDropout: masks over time, samples in one batch, honest measures, and the rate that is learnt."""

import math
import re
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama, tiny_trainer
from torch import nn

import salience as sal
from salience.core.errors import ParameterError, StructureError

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "mc-temporal-dropout.md"


class Output:
    def __init__(self, logits, loss=None):
        self.logits, self.loss = logits, loss


class SeriesNet(nn.Module):
    """A GRU with batch normalisation and dropout, that says mean and log variance."""

    def __init__(self, features=3, layer=None, outputs=2):
        super().__init__()
        torch.manual_seed(0)
        self.gaps = layer
        self.inner = nn.GRU(features, 8, batch_first=True)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, outputs)

    def forward(self, series, observed=None):
        if self.gaps is not None:
            series = self.gaps(series, observed)
        mean, spread = self.head(self.drop(self.norm(self.inner(series)[0][:, -1]))).chunk(2, -1)
        return mean, spread


class WithLogits(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = SeriesNet()

    def forward(self, series):
        return Output(self.net(series)[0])


def model_of():
    return WithLogits().eval()


CONTRACT = {
    "method": sal.MCTemporalDropout(alpha=0.4, learn=True, at="model.layers.0", reg=1e-4),
    "model": tiny_llama,
    "bad": {
        "alpha": (1.0, r"alpha must be a rate in \[0, 1\), got 1.0"),
        "alpha:2": (-0.1, r"alpha must be a rate in \[0, 1\), got -0.1"),
        "tau": (0.0, "tau must be > 0 and finite, got 0.0"),
        "samples": (0, "samples must be >= 1, got 0"),
        "reg": (-1.0, "reg must be >= 0 and finite, got -1.0"),
        "rate": (math.nan, "rate must be > 0 and finite, got nan"),
        "fill": (math.inf, "fill must be finite, got inf"),
        "keep_at_least": (-1, "keep_at_least must be >= 0, got -1"),
        "mask_axis": ("space", "mask_axis must be one of time, channel, got 'space'"),
    },
}


def series(batch=6, steps=10, features=3, seed=0):
    return torch.randn(batch, steps, features, generator=torch.Generator().manual_seed(seed))


def test_a_mask_covers_whole_steps_and_leaves_the_rest_bit_for_bit():
    x = series(400, 24)
    layer = sal.TemporalDropout(0.3)
    out = layer(x)
    gone = (out == 0).all(-1)
    assert torch.equal(out[~gone], x[~gone]) and torch.equal((out == 0).any(-1), gone)
    share = float(gone.float().mean())
    assert abs(share - 0.3) < 3 * math.sqrt(0.3 * 0.7 / gone.numel())
    assert not torch.equal(gone[0], gone[1]) and (gone[0] != gone[0, 0]).any(), (
        "it must vary over time and rows"
    )
    assert torch.equal(sal.TemporalDropout(0.0)(x), x)
    assert not torch.equal(layer(x), out), "the second call must draw anew"


def test_concrete_worked_examples_and_limit():
    def one(alpha, u):
        logit = torch.tensor(math.log(alpha / (1 - alpha)), dtype=torch.float64)
        return float(sal.concrete_drop(torch.tensor(u, dtype=torch.float64), logit))

    assert one(0.5, 0.5) == pytest.approx(0.5) and one(0.5, 0.6) == pytest.approx(0.982954, abs=1e-6)
    assert one(0.1, 0.9) == pytest.approx(0.5, abs=1e-6) and one(0.1, 0.95) == pytest.approx(
        0.999432, abs=1e-6
    )
    u = torch.rand(4000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logit = torch.tensor(-1.0, dtype=torch.float64)
    soft = sal.concrete_drop(u, logit, tau=1e-6)
    torch.testing.assert_close(soft, sal.hard_drop(u, logit.sigmoid()), atol=1e-6, rtol=0)
    assert float(sal.concrete_drop(u, logit).mean()) == pytest.approx(float(logit.sigmoid()), abs=0.02)


def test_concrete_gradient_is_that_of_finite_differences_and_finite_at_the_ends():
    u = torch.tensor([0.2, 0.7, 0.9], dtype=torch.float64)
    logit = torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sal.concrete_drop(u, a), (logit,))
    ends = torch.tensor([0.0, 1.0], dtype=torch.float32)
    for start in (-30.0, 0.0, 30.0):
        logit = torch.tensor(start, requires_grad=True)
        sal.concrete_drop(ends, logit).sum().backward()
        assert bool(logit.grad.isfinite())


def test_the_penalty_of_the_rate_is_lowest_at_a_half_and_has_its_gradient():
    logit = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: sal.concrete_penalty(a, weight=0.1, size=7), (logit,))
    values = sal.concrete_penalty(logit.detach(), weight=0.1, size=7)
    assert float(values.min()) == float(values[1]) == pytest.approx(-0.7 * math.log(2))


@pytest.mark.parametrize("learn", [False, True])
def test_all_samples_in_one_batch_equal_a_loop_over_them(learn):
    model = SeriesNet(layer=sal.TemporalDropout(0.3, learn=learn)).eval()
    x, seen = series(), torch.ones(6, 10, dtype=torch.bool)
    seen[:, 8:] = False
    found = [sal.mc_predict(model, x, seen, samples=7, seed=4, at_once=at_once) for at_once in (None, 1, 3)]
    for other in found[1:]:
        for name in ("mean", "total", "aleatoric", "epistemic"):
            torch.testing.assert_close(getattr(other, name), getattr(found[0], name), rtol=1e-5, atol=1e-6)
    assert found[0].mean.shape == (6, 1) and bool((found[0].epistemic > 0).all())
    torch.testing.assert_close(found[0].total, found[0].aleatoric + found[0].epistemic)


def test_sampling_is_the_formula_over_the_masked_inputs():
    layer, x = sal.TemporalDropout(0.3), series()
    model = SeriesNet().eval()
    found = sal.mc_predict(model, x, samples=5, layer=layer, seed=2)
    layer.eval()
    means, spreads = [], []
    with torch.no_grad(), sal.mc_mode(layer):
        layer.hold = True
        layer.sampled.fill_(2)
        for sample in range(5):
            layer.first_row.fill_(sample * len(x))
            mean, spread = model(layer(x))
            means.append(mean.double())
            spreads.append(spread.double().exp())
    means = torch.stack(means)
    torch.testing.assert_close(found.mean.double(), means.mean(0))
    wanted = (means - means.mean(0)).square().sum(0) / 4
    torch.testing.assert_close(found.epistemic.double(), wanted, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.aleatoric.double(), torch.stack(spreads).mean(0))


def test_sampling_changes_nothing_in_the_model_and_draws_anew_each_time():
    model = SeriesNet(layer=sal.TemporalDropout(0.5)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    first, second = (sal.mc_predict(model, series(), samples=4) for _ in range(2))
    assert not torch.equal(first.mean, second.mean)
    again = [sal.mc_predict(model, series(), samples=4, seed=9).mean for _ in range(2)]
    assert torch.equal(*again)
    assert model.training and model.norm.training and torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    model.eval()
    assert torch.equal(model(series())[0], model(series())[0]), "eval mode without sampling drops nothing"
    with sal.mc_mode(model):
        assert not torch.equal(model(series())[0], model(series())[0])


def test_one_sample_has_no_epistemic_variance():
    found = sal.mc_predict(SeriesNet(layer=sal.TemporalDropout(0.5)), series(), samples=1)
    assert torch.equal(found.epistemic, torch.zeros(6, 1)) and bool((found.total > 0).all())


def test_padding_further_and_slicing_leave_a_series_its_masks():
    layer = sal.TemporalDropout(0.4)
    x = series(4, 6)
    seen = torch.ones(4, 6, dtype=torch.bool)
    longer = torch.cat((x, torch.full((4, 3, 3), float("nan"))), 1)
    wide = torch.cat((seen, torch.zeros(4, 3, dtype=torch.bool)), 1)
    a = layer(x, seen)
    layer.calls.zero_()
    b = layer(longer, wide)
    assert torch.equal(b[:, :6], a) and torch.equal(b[:, 6:], torch.zeros(4, 3, 3))
    layer.calls.zero_()
    assert torch.equal(layer(x[:2], seen[:2]), a[:2])


def test_missing_steps_may_hold_nan_and_are_filled_in_eval_mode_too():
    x = series(2, 4)
    seen = torch.tensor([[True, False, True, True], [True, True, True, False]])
    dirty = x.masked_fill(~seen[..., None], float("nan"))
    for layer in (sal.TemporalDropout(0.5, fill=-9.0), sal.TemporalDropout(0.5, learn=True, fill=-9.0)):
        for mode in (True, False):
            out = layer.train(mode)(dirty, seen)
            assert bool(out.isfinite().all()) and bool((out[~seen] == -9.0).all())
        out.sum()
    layer.train()(dirty, seen).sum().backward()
    assert bool(layer.logit.grad.isfinite())


def test_genuine_zeros_stay_and_the_input_is_not_written_to():
    x = torch.zeros(3, 8, 2)
    kept = x.clone()
    out = sal.TemporalDropout(0.5, fill=-9.0)(x)
    assert set(out.unique().tolist()) == {-9.0, 0.0} and torch.equal(x, kept)


def test_some_steps_can_be_made_to_stay():
    x, seen = series(200, 5), torch.zeros(200, 5, dtype=torch.bool)
    seen[:, 2:] = True
    out = sal.TemporalDropout(0.95, keep_at_least=2)(x, seen)
    assert bool(((out != 0).all(-1).sum(1) >= 2).all()) and bool((out[:, :2] == 0).all())


def test_one_step_and_a_single_series_work():
    found = sal.mc_predict(SeriesNet(layer=sal.TemporalDropout(0.5)), series(1, 1), samples=3)
    assert found.mean.shape == (1, 1) and bool(found.total.isfinite())


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: sal.TemporalDropout()(torch.zeros(2, 3)), r"series must be float \[batch, steps, features\]"),
        (lambda: sal.TemporalDropout()(torch.zeros(2, 3, 4, dtype=torch.long)), "series must be float"),
        (
            lambda: sal.TemporalDropout()(torch.zeros(2, 3, 4), torch.ones(2, 4, dtype=torch.bool)),
            r"observed must be bool \[2, 3\]",
        ),
        (lambda: sal.TemporalDropout()(torch.zeros(2, 3, 4), torch.ones(2, 3)), "observed must be bool"),
        (
            lambda: sal.mc_predict(SeriesNet(), torch.zeros(2, 3, 3), torch.zeros(2, 3, dtype=torch.bool)),
            r"observed must be True at one step of every series at least, got 'none in rows \[0, 1\]'",
        ),
        (
            lambda: sal.mc_predict(SeriesNet(layer=sal.TemporalDropout()), series(), samples=0),
            "samples must be >= 1, got 0",
        ),
        (lambda: sal.TemporalDropout(0.0, learn=True), r"alpha must be in \(0, 1\) where it is learnt"),
        (lambda: sal.TemporalDropout(0.2, learn=True, keep_at_least=1), "keep_at_least must be 0 where"),
        (lambda: sal.coverage(torch.zeros(2), torch.ones(2), torch.ones(2), [1.0]), r"level must be in \[0, 1\)"),
        (
            lambda: sal.gaussian_loss(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2)),
            "mean, log_variance and target must be of one shape",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call, text):
    with pytest.raises(ParameterError, match=text):
        call()


def test_a_model_without_the_layer_is_refused_with_what_to_do():
    with pytest.raises(StructureError, match="must hold a TemporalDropout layer, got SeriesNet without"):
        sal.mc_predict(SeriesNet(), series())
    with (
        sal.focus(tiny_llama(), sal.MCTemporalDropout()) as handle,
        pytest.raises(StructureError, match=r"series=\.\.\. must name it, got 0 in input_ids"),
    ):
        handle.target(input_ids=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(StructureError, match="at must be the path of a submodule, got 'nowhere'"):
        sal.focus(tiny_llama(), sal.MCTemporalDropout(at="nowhere"))


def test_the_loop_on_the_page_runs_and_learns():
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "mc_predict" in b)
    space = {}
    exec(compile(block, str(PAGE), "exec"), space)
    assert space["found"].total.shape == space["y"][:8].shape
    assert float(space["loss"].detach()) < 0.5 * float(space["first"]), "the loop must learn"


@pytest.mark.parametrize("learn", [False, True])
def test_compiled_gives_what_eager_gives(learn):
    x, seen = series(), torch.ones(6, 10, dtype=torch.bool)
    seen[0, 5:] = False
    eager, other = (sal.TemporalDropout(0.3, learn=learn) for _ in range(2))
    fast = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(fast(x, seen), eager(x, seen), rtol=1e-5, atol=1e-6)
    assert int(other.calls) == 3


def test_bf16_autocast_keeps_the_masks_and_the_numbers_near():
    model = SeriesNet(layer=sal.TemporalDropout(0.3)).eval()
    exact = sal.mc_predict(model, series(), samples=6, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        near = sal.mc_predict(model, series(), samples=6, seed=0)
    assert near.mean.dtype == near.total.dtype == torch.float32
    torch.testing.assert_close(near.mean, exact.mean, rtol=0, atol=0.02)
    torch.testing.assert_close(near.total, exact.total, rtol=0.03, atol=0.02)
    half = sal.TemporalDropout(0.3)(series().bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(
        (half == 0), (sal.TemporalDropout(0.3)(series()) == 0)
    )


def test_on_a_model_each_call_is_a_sample():
    model, x = model_of(), series()
    with torch.no_grad():
        plain = model(series=x).logits
        with sal.focus(model, sal.MCTemporalDropout(alpha=0.5)) as handle:
            first, second = model(series=x).logits, model(series=x).logits
            assert not torch.equal(first, plain) and not torch.equal(first, second)
            assert handle.spent["mc-temporal-dropout"]["passes"] == 2
        assert torch.equal(model(series=x).logits, plain)


def test_a_model_that_takes_a_mask_is_told_of_the_dropped_steps():
    given = {}

    class Told(nn.Module):
        def forward(self, past_values, past_observed_mask):
            given.update(values=past_values, mask=past_observed_mask)
            return Output(past_values.mean((1, 2)))

    model, x = Told(), series(2, 12)
    mask = torch.ones(2, 12, 3)
    mask[:, 10:] = 0
    with sal.focus(model, sal.MCTemporalDropout(alpha=0.5)):
        model(past_values=x, past_observed_mask=mask)
    gone = (given["values"] == 0).all(-1)
    assert bool(gone[:, 10:].all()) and bool(gone[:, :10].any()) and not bool(gone.all())
    assert torch.equal(given["mask"] == 0, gone[..., None].expand(2, 12, 3)) and bool(
        (mask[:, :10] == 1).all()
    )


def test_a_learnt_rate_moves_on_a_trainer_towards_what_the_loss_asks(tmp_path):
    trainer = tiny_trainer(tmp_path, tiny_llama(), max_steps=8)
    handle = sal.focus(
        trainer, sal.MCTemporalDropout(alpha=0.4, learn=True, rate=0.1, at="model.layers.0", reg=0)
    )
    trainer.train()
    moved = float(handle.scores["mc-temporal-dropout.rate"])
    assert moved != pytest.approx(0.4, abs=1e-3) and 0 < moved < 1
    # with a strong entropy term the rate goes to a half, from either side
    for start in (0.2, 0.8):
        trainer = tiny_trainer(tmp_path, tiny_llama(), max_steps=8)
        method = sal.MCTemporalDropout(alpha=start, learn=True, rate=0.1, at="model.layers.0", reg=1.0)
        handle = sal.focus(trainer, method)
        trainer.train()
        assert abs(float(handle.scores["mc-temporal-dropout.rate"]) - 0.5) < 0.2


def test_learnt_rate_goes_down_where_every_step_is_needed():
    torch.manual_seed(0)
    layer = sal.TemporalDropout(0.5, learn=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    x = series(64, 12)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x).sum((1, 2)) - x.sum((1, 2))).square().mean().backward()
        optimizer.step()
    assert float(layer.alpha.detach()) < 0.1
