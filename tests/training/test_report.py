import html.parser
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, strategies as st

from jaxeff.training.report import plot_svg, report_html, write_report
from jaxeff.training.report.bars import Bar, bars
from jaxeff.training.report.labels import Box, place_labels, shorten, text_width
from jaxeff.training.report.scatter import axis, log_ticks, nice_ticks, Point, scatter
from jaxeff.training.report.words import (
    best_row,
    comparison,
    dollars,
    headline,
    points,
    short_names,
)

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["dense", "shrunk", "shrunk + distilled", "low-rank", "int8", "int4"]
CHAIN = "chain (shrunk + distilled + int8)"


def row(name, accuracy, size, flops, seconds, **more):
    return {
        "name": name,
        "accuracy": accuracy,
        "parameters": size // 4,
        "bytes": size,
        "flops": flops,
        "latency_s": seconds,
        "latency_low": 0.9 * seconds,
        "latency_high": 1.2 * seconds,
        "latency_batch": 256,
        "energy_j": seconds / 50,
        "energy_low": seconds / 200,
        "energy_high": seconds / 20,
        "energy_method": "estimate, not measured: CPU time x 6 W per core",
        "grams_co2": seconds / 1e5,
        "usd_per_million": seconds / 10,
        "train_seconds": 12.5,
        **more,
    }


def layer(path, size, flops):
    return {"path": path, "parameters": size // 4, "bytes": size, "flops": flops}


@pytest.fixture
def results():
    figures = [
        (0.978, 608_000, 12_600_000, 4.1e-3),
        (0.967, 156_000, 3_300_000, 1.35e-3),
        (0.975, 156_000, 3_300_000, 1.33e-3),
        (0.976, 244_000, 5_400_000, 2.4e-3),
        (0.978, 154_000, 12_600_000, 3.6e-3),
        (0.969, 79_000, 12_600_000, 5.2e-3),
        (0.974, 41_000, 3_300_000, 1.2e-3),
    ]
    paths = [f"params/Block_{i}/Conv_{j}/kernel" for i in range(14) for j in range(2)]
    return {
        "title": "Digits",
        "date": "2025-06-01",
        "device": "CPU",
        "versions": {"jax": "0.10.2"},
        "data": {"name": "digits", "train": 1438, "test": 359},
        "rows": [row(n, *f) for n, f in zip([*NAMES, CHAIN], figures, strict=True)],
        "layers": {
            "dense": [layer(p, 1000 * (i + 1), 10**6) for i, p in enumerate(paths)],
            CHAIN: [layer(p, 250 * (i + 1), 10**5) for i, p in enumerate(paths)],
        },
        "methods": {"latency": "median of 30 blocked calls"},
        "notes": ["One seed."],
    }


class Page(html.parser.HTMLParser):
    """The page's tags in balance, its text, its attributes, its SVGs as they stand."""

    EMPTY = {"meta", "link", "img", "br", "hr"}

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.words, self.attributes = [], [], [], []
        self.source = text
        self.feed(text)
        self.close()
        assert not self.stack
        self.text = " ".join(" ".join(self.words).split())
        self.svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.words.append(data)


def test_every_row_and_every_method_appears(results):
    page = Page(report_html(results))
    for name in [*NAMES, CHAIN]:
        assert name in page.text
    for words in ("median of 30 blocked calls", "6 W per core", "One seed.", "0.10.2"):
        assert words in page.text
    assert "14.8× smaller and 3.8× fewer FLOPs, for 0.4 points of accuracy" in page.text
    assert page.text.count("dense") > 3


def test_the_page_fetches_nothing_and_runs_nothing(results):
    page = Page(report_html(results))
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "xlink:href"} & {name for name, _ in page.attributes}
    assert not [n for n, _ in page.attributes if n.startswith("on")]
    assert "url(" not in page.source and "@import" not in page.source
    # The only address is the name space of SVG, which nobody fetches.
    assert set(re.findall(r"https?://[^\"' <]*", page.source)) == {
        "http://www.w3.org/2000/svg"
    }


