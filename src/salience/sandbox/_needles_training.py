"""The model and the tokenizer of the needles world, and its training: on short texts that stand for long ones.

Two measures make a training text of a few hundred tokens behave like one of many thousands. Positions jump at some
ends of sentences, as if filler had been left out there (PoSE, arXiv:2309.10400), so that rotary embeddings are seen
at all distances. And each far token of filler gets log(n) added to its attention logits, as if it stood there n
times, so that attention must become as sharp as a long text needs. Neither is there after training.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from salience.sandbox._needles_texts import ASKED, CHAIN, NOTE, WORDS, Question, body, hidden

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 32768
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_IDS = {word: place for place, word in enumerate((*_SPECIAL, *WORDS))}
_HEADS, _GROUPS = 4, 2
_CONSTANT = 0  # channel of the embeddings in which all tokens are equal at the start
_REACH = 20_000  # tokens that a text may stand for at most
_ALONE, _SEVERAL = 8, 4  # questions about one note and about several, of each text at most
_NEAR = 32  # tokens behind which filler may stand for more than itself


@dataclass(frozen=True)
class Stage:
    """Steps with batches of `texts` texts of `tokens` tokens, at most `notes` notes in each.

    `stretch` is how many times its own length a text stands for at most.
    """

    steps: int
    texts: int
    tokens: int
    notes: int
    stretch: float


@dataclass(frozen=True)
class Recipe:
    """What is trained and how."""

    stages: tuple[Stage, ...]
    layers: int = 2
    width: int = 64
    inner: int = 128
    head: int = 64
    theta: float = 1e7
    matrix_rate: float = 0.01
    vector_rate: float = 0.004

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def new_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = Tokenizer(models.WordLevel(_IDS, unk_token="<unk>"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[.,?=]"), "isolated")]
    )
    # spaces between words, none before marks
    tokens.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokens.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def new_model(recipe: Recipe, seed: int) -> LlamaForCausalLM:
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {"pad_token_id": _IDS["<pad>"], "bos_token_id": _IDS["<bos>"], "eos_token_id": _IDS["<eos>"]}
    config = LlamaConfig(
        vocab_size=len(_IDS),
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=_HEADS,
        num_key_value_heads=_GROUPS,
        head_dim=recipe.head,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.theta},
        tie_word_embeddings=True,
        initializer_range=recipe.width**-0.5,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would move the states of GPUs as well
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(max_new_tokens=2 * CHAIN + 2, do_sample=False, **special)
    start(model, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def start(
    model: Any,
    generator: torch.Generator,
    *,
    looks: Sequence[tuple[int, int, float]] = ((1, 0, 2.0), (2, 1, 2.0), (5, 0, 1.0)),
    lookers: int = 2,
) -> None:
    """Start near a circuit that looks things up, which from weights by chance did not form within these steps.

    Heads of the first layer look some tokens back, whatever the tokens are: all embeddings share a constant, which
    queries and keys turn into vectors whose product is largest at that distance. They write what they see into two
    spaces of the hidden states: for notes the first is for 1 and 5 back (of a question), the second for 2 back (of a
    note's value). Heads of the second layer compare the first space of queries with the second of keys, in the
    dimensions that rotary embeddings turn slowly, and copy the token that they find. Training is free to change all
    of it.

    Args:
        model (LlamaForCausalLM): of 4 heads in 2 groups; is changed.
        generator (torch.Generator): of what is by chance.
        looks (Sequence): of a head of the first layer: how far back, which space, how strongly it writes.
        lookers (int): heads of the second layer that look things up, 1 or 2.
    """
    config = model.config
    size, width = config.head_dim, config.hidden_size
    half, fast = size // 2, size // 8
    slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, size)])
    turns = config.rope_parameters["rope_theta"] ** (-torch.arange(fast) / half)  # radians for each token

    def basis(of: int) -> Tensor:
        return torch.linalg.qr(torch.randn(of, of, generator=generator)).Q

    embedding = model.model.embed_tokens.weight
    # equal norms, since the constant is divided by them
    embedding /= embedding.norm(dim=1, keepdim=True).clamp(min=1e-3)
    embedding[:, _CONSTANT] = 2 * width**-0.5

    first, second = (layer.self_attn for layer in model.model.layers[:2])
    queries, keys, values, outputs = _by_head(first, size)
    for weight in (queries, keys):
        weight *= 0.1
        weight[:, :fast] = weight[:, half : half + fast] = 0
    strength = 4.7
    keys[:, :fast, _CONSTANT] = strength
    for head, (back, _, _) in enumerate(looks):
        queries[head, :fast, _CONSTANT] = strength * torch.cos(back * turns)
        queries[head, half : half + fast, _CONSTANT] = -strength * torch.sin(back * turns)
    values[1] = values[0]
    values[:, :, _CONSTANT] = 0
    values[:, half:] *= 0.1
    spaces = basis(width)[:, : 2 * half].split(half, dim=1)
    outputs *= 0.1
    # above all else in the hidden states, or what the second layer looks for drowns in it
    for head, (_, space, strength) in enumerate(looks):
        outputs[:, head, :half] = spaces[space] * strength * width**-0.5
    model.model.layers[0].mlp.down_proj.weight.mul_(0.02)

    queries, keys, values, outputs = _by_head(second, size)
    mixed = 1.5 * basis(half)
    keys[0] *= 0.1
    keys[0, slow] = mixed @ spaces[1].T
    queries[:lookers] *= 0.1
    queries[:lookers, slow] = mixed @ spaces[0].T
    copied = basis(width)[:, :size]
    values[0, : copied.shape[1]] = copied.T
    values[0, :, _CONSTANT] = 0
    outputs[:, :lookers, : copied.shape[1]] = copied[:, None] * width**-0.5


def _by_head(attention: Any, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Views of the weights: of queries [4, size, width], keys and values [2, ...], outputs [width, 4, size]."""
    queries, keys, values = (
        linear.weight.unflatten(0, (-1, size))
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return queries, keys, values, attention.o_proj.weight.unflatten(1, (-1, size))


@dataclass(frozen=True)
class Batch:
    """Texts with questions behind each other; every question sees the text and itself, at positions as if alone.

    Attributes:
        ids (Tensor): int64 [B, L].
        positions (Tensor): int64 [B, L].
        bias (Tensor): float [B, 1, L, L], added to attention logits; -inf where nothing may be seen.
        answered (Tensor): int64 [A], columns of `ids` that hold answers, with the end behind each.
    """

    ids: Tensor
    positions: Tensor
    bias: Tensor
    answered: Tensor


def batch(stage: Stage, draw: random.Random, generator: torch.Generator) -> Batch:
    """Texts to train on: numbers of notes and chains by chance, several questions about each text."""
    chains = draw.choice((0, 1, 1, 2))
    alone = draw.randint(1, stage.notes)
    if alone + CHAIN * chains > stage.notes:
        chains = 0 if alone >= ASKED else 1
    rows, fillers = [], []
    for _ in range(stage.texts):
        found = hidden(alone, chains, draw)
        text = body(stage.tokens - 1, found.notes, draw)
        asked = [found.about(alone + CHAIN * chain) for chain in range(chains)]
        asked += [found.about(number) for number in range(min(alone, _ALONE))]
        if alone >= ASKED:
            asked += [found.about_several(draw.sample(range(alone), ASKED)) for _ in range(_SEVERAL)]
        words = ["<bos>", *text.words]
        rows.append(words + [word for one in asked for word in (*one.words, *one.answer, "<eos>")])
        filler = torch.ones(stage.tokens)
        filler[0] = 0
        for start in text.starts:
            filler[1 + start : 1 + start + NOTE] = 0
        fillers.append(filler)
    ids = torch.tensor([[_IDS[word] for word in words] for words in rows])
    # the same in every row
    segments, places, answered = _layout(asked, stage.tokens)
    times = _times(stage, generator)
    bias = times.log()[:, None, None] * F.pad(torch.stack(fillers), (0, len(places)))[:, None]
    seen = ((segments == 0) | (segments == segments[:, None])).tril()
    far = torch.ones_like(seen).tril(-_NEAR - 1)
    bias = (bias * far).masked_fill(~seen, -math.inf)[:, None]
    positions = _jumps(ids[:, : stage.tokens], times, generator)
    positions = torch.cat([positions, positions[:, -1:] + 1 + places], dim=1)
    return Batch(ids, positions, bias, answered)


def _layout(asked: Iterable[Question], tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of the question from 1 for each column, place of each column in its question, columns of answers."""
    segments = [0] * tokens
    places: list[int] = []
    answered: list[int] = []
    for number, question in enumerate(asked, start=1):
        size = len(question.words) + len(question.answer) + 1
        answered += range(len(segments) + len(question.words), len(segments) + size)
        segments += [number] * size
        places += range(size)
    return torch.tensor(segments), torch.tensor(places), torch.tensor(answered)


def _times(stage: Stage, generator: torch.Generator) -> Tensor:
    """How many times its own length each text stands for, [B], evenly by its logarithm."""
    most = max(1.0, min(stage.stretch, _REACH / stage.tokens))
    return torch.exp(torch.rand(stage.texts, generator=generator) * math.log(most))


def _jumps(ids: Tensor, times: Tensor, generator: torch.Generator) -> Tensor:
    """Positions [B, T] that leave out T (times - 1) places, behind some ends of sentences, many behind few."""
    shape = ids.shape
    weight = (ids == _IDS["."]) * (torch.rand(shape, generator=generator) < 0.3)
    share = weight * torch.rand(shape, generator=generator) ** 4
    share = share / share.sum(dim=1, keepdim=True).clamp(min=1e-6)
    behind = F.pad((share * ((times - 1) * shape[1])[:, None]).cumsum(dim=1)[:, :-1], (1, 0))
    return torch.arange(shape[1]) + behind.round().long()


def train(model: Any, recipe: Recipe, seed: int, advance: Callable[[], None]) -> None:
    """Train in place; the loss is on answers alone. Global random states stay as they were."""
    draw, generator = random.Random(f"train {seed}"), torch.Generator().manual_seed(seed)
    matrices = [
        weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name
    ]
    known = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in known]
    vectors = torch.optim.AdamW(others, lr=recipe.vector_rate, betas=(0.9, 0.95), weight_decay=0.01)
    moments = [torch.zeros_like(weight) for weight in matrices]
    stages = [stage for stage in recipe.stages for _ in range(stage.steps)]
    model.train()
    for step, stage in enumerate(stages):
        factor = min(1.0, (step + 1) / 20, (len(stages) - step) / (0.5 * len(stages)))
        vectors.param_groups[0]["lr"] = recipe.vector_rate * factor
        given = batch(stage, draw, generator)
        hidden_states = model.model(
            input_ids=given.ids,
            position_ids=given.positions,
            attention_mask=given.bias,
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden_states[:, given.answered - 1])
        F.cross_entropy(logits.flatten(0, 1), given.ids[:, given.answered].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        turn(matrices, moments, recipe.matrix_rate * factor)
        vectors.step()
        model.zero_grad()
        advance()
    model.eval()


@torch.no_grad()
def turn(matrices: list[Tensor], moments: list[Tensor], rate: float) -> None:
    """A step of Muon in float32; torch.optim.Muon computes in bfloat16, which CPUs may do many times slower."""
    for matrix, moment in zip(matrices, moments):
        gradient = matrix.grad
        assert gradient is not None  # every matrix takes part in every answer
        moment.lerp_(gradient, 0.05)
        update = torch.lerp(gradient, moment, 0.95)
        tall = update.shape[0] > update.shape[1]
        turned = update.T if tall else update
        turned = turned / (turned.norm() + 1e-7)
        for _ in range(4):
            square = turned @ turned.T
            turned = 3.4445 * turned + (-4.7750 * square + 2.0315 * square @ square) @ turned
        turned = turned.T if tall else turned
        scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
        matrix.mul_(1 - 0.01 * rate).add_(turned, alpha=-rate * scale)
