"""MCTemporalDropout: measures that a model which covers nothing cannot win, and transformers time series models."""

import math

import pytest
import torch

import salience as sal


def series(batch=6, steps=10, features=3, seed=0):
    return torch.randn(batch, steps, features, generator=torch.Generator().manual_seed(seed))


def test_calibration_punishes_a_model_that_covers_nothing_and_perfect_is_zero():
    levels = [0.1, 0.5, 0.9]
    nothing, everything = torch.zeros(3), torch.ones(3)
    perfect = torch.tensor(levels, dtype=torch.float64)
    assert float(sal.calibration_error(perfect, levels)) == 0
    # the official measure calls covering nothing perfect: the plain one must not
    assert float(sal.calibration_error(nothing, levels, weighting="official")) == 0
    assert float(sal.calibration_error(nothing, levels)) == pytest.approx(0.5)
    assert float(sal.calibration_error(everything, levels)) == pytest.approx(0.5)
    off = torch.tensor([0.1, -0.1, 0.05], dtype=torch.float64)
    up, down = (float(sal.calibration_error(perfect + sign * off, levels)) for sign in (1, -1))
    assert up == pytest.approx(down)
    # and likelihood and coverage of a model with no width at all
    y = torch.randn(200, generator=torch.Generator().manual_seed(0))
    assert float(sal.coverage(torch.zeros(200), torch.zeros(200), y).max()) == 0


def test_coverage_of_a_true_gaussian_is_its_level():
    y = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = [0.0, 0.5, 0.9, 0.95]
    covered = sal.coverage(torch.zeros_like(y), torch.ones_like(y), y, levels)
    torch.testing.assert_close(covered, torch.tensor(levels, dtype=torch.float64), atol=0.01, rtol=0)
    expected = 0.5 * math.log(2 * math.pi) + 0.5 * float(y.square().mean())
    found = float(sal.negative_log_likelihood(torch.zeros_like(y), torch.ones_like(y), y))
    assert found == pytest.approx(expected)


def test_the_loss_trains_the_variance():
    y = 2.0 * torch.randn(500, 1, generator=torch.Generator().manual_seed(0))
    spread = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([spread], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        sal.gaussian_loss(torch.zeros(500, 1), spread.expand(500, 1), y).backward()
        optimizer.step()
    assert float(spread.detach().exp()) == pytest.approx(float(y.square().mean()), rel=0.02)


def patch_tst():
    from transformers import PatchTSTConfig, PatchTSTForRegression

    torch.manual_seed(0)
    config = PatchTSTConfig(
        num_input_channels=3, context_length=12, patch_length=4, patch_stride=4, d_model=8, num_hidden_layers=1,
        num_attention_heads=2, ffn_dim=16, num_targets=1, loss="mse", attention_dropout=0.0, ff_dropout=0.0,
        path_dropout=0.0, positional_dropout=0.0, head_dropout=0.0,
    )  # fmt: skip
    return PatchTSTForRegression(config)


def test_a_transformer_for_time_series_gives_samples(tmp_path):
    model, x = patch_tst().eval(), series(4, 12)
    with torch.no_grad():
        plain = model(past_values=x).regression_outputs
        with sal.focus(model, sal.MCTemporalDropout(alpha=0.5)):
            first, second = (model(past_values=x).regression_outputs for _ in range(2))
            masked = model(past_values=x, past_observed_mask=torch.ones(4, 12, 3, dtype=torch.bool))
    assert not torch.equal(first, second) and not torch.equal(first, plain)
    assert bool(masked.regression_outputs.isfinite().all())


@pytest.mark.parametrize("learn", [False, True])
def test_a_trainer_for_time_series_drops_steps_in_training_only(tmp_path, learn):
    from transformers import Trainer, TrainingArguments

    rows = [{"past_values": x, "target_values": x.mean().reshape(1)} for x in series(16, 12)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=8, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, remove_unused_columns=False, logging_steps=1, label_names=["target_values"],
    )  # fmt: skip
    model = patch_tst()
    model.loss_type = "ForSequenceClassification"  # no labels are shifted
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows)
    plain = trainer.evaluate()["eval_loss"]
    handle = sal.focus(trainer, sal.MCTemporalDropout(alpha=0.5, learn=learn))
    assert trainer.evaluate()["eval_loss"] == plain
    trainer.train()
    spent = handle.spent["mc-temporal-dropout"]
    assert spent["passes"] == 4 and 0.2 < spent["share dropped in the last pass"] < 0.8
    assert (spent["rate"] != 0.5) == learn