def test_the_page_fits_a_phone_and_follows_the_theme(results):
    page = report_html(results)
    assert 'name="viewport" content="width=device-width' in page
    assert "prefers-color-scheme: dark" in page
    assert "overflow-x: auto" in page and "position: sticky" in page


def test_every_svg_is_well_formed_and_reads_itself_out(results):
    page = Page(report_html(results))
    plots = [s for s in page.svgs if 'class="plot"' in s]
    assert len(plots) == 6  # three of accuracy, three of layers
    for text in plots:
        root = ElementTree.fromstring(text)
        assert root.get("role") == "img" and root.get("aria-label")
        assert root.find(f"{SVG}title").text and root.find(f"{SVG}desc").text
        assert root.get("viewBox").startswith("0 0 360")
    for text in set(page.svgs) - set(plots):
        assert 'aria-hidden="true"' in text
        ElementTree.fromstring(text)


def test_names_that_look_like_markup_stay_text(results):
    evil = "<script>alert(1)</script> & \"q\" 'q'"
    results["title"] = results["data"]["name"] = results["device"] = evil
    results["rows"][1]["name"] = results["rows"][-1]["name"] = evil
    results["notes"] = results["methods"]["latency"] = evil
    results["notes"] = [evil]
    results["versions"] = {evil: evil}
    results["layers"] = {
        evil: results["layers"]["dense"],
        "x" + evil: [layer(evil, 4, 4)],
    }
    page = Page(report_html(results))
    assert "script" not in page.tags
    assert page.text.count("<script>alert(1)</script> &") >= 8
    for text in page.svgs:
        ElementTree.fromstring(text)
    ElementTree.fromstring(plot_svg(results))


@pytest.mark.parametrize("nothing", [None, float("nan"), float("inf")])
def test_what_was_not_measured_is_a_dash(results, nothing):
    for key in results["rows"][2]:
        if key != "name":
            results["rows"][2][key] = nothing
    page = Page(report_html(results))
    assert "–" in page.text
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    body = re.search(
        r"<tr><th[^>]*>(?:(?!</tr>).)*shrunk \+ distilled.*?</tr>", page.source
    )
    assert re.sub(r"<th.*?</th>|<.*?>", "", body.group()) == "–" * 9


def test_a_column_that_nobody_measured_is_left_out(results):
    assert "Energy" in report_html(results)
    for r in results["rows"]:
        r["energy_j"] = r["energy_method"] = None
    assert "Energy" not in report_html(results)


def test_the_memory_that_a_method_is_given_for_has_a_column(results):
    for i, r in enumerate(results["rows"]):
        r["peak_bytes"] = 7_400_000 if i == 0 else 3_700_000
    assert Page(report_html(results)).text.count("2.0× less") == len(NAMES)
    assert ">Peak memory<small>batch of 256" in report_html(results)


def test_little_is_enough_for_a_page():
    page = Page(report_html({"rows": [{"name": "dense"}]}))
    assert "dense" in page.text and not page.svgs[1:]
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_svg({"rows": [{"name": "dense"}]})


def test_a_report_without_rows_or_names_is_refused_and_not_written(tmp_path):
    path = tmp_path / "report.html"
    for rows in ([], [{"accuracy": 1.0}]):
        with pytest.raises(ValueError, match="row"):
            write_report(path, {"rows": rows})
    assert not list(tmp_path.iterdir())


def test_the_file_is_the_page_and_nothing_is_left_beside_it(tmp_path, results):
    path = write_report(tmp_path / "runs" / "report.html", results)
    assert path.read_text(encoding="utf-8") == report_html(results)
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    write_report(path, {"rows": [{"name": "again"}]})
    assert "again" in path.read_text(encoding="utf-8")


def test_the_picture_for_a_readme_stands_alone(results):
    root = ElementTree.fromstring(plot_svg(results))
    texts = [t.text for t in root.iter(f"{SVG}text")]
    assert (
        "chain: 14.8× smaller and 3.8× fewer FLOPs, for 0.4 points of accuracy" in texts
    )
    assert root.find(f"{SVG}style") is not None
    for name in [*NAMES, "chain"]:
        assert texts.count(name) == 2  # bytes and FLOPs


