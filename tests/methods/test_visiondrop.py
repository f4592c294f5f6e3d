"""VisionDrop: the worked example, both stages against a float64 transcription, pictures, budgets, and layouts."""

import pytest
import torch
from conftest import llava_batch, tiny_llava
from vision_families import FAMILIES

import salience as sal
from salience.core.attach import Attachment
from salience.core.errors import ConflictError, ParameterError
from salience.core.spec import parse_method
from salience.hosts.attention import AttentionCall
from salience.hosts.choices import View, equal_stages
from salience.hosts.encoder import Encoder, EncoderMaps
from salience.hosts.projection import pictures_of
from salience.hosts.sequences import gathering
from salience.hosts.vision import vision_language
from salience.methods.tokens._merging import choose, group, merge, share
from salience.methods.tokens.visiondrop import head_keys, measure, schedule, score, split

CONTRACT = {
    "method": sal.VisionDrop(encoder=(6, 2), stages=((4, 1), (2, 1)), layers=(2, 3)),
    "keep_all": sal.VisionDrop(tokens=10_000, layers=(1, 2, 3)),
    "model": tiny_llava,
    "inputs": llava_batch,
    "bad": {
        "tokens": (0, "tokens must be a count >= 1, got 0"),
        "tokens:2": (0.5, "tokens must be a count >= 1, got 0.5"),
        "encoder": ((0, 3), r"encoder must be two counts, >= 1 and >= 0, or 'auto' or None, got \(0, 3\)"),
        "encoder:2": ("all", "encoder must be two counts, .*, got 'all'"),
        "encoder:3": ((2, -1), r"encoder must be two counts, .*, got \(2, -1\)"),
        "stages": (
            ((4, 1), (4, 2)),
            r"stages must be of sums that never rise, from the encoder's on, got \[288, 5, 6\]",
        ),
        "stages:2": (((4,),), r"stages must be pairs of counts, >= 1 and >= 0, got \(\(4,\),\)"),
        "stages:3": (((300, 1),), r"stages must be of sums that never rise, .*, got \[288, 301\]"),
        "layers": ((4, 2, 6), r"layers must be rising and >= 1, got \(4, 2, 6\)"),
        "layers:2": ((0, 1, 2), r"layers must be rising and >= 1, got \(0, 1, 2\)"),
        "causal_scores": ("yes", "causal_scores must be True or False, got 'yes'"),
        "score_rows": ("text", "score_rows must be one of class, image, got 'text'"),
        "layout": ("back", "layout must be one of append, in_place, got 'back'"),
        "positions": ("shift", "positions must be one of auto, renumber, keep, got 'shift'"),
    },
}
ENCODER = {"stages": (), "layers": ()}  # the encoder's stage alone


def reduced(x, key, scores, d, c):
    """The rule in float64, one token after another: (rows, index of each; merged rows stand at their target)."""
    x, key, scores = x.double(), key.double(), scores.double()
    dominant = sorted(sorted(range(len(x)), key=lambda j: -float(scores[j]))[:d])
    rest = [j for j in range(len(x)) if j not in dominant]
    step = max(1, len(rest) // max(c, 1))
    targets = rest[::step][:c]
    joined = {t: [] for t in targets}
    for j in rest if targets else ():
        if j not in targets:
            alike = [float(key[j] @ key[t] / key[j].norm() / key[t].norm()) for t in targets]
            joined[targets[alike.index(max(alike))]].append(j)
    merged = [x[t] + (sum(x[j] for j in found) / len(found) if found else 0) for t, found in joined.items()]
    return torch.stack([x[j] for j in dominant] + merged), dominant + targets


def view_of(hidden, vision):
    valid = torch.ones_like(vision)
    source = torch.arange(vision.shape[1]).expand_as(vision)
    return View(1, hidden, vision, valid, source, vision.sum(-1), None, {}, None)


def reduce_all(hidden, keys, scores, counts, **settings):
    """`choose` on sequences of image tokens only: the rows of each, in order."""
    choice = choose(
        view_of(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool)),
        torch.zeros(hidden.shape[:2], dtype=torch.int64),
        scores,
        keys,
        counts,
        **settings,
    )
    return [choice.hidden[row, order_of(choice, row)] for row in range(len(hidden))], choice


