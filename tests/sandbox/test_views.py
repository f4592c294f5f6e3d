"""Digits with wrong labels, and digits seen twice: what they promise."""

import pytest
import torch

from salience.core.errors import ParameterError
from salience.sandbox.views import coarse_digits, noisy_digits, two_views


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.4])
def test_the_asked_share_of_training_labels_is_wrong_and_no_other(noise):
    data = noisy_digits(noise=noise, seed=1)
    assert int(data.wrong.sum()) == round(1000 * noise)
    assert data.train_images.shape == (1000, 64) and data.valid_labels.shape == (200,)
    assert data.test_images.shape == (597, 64)
    assert set(data.train_labels.tolist()) == set(range(10))
    again = noisy_digits(noise=noise, seed=1)
    assert torch.equal(again.train_labels, data.train_labels)
    assert torch.equal(noisy_digits(noise=0.0, seed=1).train_labels, data.clean_labels)


def test_no_image_is_in_two_parts():
    data, other = noisy_digits(seed=2), coarse_digits(seed=2)
    for parts in (
        (data.train_images, data.valid_images, data.test_images),
        (other.train_images, other.probe_images, other.test_images),
    ):
        assert len(torch.cat(parts)) == 1797
        assert len(torch.cat(parts).unique(dim=0)) == 1797


def test_coarse_labels_say_whether_a_digit_is_five_or_more():
    data = coarse_digits(seed=0)
    assert set(data.coarse_labels.tolist()) == {0, 1} and set(data.probe_labels.tolist()) == set(range(10))
    from salience.sandbox.digits import digits

    assert torch.equal(data.coarse_labels, (digits(seed=0).train_labels[400:] >= 5).long())


def test_views_move_an_image_by_up_to_a_pixel():
    image = torch.zeros(200, 64)
    image[:, 3 * 8 + 4] = 1.0
    random = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    views = two_views(image, random, noise=0.0)
    assert torch.equal(torch.get_rng_state(), before)
    places = views.argmax(1)
    assert views.shape == (400, 64) and bool((views.sum(1) == 1).all())
    rows, columns = places // 8, places % 8
    assert set(rows.tolist()) == {2, 3, 4} and set(columns.tolist()) == {3, 4, 5}
    assert not torch.equal(places[:200], places[200:])
    edge = torch.zeros(50, 64)
    edge[:, 0] = 1
    assert bool((two_views(edge, random, noise=0.0).sum(1) <= 1).all()), (
        "nothing comes in from the other side"
    )


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: noisy_digits(noise=1.0), r"noise must be in \[0, 1\), got 1.0"),
        (lambda: coarse_digits(seed=-1), "seed must be >= 0, got -1"),
        (lambda: two_views(torch.zeros(2, 9), torch.Generator()), r"images must be \[B, 64\], got \[2, 9\]"),
        (lambda: two_views(torch.zeros(2, 64), torch.Generator(), noise=-1.0), "noise must be >= 0"),
    ],
)
def test_bad_values_are_refused(call, text):
    with pytest.raises(ParameterError, match=text):
        call()