@given(
    st.lists(
        st.tuples(st.floats(0, 300), st.floats(0, 200), st.integers(1, 14)),
        min_size=1,
        max_size=9,
    )
)
def test_labels_overlap_no_label_and_no_point_and_stay_inside(places):
    area = Box(40.0, 20.0, 346.0, 234.0)
    at = [(46 + x, 27 + y) for x, y, _ in places]
    names = ["x" * n for *_, n in places]
    labels = place_labels(names, at, area)
    for a, b in itertools.combinations(labels, 2):
        assert not a.box.overlaps(b.box)
    for label in labels:
        assert label.box.inside(area)
        x, y = label.point
        assert not label.box.overlaps(Box(x - 6, y - 6, x + 6, y + 6))
        for px, py in at:
            assert not label.box.overlaps(Box(px - 6, py - 6, px + 6, py + 6))


def test_seven_models_all_get_their_labels(results):
    drawn = [
        Point(n, r["bytes"], 100 * r["accuracy"], color=i)
        for i, (n, r) in enumerate(zip([*NAMES, "chain"], results["rows"], strict=True))
    ]
    plot = scatter(drawn, x_title="size", x_unit="B", baseline=97.8)
    assert {label.name for label in plot.labels} == {p.name for p in drawn}


@pytest.mark.parametrize("x", [585_000.0, 500_000.0, 2_280_000.0])
def test_names_keep_off_the_numbers_at_the_axes(x):
    points = [("dense", 2_280_000.0, 99.2), ("int4", 2_300_000.0, 99.7)]
    points += [("shrunk", x, 98.6), ("shrunk + distilled", x, 98.6)]
    plot = scatter([Point(*p) for p in points], x_title="FLOPs", x_unit="FLOP")
    assert {label.name for label in plot.labels} == {p[0] for p in points}
    for label in plot.labels:
        # A tick ends 6 pixels left of the axis; a letter is some 7 wide.
        assert label.box.x0 - (plot.area.x0 - 6) >= 14
        assert label.box.y1 <= plot.area.y1


def test_models_in_one_place_still_get_all_their_labels():
    drawn = [Point(n, 1000.0, 90.0, color=i) for i, n in enumerate(NAMES)]
    assert len(scatter(drawn, x_title="size", x_unit="B").labels) == len(NAMES)


def test_a_label_rather_covers_no_error_bar():
    area = Box(0.0, 0.0, 300.0, 200.0)
    bar = Box(150.0, 93.0, 290.0, 107.0)  # to the right, where a label goes first
    (free,) = place_labels(["name"], [(140.0, 100.0)], area)
    (moved,) = place_labels(["name"], [(140.0, 100.0)], area, [bar])
    assert free.box.overlaps(bar) and not moved.box.overlaps(bar)


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6), most=st.integers(3, 8))
def test_ticks_are_round_few_and_inside(low, span, most):
    ticks = nice_ticks(low, low + span, most)
    assert 2 <= len(ticks) <= most
    slack = 1e-6 * max(span, abs(low))
    assert all(low - slack <= t <= low + span + slack for t in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), abs=slack)


