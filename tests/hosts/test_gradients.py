"""Gradients of single samples: one backward pass over a batch gives what one pass a sample gives."""

import pytest
import torch
from conftest import collate, llava_batch, ragged_samples, tiny_gpt2, tiny_llama, tiny_llava, with_lora

from salience.core.errors import ParameterError
from salience.hosts.gradients import LayerGradients, RandomSigns, unit_rows


def tiny_mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        )
    )  # fmt: skip


def single(batch, row):
    length = int(batch["attention_mask"][row].sum())
    return {name: value[row : row + 1, :length] for name, value in batch.items()}


MODELS = {
    "llama": tiny_llama,
    "lora": lambda: with_lora(tiny_llama()),
    "conv1d": tiny_gpt2,
    "mixture": tiny_mixture,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_gives_the_gradient_of_each_sample_alone(name):
    model = MODELS[name]()
    take, batch = LayerGradients(model), collate(ragged_samples(4))
    found = take(batch)
    assert found.gradients.shape == (4, take.parameters) and found.losses.shape == (4,)
    for row in range(4):
        alone = single(batch, row)
        loss = model(**alone).loss
        # the layer's matrices by autograd, as a user would take them
        layer = model.get_submodule(take.path)
        chosen = [p for n, p in layer.named_parameters() if p.dim() > 1 and ("lora_" in n or name != "lora")]
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, chosen)]).float()
        torch.testing.assert_close(found.losses[row].float(), loss.detach().float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            found.gradients[row].sort().values, expected.sort().values, rtol=1e-4, atol=1e-6
        )


def test_of_an_adapter_only_the_adapter_counts_and_the_model_is_left_as_it_was():
    model = with_lora(tiny_llama()).train()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    take = LayerGradients(model, 0)
    layer = model.get_submodule(take.path)
    assert take.parameters == sum(p.numel() for n, p in layer.named_parameters() if "lora_" in n)
    take(collate(ragged_samples(2)))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_that_sees_and_a_sample_with_nothing_to_learn():
    model = tiny_llava()
    batch = llava_batch((1, 0), side="right", labels=True)
    batch["labels"][1] = -100
    found = LayerGradients(model)(batch)
    assert found.gradients[0].norm() > 0 and found.gradients[1].norm() == 0 and found.losses[1] == 0
    alone = LayerGradients(tiny_llama())(
        {
            name: value[:1] * 0 + (-100 if name == "labels" else 1)
            for name, value in collate(ragged_samples(1)).items()
        }
    )
    assert not alone.gradients.any()


@pytest.mark.parametrize("layer", [2, -3, "last"])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(ParameterError, match="layer must be one of the 2 layers"):
        LayerGradients(tiny_llama(), layer)


def test_signs_keep_angles_are_seeded_and_do_not_depend_on_the_batch():
    rows = torch.randn(6, 9000, generator=torch.Generator().manual_seed(0))
    rows[1] = rows[0] + 0.5 * rows[1]
    state = torch.get_rng_state()
    project = RandomSigns(2048, seed=3)
    found = project(rows)
    assert torch.equal(torch.get_rng_state(), state)
    cosines = [unit_rows(x) @ unit_rows(x).T for x in (rows, found)]
    assert (cosines[0] - cosines[1]).abs().max() < 0.1
    assert found.norm(dim=1) / rows.norm(dim=1) == pytest.approx(torch.ones(6), abs=0.1)
    torch.testing.assert_close(RandomSigns(2048, seed=3)(rows[2:4]), found[2:4])
    assert not torch.allclose(RandomSigns(2048, seed=4)(rows), found)


def test_blocks_that_are_not_kept_are_made_again_alike(monkeypatch):
    rows = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    expected = RandomSigns(64)(rows)
    monkeypatch.setattr("salience.hosts.gradients._KEPT_BYTES", 0)
    project = RandomSigns(64)
    assert torch.equal(project(rows), expected) and torch.equal(project(rows), expected) and not project._kept


def test_rows_that_are_not_finite_become_zero():
    rows = torch.tensor([[3.0, 4.0], [torch.nan, 1.0], [torch.inf, 0.0], [0.0, 0.0]])
    assert unit_rows(rows).tolist() == [pytest.approx([0.6, 0.8]), [0, 0], [0, 0], [0, 0]]