def order_of(choice, row):
    order, kept = gathering(choice.keep, choice.order, left=False)
    return order[row, kept[row]]


def test_worked_example():
    """Rows 1..6, scores 2 > 5 > rest, D = C = 2: 3, 6 stay, 1 + 2 and 4 + 5 are merged."""
    rows = torch.arange(1.0, 7)[:, None]
    scores = torch.tensor([0.0, 0.1, 0.9, 0.2, 0.3, 0.8])
    keys = torch.tensor([[1, 0], [0.9, 0.1], [5, 5], [0, 1], [0.2, 0.8], [5, 5.0]])
    groups = group(scores, keys, 2, 2)
    assert groups.dominant.tolist() == [2, 5] and groups.target.tolist() == [0, 3]
    assert groups.follower.tolist() == [1, 4] and groups.joins.tolist() == [0, 1]
    assert merge(rows, groups).flatten().tolist() == [3, 9]
    (out,), _ = reduce_all(rows[None], keys[None], scores[None], (2, 2))
    assert out.flatten().tolist() == [3, 6, 3, 9]
    (out,), _ = reduce_all(rows[None], keys[None], scores[None], (2, 2), layout="in_place")
    assert out.flatten().tolist() == [3, 3, 9, 6]
    (out,), choice = reduce_all(rows[None], keys[None], scores[None], (2, 2), leading=torch.tensor([[7.0]]))
    assert out.flatten().tolist()[:2] == [7, 3] and int(choice.keep.sum()) == 4


@pytest.mark.parametrize(
    ("n", "d", "c"), [(63, 20, 7), (17, 1, 1), (12, 0, 5), (9, 4, 0), (8, 3, 5), (5, 1, 3)]
)
def test_merging_equals_the_rule_written_out(n, d, c):
    draw = torch.Generator().manual_seed(n)
    x, key = (torch.randn(n, width, generator=draw).double() for width in (6, 4))
    scores = torch.rand(n, generator=draw).double()
    (out,), choice = reduce_all(x[None], key[None], scores[None], (d, c))
    if d + c == n:
        assert torch.equal(out, x) and not bool(choice.merged.any())
        return
    expected, places = reduced(x, key, scores, d, c)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    assert sorted(places) == choice.keep[0].nonzero().flatten().tolist()
    assert torch.equal(out[:d], x[sorted(places[:d])]), "dominant tokens are copies"


def test_identical_tokens_all_join_the_first_target():
    x = torch.ones(1, 10, 3)
    scores = torch.arange(10.0, 0, -1)[None]
    (out,), _ = reduce_all(x, torch.full((1, 10, 4), 0.3), scores, (2, 3))
    assert out[:, 0].tolist() == [1, 1, 2, 1, 1]


def test_permuting_followers_and_doubling_heads_change_nothing():
    draw = torch.Generator().manual_seed(0)
    x, key = (torch.randn(12, width, generator=draw).double() for width in (6, 4))
    groups = group(torch.rand(12, generator=draw), key, 3, 2)
    mixed = torch.arange(12)
    mixed[groups.follower] = groups.follower.flip(0)
    again = group(torch.zeros(12).index_fill(0, groups.dominant, 1.0), key[mixed], 3, 2)
    torch.testing.assert_close(merge(x[mixed], again), merge(x, groups), rtol=0, atol=1e-12)
    query, keys = (torch.randn(1, heads, 9, 8, generator=draw).double() for heads in (4, 2))
    rows = torch.zeros(1, 9, dtype=torch.bool)
    rows[0, 2:7] = True
    one = AttentionCall(None, query, keys, None, None, 8**-0.5, {})
    two = AttentionCall(
        None, query.repeat_interleave(2, 1), keys.repeat_interleave(2, 1), None, None, 8**-0.5, {}
    )
    torch.testing.assert_close(head_keys(two), head_keys(one))
    for causal in (False, True):
        torch.testing.assert_close(
            score(two, rows, torch.ones_like(rows), causal=causal),
            score(one, rows, torch.ones_like(rows), causal=causal),
        )


