"""Image tokens and their places: what changes in a picture changes the tokens whose boxes cover it, and no others."""

import pytest
import torch
from torch import nn
from vision_families import FAMILIES, IMAGE, PATCH, TILE, VIDEO, flatten_patches

from salience.core.errors import ParameterError, StructureError
from salience.hosts.image_grid import block_order, boxes, put_together, spread, views

CASES = [(name, False) for name in FAMILIES] + [(name, True) for name in FAMILIES if FAMILIES[name].video]
IDS = [name + (" video" if video else "") for name, video in CASES]
INTERPOLATED = ("llava_onevision",)  # a token mixes neighbouring patches
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def core_of(name):
    return FAMILIES[name].make().model


def inputs_of(name, video, **options):
    extra = {"counts": (0, 0, 0), "videos": (1, 0, 2)} if video else {"counts": (1, 2, 0)}
    return FAMILIES[name].inputs(**(extra | options))


def without_attention(core):
    """The same model with an encoder in which every patch is on its own."""
    encoder = core.get_encoder(modality="image")
    for name, module in encoder.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, nn.Linear) and last in ("out_proj", "o_proj", "projection_layer", "proj"):
            nn.init.zeros_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return core


def features(core, inputs, video):
    """[tokens, d] as they are put into the prompt."""
    if video:
        keys = {"pixel_values_videos", "video_grid_thw"}
        found = core.get_video_features(**{key: inputs[key] for key in keys & set(inputs)}).pooler_output
    else:
        keys = {"pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask"}
        found = core.get_image_features(**{key: inputs[key] for key in keys & set(inputs)}).pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])


