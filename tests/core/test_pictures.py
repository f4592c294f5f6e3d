"""Pictures: the right panels and axes, and SVG that is small, repeatable and safe inside a page."""

import base64
import math
import re
import struct
import subprocess
import sys
import textwrap
from xml.etree import ElementTree

import pytest
import torch

from salience.core.drawing import ARMS, BASELINE, NARROW, colours
from salience.core.pictures import (
    MEMORY,
    as_svg,
    byte_unit,
    bytes_text,
    draw_histories,
    loss_curves,
    memory_bars,
    memory_total,
)
from salience.core.scores import History

BYTES = {"parameters": 4096, "gradients": 1024, "optimizer": 2048, "saved_for_backward": 10240}


def history(steps, rows):
    made = History()
    for step, row in zip(steps, rows):
        made.add(step, torch.as_tensor(row))
    return made


def rows(losses, evals=(), second=0.5):
    trained = [
        {"step": step, "loss": loss, "lr": 1e-3, "seconds": second * step}
        for step, loss in enumerate(losses, 1)
    ]
    return trained + [{"step": step, "eval_loss": loss} for step, loss in evals]


def panels(figure):
    """Axes without those of colour bars."""
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def image_sizes(svg):
    pngs = re.findall(r"data:image/png;base64,([^\"]+)", svg)
    return [struct.unpack(">II", base64.b64decode(png)[16:24]) for png in pngs]


def test_a_map_has_units_upwards_steps_to_the_right_and_a_colour_bar():
    one = history([0, 10, 20], [[0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]])
    figure = draw_histories({"ist: importance": ("layer", one)})
    (axes,) = panels(figure)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title("left")) == (
        "step",
        "layer",
        "ist: importance",
    )
    assert len(figure.axes) == 2
    (image,) = axes.images
    assert torch.equal(torch.as_tensor(image.get_array().filled()), one.values().double().T)
    assert image.get_extent() == [0, 30, -0.5, 3.5]
    assert image.origin == "lower"
    assert image.get_clim() == (0, 5)
    assert image.cmap.name == "viridis"


def test_each_history_has_its_panel_and_one_without_rows_has_none():
    one = history([0, 1], [[1.0, 2.0]] * 2)
    figure = draw_histories({"a": ("layer", one), "b": ("head", one), "c": ("token", History())})
    assert [axes.get_ylabel() for axes in panels(figure)] == ["layer", "head"]
    as_svg(figure)
    as_svg(draw_histories({}))


def test_the_title_may_say_what_the_units_are():
    one = history([0, 1], [[1.0, 2.0]] * 2)
    (axes,) = panels(draw_histories({"sstoken: share kept of each tenth of the response": ("token", one)}))
    assert axes.get_ylabel() == "tenth"


def test_a_single_row_is_drawn_as_bars():
    figure = draw_histories({"wanda: importance": ("layer", history([7], [[1.0, -2.0, math.nan]]))})
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("score", "layer")
    assert axes.get_title("left") == "wanda: importance, at step 7"
    assert axes.get_ylim() == (-0.5, 2.5)
    as_svg(figure)


def test_uneven_steps_keep_their_places():
    one = history([0, 1, 10], [[0.0], [1.0], [2.0]])
    (axes,) = panels(draw_histories({"a": ("layer", one)}))
    low, high, *_ = axes.images[0].get_extent()
    values = axes.images[0].get_array()[0]
    at = [low + (index + 0.5) * (high - low) / len(values) for index in range(len(values))]
    assert {round(float(value)) for place, value in zip(at, values) if 2 < place < 9} == {1}
    assert float(values[0]) == 0
    assert float(values[-1]) == 2


@pytest.mark.parametrize(("until", "end"), [(None, 50), (40, 40), (25, 50), (90, 50)])
def test_the_last_column_ends_with_training(until, end):
    one = history([0, 25], [[0.0], [1.0]])
    (axes,) = panels(draw_histories({"a": ("layer", one)}, until=until))
    assert axes.get_xlim() == (0, end)


@pytest.mark.parametrize(("recorded", "units"), [(3000, 4), (4, 5000)], ids=["many steps", "many units"])
def test_large_maps_stay_small(recorded, units):
    one = history(range(recorded), torch.arange(float(units)).repeat(recorded, 1))
    svg = as_svg(draw_histories({"a": ("unit", one)}))
    assert len(svg) < 60_000
    assert all(width <= 600 and height <= 512 for width, height in image_sizes(svg))


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0], ids=["nan", "inf", "constant"])
def test_maps_without_contrast_are_drawn(value):
    as_svg(draw_histories({"a": ("layer", history([0, 1], [[value, value]] * 2))}))


def test_what_is_not_finite_does_not_set_the_scale():
    (axes,) = panels(draw_histories({"a": ("layer", history([0, 1], [[1.0, math.inf], [2.0, math.nan]]))}))
    assert axes.images[0].get_clim() == (1, 2)


def test_losses_of_several_arms_against_step_and_time():
    figure = loss_curves(
        {"lora": rows([3.0, 2.0, 1.0], [(3, 1.2)]), "ist": rows([3.0, 1.9, 0.9], [(3, 1.1)], second=0.4)},
        labels={"lora": "LoRA", "ist": "LoRA with IST"},
        baseline="lora",
    )
    assert [axes.get_xlabel() for axes in figure.axes] == ["step", "training time (s)"]
    assert figure.axes[0].get_ylabel() == "loss"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["LoRA", "LoRA with IST", "held-out loss"]
    assert {line.get_color() for line in figure.axes[0].lines} == {BASELINE, ARMS[0]}
    assert list(figure.axes[1].lines[3].get_xdata()) == pytest.approx([0.4, 0.8, 1.2])