def test_the_causal_mask_favours_early_tokens_and_none_favours_no_one():
    call = AttentionCall(None, torch.zeros(1, 1, 8, 1), torch.zeros(1, 1, 8, 1), None, None, 1.0, {})
    rows = torch.ones(1, 8, dtype=torch.bool)
    assert score(call, rows, rows, causal=True)[0].tolist() == pytest.approx(
        [0.3397, 0.2147, 0.1522, 0.1106, 0.0793, 0.0543, 0.0335, 0.0156], abs=5e-5
    )
    assert score(call, rows, rows, causal=False)[0].tolist() == pytest.approx([1 / 8] * 8)


def test_counts_follow_from_the_average():
    assert schedule(32, 4) == (48, 35, 26, 19)
    assert [split(total) for total in (48, 35, 26, 19, 1)] == [(42, 6), (30, 5), (22, 4), (16, 3), (1, 0)]
    assert sal.VisionDrop(tokens=32).plan() == ((42, 6), (30, 5), (22, 4), (16, 3))
    for tokens in (1, 2, 7, 64, 192):
        for stages in range(1, 7):
            counts = schedule(tokens, stages)
            assert sum(counts) == tokens * stages and min(counts) >= 1
            assert list(counts) == sorted(counts, reverse=True)
    assert sal.VisionDrop(tokens=64, **ENCODER).plan() == ((56, 8),)
    assert len(sal.VisionDrop(encoder=None).plan()) == 3
    assert equal_stages(32, 3, name="stages") == (8, 16, 24)
    with pytest.raises(ParameterError, match="stages must be fewer than the decoder's 3 layers, got 3"):
        equal_stages(3, 3, name="stages")
    with pytest.raises(ParameterError, match="stages must be at least one where encoder is None"):
        sal.VisionDrop(encoder=None, stages=())
    with pytest.raises(ParameterError, match="stages must be at least one where encoder is None"):
        sal.VisionDrop(encoder=None, layers=())
    with pytest.raises(ParameterError, match="layers must be one for each of the 1 stages"):
        sal.VisionDrop(stages=((4, 1),), layers=(1, 2))
    assert share(7, [16, 16]) == [4, 3] and share(10, [80, 20, 1]) == [8, 2, 0] and share(5, [5]) == [5]
    text = "visiondrop:encoder=(42,6),stages=((30,5),(22,4),(16,3))"
    assert parse_method(text) == sal.VisionDrop(encoder=(42, 6), stages=((30, 5), (22, 4), (16, 3)))


