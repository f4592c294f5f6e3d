"""The report: one file that needs nothing else, from a run folder; what is missing or broken is named."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from safetensors.torch import save_file

from salience.core.errors import ParameterError
from salience.report import build, view, words

LORA = {
    "label": "LoRA",
    "methods": [],
    "slugs": [],
    "quality": 71.5,
    "quality_by_task": {"copy": 90.0, "sort": 53.0},
    "eval_loss": 0.75,
    "seconds": 45.0,
    "step_seconds": 0.21,
    "memory": {"parameters": 8192, "gradients": 1024, "optimizer": 2048, "saved_for_backward": 9216},
    "trainable_parameters": 256,
    "steps": 4,
    "spent": {},
}
IST = {
    **LORA,
    "label": "LoRA with IST",
    "methods": ["IST(active_layers=2)"],
    "slugs": ["ist"],
    "quality": 72.5,
    "quality_by_task": {"copy": 91.0, "sort": 54.0},
    "step_seconds": 0.1848,
    "memory": {"parameters": 8192, "gradients": 256, "optimizer": 512, "saved_for_backward": 1280},
    "spent": {
        "ist": {"layers": 3, "trained now": [0, 2], "share of adapter parameters": 0.25, "held bytes": 2048}
    },
}
RESULT = {
    "title": "Tuning a model on data",
    "model": {"name": "small llama", "parameters": 3_375_104, "layers": 3, "source": "made in place"},
    "data": {"name": "tasks", "train": 4000, "test": 200, "description": "with planted noise"},
    "baseline": "lora",
    "quality": {"name": "exact match", "higher_is_better": True, "unit": "%"},
    "arms": {"lora": LORA, "ist": IST},
    "verdict": ["Memory is saved."],
    "about": {"salience": "0.1.0", "machine": "two cores"},
}
SAMPLE = {
    "arm": "ist",
    "slug": "sstoken",
    "title": "A noisy sample",
    "tokens": ["Sort", " b", " a", "\n", "<script>alert(1)</script>", "\x00"],
    "prompt": [True, True, False, False, False, False],
    "score": [None, None, 0.9, 0.1, -0.5, math.nan],
    "kept": [False, False, True, True, False, False],
}
SECTIONS = ["summary", "comparison", "loss", "memory", "maps", "tokens", "tasks", "methods", "again", "about"]


class Page(HTMLParser):
    """What a browser would see: elements, links and the text outside of styles."""

    VOID = frozenset({"meta", "br", "path", "use", "rect", "image"})

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags, self.ids, self.links, self.open, self.words = [], [], [], [], []
        self.feed(self.html)
        assert not self.open
        self.text = " ".join("".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._note(attrs)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)

    def _note(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)

    @property
    def sections(self):
        return [name for name in self.ids if name in SECTIONS]


def write(folder, result=RESULT, losses=(3.0, 2.0, 1.0, 0.9), scores=True, tokens=(SAMPLE,), recipe=None):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(recipe or {"methods": ["ist"], "nested": {"rank": 8}}))
    (folder / "result.json").write_text(json.dumps(result))
    lines = []
    for arm in result["arms"]:
        for step, loss in enumerate(losses, 1):
            lines.append({"arm": arm, "step": step, "loss": loss, "lr": 1e-3, "seconds": 0.2 * step})
        lines.append({"arm": arm, "step": len(losses), "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if scores:
        values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 4.0, 2.0, 3.0]])
        kept = {"ist/ist/importance/steps": torch.tensor([0, 2]), "ist/ist/importance/values": values}
        save_file(kept, str(folder / "scores.safetensors"))
    if tokens:
        (folder / "tokens.json").write_text(json.dumps(list(tokens)))
    return folder


def changed(**changes):
    """RESULT with some entries replaced: changed(**{"arms.ist.label": "x"})."""
    result = copy.deepcopy(RESULT)
    for path, value in changes.items():
        *parents, last = path.split(".")
        inner = result
        for name in parents:
            inner = inner[name]
        inner[last] = value
    return result


@pytest.fixture
def unpainted(monkeypatch):
    """Leave the pictures out where only words are looked at: they take most of the time."""
    monkeypatch.setattr(view, "drawn", lambda draw, label, salt: {"wide": "", "narrow": ""})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return Page(build(write(tmp_path_factory.mktemp("run"))))


def test_the_page_is_written_beside_the_run(tmp_path, unpainted):
    path = build(str(write(tmp_path)))
    assert path == tmp_path / "report.html"
    assert not list(tmp_path.glob(".*"))


def test_the_page_needs_no_other_file_and_no_network(page):
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not {"script", "link", "iframe", "img", "object", "base"} & set(page.tags)
    assert "@import" not in page.html
    assert not re.search(r"url\((?!#)", page.html)
    assert set(re.findall(r"https?://[^\"\s<)]*", page.html)) == {"http://www.w3.org/2000/svg"}


def test_ids_are_unique_so_that_pictures_do_not_borrow_from_hidden_ones(page):
    per_picture = [
        set(re.findall(r' id="([^"]*)"', svg)) for svg in re.findall(r"<svg.*?</svg>", page.html, re.S)
    ]
    assert len(per_picture) == 6
    assert sum(map(len, per_picture)) == len(set.union(*per_picture))


def test_all_sections_stand_in_order(page):
    assert page.sections == SECTIONS


def test_the_headline_says_what_was_saved_and_what_it_cost(page):
    assert (
        "LoRA with IST: 50 % less training memory, 12 % less time per step, exact match 72.5 % against 71.5 %."
        in page.text
    )


def test_figures_ratios_and_signed_differences(page):
    for words_ in (
        "20.0 KiB → 10.0 KiB", "−10.0 KiB · 0.50×", "−25.2 ms · 0.88×", "+1.0 points", "one run, no interval",
        "With 200 held-out samples the choice of samples alone moves a value of 71.5 % by about 3.2 points",
        "salience bench ist", "small llama (3.38 million parameters; 3 layers; made in place)",
        "4,000 training samples; 200 held out; with planted noise", "4 steps each", "Memory is saved.",
        "Both start from the same weights",
    ):  # fmt: skip
        assert words_ in page.text, words_


def test_what_the_methods_did_is_told_in_words(page):
    assert "IST(active_layers=2)" in page.text
    for words_ in ("trained now 0, 2", "share of adapter parameters 25 %", "held bytes 2.00 KiB"):
        assert words_.replace(" ", "") in page.text.replace(" ", ""), words_


def test_the_map_names_method_unit_and_best_layers(page):
    assert "IST: importance" in page.html
    assert ">layer</text>" in page.html
    assert "2 recordings, steps 0 to 2. Highest at the end: layers 1, 3 and 2." in page.text


def test_tokens_are_text_with_their_state_and_score(page):
    spans = re.findall(
        r'<span class="(prompt|kept|dropped)" title="([^"]*)"(?: style="--s: ([\d.]+)")?>', page.html
    )
    assert spans == [
        ("prompt", "prompt", ""), ("prompt", "prompt", ""), ("kept", "kept, score 0.900", "1.00"),
        ("kept", "kept, score 0.100", "0.00"), ("dropped", "dropped, score −0.500", ""), ("dropped", "dropped", ""),
    ]  # fmt: skip
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.html
    assert "↵\n" in page.html
    assert "\u2400" in page.html
    assert "2 of 4 answer tokens kept." in page.text


def test_the_command_repeats_the_run_and_the_recipe_is_shown(tmp_path, unpainted):
    page = Page(build(write(tmp_path / "my run")))
    again = f"salience tune --recipe '{tmp_path}/my run/recipe.json' --out '{tmp_path}/my run-again'"
    assert again in page.text
    assert '"nested": { "rank": 8 }' in page.text
    page = Page(build(write(tmp_path / "other", {**RESULT, "command": "salience shrink --keep 0.5"})))
    assert "salience shrink --keep 0.5" in page.text
    assert "salience tune" not in page.text


EVIL = '</style><script>alert("1")</script>\'&'


@pytest.mark.parametrize(
    "result",
    [
        changed(title=EVIL),
        changed(**{"arms.ist.label": EVIL}),
        changed(**{"arms.ist.methods": [EVIL]}),
        changed(**{"arms.ist.spent": {"ist": {EVIL: EVIL}}}),
        changed(**{"arms.ist.quality_by_task": {EVIL: 1.0}}),
        changed(**{"quality.name": EVIL, "quality.unit": EVIL}),
        changed(**{"model.name": EVIL, "data.description": EVIL}),
        changed(verdict=[EVIL], about={EVIL: EVIL}, command=EVIL),
    ],
    ids=["title", "label", "method", "spent", "task", "quality", "facts", "end"],
)
def test_all_words_are_escaped(tmp_path, result, unpainted):
    page = Page(build(write(tmp_path, result, recipe={EVIL: EVIL}, tokens=[{**SAMPLE, "title": EVIL}])))
    assert "script" not in page.tags
    assert page.tags.count("style") == 1


def test_names_in_the_pictures_are_escaped_too(tmp_path):
    write(tmp_path, changed(**{"arms.ist.label": EVIL}))
    key = f"ist/{EVIL.replace('/', '')}/a/b {EVIL}"
    save_file(
        {f"{key}/steps": torch.tensor([3]), f"{key}/values": torch.ones(1, 2)},
        tmp_path / "scores.safetensors",
    )
    page = Page(build(tmp_path))
    assert "maps" in page.sections
    assert "script" not in page.tags
    assert ">unit</text>" in page.html


def test_optional_parts_leave_their_section_out(tmp_path, unpainted):
    result = changed(verdict=[], about={}, model=None, data={})
    for arm in result["arms"].values():
        for name in (
            "quality_by_task",
            "methods",
            "slugs",
            "eval_loss",
            "trainable_parameters",
            "steps",
            "spent",
        ):
            del arm[name]
    write(tmp_path, result, scores=False, tokens=())
    (tmp_path / "metrics.jsonl").write_text("")
    page = Page(build(tmp_path))
    assert page.sections == ["summary", "comparison", "memory", "again", "about"]
    assert "salience bench" not in page.text
    assert "held-out" not in page.text


def test_a_single_arm_is_told_without_comparison(tmp_path):
    result = changed(baseline="ist")
    del result["arms"]["lora"]
    page = Page(build(write(tmp_path, result)))
    assert page.sections == SECTIONS
    assert "LoRA with IST: exact match 72.5 %, 10.0 KiB of training memory, 185 ms per step." in page.text
    for word in ("baseline", "against", "one run", "·", "Both"):
        assert word not in page.text.replace("baseline:", "")


def test_three_arms_get_a_sentence_each(tmp_path, unpainted):
    result = changed()
    result["arms"]["same"] = {
        **LORA,
        "label": "LoRA with nothing",
        "methods": ["Nothing()"],
        "slugs": ["nothing"],
    }
    page = Page(build(write(tmp_path, result)))
    assert "LoRA with IST: 50 % less training memory" in page.text
    assert "LoRA with nothing: the same training memory, the same time per step" in page.text
    assert "All arms start from the same weights" in page.text


def test_losses_that_are_not_finite_are_told(tmp_path):
    page = Page(build(write(tmp_path, losses=(3.0, math.nan, math.inf, None))))
    assert "LoRA: the loss was not finite at step 2 and 2 more." in page.text


def test_numbers_that_are_not_known_are_dashes(tmp_path, unpainted):
    result = changed(
        **{"arms.ist.quality": None, "arms.ist.step_seconds": math.nan, "arms.lora.eval_loss": None}
    )
    page = Page(build(write(tmp_path, result)))
    assert "time per step not known, exact match – against 71.5 %." in page.text


def test_the_peak_is_shown_where_it_was_measured(tmp_path, page, unpainted):
    assert "peak memory" not in page.text
    measured = changed(**{"arms.ist.memory": {**IST["memory"], "peak": 4096}})
    assert "peakmemorymeasured–4.00KiB" in Page(build(write(tmp_path, measured))).text.replace(" ", "")


def test_lower_may_be_better(tmp_path, unpainted):
    quality = {"name": "held-out loss", "higher_is_better": False, "unit": "nats/token"}
    page = Page(
        build(
            write(tmp_path, changed(quality=quality, **{"arms.ist.quality": 0.7, "arms.lora.quality": 0.75}))
        )
    )
    assert "held-out loss 0.7000 nats/token against 0.7500 nats/token." in page.text
    assert "lower is better" in page.text
    assert "−0.0500" in page.text


def test_halves_of_surrogate_pairs_do_not_break_the_file(tmp_path, unpainted):
    page = Page(build(write(tmp_path, tokens=[{**SAMPLE, "tokens": ["\ud83d"] * 6}])))
    assert "tokens" in page.sections


def test_many_samples_are_folded(tmp_path, unpainted):
    page = Page(build(write(tmp_path, tokens=[SAMPLE] * 8)))
    assert "2 more" in page.text


@pytest.mark.parametrize("name", ["recipe.json", "metrics.jsonl", "result.json"])
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ParameterError, match=rf"{re.escape(name)} must be in the run folder, got none"):
        build(tmp_path)


@pytest.mark.parametrize("name", ["recipe.json", "result.json", "tokens.json"])
def test_a_torn_file_is_named(tmp_path, name):
    write(tmp_path)
    (tmp_path / name).write_text('{"title": ')
    with pytest.raises(ParameterError, match=rf"{re.escape(name)} must be valid JSON, got Expecting value"):
        build(tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe")
    with pytest.raises(ParameterError, match=rf"{re.escape(name)} must be a readable text file"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ('{"arm": "lora", "st', "JSON on every line, got line 2: Unterminated string"),
        ("[1]", r"objects with arm and step on every line, got line 2: \[1\]"),
        ('{"arm": "lora"}', "objects with arm and step on every line, got line 2"),
        ('{"arm": "lora", "step": 1, "loss": "x"}', "lines whose loss is a number, got line 2"),
    ],
    ids=["torn", "list", "no step", "text"],
)
def test_a_broken_line_is_numbered(tmp_path, line, text):
    write(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"arm": "lora", "step": 1, "loss": 1.0}\n' + line + "\n")
    with pytest.raises(ParameterError, match=f"metrics.jsonl must be {text}"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ([], "a JSON object, got list"),
        (changed(title=None), r"a result with title \(str\), got NoneType"),
        (changed(arms={}), "a result with at least one arm, got none"),
        (changed(baseline="no"), "a result whose baseline is one of lora, ist, got 'no'"),
        (changed(**{"arms.ist": 3}), "a result whose arms.ist is an object, got int"),
        (changed(**{"arms.ist.quality": "x"}), r"arms.ist.quality \(int or float or null\), got str"),
        (
            changed(**{"arms.ist.memory": {"parameters": 1}}),
            r"arms.ist.memory.gradients \(int or float\), got none",
        ),
    ],
    ids=["list", "title", "no arms", "baseline", "arm", "quality", "memory"],
)
def test_a_result_without_what_is_needed_is_refused(tmp_path, result, text):
    write(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps(result))
    with pytest.raises(ParameterError, match=f"result.json must be .*{text}"):
        build(tmp_path)


def test_broken_scores_and_tokens_are_named(tmp_path):
    write(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"no")
    with pytest.raises(ParameterError, match=r"scores.safetensors must be a readable safetensors file"):
        build(tmp_path)
    steps, values = torch.tensor([1, 2]), torch.ones(3, 2)
    save_file({"ist/ist/a/steps": steps, "ist/ist/a/values": values}, str(tmp_path / "scores.safetensors"))
    wanted = r"steps \[T\] and values \[T, U\] for ist/ist/a, got steps \[2\] with values \[3, 2\]"
    with pytest.raises(ParameterError, match=wanted):
        build(tmp_path)
    write(tmp_path, tokens=[SAMPLE, {**SAMPLE, "kept": [True]}])
    with pytest.raises(
        ParameterError, match="equally long tokens, prompt, score, kept, got other in sample 2"
    ):
        build(tmp_path)


def test_a_failed_build_leaves_the_earlier_page(tmp_path, unpainted):
    path = build(write(tmp_path))
    before = path.read_bytes()
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(ParameterError):
        build(tmp_path)
    assert path.read_bytes() == before


def test_the_same_run_gives_the_same_page(tmp_path):
    path = build(write(tmp_path))
    before = path.read_bytes()
    assert build(tmp_path).read_bytes() == before


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0, "0.000"), (12345, "12,345"), (0.75, "0.7500"), (-3.14159, "−3.142"), (2e-7, "2e−07"),
     (123456.0, "123,456"), (math.nan, "–"), (None, "–")],
)  # fmt: skip
def test_numbers_read_well(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 ms"), (0.0854, "85.4 ms"), (1.25, "1.25 s"), (45.26, "45.3 s"), (200, "3 min 20 s"),
     (7500, "2 h 5 min"), (None, "–")],
)  # fmt: skip
def test_times_read_well(value, text):
    assert words.seconds_text(value) == text


@pytest.mark.parametrize(
    ("new", "old", "text"),
    [(51, 100, "49 % less memory"), (102.4, 100, "2.4 % more memory"), (100.4, 100, "the same memory"),
     (1, 0, "memory not known"), (300, 100, "200 % more memory")],
)  # fmt: skip
def test_changes_in_words(new, old, text):
    assert words.change_words(new, old, "memory") == text


def test_a_difference_that_shows_as_zero_has_no_sign():
    assert words.change_quality(71.52, 71.5, "%") == "±0.0 points"
    assert words.difference(1.0, 1.0, words.number, True) == {"small": "no change"}


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [(True, "", "yes"), ([1, 2], "", "1, 2"), ([], "", "none"), (list(range(20)), "", "20 in all"),
     (0.5, "share kept", "50 %"), (3, "share", "3"), ({"a": 1, "b": 0.5}, "", "a 1, b 0.5000"), (None, "", "–"),
     ("word", "", "word")],
)  # fmt: skip
def test_values_of_methods_in_words(value, name, text):
    assert text in words.plain(value, name)
