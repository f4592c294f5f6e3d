"""Tiny vision-language models of many families, made from config classes, and inputs as their processors write them.

```python
family = FAMILIES["llava_next"]
model = family.make()
inputs = family.inputs(counts=(1, 2, 0))  # rows with one image, with two, and with text only
alone = family.inputs(counts=(1, 2, 0), only=1)  # the second row by itself, without padding
```
No processor, no tokenizer, no download: token ids are drawn, placeholders counted as the processors count them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

VOCAB, PAD, BOS, EOS = 120, 0, 1, 2
IMAGE, VIDEO, VISION_START, VISION_END, BREAK = 110, 111, 112, 113, 114
TEXT = (3, 100)  # ids of ordinary text
LAYERS, HIDDEN = 4, 64
PATCH = 4


@dataclass(frozen=True)
class Media:
    """One image or video: the token ids that stand for it, and its tensors before they are batched."""

    ids: list[int]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name (str): as in `FAMILIES`.
        make (Callable): () -> model; seeded, eval mode, float32, ids for generation set.
        image (Callable): (generator, number of the image, images in its row) -> Media.
        pack (Callable): rows of images -> keywords of the forward; called only if there is an image.
        video (Callable | None): (generator, number) -> Media, where the family reads videos apart from images.
        pack_videos (Callable | None): rows of videos -> keywords of the forward.
        types (bool): the forward wants `mm_token_type_ids`.
    """

    name: str
    make: Callable[[], Any]
    image: Callable[[torch.Generator, int, int], Media]
    pack: Callable[[list[list[Media]]], dict[str, torch.Tensor]]
    video: Callable[[torch.Generator, int], Media] | None = None
    pack_videos: Callable[[list[list[Media]]], dict[str, torch.Tensor]] | None = None
    types: bool = False

    def inputs(
        self, counts=(1, 2, 0), *, videos=(), pad="left", lengths=(), seed=0, only=None
    ) -> dict[str, torch.Tensor]:
        """Keywords for `model(**inputs)` and `model.generate(**inputs)`.

        Args:
            counts: images in each row.
            videos: videos in each row, after its images; none where it is shorter than `counts`.
            pad: "left" or "right"; None checks that no row needs padding.
            lengths: text tokens after the last picture of each row; chosen, and different, where it is shorter.
            seed: of ids and pixels. A row is the same whatever the other rows are.
            only: the number of the row that is returned alone, without padding.
        """
        if any(videos) and self.video is None:
            raise ValueError(f"videos must be empty for {self.name}, got {videos}")
        rows = []
        for place, count in enumerate(counts):
            draw = torch.Generator().manual_seed(1000 * seed + place)
            images = [self.image(draw, place + number, count) for number in range(count)]
            clips = [self.video(draw, place + number) for number in range((*videos, *[0] * 99)[place])]
            length = lengths[place] if place < len(lengths) else 5 + (4 * place) % 7
            ids = [BOS, *_words(draw, 3)]
            for media in [*images, *clips]:
                ids += [*media.ids, *_words(draw, 2)]
            rows.append(([*ids, *_words(draw, length)], images, clips))
        rows = rows if only is None else [rows[only]]
        batch = _padded([ids for ids, _, _ in rows], pad, self.types)
        if any(images for _, images, _ in rows):
            batch |= self.pack([images for _, images, _ in rows])
        if any(clips for _, _, clips in rows):
            batch |= self.pack_videos([clips for _, _, clips in rows])
        return batch

    def placeholders(self, inputs, *, video=False) -> torch.Tensor:
        """[B, T] bool: which tokens of the prompt an image (or a video) fills."""
        return inputs["input_ids"] == (VIDEO if video else IMAGE)


def _words(draw, count):
    return torch.randint(*TEXT, (count,), generator=draw).tolist()


