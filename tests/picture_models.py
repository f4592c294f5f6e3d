"""Tiny classifiers of images for tests: students, teachers, and one that also takes the batches of text."""

import torch
from conftest import tiny_trainer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CLASSES = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(samples):
    """Collates: samples of images as they are, and any text sample as an image that depends on its words."""
    rows = []
    for sample in samples:
        if "pixel_values" not in sample:
            draw = seeded(sum(sample["input_ids"]))
            pixels = torch.randn(3, 8, 8, generator=draw)
            sample = {"pixel_values": pixels, "labels": len(sample["labels"]) % CLASSES}
        rows.append(sample)
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def vit(seed=0, classes=CLASSES):
    """A ViT of one layer."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=classes, **SIZES))


def shown_model():
    """A ResNet that also takes the text batches of tests that know no images.

    Not a ViT: transformers renames its weights in checkpoints, and a Trainer that resumes does not rename them back.
    """
    from transformers import ResNetConfig, ResNetForImageClassification

    class Shown(ResNetForImageClassification):
        def forward(self, pixel_values=None, labels=None, input_ids=None, attention_mask=None):
            if input_ids is not None:
                shown = pictures([{"input_ids": row, "labels": row} for row in input_ids.tolist()])
                pixel_values, labels = shown["pixel_values"], None
            return super().forward(pixel_values=pixel_values, labels=labels)

    Shown.__name__ = "ResNetForImageClassification"  # transformers finds the loss by the class's name
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    # a model that is given labels writes the problem into its config; under PLD or CutMix it is not given them
    config = ResNetConfig(num_labels=CLASSES, problem_type="single_label_classification", **sizes)
    return Shown(config).eval()


class FlatTeacher(torch.nn.Module):
    """Images to logits by one matrix; its repr makes it again for the test that evaluates reprs."""

    def __init__(self, classes=CLASSES, seed=5, scale=1.0):
        super().__init__()
        self.linear = torch.nn.Linear(192, classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(scale * 0.2 * torch.randn(parameter.shape, generator=seeded(seed)))
        self.calls = 0
        self.modes = set()

    def forward(self, pixels):
        self.calls += 1
        self.modes.add((self.training, torch.is_grad_enabled(), pixels.dtype))
        return self.linear(pixels.flatten(1))

    def __repr__(self):
        return "__import__('picture_models').TEACHER"


TEACHER = FlatTeacher()


def on_pictures(**given):
    """A Trainer whose batches are images."""
    from transformers import Trainer

    return Trainer(**{**given, "data_collator": pictures})


def images(count=8, seed=0):
    draw = seeded(seed)
    return [
        {"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": i % CLASSES} for i in range(count)
    ]


def picture_trainer(folder, model=None, count=8, **settings):
    return tiny_trainer(folder, model or vit(), images(count), on_pictures, **settings)
