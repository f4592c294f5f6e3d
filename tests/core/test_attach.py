"""The record of changes: everything comes off, in reverse, also when something on the way fails."""

import pytest
import torch
from torch import nn

from salience.core.attach import Attachment


class Box:
    name = "class"

    def greet(self):
        return "hello"


def test_attributes_and_functions_come_back():
    box, record = Box(), Attachment()
    record.wrap(box, "greet", lambda original: lambda: original() + "!")
    record.wrap(box, "greet", lambda original: lambda: original() + "?")
    record.set(box, "name", "own")
    record.set(box, "name", "newer")
    assert box.greet() == "hello!?" and box.name == "newer" and len(record) == 4
    record.undo()
    assert box.greet() == "hello" and box.name == "class" and not vars(box)
    record.undo()


def test_modules_hooks_flags_and_values_come_back():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    relu, record = model[1], Attachment()
    record.hook(model[0].register_forward_hook(lambda *a: None))
    record.replace_module(model, "1", nn.GELU())
    record.flags(model.parameters())
    record.values(model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0).requires_grad_(False)
    record.undo()
    assert model[1] is relu and not model[0]._forward_hooks
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_failing_inverse_does_not_stop_the_others():
    box, record = Box(), Attachment()
    record.set(box, "name", "own")
    record.on_undo(lambda: 1 / 0)
    with pytest.raises(ExceptionGroup, match="undo failed in part"):
        record.undo()
    assert box.name == "class"