@given(low=st.floats(1e-9, 1e9), ratio=st.floats(1.2, 1e9))
def test_log_ticks_are_few_and_inside(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 6
    assert all(low * 0.999 <= t <= low * ratio * 1.001 for t in ticks)


@given(st.lists(st.floats(1e-6, 1e12), min_size=1, max_size=8), st.booleans())
def test_every_value_lies_on_its_axis_in_order(values, log):
    scale = axis(values, 10.0, 350.0, log=log)
    pixels = [scale(v) for v in sorted(values)]
    assert all(10 < p < 350 for p in pixels)
    assert pixels == sorted(pixels)


def test_bars_are_as_long_as_what_they_stand_for(results):
    body, height = bars(
        [Bar("a", 100.0, 25.0), Bar("b", 50.0, 0.0)], unit="B", before="x", after="y"
    )
    root = ElementTree.fromstring(f"<svg>{body}</svg>")
    wide = [float(r.get("width")) for g in root.iter("g") for r in g.iter("rect")]
    assert wide[1] == pytest.approx(wide[0] / 4, abs=0.1)
    assert wide[2] == pytest.approx(wide[0] / 2, abs=0.1)
    assert wide[3] == 0
    assert max(float(r.get("y")) + 9 for r in root.iter("rect")) <= height


def test_the_smallest_of_many_layers_are_one_bar_that_holds_their_sum(results):
    page = report_html(results)
    figure = re.search(r"<h3>Parameters</h3>.*?</svg>", page, re.DOTALL).group()
    root = ElementTree.fromstring(figure.split("</h3>")[1].strip())
    names = [t.text for t in root.iter(f"{SVG}text") if t.get("class") == "name"]
    assert len(names) == 24 and names[-1] == "5 smaller layers"
    assert "Block_13/Conv_1/kernel" in names
    assert not any(n.startswith("params/") for n in names)
    # Of 28 layers of 250 (i + 1) parameters the five smallest sum to 250 * 15.
    assert "3.75 k → 936" in figure


def test_a_difference_within_the_noise_is_neither_good_nor_bad(results):
    dense, other = results["rows"][0], results["rows"][1]
    other["latency_s"] = 1.02 * dense["latency_s"]
    assert '"bad">1.02× slower' not in report_html(results)
    assert "1.02× slower" in report_html(results)
    other["latency_s"] = 1.2 * dense["latency_s"]
    assert '"bad">1.20× slower' in report_html(results)


@given(st.text("abcdefg/_0123456789", min_size=1, max_size=80), st.floats(40, 300))
def test_a_shortened_text_fits_and_keeps_both_ends(text, room):
    short = shorten(text, room)
    assert text_width(short) <= room or len(short) <= 3
    assert short == text or (text.startswith(short.split("…")[0]) and "…" in short)


def test_comparisons_say_more_and_less_in_the_right_direction():
    first = {"bytes": 100, "latency_s": 1.0, "flops": 10}
    assert comparison({"bytes": 25}, first, "bytes") == "4.0× smaller"
    assert comparison({"latency_s": 1.5}, first, "latency_s") == "1.50× slower"
    assert comparison({"flops": 10}, first, "flops") == "same"
    assert comparison({"flops": None}, first, "flops") == ""
    assert comparison({"bytes": 0.01}, first, "bytes") == "10000× smaller"


def test_accuracy_differs_in_points():
    first = {"accuracy": 0.9}
    assert points({"accuracy": 0.886}, first) == "−1.4 points"
    assert points({"accuracy": 0.91}, first) == "+1.0 points"
    assert points({"accuracy": 0.9003}, first) == "+0.03 points"
    assert points({"accuracy": 0.9}, first) == "same"
    assert points({"accuracy": math.nan}, first) == ""


def test_the_lead_goes_to_the_smallest_within_a_point():
    rows = [
        {"name": "dense", "accuracy": 0.90, "bytes": 100, "flops": 10},
        {"name": "tiny", "accuracy": 0.80, "bytes": 1, "flops": 1},
        {"name": "small", "accuracy": 0.89, "bytes": 20, "flops": 10},
        {"name": "exact", "accuracy": 0.90, "bytes": 50, "flops": 5},
    ]
    assert best_row(rows)["name"] == "small"
    assert headline(rows) == "5.0× smaller, for 1 point of accuracy"
    assert best_row([rows[0], rows[1]])["name"] == "tiny"
    exact = headline([rows[0], rows[3]])
    assert exact == "2.0× smaller and 2.0× fewer FLOPs, at the same accuracy"
    assert best_row(rows[:1]) is None


def test_a_model_that_grew_is_said_to_have_grown():
    rows = [
        {"name": "dense", "accuracy": 0.90, "bytes": 100},
        {"name": "wide", "accuracy": 0.95, "bytes": 300},
    ]
    assert headline(rows) == "3.0× larger, and 5.0 points more accurate"


def test_names_lose_their_brackets_only_where_they_stay_different():
    assert short_names(["a (b)", "c"]) == ["a", "c"]
    assert short_names(["a (b)", "a (c)"]) == ["a (b)", "a (c)"]


def test_small_prices_keep_three_digits():
    assert dollars(12.3456) == "$12.35"
    assert dollars(0.000445123) == "$0.000445"
    assert dollars(0) == "$0.00"
    assert dollars(None) == "–"
