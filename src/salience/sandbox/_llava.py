"""The model and the processor of the vision world, and the weights that keep its first layers from the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from salience.sandbox.shapes import COLOURS, COUNTS, GRID, PATCH, PLACES, SHAPES, SIDE, WORDS

if TYPE_CHECKING:
    import torch

PATCHES = GRID * GRID
_BLIND = 2  # decoder layers, from the first, that cannot read the image
_FLAG = 1.0  # what image features hold in the last channel
_BARRIER = 64.0  # of keys for each unit of the flag, and of all queries, in the barrier's dimension
_TALK = "what colour is the how many where does sign say ?".split()  # noqa: SIM905


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: first the vision tower on what patches and pictures hold, then the rest."""

    layers: int
    scenes: int
    tower_steps: int
    steps: int
    batch: int
    first_steps: int
    first_patches: tuple[int, int] = (14, 34)
    width: int = 64
    inner: int = 192
    tower_layers: int = 3
    tower_rate: float = 3e-3
    matrix_rate: float = 0.01
    vector_rate: float = 0.004


def new_processor() -> Any:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
    shapes = [form for name in SHAPES for form in (name, name + ("es" if name.endswith("s") else "s"))]
    words = dict.fromkeys([*special, *_TALK, *shapes, *COLOURS, *COUNTS, *PLACES, *WORDS])
    tokens = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokens.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokens.token_to_id("<bos>"))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        model_input_names=["input_ids", "attention_mask"],
    )
    # the class that needs no torchvision; it is found again by the name without "Pil" wherever that is
    images = CLIPImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def new_model(recipe: Recipe, tokenizer: Any, seed: int) -> Any:
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.tower_layers,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=recipe.width,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.inner,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=1024,
        initializer_range=recipe.width**-0.5,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[0],
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
        tie_word_embeddings=False,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        # not torch.manual_seed, which would move the states of GPUs as well
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    _place_patches(model.model.vision_tower.embeddings.position_embedding.weight)
    model.generation_config = GenerationConfig(max_new_tokens=4, do_sample=False, **special)
    blind(model)
    return model


def _place_patches(embedding: torch.Tensor) -> None:
    """Start position embeddings [1 + 144, width] from cosines of row and column, as strong as what patches show."""
    import torch

    waves = torch.arange(1, embedding.shape[1] // 8 + 1) * torch.pi / GRID
    cosines = 0.5 * torch.cos((torch.arange(GRID)[:, None] + 0.5) * waves)
    patches = torch.arange(PATCHES)
    with torch.no_grad():
        embedding[1:, : 2 * len(waves)] = torch.cat(
            [cosines[patches // GRID], cosines[patches % GRID]], dim=1
        )


def blind(model: Any) -> None:
    """Set the weights that keep the first decoder layers from reading the image; training must leave them so."""
    import torch

    language, projector = model.model.language_model, model.model.multi_modal_projector
    size = language.config.head_dim
    # the pair of dimensions that rotary embeddings turn slowest, so that the distance changes nothing
    barrier, partner = size // 2 - 1, size - 1
    with torch.no_grad():
        language.embed_tokens.weight[:, -1] = 0
        projector.linear_2.weight[-1] = 0
        projector.linear_2.bias[-1] = _FLAG
        for layer in language.layers[:_BLIND]:
            attention = layer.self_attn
            layer.input_layernorm.weight[-1] = 1
            for linear in (attention.q_proj, attention.k_proj):
                for index in (barrier, partner):
                    linear.weight[index::size] = 0
                    linear.bias[index::size] = 0
            attention.q_proj.bias[barrier::size] = _BARRIER
            attention.k_proj.weight[barrier::size, -1] = -_BARRIER
            # what the layer adds must leave the flag as it is
            attention.o_proj.weight[-1] = 0
            attention.o_proj.bias[-1] = 0
            layer.mlp.down_proj.weight[-1] = 0
