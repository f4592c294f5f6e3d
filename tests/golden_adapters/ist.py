"""Feeds the golden inputs of the official IST callback to salience's own functions, on a stub with PEFT adapters."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import salience as sal
from salience.hosts.transformers import adapter_layers
from salience.methods.layers.ist import probe_sets, suppress_weights, train_weights, updated_scores


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


class Stub(nn.Module):
    """h <- h + tanh(W h + s B A h) with s from the adapter; loss = mean((h - y)^2)."""

    def __init__(self, blocks, width):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, inputs, labels):
        for block in self.blocks:
            inputs = block(inputs)
        return {"loss": (inputs - labels).square().mean(), "logits": inputs}


def stub(tensors, p):
    model = Stub(p["num_layers"], p["d"])
    config = LoraConfig(r=p["rank"], lora_alpha=p["raw_scaling"] * p["rank"], target_modules=["linear"])
    inject_adapter_in_model(config, model)
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            block.linear.base_layer.weight.copy_(tensors["base"][index])
            block.linear.lora_A["default"].weight.copy_(tensors["lora_A"][index])
            block.linear.lora_B["default"].weight.copy_(tensors["lora_B"][index])
    return model


def run(tensors, parameters):
    p = parameters["parameters"]
    model = stub(tensors, p)
    batch = {"inputs": tensors["x"], "labels": tensors["y"]}
    method = sal.IST(
        active_layers=p["n_update"], suppressed_layers=p["n_suppress"], candidates=p["num_candidates"]
    )
    loop = sal.loop(model, method, data=[batch], shifted=False)
    adapters = adapter_layers(model)
    losses, after = [], []
    for score, sets in zip(tensors["score_before"], tensors["suppressed"]):
        losses.append(probe_sets(loop, adapters, sets, batch, suppression=p["suppression"]))
        after.append(updated_scores(score, sets, losses[-1], score_lr=p["score_lr"]))
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "score_after": torch.stack(after),
        "p_suppress": suppress_weights(tensors["score_before"]),
        "p_update": train_weights(torch.stack(after)),
    }


SKIPS = {"x", "y", "base", "lora_A", "lora_B", "score_before", "suppressed", "active"}
TOLERANCE = {"rtol": 0, "atol": 1e-6}
