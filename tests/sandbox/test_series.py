"""The world of series: reproducible, standardised, with as many holes as asked for, and learnable in seconds."""

import pytest
import torch

from salience.core.errors import ParameterError
from salience.sandbox.series import FEATURES, SeriesNet, series


def test_same_arguments_same_series_and_no_global_randomness():
    before = torch.get_rng_state()
    first, second, other = series(seed=3), series(seed=3), series(seed=4)
    SeriesNet(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.train, second.train) and torch.equal(first.test_target, second.test_target)
    assert not torch.equal(first.train, other.train)


def test_shapes_and_standardisation():
    data = series(train=300, test=50, steps=12)
    assert data.train.shape == (300, 12, FEATURES) and data.valid.shape == data.test.shape == (
        50,
        12,
        FEATURES,
    )
    assert data.train_target.shape == (300,) and data.train_observed.dtype == torch.bool
    torch.testing.assert_close(data.train.mean((0, 1)), torch.zeros(3), atol=1e-5, rtol=0)
    assert float(data.train_target.std()) == pytest.approx(1, abs=1e-5)
    assert bool(data.train_observed.all())


@pytest.mark.parametrize("share", [0.2, 0.4, 0.8])
def test_clouds_cover_what_was_asked_in_runs_and_leave_one_step(share):
    data = series(train=2000, test=500, missing=share, missing_test=0.0)
    gone = ~data.train_observed
    assert float(gone.float().mean()) == pytest.approx(share, abs=0.02)
    assert bool(data.test_observed.all()) and bool(data.train_observed.any(1).all())
    assert bool((data.train[gone] == 0).all())
    after = gone[:, 1:][gone[:, :-1]].float().mean()
    assert float(after) > share + 0.2 * (1 - share), "clouds must come in runs"


def test_short_series_are_padded_behind():
    data = series(train=200, test=10, steps=10, shortest=3)
    lengths = data.train_observed.sum(1)
    assert int(lengths.min()) == 3 and int(lengths.max()) == 10
    assert torch.equal(data.train_observed, torch.arange(10) < lengths[:, None])


def test_padding_does_not_change_what_the_network_says():
    data = series(train=8, test=4, steps=10, shortest=4)
    net = SeriesNet().eval()
    longer = torch.cat((data.train, torch.full((8, 5, 3), 7.0)), 1)
    seen = torch.cat((data.train_observed, torch.zeros(8, 5, dtype=torch.bool)), 1)
    for a, b in zip(net(data.train, data.train_observed), net(longer, seen)):
        torch.testing.assert_close(a, b)


def test_the_network_learns_it_in_seconds():
    data = series(train=600, test=300)
    net = SeriesNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    order = torch.Generator().manual_seed(0)
    for _ in range(120):
        rows = torch.randint(600, (64,), generator=order)
        mean, _ = net(data.train[rows])
        optimizer.zero_grad()
        (mean - data.train_target[rows]).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        error = (net(data.test)[0] - data.test_target).square().mean()
    assert float(error) < 0.4, "the mean alone has an error of 1"


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("train", 1, "train must be >= 2, got 1"),
        ("steps", 1, "steps must be >= 2, got 1"),
        ("missing", 0.95, r"missing must be in \[0, 0.9\], got 0.95"),
        ("missing_test", -0.1, r"missing_test must be in \[0, 0.9\], got -0.1"),
        ("shortest", 99, r"shortest must be None or in \[1, 24\], got 99"),
        ("noise", -1.0, "noise must be >= 0"),
        ("seed", -1, "seed must be >= 0"),
    ],
)
def test_bad_values_are_refused(name, value, text):
    with pytest.raises(ParameterError, match=text):
        series(**{name: value})
