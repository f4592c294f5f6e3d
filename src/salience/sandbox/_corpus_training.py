"""The model of the corpus world and its training: a plain causal loss on documents, from a start near copying."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from salience.core.losses import IGNORE
from salience.sandbox._needles_training import start, turn

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from salience.sandbox.corpus import Recipe


def new_model(recipe: Recipe, tokenizer: Any, positions: int, seed: int) -> LlamaForCausalLM:
    """A Llama of two layers whose second compares the newest token with what stood in front of earlier ones."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", "rope_theta": 1e7},
        tie_word_embeddings=True,
        initializer_range=recipe.width**-0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would move the states of GPUs as well
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # token i asks for what followed the last occurrence of token i
    start(model, torch.Generator().manual_seed(seed), looks=((0, 0, 2.0), (1, 1, 2.0)), lookers=1)
    return model


def train(
    model: Any,
    rows: Sequence[Sequence[int]],
    recipe: Recipe,
    seed: int,
    advance: Callable[[], None] = lambda: None,
) -> list[float]:
    """Train in place on documents drawn by chance, each cut to so many tokens.

    Args:
        model (Any): is changed.
        rows (Sequence): tokens of each document.
        recipe (Recipe): steps, rows of a step, tokens of a row, rates.
        seed (int): of the order.
        advance (Callable): called after every step.

    Returns:
        list[float]: loss of every step. Global random states stay as they were.
    """
    draw = random.Random(f"train {seed}")
    matrices = [
        weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name
    ]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    vectors = torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.01)
    moments = [torch.zeros_like(weight) for weight in matrices]
    losses = []
    model.train()
    for step in range(recipe.steps):
        factor = min(1.0, (step + 1) / 20, (recipe.steps - step) / (0.4 * recipe.steps))
        vectors.param_groups[0]["lr"] = recipe.vector_rate * factor
        ids, labels = _padded([draw.choice(rows)[: recipe.tokens] for _ in range(recipe.rows)])
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        turn(matrices, moments, recipe.matrix_rate * factor)
        vectors.step()
        model.zero_grad()
        losses.append(float(loss.detach()))
        advance()
    model.eval()
    return losses


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), IGNORE)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = labels[place, : len(row)] = torch.tensor(row)
    return ids, labels
