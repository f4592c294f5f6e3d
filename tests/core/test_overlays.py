"""Overlays: the right panels, counts and places; the pixels of kept, merged and dropped tokens; bad input."""

import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from salience.core.drawing import NARROW
from salience.core.errors import ParameterError
from salience.core.overlays import DROPPED, KEPT, KEPT_LINE, MERGED, MERGED_LINE, Stage, _outlines, draw_kept
from salience.core.pictures import as_svg


def grid(number, high, wide, cell):
    return np.array(
        [
            [number, top, left, top + cell, left + cell]
            for top in range(0, high, cell)
            for left in range(0, wide, cell)
        ],
        dtype=float,
    )


def picture(high=48, wide=48, seed=0):
    return np.random.default_rng(seed).random((3, high, wide))


def panels(figure):
    return [axes for axes in figure.axes if axes.images]


def words(figure):
    return [text.get_text() for text in figure.texts]


def shapes(axes, colour):
    """Straight lines of a colour as pairs of ends, and centres of filled marks."""
    found, marks = set(), []
    for patch in axes.patches:
        if to_hex(patch.get_edgecolor()) == colour:
            ends = patch.get_path().vertices
            if patch.get_fill():
                marks += ends.reshape(-1, 5, 2)[:, :4].mean(1).tolist()
            else:
                found |= {tuple(map(tuple, pair)) for pair in ends.reshape(-1, 2, 2).tolist()}
    return found, marks


def test_a_row_for_each_picture_and_a_column_for_each_stage():
    places = np.concatenate([grid(0, 48, 48, 12), grid(1, 24, 48, 12), np.full((2, 5), np.nan)])
    half, few = np.arange(26) % 2, np.arange(26) < 5
    figure = draw_kept(
        [picture(), picture(24)],
        places,
        {"PyramidDrop": [Stage("layer 8", half), Stage("layer 16", few)], "FastV": [Stage("layer 2", half)]},
        labels=["image 1", "image 2"],
    )
    assert len(panels(figure)) == 2 * 4
    shown = words(figure)
    for text in ("PyramidDrop", "FastV", "picture", "image 1", "image 2", "kept", "dropped"):
        assert text in shown
    assert shown.count("layer 8: 13 of 26 kept") == 1
    assert shown.count("layer 16: 5 of 26 kept") == 1
    # tokens that lie nowhere count for the stage and for no picture
    assert shown.count("8 of 16") == 2
    assert shown.count("4 of 8") == 2
    assert "5 of 16" in shown
    assert "0 of 8" in shown
    assert "merged into another" not in shown


def test_pixels_tell_what_became_of_them():
    image = np.zeros((3, 24, 24))
    image[0], image[2] = 1.0, 0.2
    fates = [KEPT, DROPPED, MERGED, DROPPED]
    figure = draw_kept([image], grid(0, 24, 24, 12), {"X": [Stage("layer 2", fates)]})
    plain, drawn = (axes.images[0].get_array() / 255.0 for axes in panels(figure))
    np.testing.assert_allclose(plain, image.transpose(1, 2, 0), atol=0.003)
    np.testing.assert_array_equal(drawn[:12, :12], plain[:12, :12])
    grey = 0.299 + 0.2 * 0.114
    pale = 0.84 + 0.28 * (grey - 0.84)
    np.testing.assert_allclose(drawn[:12, 12:], pale, atol=0.003)
    np.testing.assert_allclose(drawn[12:, 12:], pale, atol=0.003)
    between = pale + 0.45 * (image.transpose(1, 2, 0)[12:, :12] - pale)
    np.testing.assert_allclose(drawn[12:, :12], between, atol=0.003)


def test_the_outline_is_the_border_of_what_was_kept():
    fates = [KEPT, KEPT, MERGED, DROPPED]
    axes = panels(draw_kept([picture(24, 24)], grid(0, 24, 24, 12), {"X": [Stage("layer 2", fates)]}))[1]
    rows = {((0.0, 0.0), (24.0, 0.0)), ((0.0, 12.0), (24.0, 12.0))}
    columns = {((0.0, 0.0), (0.0, 12.0)), ((24.0, 0.0), (24.0, 12.0))}
    assert shapes(axes, KEPT_LINE) == (rows | columns, [])
    around, marks = shapes(axes, MERGED_LINE)
    assert len(around) == 4
    assert marks == [[6.0, 18.0]]


@pytest.mark.parametrize("seed", range(3))
def test_outlines_have_the_length_of_the_border(seed):
    """Against a count of cells whose neighbour was not kept."""
    kept = np.random.default_rng(seed).random((7, 5)) < 0.5
    around = np.pad(kept, 1)
    border = sum(
        int((kept & ~around[1 + down : 8 + down, 1 + across : 6 + across]).sum())
        for down, across in ((0, 1), (0, -1), (1, 0), (-1, 0))
    )
    found = _outlines(grid(0, 70, 50, 10)[kept.ravel(), 1:])
    assert sum(abs(x - u) + abs(y - v) for (x, y), (u, v) in found) == 10 * border


