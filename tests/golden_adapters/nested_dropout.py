"""The law of the prefixes, selection and exchange of the second stage, and the choice of K."""

import torch
from torch import nn

import salience as sal

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}
SKIPS = {
    "dist_params", "f1.weight", "f1.bias", "f2.weight", "f2.bias", "c1.weight", "c2.weight", "x", "y", "select_k0",
    "train_k0", "val_x", "val_y",
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, tensors, number, std):
        super().__init__()
        width, inputs = tensors[f"f{number}.weight"].shape
        self.features = nn.Sequential(nn.Linear(inputs, width), nn.Tanh())
        self.mask = sal.NestedMask(width, std=std)
        self.classifier = nn.Linear(width, tensors[f"c{number}.weight"].shape[1], bias=False)
        with torch.no_grad():
            self.features[0].weight.copy_(tensors[f"f{number}.weight"])
            self.features[0].bias.copy_(tensors[f"f{number}.bias"])
            self.classifier.weight.copy_(tensors[f"c{number}.weight"].T)

    def forward(self, x):
        return self.classifier(self.mask(self.features(x)))


def run(tensors, parameters):
    p = parameters["parameters"]
    nets = [Net(tensors, number, p["std"]) for number in (1, 2)]
    pair = sal.CoTeaching(*nets, forget_rate=p["forget_rate"]).eval()
    for net in nets:
        net.mask.limit(int(tensors["select_k0"]) + 1)
        net.mask.fixed = int(tensors["train_k0"]) + 1
    x, y = tensors["x"], tensors["y"]
    half = len(x) // 2
    with torch.no_grad():
        first, second = nets[0](x[:half]), nets[1](x[half : 2 * half])
    loss = pair.train()(x=x, labels=y)["loss"]
    loss.backward()
    second_rows, first_rows = pair.picked
    each = [nn.functional.cross_entropy(net(x[rows]), y[rows]) for net, rows in zip(nets, pair.picked)]
    accuracy = sal.accuracy_of_prefixes(nets, [{"x": tensors["val_x"], "labels": tensors["val_y"]}])
    best = sal.choose_prefix(accuracy, one_means_all=True)
    return {
        "dist": sal.prefix_law(p["K"], p["std"], mu=p["mu"]),
        "sel_logits1": first,
        "sel_logits2": second,
        "idx1": first_rows,
        "idx2": second_rows - half,
        "n_remember": torch.tensor(sal.remembered(half, p["forget_rate"])),
        "loss1": each[0].detach(),
        "loss2": each[1].detach(),
        "grad_c1": nets[0].classifier.weight.grad.T,
        "grad_f1": nets[0].features[0].weight.grad,
        "val_acc_per_k": accuracy,
        "val_best_k0": torch.tensor(best - 1),
        "val_best_acc_penalised": sal.penalized(accuracy).max().float(),
    }
