"""Numbers that are a function of seed, counters and index: uniform, unrelated, and without any state."""

import pytest
import torch

from salience.core.noise import uniform


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**40 + 3])
@pytest.mark.parametrize("counter", [0, 1, 2**31])
def test_numbers_are_uniform_in_the_open_interval(seed, counter):
    u = uniform(torch.arange(1 << 17), seed=seed, counter=counter).double()
    assert float(u.min()) > 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.004)
    assert float(u.var()) == pytest.approx(1 / 12, rel=0.01)
    cells = torch.histc(u, 64, 0, 1)
    # chi squared with 63 degrees of freedom: 63 +- 11
    assert float(((cells - 2048).square() / 2048).sum()) < 120


def test_neighbouring_seeds_counters_and_indices_are_unrelated():
    index = torch.arange(1 << 16)
    rows = [
        uniform(index, seed=0), uniform(index, seed=1), uniform(index, seed=0, counter=1),
        uniform(index, seed=0, counter=(0, 1)), uniform(index, seed=0, counter=(1, 0)), uniform(index + 1, seed=0),
        uniform(index, seed=1 << 32),
    ]  # fmt: skip
    related = torch.corrcoef(torch.stack(rows).double()) - torch.eye(len(rows))
    assert float(related.abs().max()) < 0.02
    first = torch.stack([uniform(torch.tensor(0), seed=0, counter=step) for step in range(2000)]).double()
    assert float(torch.corrcoef(torch.stack((first[1:], first[:-1])))[0, 1]) == pytest.approx(0, abs=0.08)
    assert float(first.mean()) == pytest.approx(0.5, abs=0.03)


def test_slices_and_broadcast_counters_give_the_same_numbers():
    index = torch.arange(50)
    whole = uniform(index, seed=3, counter=(7, torch.arange(4).unsqueeze(1)))
    assert whole.shape == (4, 50)
    assert torch.equal(whole[2, 10:20], uniform(index[10:20], seed=3, counter=(7, 2)))
    assert torch.equal(
        whole[1:3], uniform(index, seed=3, counter=(torch.tensor(7), torch.tensor([[1], [2]])))
    )


def test_no_global_state_moves_and_compiled_numbers_are_the_same():
    before = torch.get_rng_state()
    eager = uniform(torch.arange(64), seed=5, counter=torch.tensor(9))
    assert torch.equal(torch.get_rng_state(), before)
    fast = torch.compile(lambda i, c: uniform(i, seed=5, counter=c), backend="aot_eager", fullgraph=True)
    assert torch.equal(fast(torch.arange(64), torch.tensor(9)), eager)
