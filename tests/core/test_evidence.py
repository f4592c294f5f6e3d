"""What autograd keeps for backward is counted once, and parameters are not counted."""

import torch
from torch import nn

from salience.core.evidence import saved_for_backward


def test_weights_of_frozen_layers_cost_nothing():
    layer = nn.Linear(64, 64)
    rows = torch.randn(2, 64, requires_grad=True)
    counts = {}
    for trains in (True, False):
        layer.requires_grad_(trains)
        with saved_for_backward() as kept:
            layer(rows).sum()
        counts[trains] = kept["bytes"]
    # a layer that trains keeps its input; a frozen one needs its weight alone
    assert counts == {True: rows.numel() * 4, False: 0}