def test_a_single_arm_is_drawn_against_the_step_alone():
    figure = loss_curves({"lora": rows([3.0, 2.0])}, baseline="lora")
    assert [axes.get_xlabel() for axes in figure.axes] == ["step"]
    assert figure.axes[0].lines[0].get_color() == ARMS[0]


def test_on_a_phone_the_panels_are_one_below_the_other():
    two = {"a": rows([3.0, 2.0]), "b": rows([3.0, 2.0])}
    above, below = loss_curves(two, width=NARROW).axes
    assert above.get_subplotspec().get_geometry()[:2] == (2, 1)
    assert below.get_ylabel() == "loss"


def test_long_times_are_in_minutes_or_hours():
    two = {name: rows([3.0, 2.0], second=600) for name in "ab"}
    assert loss_curves(two).axes[1].get_xlabel() == "training time (min)"
    two = {name: rows([3.0, 2.0], second=7200) for name in "ab"}
    assert loss_curves(two).axes[1].get_xlabel() == "training time (h)"


@pytest.mark.parametrize(
    "losses", [[], [2.0], [math.nan] * 3, [1.0, math.nan, math.inf, 2.0], [None, 1.0]], ids=str
)
def test_losses_that_are_missing_or_not_finite_leave_a_gap(losses):
    figure = loss_curves({"a": rows(losses)})
    low, high = figure.axes[0].get_ylim()
    assert low < high < 10
    as_svg(figure)


def test_a_wild_batch_does_not_flatten_the_picture():
    losses = [1.0] * 200
    losses[100] = 1000.0
    assert loss_curves({"a": rows(losses)}).axes[0].get_ylim()[1] < 150


def test_memory_bars_stack_the_four_parts():
    arms = {
        "a": {"label": "LoRA", "memory": BYTES},
        "b": {"label": "IST", "memory": {**BYTES, "gradients": 0}},
    }
    figure = memory_bars(arms, baseline="a")
    (axes,) = figure.axes
    assert axes.get_xlabel() == "training memory (KiB)"
    ends = sorted(bar.get_x() + bar.get_width() for bar in axes.patches if round(bar.get_y() + 0.26) == 0)
    assert ends == pytest.approx([4, 5, 7, 17])
    assert {"LoRA", "IST", "17.0 KiB", "16.0 KiB"} <= {text.get_text() for text in axes.texts}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [name for _, name, _ in MEMORY]


def test_memory_of_nothing_is_drawn():
    as_svg(memory_bars({"a": {"label": "a", "memory": dict.fromkeys(BYTES, 0)}}))


def test_memory_total_counts_the_parts_and_not_the_peak():
    assert memory_total({**BYTES, "peak": 10**9}) == 17408


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (30 * 2**20, "30.0 MiB"),
        (411.6 * 1024, "412 KiB"), (99.96 * 2**20, "100 MiB"), (2.5 * 2**30, "2.50 GiB"), (3 * 2**40, "3.00 TiB"),
    ],
)  # fmt: skip
def test_bytes_read_well(count, text):
    assert bytes_text(count) == text


def test_the_unit_of_bytes_and_its_size():
    assert byte_unit(5 * 2**20) == ("MiB", 2**20)


def test_colours_are_grey_for_the_baseline_and_differ_otherwise():
    paint = colours(["lora", "ist", "lisa"], "lora")
    assert paint == {"lora": BASELINE, "ist": ARMS[0], "lisa": ARMS[1]}
    assert colours(["lora"], "lora") == {"lora": ARMS[0]}
    assert len({*ARMS, BASELINE}) == 7


def test_svg_is_one_element_with_text_and_nothing_from_outside():
    svg = as_svg(loss_curves({"a": rows([3.0, 2.0])}), label='loss "of" <a>', salt="one")
    tree = ElementTree.fromstring(svg)
    assert tree.tag == "{http://www.w3.org/2000/svg}svg"
    assert tree.get("aria-label") == 'loss "of" <a>'
    assert "step" in {element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert "<style" not in svg
    assert not re.search(r'(href|src)="(?!#|data:)', svg)


def test_svg_is_repeatable_and_its_ids_are_its_own():
    def ids(salt):
        svg = as_svg(loss_curves({"a": rows([3.0, 2.0])}), salt=salt)
        return svg, set(re.findall(r' id="([^"]*)"', svg))

    first, found = ids("one")
    assert first == ids("one")[0]
    assert found
    assert not found & ids("two")[1]
    assert found == {*re.findall(r"url\(#([^)]*)\)", first), *re.findall(r'href="#([^"]*)"', first)}


@pytest.mark.parametrize(
    "name",
    ["$x^2", "<script>", "\x00\ud800", "名前", "x" * 300],
    ids=["dollar", "tag", "control", "cjk", "long"],
)
def test_labels_are_the_users_own_words(name, recwarn):
    arms = {"a": {"label": name, "memory": BYTES}, "b": {"label": "other", "memory": BYTES}}
    for width in (820, NARROW):
        svgs = [
            as_svg(memory_bars(arms, width=width)),
            as_svg(loss_curves({"a": rows([2.0]), "b": rows([2.0])}, labels={"a": name}, width=width)),
            as_svg(draw_histories({name: ("layer", history([0, 1], [[1.0]] * 2))}, width=width)),
        ]
        for svg in svgs:
            ElementTree.fromstring(svg)
    assert not recwarn.list


def test_drawing_leaves_global_settings_alone_and_pyplot_unimported():
    code = f"""
        import sys
        import matplotlib
        # asking for the backend would import pyplot
        settings = lambda: {{key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}}
        before = settings()
        from salience.core.pictures import as_svg, memory_bars
        as_svg(memory_bars({{"a": {{"label": "a", "memory": {BYTES}}}}}))
        assert settings() == before
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
