"""The linear layer that makes the logits, in transformers models and in any module."""

import pytest
import torch
from conftest import tiny_llama, with_lora
from torch import nn

from salience.core.errors import StructureError
from salience.core.losses import logits_of
from salience.hosts.classifier import find_classifier


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    return ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_labels=3, **sizes))


def roberta():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {"vocab_size": 40, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    return RobertaForSequenceClassification(RobertaConfig(num_hidden_layers=1, num_labels=3, **sizes))


@pytest.mark.parametrize(
    "make, path",
    [(vit, "classifier"), (tiny_llama, "lm_head"), (roberta, "classifier.out_proj")],
    ids=["vit", "llama", "roberta"],
)
def test_in_transformers_models(make, path):
    model = make()
    found, layer = find_classifier(model)
    assert found == path and layer is model.get_submodule(path)


def test_in_any_module_the_last_named_like_one_else_the_last_linear():
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.LayerNorm(2))
    assert find_classifier(plain)[0] == "2"
    named = nn.ModuleDict({"body": nn.Linear(4, 8), "head": nn.Linear(8, 2), "extra": nn.Linear(2, 2)})
    assert find_classifier(named)[0] == "head"
    assert find_classifier(named, "extra")[1] is named["extra"]
    assert find_classifier(torch.compile(plain))[0] == "2"
    with pytest.raises(StructureError, match="classifier must be one of body, head, extra, got 'tail'"):
        find_classifier(named, "tail")
    with pytest.raises(StructureError, match="model must end in a linear layer"):
        find_classifier(nn.Sequential(nn.ReLU()))


def test_under_an_adapter():
    path, layer = find_classifier(with_lora(tiny_llama()))
    assert path.endswith("lm_head") and layer.weight.shape[1] == 32


def test_logits_are_found_or_missed_clearly():
    logits = torch.zeros(2, 3)
    assert logits_of(logits) is logits and logits_of({"logits": logits}) is logits
    with pytest.raises(StructureError, match="model must return logits, got tuple without"):
        logits_of((logits,))