def test_groups_that_do_not_fit_start_a_new_band():
    places, fates = grid(0, 48, 48, 12), np.ones(16)
    four = [Stage(f"layer {number}", fates) for number in range(4)]
    side_by_side = draw_kept([picture()], places, {"A": four, "B": four[:1]})
    below = draw_kept([picture()], places, {"A": four, "B": four})
    assert len(panels(side_by_side)) == 6
    assert len(panels(below)) == 10  # the plain picture once more
    assert below.get_figheight() > 1.5 * side_by_side.get_figheight()
    long = draw_kept([picture()], places, {"A": [Stage(f"layer {number}", fates) for number in range(8)]})
    assert {"A", "A, continued"} <= set(words(long))
    assert len(panels(long)) == 10


@pytest.mark.parametrize("width", [NARROW, 820])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_everything_lies_on_the_page_and_panels_do_not_overlap(count, width):
    images = [picture(20 + 30 * number, 60, seed=number) for number in range(count)]
    places = np.concatenate(
        [grid(number, image.shape[1] // 10 * 10, 60, 10) for number, image in enumerate(images)]
    )
    fates = np.arange(len(places)) % 3
    stages = {
        "Method": [Stage("layer 8", fates), Stage("layer 16", fates)],
        "Other": [Stage("layer 2", fates)],
    }
    figure = draw_kept(images, places, stages, width=width)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert figure.get_figwidth() * 96 == pytest.approx(width)
    rectangles = [axes.get_position() for axes in panels(figure)]
    for number, one in enumerate(rectangles):
        assert 0 <= one.x0 < one.x1 <= 1
        assert 0 <= one.y0 < one.y1 <= 1
        for other in rectangles[:number]:
            assert not (
                min(one.x1, other.x1) - max(one.x0, other.x0) > 1e-9
                and min(one.y1, other.y1) - max(one.y0, other.y0) > 1e-9
            )
    renderer = canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in figure.texts]
    for number, one in enumerate(texts):
        assert one.x0 >= 0, figure.texts[number]
        assert one.x1 <= figure.bbox.width + 1, figure.texts[number]
        for place, other in enumerate(texts[:number]):
            assert not one.overlaps(other), (figure.texts[number], figure.texts[place])


def test_proportions_of_pictures_are_kept():
    places = np.concatenate([grid(0, 24, 48, 12), grid(1, 96, 24, 12)])
    figure = draw_kept([picture(24, 48), picture(96, 24)], places, {"X": [Stage("a", np.ones(len(places)))]})
    width, height = figure.get_size_inches()
    ratios = [
        axes.get_position().height * height / (axes.get_position().width * width) for axes in panels(figure)
    ]
    assert ratios == pytest.approx([0.5, 0.5, 4.0, 4.0])


def test_what_is_left_out_is_said():
    places = np.concatenate([grid(number, 24, 24, 12) for number in range(11)])
    figure = draw_kept([picture(24, 24)] * 11, places, {"X": [Stage("a", np.ones(44))]}, most=8)
    assert len(panels(figure)) == 16
    assert "3 more pictures are not drawn." in words(figure)
    assert "a: 44 of 44 kept" in words(figure)


def test_a_large_picture_is_made_small():
    places = grid(0, 672, 672, 14)
    fates = np.arange(len(places)) % 2
    text = as_svg(
        draw_kept([np.zeros((3, 672, 672))], places, {"X": [Stage("layer 8", fates)]}), label="what was kept"
    )
    assert text.startswith("<svg")
    assert len(text) < 60_000
    assert 'aria-label="what was kept"' in text
    sizes = re.findall(r'<image[^>]*width="([\d.]+)"', text)
    assert len(sizes) == 2


def test_words_of_the_user_are_no_markup():
    text = as_svg(
        draw_kept([picture()], grid(0, 48, 48, 12), {"a<b>$x$": [Stage("lay\ner <1>", np.ones(16))]})
    )
    assert "a&lt;b&gt;$x$" in text
    assert "lay er &lt;1&gt;" in text


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"pictures": []}, r"pictures must be at least one \[3, H, W\] array, got 0"),
        ({"pictures": [np.zeros((4, 4, 3))]}, r"pictures must be finite \[3, H, W\] arrays, got \(4, 4, 3\)"),
        ({"pictures": [np.full((3, 4, 4), np.nan)]}, "pictures must be finite"),
        ({"places": np.zeros((4, 4))}, r"places must be an \[n, 5\] array, got \(4, 4\)"),
        ({"places": grid(1, 24, 24, 12)}, r"places must be of pictures 0 to 0, got \[1.0\]"),
        ({"methods": {}}, "methods must be at least one method with a stage"),
        ({"methods": {"X": []}}, "methods must be at least one method with a stage"),
        ({"methods": {"X": [Stage("layer 2", [1, 0])]}}, "fates of X, layer 2 must be 4 numbers of 0"),
        (
            {"methods": {"X": [Stage("layer 2", [1, 0, 0.5, 0])]}},
            r"numbers of 0, 1 and 2, got 'shape \(4,\) with",
        ),
        ({"labels": ["a", "b"]}, "labels must be none or 1, one a picture"),
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"width": 100}, "width must be at least 256 pixels, got 100"),
    ],
)
def test_bad_input(change, text):
    good = {
        "pictures": [picture(24, 24)],
        "places": grid(0, 24, 24, 12),
        "methods": {"X": [Stage("a", np.ones(4))]},
    }
    with pytest.raises(ParameterError, match=text):
        draw_kept(**(good | change))


def test_importing_draws_nothing_and_loads_no_matplotlib():
    code = "import sys, salience.core.overlays; sys.exit(any('matplotlib' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