def pictures_of(inputs, video):
    """Every view's pixels [3, H, W], told from the inputs alone, and a function that writes them back."""
    key = "pixel_values_videos" if video else "pixel_values"
    pixels = inputs[key]
    grids = inputs.get("video_grid_thw" if video else "image_grid_thw")
    if grids is None:
        flat = pixels.flatten(0, -4)
        real = [number for number, view in enumerate(flat) if view.any()]
        sizes = inputs.get("image_sizes")
        if sizes is not None and "batch_num_images" in inputs:  # OneVision: the base view alone
            real = [
                number
                for number in real
                if number % pixels.shape[1] == 0 or alone(inputs, number // pixels.shape[1])
            ]
        cut = [flat[number] for number in real]
        if sizes is not None and pixels.ndim == 4:
            cut = [view[:, :high, :wide] for view, (high, wide) in zip(cut, sizes.tolist())]

        def rewrite(number, picture):
            changed = flat.clone()
            changed[real[number], :, : picture.shape[1], : picture.shape[2]] = picture
            return inputs | {key: changed.view_as(pixels)}

        return cut, rewrite
    frames, start = [], 0
    for time, down, across in grids.tolist():
        part = pixels[start : start + time * down * across]
        start += len(part)
        cut = part.reshape(time, down // 2, across // 2, 2, 2, 3, 2, PATCH, PATCH).permute(
            0, 6, 5, 1, 3, 7, 2, 4, 8
        )
        frames.append(cut.reshape(2 * time, 3, down * PATCH, across * PATCH))
    owners = [(number, at) for number, clip in enumerate(frames) for at in range(0, len(clip), 2)]

    def rewrite(number, picture):
        clip, at = owners[number]
        changed = [frame.clone() for frame in frames]
        changed[clip][at] = picture
        return inputs | {key: torch.cat([flatten_patches(frame)[0] for frame in changed])}

    return [frames[clip][at] for clip, at in owners], rewrite


def alone(inputs, image):
    counts = inputs["batch_num_images"]
    return bool(torch.repeat_interleave(counts, counts)[image] == 1)


@pytest.mark.parametrize(("name", "video"), CASES, ids=IDS)
def test_the_tokens_that_a_patch_changes_are_those_whose_boxes_cover_it(name, video):
    core, inputs = without_attention(core_of(name)), inputs_of(name, video)
    where = boxes(core, inputs, video=video)
    pictures, rewrite = pictures_of(inputs, video)
    draw = torch.Generator().manual_seed(3)
    reached = 0
    with torch.no_grad():
        before = features(core, inputs, video)
        assert len(before) == len(where)
        for number, picture in enumerate(pictures):
            rows, columns = picture.shape[1] // PATCH, picture.shape[2] // PATCH
            for place in torch.randperm(rows * columns, generator=draw)[:6].tolist():
                top, left = place // columns * PATCH, place % columns * PATCH
                marked = picture.clone()
                marked[:, top : top + PATCH, left : left + PATCH] = torch.tensor([2.0, -2.0, 1.0])[
                    :, None, None
                ]
                moved = (features(core, rewrite(number, marked), video) - before).norm(dim=1)
                changed = {token for token in range(len(where)) if moved[token] > 1e-4}
                covering = {
                    token
                    for token, box in enumerate(where)
                    if box is not None and box.view == number and overlap(box, top, left) > 1e-3
                }
                reached += len(changed)
                if name in INTERPOLATED:
                    assert covering or not changed
                    assert not changed or overlap(where[int(moved.argmax())], top, left) > 0
                else:
                    assert changed == covering, (number, top, left)
    assert reached


def overlap(box, top, left):
    down = min(box.bottom, top + PATCH) - max(box.top, top)
    across = min(box.right, left + PATCH) - max(box.left, left)
    return max(down, 0) * max(across, 0)


@pytest.mark.parametrize(("name", "video"), CASES, ids=IDS)
def test_there_is_one_box_for_each_placeholder(name, video):
    family, core = FAMILIES[name], core_of(name)
    inputs = inputs_of(name, video)
    where = boxes(core, inputs, video=video)
    shown = views(core, inputs, video=video)
    assert len(where) == int(family.placeholders(inputs, video=video).sum())
    assert {box.view for box in where if box} == set(range(len(shown)))
    for box in where:
        if box is not None:
            high, wide = shown[box.view].picture.shape[1:]
            assert 0 <= box.top < box.bottom <= high
            assert 0 <= box.left < box.right <= wide
    # a row alone is what it is in the batch
    counts = family.placeholders(inputs, video=video).sum(1).tolist()
    row = inputs_of(name, video, only=0)
    assert [(box.top, box.left, box.view) if box else None for box in boxes(core, row, video=video)] == [
        (box.top, box.left, box.view) if box else None for box in where[: counts[0]]
    ]


@pytest.mark.parametrize(("name", "video"), CASES, ids=IDS)
def test_boxes_of_a_view_tile_it_without_overlap(name, video):
    core, inputs = core_of(name), inputs_of(name, video)
    where = [box for box in boxes(core, inputs, video=video) if box]
    for number, view in enumerate(views(core, inputs, video=video)):
        area = sum((box.bottom - box.top) * (box.right - box.left) for box in where if box.view == number)
        _, high, wide = view.picture.shape
        cut = (
            "tile" in view.label
        )  # padding is cut away, and cells of interpolated tiles reach into the next tile
        assert area <= high * wide + 1e-6
        assert cut or area == pytest.approx(high * wide)


@pytest.mark.parametrize(("name", "video"), CASES, ids=IDS)
def test_views_are_the_pictures_that_the_encoder_sees(name, video):
    core, inputs = core_of(name), inputs_of(name, video)
    shown = views(core, inputs, **HALF, video=video)
    pictures, _ = pictures_of(inputs, video)
    assert len(shown) == len(pictures)
    for view, picture in zip(shown, pictures):
        torch.testing.assert_close(view.picture, (picture * 0.5 + 0.5).clamp(0, 1))
        assert (view.rows, view.columns) == (picture.shape[1] // PATCH, picture.shape[2] // PATCH)
        assert view.order.unique(dim=0).shape == (view.rows * view.columns, 2)
    for view in views(core, inputs, video=video):
        assert 0 <= float(view.picture.min()) <= float(view.picture.max()) <= 1


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llava_onevision",)])
def test_the_mean_of_a_patch_spreads_to_the_mean_of_the_box(name):
    """Pixel means of patches, spread, are the pixel means of the boxes of the tokens."""
    core, inputs = core_of(name), inputs_of(name, False)
    seen = views(core, inputs)
    maps = [view.picture.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).mean((0, 3, 4)) for view in seen]
    maps = [values[view.order[:, 0], view.order[:, 1]] for view, values in zip(seen, maps)]
    tokens = spread(core, inputs, maps, newline=-1.0)
    for value, box in zip(tokens.tolist(), boxes(core, inputs)):
        if box is None:
            assert value == -1.0
            continue
        top, left, bottom, right = (round(side) for side in (box.top, box.left, box.bottom, box.right))
        wanted = seen[box.view].picture[:, top:bottom, left:right].double().mean()
        assert value == pytest.approx(float(wanted), abs=1e-5)


def test_onevision_interpolates_values_as_features():
    """Bilinear in float64 from the four neighbours of the centre of each token of the tiles."""
    core, inputs = core_of("llava_onevision"), inputs_of("llava_onevision", False, counts=(1, 0, 1))
    seen = views(core, inputs)
    tiles = [number for number, view in enumerate(seen) if view.canvas == 3]  # the second image
    assert len(tiles) == 4
    draw = torch.Generator().manual_seed(0)
    maps = [torch.rand(16, 2, generator=draw, dtype=torch.float64) for _ in seen]
    tokens, where = spread(core, inputs, maps), boxes(core, inputs)
    plane = torch.zeros(8, 8, 2, dtype=torch.float64)
    for number in tiles:
        (top, left), values = seen[number].origin, maps[number].view(4, 4, 2)
        plane[top // PATCH : top // PATCH + 4, left // PATCH : left // PATCH + 4] = values
    step = 8 / 5  # eight patches across become five tokens
    checked = 0
    for value, box in zip(tokens, where):
        if box is None or box.view not in tiles:
            continue
        top, left = seen[box.view].origin
        # a cell that is cut at its tile keeps the side that lies inside
        row = (
            round((top + box.bottom) / PATCH / step)
            if box.bottom < TILE
            else round((top + box.top) / PATCH / step) + 1
        )
        column = (
            round((left + box.right) / PATCH / step)
            if box.right < TILE
            else round((left + box.left) / PATCH / step) + 1
        )
        at = [(number - 0.5) * step - 0.5 for number in (row, column)]
        low = [int(place) for place in at]
        part = [place - start for place, start in zip(at, low)]
        wanted = sum(
            (part[0] if down else 1 - part[0])
            * (part[1] if across else 1 - part[1])
            * plane[low[0] + down, low[1] + across]
            for down in (0, 1)
            for across in (0, 1)
        )
        torch.testing.assert_close(value, wanted)
        checked += 1
    assert checked == 25


def test_qwen_blocks_are_averaged_in_float64():
    core, inputs = core_of("qwen2_vl"), inputs_of("qwen2_vl", False)
    draw = torch.Generator().manual_seed(1)
    maps = [torch.rand(view.rows * view.columns, generator=draw).double() for view in views(core, inputs)]
    wanted = torch.cat(maps).view(-1, 4).mean(1)
    torch.testing.assert_close(spread(core, inputs, maps), wanted, atol=0, rtol=1e-14)


@pytest.mark.parametrize("video", [False, True])
def test_the_order_of_qwen25s_blocks_is_that_of_its_windows(video):
    core, inputs = core_of("qwen2_5_vl"), inputs_of("qwen2_5_vl", video)
    seen = {}
    handles = [
        core.visual.patch_embed.register_forward_hook(lambda module, args, out: seen.update(patches=out)),
        core.visual.blocks[0].register_forward_pre_hook(lambda module, args: seen.update(block=args[0])),
    ]
    with torch.no_grad():
        features(core, inputs, video)
    for handle in handles:
        handle.remove()
    order = block_order(core, inputs, video=video)
    torch.testing.assert_close(seen["block"], seen["patches"][order], atol=0, rtol=0)
    assert not torch.equal(order, torch.arange(len(order)))
    assert block_order(core_of("qwen2_vl"), inputs_of("qwen2_vl", video), video=video) is None


def test_a_class_token_is_dropped_where_the_model_drops_it():
    core, inputs = core_of("llava"), inputs_of("llava", False)
    maps = [torch.arange(37.0) for _ in range(3)]
    tokens = spread(core, inputs, maps)
    assert torch.equal(tokens, torch.arange(1.0, 37).repeat(3))
    assert torch.equal(spread(core, inputs, [values[1:] for values in maps]), tokens)
    core.config.vision_feature_select_strategy = "full"
    longer = inputs["input_ids"].clone()
    longer[2, -3:] = IMAGE  # one more token for each of the three images
    full = inputs | {"input_ids": longer}
    assert torch.equal(spread(core, full, maps), torch.arange(37.0).repeat(3))
    assert [number for number, box in enumerate(boxes(core, full)) if box is None] == [0, 37, 74]


def test_text_only_prompts_have_no_views():
    core = core_of("llava_next")
    inputs = FAMILIES["llava_next"].inputs((0, 0))
    assert views(core, inputs) == boxes(core, inputs) == []
    assert spread(core, inputs, []).shape == (0,)


@pytest.mark.parametrize(
    ("change", "maps", "text"),
    [
        ({"pixel_values": None}, None, "inputs must be with pixel_values for the 108 image tokens"),
        ({}, [torch.zeros(36)] * 2, "maps must be 3 tensors, one for each view, got 2"),
        (
            {},
            [torch.zeros(36)] * 2 + [torch.zeros(35)],
            r"map 2 must be of 36 or 37 rows for 6 × 6 patches, got",
        ),
        (
            {},
            [torch.zeros(36)] * 2 + [torch.zeros(36, 1)],
            r"maps must be all \[N\] or all \[N, d\] with one d",
        ),
        (
            {"pixel_values": torch.zeros(1, 3, 3, 24, 24)},
            None,
            "image layout of LlavaModel must be one of those",
        ),
    ],
)
def test_bad_input_of_spread(change, maps, text):
    core, inputs = core_of("llava"), inputs_of("llava", False) | change
    with pytest.raises((ParameterError, StructureError), match=text):
        spread(core, inputs, maps if maps is not None else [torch.zeros(36)] * 3)


def test_tokens_that_disagree_with_the_patches_are_an_error():
    core, inputs = core_of("llava"), inputs_of("llava", False)
    inputs["input_ids"][1, -1] = IMAGE
    with pytest.raises(
        StructureError, match="must spread to the 109 image tokens of the prompts, got 108 from 3"
    ):
        boxes(core, inputs)


def test_bad_mean_and_std():
    core, inputs = core_of("llava"), inputs_of("llava", False)
    with pytest.raises(ParameterError, match="mean and std must be given together"):
        views(core, inputs, mean=(0.5, 0.5, 0.5))
    with pytest.raises(ParameterError, match="std must be three numbers, got"):
        views(core, inputs, mean=(0.5, 0.5, 0.5), std=(1.0,))


def test_a_model_without_an_encoder_or_of_unknown_video_is_an_error():
    llava = core_of("llava")
    inputs = {"input_ids": torch.tensor([[VIDEO]]), "pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)}
    with pytest.raises(StructureError, match="the video layout of LlavaModel must be one of those known"):
        views(llava, inputs, video=True)
    with pytest.raises(StructureError, match="model must have a vision encoder, got LlamaModel"):
        views(llava.language_model, inputs_of("llava", False))


@pytest.mark.parametrize("name", FAMILIES)
def test_families_run_and_rows_do_not_depend_on_each_other(name):
    """The families themselves: batched and padded on either side, each row gives what it gives alone."""
    family = FAMILIES[name]
    model = family.make()
    options = {"counts": (1, 2, 0), "videos": (1, 0, 2) if family.video else ()}
    left, right = family.inputs(**options), family.inputs(**options, pad="right")
    with torch.no_grad():
        logits, others = model(**left).logits, model(**right).logits
        torch.testing.assert_close(
            others[right["attention_mask"].bool()], logits[left["attention_mask"].bool()], atol=1e-4, rtol=0
        )
        for row in range(3):
            single = model(**family.inputs(**options, only=row)).logits[0]
            torch.testing.assert_close(logits[row, -len(single) :], single, atol=1e-4, rtol=0)
        written = model.generate(**left, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert written.shape[1] == left["input_ids"].shape[1] + 3


def test_tiles_lie_side_by_side_on_the_canvas_of_their_picture():
    """A picture of 20 × 32 becomes two rows of two tiles, one of 30 × 13 two tiles one below the other."""
    core, inputs = core_of("llava_next"), inputs_of("llava_next", False, counts=(2,))
    found = {}
    for view in views(core, inputs):
        found.setdefault(view.label.partition(",")[0], []).append((view.canvas, view.origin))
    assert found["image 1"] == [(0, (0, 0)), (1, (0, 0)), (1, (0, 16)), (1, (16, 0)), (1, (16, 16))]
    assert found["image 2"] == [(2, (0, 0)), (3, (0, 0)), (3, (16, 0))]


def test_tiles_are_put_together_to_one_picture():
    core, inputs = core_of("llava_next"), inputs_of("llava_next", False, counts=(2,))
    found, where = views(core, inputs), boxes(core, inputs)
    labels, pictures, places = put_together(found, where)
    assert labels == ["image 1", "image 1, 4 tiles", "image 2", "image 2, 2 tiles"]
    assert [tuple(picture.shape) for picture in pictures] == [
        (3, 16, 16),
        (3, 32, 32),
        (3, 16, 16),
        (3, 32, 16),
    ]
    for token, box in enumerate(where):
        if box is None:
            assert places[token].isnan().all()
            continue
        number, top, left, bottom, right = (int(value) for value in places[token].tolist())
        part = pictures[number][:, top:bottom, left:right]
        view = found[box.view].picture
        assert torch.equal(part, view[:, int(box.top) : int(box.bottom), int(box.left) : int(box.right)])


@pytest.mark.parametrize("name", ["AyaVision", "PaliGemma", "VipLlava"])
def test_families_beyond_those_of_the_list(name):
    """Found by what they can do: a shuffle in the projector, no class token, several layers of features."""
    core, inputs = others(name)
    draw = torch.Generator().manual_seed(0)
    before, where = features(core, inputs, False), boxes(core, inputs)
    assert len(before) == len(where)
    for place in torch.randperm(36, generator=draw)[:8].tolist():
        top, left = place // 6 * PATCH, place % 6 * PATCH
        pixels = inputs["pixel_values"].clone()
        pixels[1, :, top : top + PATCH, left : left + PATCH] = torch.tensor([2.0, -2.0, 1.0])[:, None, None]
        moved = (features(core, inputs | {"pixel_values": pixels}, False) - before).norm(dim=1)
        covering = {n for n, box in enumerate(where) if box.view == 1 and overlap(box, top, left) > 0}
        assert {n for n in range(len(where)) if moved[n] > 1e-4} == covering


def test_a_family_that_cannot_be_mapped_says_what_was_seen():
    core, inputs = others("Gemma3")  # pools each picture to a fixed number of tokens
    with pytest.raises(
        StructureError, match="Gemma3Model must spread to the 8 image tokens of the prompts, got 72"
    ):
        boxes(core, inputs)
    llava, given = core_of("llava"), inputs_of("llava", False)
    llava.pixel_shuffle = lambda patches, grid, side: patches
    with pytest.raises(
        StructureError, match="got a pixel_shuffle of LlavaModel that takes patches, grid, side"
    ):
        boxes(llava, given)
    packing, tiled = core_of("llava_next"), inputs_of("llava_next", False)
    packing.config.vision_config.image_size = 2 * TILE
    with pytest.raises(StructureError, match="LlavaNextModel"):
        boxes(packing, tiled)


def others(name):
    """A model that is not in the list, without attention in its encoder, and two pictures for it."""
    import vision_families as made

    siglip = made._vision("siglip_vision_model", 24, vision_use_head=False, projection_dim=made.HIDDEN)
    text, settings, tokens = "llama", {}, 36
    if name == "AyaVision":
        text, tokens = "cohere2", 9
    elif name == "PaliGemma":
        text, settings = "gemma", {"projection_dim": made.HIDDEN}
    elif name == "Gemma3":
        text, settings, tokens = "gemma3_text", {"mm_tokens_per_image": 4}, 4
    clip = made._vision("clip_vision_model", 24)
    vision = clip if name == "VipLlava" else siglip
    if name == "VipLlava":
        settings = {"vision_feature_layers": [-2, -1]}
    model = made._model(name, made._text(text), vision, **settings)().model
    draw = torch.Generator().manual_seed(5)
    ids = torch.tensor([[1, *[IMAGE] * tokens, 7, *[IMAGE] * tokens, 8]])
    return without_attention(model), {
        "input_ids": ids,
        "pixel_values": torch.rand(2, 3, 24, 24, generator=draw),
    }
