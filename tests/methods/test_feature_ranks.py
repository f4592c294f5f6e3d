"""Two processes under DDP give what one process gives for the parts on features and steps."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "core"))


@pytest.mark.slow
def test_two_ranks_give_the_gradient_of_one_process(tmp_path):
    from test_distributed import launch

    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    launch("features.py", one)
    launch("features.py", two, ranks=2)
    whole, ranks = load_file(one), load_file(two)
    assert whole.keys() == ranks.keys()
    # co-teaching selects in the half batches of each rank: another selection, compared below
    for name in sorted(key for key in whole if not key.startswith("pair.")):
        torch.testing.assert_close(
            ranks[name], whole[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    from torch import nn

    import salience as sal

    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 6, generator=draw), torch.randint(3, (8,), generator=draw)
    torch.manual_seed(3)
    pair = sal.CoTeaching(nn.Linear(6, 3), nn.Linear(6, 3), forget_rate=0.5).train()
    for rows in (slice(4), slice(4, 8)):
        (pair(input=x[rows], labels=y[rows])["loss"] / 2).backward()
    for name, parameter in pair.named_parameters():
        torch.testing.assert_close(ranks[f"pair.{name}"], parameter.grad, rtol=1e-5, atol=1e-6)
