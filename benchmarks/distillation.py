"""What a step of PLD and of DHKD costs beside a step of plain KD, at 1,000 classes.

A small vision transformer (transformers' ViT, 64 x 64 images in patches of 8, width 192, 6 layers) with random
weights is the student; the teacher's logits are given, so that only what the methods differ in is compared: forward,
loss, backward and optimizer step. Arms take turns within a round, and the ratio is taken within the round, so that
other programs on the machine hit all of them. Each loss is also timed alone, forward and backward, and PLD's sort.

    python benchmarks/distillation.py [--rounds 7] [--batch 64] [--classes 1000] [--device cpu] [--out FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import salience as sal
from salience.claims._distillation import knowledge_distillation
from salience.core.evidence import about
from salience.methods.classes.dhkd import aligned_backward
from salience.methods.classes.pld import teacher_order

ARMS = ("CE", "KD", "PLD", "PLD, top 64", "DHKD", "DHKD, aligned")


class Student(torch.nn.Module):
    """ViT features and a classifier, or two."""

    def __init__(self, classes, dual):
        from transformers import ViTConfig, ViTModel

        super().__init__()
        torch.manual_seed(0)
        sizes = {
            "hidden_size": 192,
            "intermediate_size": 768,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
        }
        self.backbone = ViTModel(ViTConfig(image_size=64, patch_size=8, **sizes), add_pooling_layer=False)
        head = torch.nn.Linear(192, classes)
        self.head = sal.DualHead(head) if dual else head

    def forward(self, images):
        return self.head(self.backbone(pixel_values=images).last_hidden_state[:, 0])


def step_of(arm, classes, device):
    """A function of one batch that makes one optimizer step."""
    student = Student(classes, arm.startswith("DHKD")).to(device).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    losses = {
        "CE": lambda s, t, y: F.cross_entropy(s, y),
        "KD": knowledge_distillation(4.0),
        "PLD": sal.PlackettLuceLoss(),
        "PLD, top 64": sal.PlackettLuceLoss(top_m=64),
    }
    logit_loss = sal.BinaryKLLoss()

    def step(images, logits, labels):
        if arm in losses:
            losses[arm](student(images), logits, labels).backward()
        else:
            main, auxiliary = student(images)
            first, second = F.cross_entropy(main, labels), logit_loss(auxiliary, logits)
            if arm == "DHKD":
                (first + second).backward()
            else:
                aligned_backward(first, second, student.parameters())
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(work, device):
    """Of one call: the process's own time on a CPU, wall time on a GPU."""
    if device != "cpu":
        torch.cuda.synchronize()
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - started


def pieces(logits, labels, device, rounds):
    """Milliseconds of each loss by itself, forward and backward, and of PLD's sort."""
    student = torch.randn_like(logits).requires_grad_()
    kd, pld, top = knowledge_distillation(4.0), sal.PlackettLuceLoss(), sal.PlackettLuceLoss(top_m=64)
    norm = sal.BinaryKLLoss()
    works = {
        "KD": lambda: kd(student, logits, labels).backward(),
        "PLD": lambda: pld(student, logits, labels).backward(),
        "PLD, top 64": lambda: top(student, logits, labels).backward(),
        "DHKD's logit loss": lambda: norm(student, logits).backward(),
        "PLD's sort": lambda: teacher_order(logits, labels),
    }
    found = {}
    for name, work in works.items():
        work()
        found[name] = 1e3 * statistics.median(seconds(work, device) for _ in range(3 * rounds))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(args.batch, 3, 64, 64, generator=draw).to(args.device)
    logits = (3 * torch.randn(args.batch, args.classes, generator=draw)).to(args.device)
    labels = torch.randint(0, args.classes, (args.batch,), generator=draw).to(args.device)
    steps = {arm: step_of(arm, args.classes, args.device) for arm in ARMS}
    for step in steps.values():
        step(images, logits, labels)
    rounds = [
        {arm: seconds(lambda s=step: s(images, logits, labels), args.device) for arm, step in steps.items()}
        for _ in range(args.rounds)
    ]
    alone = pieces(logits, labels, args.device, args.rounds)
    forward_of = Student(args.classes, False).to(args.device)
    with torch.no_grad():
        forward = [seconds(lambda: forward_of(images), args.device) for _ in range(args.rounds)]
    rows = {}
    for arm in ARMS:
        ratio = statistics.median(one[arm] / one["KD"] for one in rounds)
        rows[arm] = {"ms": 1e3 * statistics.median(one[arm] for one in rounds), "ratio to KD": ratio}
        print(f"{arm:16s} {rows[arm]['ms']:9.1f} ms a step   {ratio:6.3f} x KD")
    alone["the student's forward pass"] = 1e3 * statistics.median(forward)
    print("alone, in ms: " + ", ".join(f"{name} {value:.2f}" for name, value in alone.items()))
    if args.out:
        command = f"python benchmarks/distillation.py --rounds {args.rounds} --batch {args.batch} "
        command += f"--classes {args.classes} --device {args.device} --out {args.out}"
        content = {
            "command": command,
            "about": about(args.device),
            "steps": rows,
            "alone ms": alone,
            "rounds": rounds,
        }
        args.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