@pytest.mark.parametrize("rows", ["class", "image"])
@torch.no_grad()
def test_the_encoders_stage_is_the_rule_on_the_towers_features(rows):
    """A prompt written by hand: what the rule leaves of the features, projected, between the text's embeddings."""
    model, batch = tiny_llava(attn="eager").double(), llava_batch((1,))
    batch["pixel_values"] = batch["pixel_values"].double()
    with sal.focus(model, sal.VisionDrop(encoder=(6, 3), score_rows=rows, **ENCODER)) as handle:
        focused = model(**batch).logits[0, -1]
        stage = handle.parts[0].stages[0]
    tower = model.model.vision_tower
    seen = tower(batch["pixel_values"], output_hidden_states=True, output_attentions=True)
    x, attention = seen.hidden_states[-2][0], seen.attentions[-2][0]
    normed = tower.encoder.layers[-2].layer_norm1(seen.hidden_states[-3])
    key = tower.encoder.layers[-2].self_attn.k_proj(normed)[0].view(17, 4, -1).mean(1)
    if rows == "class":
        scores = attention[:, 0].sum(0)
        scores[0] = 100.0  # the class token is always in
    else:
        x, key, scores = x[1:], key[1:], attention[:, 1:].mean((0, 1))[1:]
    kept, places = reduced(x, key, scores, 6, 3)
    image = model.model.multi_modal_projector(kept[None])
    text = model.get_input_embeddings()(batch["input_ids"])
    by_hand = torch.cat((text[:, :2], image, text[:, 18:]), 1)
    torch.testing.assert_close(focused, model(inputs_embeds=by_hand).logits[0, -1], rtol=0, atol=1e-6)
    assert int(stage.kept.sum()) == 9
    patches = [place - (rows == "class") for place in places if place or rows != "class"]
    assert set(patches) <= set((stage.kept[0].nonzero().flatten() - 2).tolist())


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_the_decoders_stage_is_the_rule_on_its_hidden_states(causal):
    model, batch = tiny_llava(attn="eager").double(), llava_batch((1,))
    batch["pixel_values"] = batch["pixel_values"].double()
    method = sal.VisionDrop(encoder=None, stages=((5, 3),), layers=(2,), causal_scores=causal)
    with sal.focus(model, method) as handle:
        focused = model(**batch).logits[0, -1]
        stage = handle.parts[0].stages[0]
    text = model.model.language_model
    hidden = model(**batch, output_hidden_states=True).hidden_states[2]
    places = torch.arange(hidden.shape[1])[None]
    layer, (cos, sin) = text.layers[2], text.rotary_emb(hidden, position_ids=places)
    normed, attn = layer.input_layernorm(hidden), layer.self_attn

    def turned(projection, heads):
        z = projection(normed).view(1, -1, heads, 8).transpose(1, 2)
        half = torch.cat((-z[..., 4:], z[..., :4]), -1)
        return z * cos + half * sin

    q, k = turned(attn.q_proj, 4)[0], turned(attn.k_proj, 2)[0].repeat_interleave(2, 0)
    image = slice(2, 18)
    logits = (q[:, image] @ k[:, :18].transpose(1, 2)) / 8**0.5
    if causal:
        logits = logits.masked_fill(torch.arange(18) > torch.arange(2, 18)[:, None], -torch.inf)
    scores = logits.softmax(-1).mean(0).mean(0)[image]
    torch.testing.assert_close(stage.scores[0, image].double(), scores, rtol=0, atol=1e-7)
    rows, kept = reduced(hidden[0, image], k.mean(0)[image], scores, 5, 3)
    assert sorted(kept) == (stage.kept[0].nonzero().flatten() - 2).tolist()
    short = torch.cat((hidden[:, :2], rows[None], hidden[:, 18:]), 1)
    size = short.shape[1]
    mask = torch.full((size, size), -torch.inf).triu(1).double()[None, None]
    turn = text.rotary_emb(short, position_ids=torch.arange(size)[None])
    for layer in text.layers[2:]:
        short = layer(short, attention_mask=mask, position_embeddings=turn)
    torch.testing.assert_close(focused, model.lm_head(text.norm(short))[0, -1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_a_class_token_among_the_image_tokens_gives_the_same_sequence():
    """A model that keeps it as an image token, and one that drops it in front of the projector."""
    drops, keeps = tiny_llava().double(), tiny_llava().double()
    keeps.config.vision_feature_select_strategy = "full"
    method = sal.VisionDrop(encoder=(6, 3), stages=((4, 1),), layers=(2,))
    batch = llava_batch((1,))
    batch["pixel_values"] = batch["pixel_values"].double()
    longer = dict(batch)
    for name, value in (("input_ids", 63), ("attention_mask", 1)):
        longer[name] = torch.cat((batch[name][:, :2], torch.tensor([[value]]), batch[name][:, 2:]), 1)
    with sal.focus(drops, method):
        one = drops(**batch).logits[0, -1]
    with sal.focus(keeps, method):
        other = keeps(**longer).logits[0, -1]
    torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "mistral3", "idefics3"])
