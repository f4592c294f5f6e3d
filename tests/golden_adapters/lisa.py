"""Repeats the official LISA run: the recorded active sets, torch's AdamW, and each policy for optimizer state."""

import torch
from torch import nn

import salience as sal


class Layer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*weight.shape, bias=False, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden))


class Stack(nn.Module):
    """h = E x; h <- h + tanh(W_l h); out = H h; loss = mean((out - y)^2)."""

    def __init__(self, weights):
        super().__init__()
        self.embed, self.head = (Layer(weight).linear for weight in (weights[0], weights[-1]))
        self.blocks = nn.ModuleList(Layer(weight) for weight in weights[1:-1])

    def forward(self, inputs, labels):
        hidden = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        out = self.head(hidden)
        return {"loss": (out - labels).square().mean(), "logits": out}


def run(tensors, parameters):
    p = parameters["parameters"]
    out = {}
    for policy in ("keep", "drop", "reset"):
        model = Stack(tensors["init"])
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=p["lr"],
            betas=tuple(p["betas"]),
            eps=p["eps"],
            weight_decay=p["weight_decay"],
        )
        method = sal.LISA(
            active_layers=p["active_layers_gamma"], interval=p["sampling_period_K"], state=policy
        )
        loop = sal.loop(model, method, optimizer=optimizer, shifted=False)
        loop.parts[0].force(tensors["active"].tolist())
        loop.begin()
        losses = []
        for inputs, labels in zip(tensors["X"], tensors["Y"]):
            batch = {"inputs": inputs, "labels": labels}
            loop.start_step([batch])
            loss = loop.loss(batch)
            loss.backward()
            loop.finish_step()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        out[f"losses_{policy}"] = torch.stack(losses)
        blocks = [block.linear.weight for block in model.blocks]
        out[f"final_{policy}"] = torch.stack([model.embed.weight, *blocks, model.head.weight]).detach()
    return out


SKIPS = {"init", "X", "Y", "active"}
TOLERANCE = {"rtol": 0, "atol": 1e-9}
