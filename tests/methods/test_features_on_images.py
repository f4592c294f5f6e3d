"""NestedDropout, CoTeaching and ProjectionHead on an image classifier: on a transformers Trainer and in a loop."""

import pytest
import torch

import salience as sal
from salience.hosts.classifier import find_classifier
from salience.sandbox.digits import ResidualMLP, digits

CLASSES = 3


def tiny_vit(seed=0):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config)


def images(count=32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    pixels = 0.3 * torch.randn(count, 1, 8, 8, generator=draw)
    pixels[torch.arange(count), 0, labels] += 2  # the label is the bright row
    return [{"pixel_values": p, "labels": y} for p, y in zip(pixels, labels)]


def trainer_of(model, folder, **settings):
    from transformers import Trainer, TrainingArguments

    arguments = {
        "max_steps": 30,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "remove_unused_columns": False,
        **settings,
    }
    args = TrainingArguments(output_dir=str(folder), **arguments)
    return Trainer(model=model, args=args, train_dataset=images(), eval_dataset=images(seed=1))


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def as_batch(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_nested_dropout_on_a_vit(settings, tmp_path):
    trainer = trainer_of(tiny_vit(), tmp_path, **settings)
    assert find_classifier(trainer.model)[0] == "classifier"
    handle = sal.focus(trainer, sal.NestedDropout(std=8.0))
    trainer.train()
    handle.undo()
    found = losses(trainer)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    with sal.focus(trainer.model, sal.NestedDropout(), data=[as_batch(images(seed=2))]) as cut:
        spent = cut.spent["nested-dropout"]
        handle_accuracy = spent["validation accuracy"]
        with torch.no_grad():
            batch = as_batch(images(seed=2))
            logits = trainer.model.eval()(pixel_values=batch["pixel_values"]).logits
        assert float((logits.argmax(1) == batch["labels"]).float().mean()) == pytest.approx(handle_accuracy)
    assert 1 <= spent["kept"] <= 16 and handle_accuracy >= spent["validation accuracy with all"]


@pytest.mark.parametrize("kind", ["mlp", "linear", "fixed", "none"])
def test_a_projection_head_on_a_vit_separates_the_classes(kind, tmp_path):
    trainer = trainer_of(tiny_vit(), tmp_path)
    handle = sal.focus(trainer, sal.ProjectionHead(kind=kind, kappa=1.2, probe=True))
    trainer.train()
    first, last = (handle.parts[0].histories["contrastive loss"].rows[at] for at in (0, -1))
    assert float(last) < float(first)
    assert trainer.evaluate()["eval_loss"] < 1.09, "the classifier must have learnt on the side"
    names = set(tiny_vit().state_dict())
    assert set(trainer.model.state_dict()) == names


def test_co_teaching_of_two_vits_on_a_trainer(tmp_path):
    pair = sal.CoTeaching(tiny_vit(0), tiny_vit(1), forget_rate=0.25)
    trainer = trainer_of(pair, tmp_path)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-5:]) < 0.8 * sum(found[:5])
    predicted = trainer.predict(images(seed=1))
    assert predicted.predictions.shape == (32, CLASSES)


@pytest.mark.parametrize(
    "method",
    [sal.NestedDropout(std=20.0), sal.ProjectionHead(kind="fixed", kappa=1.1)],
    ids=["nested", "head"],
)
def test_in_a_loop_on_any_module_with_logits(method):
    data = digits(seed=0)
    model = ResidualMLP(2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loop = sal.loop(model, method, optimizer=optimizer, shifted=False)
    loop.begin()
    found = []
    for step in range(60):
        rows = torch.arange(64) + 16 * step
        batch = {"images": data.train_images[rows], "labels": data.train_labels[rows]}
        loop.start_step([batch])
        loss = loop.loss(batch)
        loss.backward()
        loop.finish_step()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    loop.end()
    loop.record.undo()
    assert sum(found[-5:]) < 0.85 * sum(found[:5])
    assert not any(module._forward_pre_hooks for module in model.modules())