def _padded(rows, pad, types):
    longest = max(map(len, rows))
    if pad not in ("left", "right") and any(len(row) != longest for row in rows):
        raise ValueError(f"pad must be left or right for rows of different lengths, got {pad}")
    ids = torch.full((len(rows), longest), PAD)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        at = slice(longest - len(row), None) if pad == "left" else slice(len(row))
        ids[place, at], mask[place, at] = torch.tensor(row), 1
    batch = {"input_ids": ids, "attention_mask": mask}
    if types:
        batch["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return batch


def _pixels(draw, *shape):
    return 2 * torch.rand(shape, generator=draw) - 1


def _flat(rows, name, join=torch.cat):
    return join([media.tensors[name] for row in rows for media in row])


# one image, one view: LLaVA; several views of equal rank: InternVL


def _square(side, merge=1, tiles=(1,)):
    def image(draw, number, count):
        views = tiles[number % len(tiles)]
        ids = [IMAGE] * (views * (side // PATCH // merge) ** 2)
        return Media(ids, {"pixels": _pixels(draw, views, 3, side, side)})

    return image


def _pack_square(rows):
    return {"pixel_values": _flat(rows, "pixels")}


# a base view and a grid of tiles, padding cut away, a newline after each row: LLaVA-NeXT, LLaVA-OneVision

TILE = 16
PINPOINTS = [[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE], [TILE, 3 * TILE]]
SIZES = ((20, 32), (30, 13), (31, 30), (14, 50))  # height, width of the pictures as they came


def _anyres(most=None):
    def image(draw, number, count):
        from transformers.models.llava_next.modeling_llava_next import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        size, side = SIZES[number % len(SIZES)], TILE // PATCH
        rows, columns = get_anyres_image_grid_shape(size, PINPOINTS, TILE)
        tokens = side**2 + 1
        if most is not None and count > 1:
            views = 1  # OneVision cuts only the single image of a row into tiles
        else:
            views = 1 + rows * columns
            high, wide = unpad_image(torch.zeros(1, rows * side, columns * side), size).shape[1:]
            ratio = math.sqrt(high * wide / (most * side**2)) if most else 1.0
            if ratio > 1.1:
                high, wide = int(high // ratio), int(wide // ratio)
            tokens = side**2 + high * (wide + 1)
        pixels = _pixels(draw, views, 3, TILE, TILE)
        return Media([IMAGE] * tokens, {"pixels": pixels, "size": torch.tensor(size)})

    return image


def _pack_anyres(rows):
    views = [media.tensors["pixels"] for row in rows for media in row]
    most = max(len(pixels) for pixels in views)
    stacked = torch.stack([F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, most - len(pixels))) for pixels in views])
    return {"pixel_values": stacked, "image_sizes": _flat(rows, "size", torch.stack)}


def _pack_onevision(rows):
    return _pack_anyres(rows) | {"batch_num_images": torch.tensor([len(row) for row in rows])}


def _video_onevision(draw, number):
    frames, side = 3, math.ceil(TILE / PATCH / 2)
    return Media([VIDEO] * (frames * side**2 + 1), {"pixels": _pixels(draw, frames, 3, TILE, TILE)})


# flattened patches of any grid, four patches a token: Qwen

GRIDS = ((8, 10), (10, 6), (6, 6), (12, 8))  # patches down and across


def flatten_patches(frames):
    """[T, 3, H, W] frames to [N, values] patches in Qwen's order, and their grid (time, down, across)."""
    time, down, across = len(frames) // 2, frames.shape[2] // PATCH, frames.shape[3] // PATCH
    cut = frames.reshape(time, 2, 3, down // 2, 2, PATCH, across // 2, 2, PATCH)
    cut = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * down * across, -1)
    return cut, torch.tensor([time, down, across])


def _grid_image(draw, number, count):
    down, across = GRIDS[number % len(GRIDS)]
    still = _pixels(draw, 1, 3, down * PATCH, across * PATCH).expand(2, -1, -1, -1)
    pixels, grid = flatten_patches(still)
    return Media(
        [VISION_START, *[IMAGE] * (down * across // 4), VISION_END], {"pixels": pixels, "grid": grid}
    )


def _grid_video(stamps):
    def video(draw, number):
        down, across = GRIDS[(number + 2) % len(GRIDS)]
        pixels, grid = flatten_patches(_pixels(draw, 4, 3, down * PATCH, across * PATCH))
        frame = [VIDEO] * (down * across // 4)
        if stamps:  # Qwen3 writes the time before each slice
            ids = [*_words(draw, 2), VISION_START, *frame, VISION_END]
            return Media([*ids, *ids], {"pixels": pixels, "grid": grid})
        return Media([VISION_START, *frame, *frame, VISION_END], {"pixels": pixels, "grid": grid})

    return video


def _pack_grid(rows):
    return {"pixel_values": _flat(rows, "pixels"), "image_grid_thw": _flat(rows, "grid", torch.stack)}


def _pack_grid_videos(rows):
    return {"pixel_values_videos": _flat(rows, "pixels"), "video_grid_thw": _flat(rows, "grid", torch.stack)}


# tiles in a padded [B, most, ...] block: Idefics3, SmolVLM


def _pack_block(rows):
    most = max(sum(len(media.tensors["pixels"]) for media in row) for row in rows)
    pixels = torch.zeros(len(rows), most, 3, TILE * 2, TILE * 2)
    mask = torch.zeros(len(rows), most, TILE * 2, TILE * 2, dtype=torch.long)
    for place, row in enumerate(rows):
        views = [view for media in row for view in media.tensors["pixels"]]
        for number, view in enumerate(views):
            pixels[place, number], mask[place, number] = view, 1
        if views:  # the last view of a row is narrower than the others and padded
            pixels[place, len(views) - 1, :, :, TILE + 8 :], mask[place, len(views) - 1, :, TILE + 8 :] = 0, 0
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


# pictures of any size, padded to the largest, a break after each row of tokens: Mistral3


def _sized_image(draw, number, count):
    down, across = GRIDS[number % len(GRIDS)]
    ids = ([IMAGE] * (across // 2) + [BREAK]) * (down // 2)
    pixels = _pixels(draw, 3, down * PATCH, across * PATCH)
    return Media(ids, {"pixels": pixels, "size": torch.tensor(pixels.shape[1:])})


def _pack_sized(rows):
    sizes = _flat(rows, "size", torch.stack)
    high, wide = sizes.amax(0).tolist()
    views = [media.tensors["pixels"] for row in rows for media in row]
    stacked = [F.pad(view, (0, wide - view.shape[2], 0, high - view.shape[1])) for view in views]
    return {"pixel_values": torch.stack(stacked), "image_sizes": sizes}


# models
# fmt: off


def _text(model_type, **settings):
    return {
        "model_type": model_type, "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HIDDEN // 4,
        "max_position_embeddings": 1024, "initializer_range": 0.1, "pad_token_id": PAD, "bos_token_id": BOS,
        "eos_token_id": EOS, "tie_word_embeddings": False, **settings,
    }


def _vision(model_type, side, **settings):
    return {
        "model_type": model_type, "image_size": side, "patch_size": PATCH, "hidden_size": 32,
        "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "initializer_range": 0.1,
        **settings,
    }


def _qwen_vision(model_type, **settings):
    return {
        "model_type": model_type, "depth": 3, "num_heads": 4, "patch_size": PATCH, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "initializer_range": 0.1, **settings,
    }


def _model(name, text, vision, **settings):
    """() -> a model of class {name}ForConditionalGeneration from its config, the same weights each time."""

    def make():
        import transformers

        config = getattr(transformers, f"{name}Config")(
            text_config=dict(text), vision_config=dict(vision), image_token_id=IMAGE, video_token_id=VIDEO,
            image_token_index=IMAGE, video_token_index=VIDEO, vision_start_token_id=VISION_START,
            vision_end_token_id=VISION_END, pad_token_id=PAD, tie_word_embeddings=False, **settings,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
        for key, value in (("pad", PAD), ("bos", BOS), ("eos", EOS)):
            setattr(model.generation_config, f"{key}_token_id", value)
        return model

    return make


_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_QWEN2 = _qwen_vision("qwen2_vl_vision", embed_dim=32, hidden_size=HIDDEN, mlp_ratio=2)
_QWEN25 = _qwen_vision(
    "qwen2_5_vl_vision", hidden_size=32, out_hidden_size=HIDDEN, intermediate_size=64, window_size=4 * PATCH,
    fullatt_block_indexes=[1],
)
_QWEN3 = {
    "hidden_size": 32, "out_hidden_size": HIDDEN, "intermediate_size": 64, "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_TILES = {"image_grid_pinpoints": PINPOINTS}


def _grid_family(name, make, stamps=False):
    return Family(name, make, _grid_image, _pack_grid, _grid_video(stamps), _pack_grid_videos, types=True)


_ALL = (
    Family("llava", _model("Llava", _text("llama"), _vision("clip_vision_model", 24)), _square(24), _pack_square),
    Family(
        "llava_next", _model("LlavaNext", _text("llama"), _vision("clip_vision_model", TILE), **_TILES),
        _anyres(), _pack_anyres,
    ),
    Family(
        "llava_onevision",
        _model(
            "LlavaOnevision", _text("qwen2"), _vision("siglip_vision_model", TILE, vision_use_head=False),
            vision_aspect_ratio="anyres_max_2", **_TILES,
        ),
        _anyres(most=2), _pack_onevision, _video_onevision, lambda rows: {
            "pixel_values_videos": _flat(rows, "pixels", torch.stack)
        },
    ),
    _grid_family("qwen2_vl", _model("Qwen2VL", _text("qwen2_vl_text", rope_parameters=_SECTIONS), _QWEN2)),
    _grid_family("qwen2_5_vl", _model("Qwen2_5_VL", _text("qwen2_5_vl_text", rope_parameters=_SECTIONS), _QWEN25)),
    _grid_family(
        "qwen3_vl",
        _model(
            "Qwen3VL", _text("qwen3_vl_text", rope_parameters=_SECTIONS),
            _qwen_vision("qwen3_vl_vision", **_QWEN3),
        ),
        stamps=True,
    ),
    _grid_family(
        "qwen3_vl_moe",
        _model(
            "Qwen3VLMoe", _text("qwen3_vl_moe_text", rope_parameters=_SECTIONS, **_MOE),
            _qwen_vision("qwen3_vl_moe_vision", **_QWEN3),
        ),
        stamps=True,
    ),
    Family(
        "internvl",
        _model("InternVL", _text("qwen2"), {
            **_vision("internvl_vision", [24, 24]), "patch_size": [PATCH, PATCH]
        }),
        _square(24, merge=2, tiles=(1, 3)), _pack_square,
    ),
    Family(
        "idefics3", _model("Idefics3", _text("llama"), _vision("idefics3_vision", 2 * TILE), scale_factor=2),
        _square(2 * TILE, merge=2, tiles=(1, 3)), _pack_block,
    ),
    Family(
        "smolvlm", _model("SmolVLM", _text("llama"), _vision("smolvlm_vision", 2 * TILE), scale_factor=2),
        _square(2 * TILE, merge=2, tiles=(1, 3)), _pack_block,
    ),
    Family(
        "mistral3", _model(
            "Mistral3", _text("mistral", sliding_window=None),
            _vision("pixtral", 64, head_dim=8), spatial_merge_size=2,
        ),
        _sized_image, _pack_sized,
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
