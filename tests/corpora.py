"""Small corpora and a small reader of them, made in place."""

import random

from conftest import tiny_llama


def small_corpus(count, seed=0):
    """Short texts of letters and spaces, of different lengths, the same for the same seed."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        words = ["".join(draw.choices("abcdexyz", k=draw.randint(1, 6))) for _ in range(draw.randint(2, 15))]
        texts.append(" ".join(words))
    return texts


def tiny_tokenizer():
    """One token a letter, with one for the beginning."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {
        token: place
        for place, token in enumerate(["<pad>", "<bos>", "<eos>", *"abcdefghijklmnopqrstuvwxyz ."])
    }
    tokens = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=None))
    tokens.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokens.decoder = decoders.Fuse()
    tokens.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def tiny_reader(seed=0, **settings):
    """A model that was not trained, with its tokenizer."""
    return tiny_llama(seed=seed, **settings).eval(), tiny_tokenizer()
