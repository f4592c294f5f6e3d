"""Fixtures that many tests share: tiny models made from config classes, no downloads, no network."""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _no_global_random_state():
    """A test that moves torch's global random state must not change the next one."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


def tiny_llama(layers=2, vocab=64, hidden=32, seed=0, **settings):
    """A Llama of a few thousand parameters, in float32, with dropout off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        **settings,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2(layers=2, vocab=64, seed=0):
    """A GPT-2 in float64 with dropout off: unlike Llama's norms, its layer norms really compute in float64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab,
        n_embd=32,
        n_layer=layers,
        n_head=4,
        n_positions=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).double()


def tiny_llava(layers=6, seed=0, attn="sdpa", **text):
    """A LLaVA of 16 image tokens an image (id 63) on a Llama with grouped heads, in eval mode."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    vision = CLIPVisionConfig(image_size=16, patch_size=4, num_hidden_layers=3, projection_dim=32, **sizes)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **text}
    decoder = LlamaConfig(
        vocab_size=64,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        max_position_embeddings=256,
        **sizes,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=decoder, image_token_id=63, attn_implementation=attn
    )
    return LlavaForConditionalGeneration(config).eval()


def llava_batch(images=(1, 2, 0), seed=0, side="left", labels=False):
    """Prompts of different lengths with so many images each, for `tiny_llava`; text, images, then a question."""
    draw = torch.Generator().manual_seed(seed)
    samples = []
    for number, count in enumerate(images):
        words = torch.randint(3, 60, (6 + number,), generator=draw).tolist()
        ids = [1, words[0]] + [63] * (16 * count) + words[1:]
        samples.append({"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]})
    batch = collate(samples, side=side)
    if not labels:
        del batch["labels"]
    if sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, 16, 16, generator=draw)
    return batch


def with_lora(model, r=4, dropout=0.0, targets=("q_proj", "v_proj", "up_proj", "down_proj"), **settings):
    """The model under a LoRA adapter whose B matrices are not zero, so that every gradient is."""
    from peft import LoraConfig, get_peft_model

    settings.setdefault("lora_alpha", r)
    wrapped = get_peft_model(
        model, LoraConfig(r=r, lora_dropout=dropout, target_modules=list(targets), **settings)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def ragged_samples(count=8, vocab=64, longest=12, seed=0):
    """Samples of different lengths: prompt masked with -100, then a response; as lists."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        length = int(torch.randint(5, longest + 1, (1,), generator=generator))
        prompt = int(torch.randint(1, length - 2, (1,), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        samples.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return samples


def collate(samples, pad=0, side="right"):
    """Pads ragged samples to one batch of tensors."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = {"input_ids": [], "attention_mask": [], "labels": []}
    for sample in samples:
        ids, labels = list(sample["input_ids"]), list(sample["labels"])
        gap = longest - len(ids)
        for name, row, filler in (
            ("input_ids", ids, pad),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", labels, -100),
        ):
            rows[name].append(row + [filler] * gap if side == "right" else [filler] * gap + row)
    return {name: torch.tensor(row) for name, row in rows.items()}


class Listed(torch.utils.data.Dataset):
    """A map-style dataset over a list of samples."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def tiny_trainer(folder, model=None, samples=None, cls=None, callbacks=None, **settings):
    """A transformers Trainer on the CPU that writes nothing but what a test asks for."""
    from transformers import Trainer, TrainingArguments

    arguments = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "remove_unused_columns": False,
        **settings,
    }
    return (cls or Trainer)(
        model=model if model is not None else tiny_llama(),
        args=TrainingArguments(**arguments),
        train_dataset=Listed(samples or ragged_samples(8)),
        data_collator=collate,
        callbacks=callbacks,
    )


def losses_of(trainer):
    """The logged training losses."""
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


WORDS = "the a cat dog sits runs on under mat tree and then it was big small ? . 0 1 2 3".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A folder that from_pretrained loads: a tiny Llama and a word tokenizer made in place."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "Question", "Answer"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    tiny_llama(layers=2, vocab=64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def seeing_checkpoint(tmp_path_factory):
    """A folder with a tiny LLaVA of 16 image tokens an image, its word tokenizer and its processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS, "Question", "Answer"]
    words += [f"word{number}" for number in range(len(words), 63)] + ["<image>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    folder = tmp_path_factory.mktemp("seeing") / "tiny-llava"
    tiny_llava(layers=6).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def picture(tmp_path):
    """A PNG file of 40 x 30 pixels."""
    from PIL import Image

    draw = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (30, 40, 3), generator=draw, dtype=torch.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels.numpy()).save(path)
    return path


@pytest.fixture
def rows(tmp_path):
    """Forty prompts with completions as a .jsonl file."""
    generator = torch.Generator().manual_seed(1)
    lines = []
    for _ in range(40):
        picked = [WORDS[i] for i in torch.randint(0, len(WORDS), (8,), generator=generator).tolist()]
        lines.append(json.dumps({"prompt": " ".join(picked[:4]), "completion": " " + " ".join(picked[4:])}))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run `salience ...`: gives exit code, standard output and standard error."""
    from salience.cli import main

    monkeypatch.setenv("SALIENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["salience", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
