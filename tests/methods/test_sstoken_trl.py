"""SsToken on TRL's SFTTrainer: its own data format, its own collator, and the plain Trainer's loss."""

import pytest
import torch
from conftest import losses_of, tiny_llama, tiny_trainer

import salience as sal

pytestmark = pytest.mark.slow  # importing TRL takes ten seconds
WORDS = ["<pad>", "<eos>", "<unk>", "add", "one", "two", "three", "four", "five", "six", "seven", "is"]
PAIRS = [
    ("add one two", "three"),
    ("add one three", "four"),
    ("add two three", "is five"),
    ("add two four", "six"),
]


def tiny_tokenizer():
    """A tokenizer of whole words, built in place."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def sft_trainer(folder, model, **settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"{prompt} ", "completion": completion} for prompt, completion in PAIRS * 2]
    arguments = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 3,
        "gradient_checkpointing": False,
        **settings,
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def test_trains_on_an_sft_trainer_and_equals_the_plain_trainer(tmp_path):
    trainer = sft_trainer(
        tmp_path / "sft", tiny_llama(vocab=len(WORDS)), train_sampling_strategy="sequential"
    )
    samples = [dict(row) for row in trainer.train_dataset]
    assert set(samples[0]) >= {"input_ids", "labels"}, "TRL prepares prompt and completion itself"
    assert samples[0]["labels"][:3] == [-100] * 3
    method = sal.SsToken(keep=0.5)
    with sal.focus(trainer, method) as handle:
        trainer.train()
        spent = handle.spent["sstoken"]
        assert spent["response tokens"] == 18 and 0 < spent["kept"] < 18
        assert handle.parts[0].heat[0]["prompt"][:3] == [True] * 3
    samples = [{name: row[name] for name in ("input_ids", "labels")} for row in samples]
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    plain = tiny_trainer(tmp_path / "plain", tiny_llama(vocab=len(WORDS)), samples, **settings)
    with sal.focus(plain, method):
        plain.train()
    assert losses_of(trainer) == pytest.approx(losses_of(plain), rel=1e-5)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=0, atol=1e-5)


def test_keeping_all_gives_the_sft_trainers_own_loss(tmp_path):
    losses = []
    for name, methods in (("own", None), ("all", sal.SsToken(keep=1.0))):
        trainer = sft_trainer(tmp_path / name, tiny_llama(vocab=len(WORDS)))
        if methods is not None:
            sal.focus(trainer, methods)
        trainer.train()
        losses.append(losses_of(trainer))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_history_goes_with_the_tokenizer_that_measured_it(tmp_path):
    trainer = sft_trainer(tmp_path, tiny_llama(vocab=len(WORDS)))
    tokenizer = trainer.processing_class
    losses = sal.history_losses(trainer.model, trainer.get_train_dataloader(), tokenizer=tokenizer)
    assert len(losses) == len(PAIRS)  # each sample stands twice in the set
    path = losses.save(tmp_path / "h.safetensors")
    method = sal.SsToken(keep=0.5, history=str(path))
    with sal.focus(trainer, method) as handle:
        trainer.train()
        assert handle.spent["sstoken"]["extra forward passes"] == 0
    tokenizer.add_tokens(["eight"])
    with pytest.raises(ValueError, match="history must be measured with this run's tokenizer"):
        sal.focus(trainer, method)