@torch.no_grad()
def test_the_towers_scores_are_those_of_its_eager_attention(name):
    """Mistral's tower reads all pictures in one row that its mask divides."""
    family = FAMILIES[name]
    model, batch = family.make(), family.inputs((1, 2))
    model.set_attn_implementation("eager")
    found, record, seen, weights = vision_language(model), Attachment(), [], []
    classed = name == "llava"
    attention = found.vision[-1].attentions[0].module
    maps = EncoderMaps(Encoder(found, record), -1, record, lambda call: measure(call, classed))
    record.hook(attention.register_forward_hook(lambda module, args, output: weights.append(output[1])))
    model(**batch)
    record.undo()
    seen = torch.stack(maps.views["image"])[..., 0]
    rows = weights[0].mean(1)
    expected = rows[:, 0].clone() if classed else rows.mean(1)
    if classed:
        expected[:, 0] = 1.0
    torch.testing.assert_close(seen, expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_maps_of_a_tower_that_sorts_patches_by_window_come_back_in_order():
    """If all its layers see everything, the size of the windows must not matter."""
    found, batch = [], FAMILIES["qwen2_5_vl"].inputs((1, 2, 0))
    for window in (16, 10_000):
        model = FAMILIES["qwen2_5_vl"].make()
        model.model.visual.window_size = window
        model.model.visual.fullatt_block_indexes = [0, 1, 2]
        record, seen = Attachment(), []
        maps = EncoderMaps(Encoder(vision_language(model), record), 1, record, lambda c: measure(c, False))
        ids = batch["input_ids"]
        vision = ids == model.config.image_token_id
        with sal.focus(model, sal.VisionDrop(tokens=10_000, encoder_layer=1)) as handle:
            model(**batch)
            view = view_of(torch.zeros(*ids.shape, 1), vision)
            object.__setattr__(view, "inputs", {**batch, **handle.parts[0].prompt})
            seen = maps.at_tokens(view)
        record.undo()
        found.append(seen)
    assert float(found[0].abs().sum()) > 0
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


def pictures(name, counts, videos=()):
    family = FAMILIES[name]
    model, batch = family.make(), family.inputs(counts, videos=videos)
    found, record = vision_language(model), Attachment()
    vision = found.image_tokens(batch["input_ids"])
    view = view_of(torch.zeros(*vision.shape, 1), vision)
    object.__setattr__(view, "inputs", batch)
    numbers = pictures_of(Encoder(found, record), view)
    record.undo()
    assert bool(((numbers >= 0) == vision).all())
    return [numbers[row][vision[row]].unique_consecutive(return_counts=True) for row in range(len(vision))]


def test_every_token_knows_its_picture():
    one, two, none = pictures("llava", (1, 2, 0))
    assert [x.tolist() for x in one] == [[0], [36]] and [x.tolist() for x in two] == [[1, 2], [36, 36]]
    assert not len(none[0])
    # rows of one picture are divided by breaks, which are text
    one, two, _ = pictures("mistral3", (1, 2, 0))
    assert one[0].tolist() == [0] and two[0].tolist() == [1, 2]
    # a base view, then its tiles with their newlines
    one, two, _ = pictures("llava_next", (1, 2, 0))
    assert one[0].tolist() == [0, 1] and two[0].tolist() == [2, 3, 4, 5]
    # frames of a video come after the pictures
    one, two = pictures("qwen2_vl", (1, 0), videos=(1, 1))
    assert one[0].tolist() == [0, 1, 2] and two[0].tolist() == [3, 4]


@torch.no_grad()
def test_pictures_share_a_prompts_counts_and_short_prompts_stay_whole():
    model, batch = tiny_llava(), llava_batch((1, 2, 0))
    with sal.focus(model, sal.VisionDrop(encoder=(14, 6), stages=((9, 1),), layers=(3,))) as handle:
        model(**batch)
        first, second = handle.parts[0].stages
    assert first.kept.sum(-1).tolist() == [16, 20, 0] and second.kept.sum(-1).tolist() == [10, 10, 0]
    assert not bool(first.merged[0].any()) and bool(first.merged[1].any())
    (places,) = (batch["input_ids"][1] == 63).nonzero(as_tuple=True)
    halves = first.kept[1, places].view(2, 16).sum(-1)
    assert halves.tolist() == [10, 10]
    spent = handle.spent["visiondrop"]
    assert spent["kept from layer 0 on"] == 36 and spent["kept from layer 3 on"] == 20


@torch.no_grad()
def test_the_question_does_not_change_the_choice():
    model, batch = tiny_llava(), llava_batch((1,))
    kept = []
    for word in (5, 40):
        batch["input_ids"][0, -2] = word
        with sal.focus(model, CONTRACT["method"]) as handle:
            model(**batch)
            kept.append(torch.stack([stage.kept for stage in handle.parts[0].stages]))
    assert torch.equal(*kept)


@torch.no_grad()
def test_layouts_and_positions_are_what_they_say():
    model, batch = tiny_llava(), llava_batch((1,))
    logits = {}
    for layout in ("append", "in_place"):
        for positions in ("renumber", "keep"):
            method = sal.VisionDrop(encoder=(6, 3), layout=layout, positions=positions, **ENCODER)
            with sal.focus(model, method) as handle:
                logits[layout, positions] = model(**batch).logits[0, -1]
                kept = handle.parts[0].stages[0]
            assert int(kept.kept.sum()) == 9 and int((kept.merged & ~kept.kept).sum()) == 0
    values = list(logits.values())
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@torch.no_grad()
def test_beams_and_videos():
    model, batch = tiny_llava(), llava_batch((1, 2, 0))
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3}
    with sal.focus(model, CONTRACT["method"]):
        together = model.generate(**batch, **settings)
        images = {0: batch["pixel_values"][:1], 1: batch["pixel_values"][1:]}
        for row in range(3):
            places = batch["attention_mask"][row].bool()
            one = {k: v[row : row + 1, places] for k, v in batch.items() if k != "pixel_values"}
            if row in images:
                one["pixel_values"] = images[row]
            assert together[row, -4:].tolist() == model.generate(**one, **settings)[0, -4:].tolist()
    for name in ("qwen2_vl", "llava_onevision"):
        family = FAMILIES[name]
        model = family.make()
        with sal.focus(model, sal.VisionDrop(encoder=(10, 2), stages=((6, 1),), layers=(2,))) as handle:
            model.generate(**family.inputs((1, 0), videos=(1, 1)), max_new_tokens=3, do_sample=False)
            assert handle.parts[0].stages[0].kept.sum(-1).tolist() == [12, 12]


@torch.no_grad()
def test_deepstack_takes_the_later_stages_alone():
    model, batch = FAMILIES["qwen3_vl"].make(), FAMILIES["qwen3_vl"].inputs((1, 2, 0))
    with pytest.raises(ConflictError, match="layers must be >= 1 for Qwen3VL"):
        sal.focus(model, CONTRACT["method"])
    with sal.focus(model, sal.VisionDrop(encoder=None, stages=((6, 2),), layers=(2,))) as handle:
        model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert handle.parts[0].stages[0].kept.sum(-1).tolist()[1:] == [8, 0]


@torch.no_grad()
def test_bfloat16_and_pictures_that_were_not_given():
    model, batch = tiny_llava().bfloat16(), llava_batch((1, 2, 0))
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with sal.focus(model, CONTRACT["method"]):
        assert bool(model(**batch).logits.isfinite().all())
        # nor are those of the prompt before taken
        with pytest.raises(ParameterError, match="inputs must be with pixel_values for the 48 image tokens"):
            model(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    with pytest.raises(ParameterError, match=r"encoder_layer must be in \[-3, 2\] for the 3 vision layers"):
        sal.focus(model, sal.VisionDrop(encoder_layer=3))
