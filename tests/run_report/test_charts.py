# Copyright 2026 The trl-distreward authors. Licensed under the Apache License, Version 2.0.
import math
import re
import xml.etree.ElementTree as ET

import pytest

from trl_distreward.run_report.charts import Series, bar_chart, line_chart, number, share_bar, ticks


@pytest.mark.parametrize(
    ("low", "high"), [(0, 450), (3, 4), (-0.0012, 0.0034), (-57.5, -28.2), (1e-5, 1e-4), (2e6, 9e6), (0.97, 0.98)]
)
def test_ticks_are_round_few_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7 and low <= found[0] and found[-1] <= high * (1 + 1e-9)
    gap = found[1] - found[0]
    assert all(b - a == pytest.approx(gap) for a, b in zip(found, found[1:], strict=False))
    assert gap / 10 ** math.floor(math.log10(gap) + 1e-9) == pytest.approx(
        min((1, 2, 2.5, 5), key=lambda f: abs(f - gap / 10 ** math.floor(math.log10(gap) + 1e-9)))
    )


def labels(chart):
    """What is written beside the axis of values."""
    return re.findall(r'class="end" [^>]*>([^<]*)<', chart)


@pytest.mark.parametrize(
    "values", [(0.25, 0.5), (25, 130), (1e-5, 3.2e-5), (0.98, 0.9812), (2.4e6, 9.7e6), (-4.2, -3.7)]
)
def test_labels_of_an_axis_are_all_different_and_true(values):
    shown = labels(line_chart("t", [Series("a", list(enumerate(values)))]))
    assert len(set(shown)) == len(shown) >= 2
    low, high = min(values), max(values)
    margin = 0.07 * (high - low)
    assert all(low - margin <= float(text) <= high + margin for text in shown)


@pytest.mark.parametrize("value", [0.4, 1.0, 0.125, -4.34, 0.01, 3e-12, 7.3e9])
def test_values_that_differ_by_rounding_are_a_flat_line(value):
    chart = line_chart("t", [Series("a", [(0, value), (1, math.nextafter(value, math.inf))])])
    assert len(set(labels(chart))) == len(labels(chart)) >= 2
    heights = {point.split()[1] for point in path_of(chart)[1:].split("L")}
    assert len(heights) == 1


def path_of(chart):
    return re.search(r'class="line s0" d="([^"]*)"', chart)[1]


def test_line_breaks_where_a_value_is_not_finite_and_says_so():
    chart = line_chart("t", [Series("a", [(0, 1.0), (1, math.nan), (2, 3.0), (3, 2.0)])])
    assert path_of(chart).count("M") == 2 and path_of(chart).count("L") == 1
    assert "1 values are not finite." in chart and "nan" not in path_of(chart)
    assert line_chart("t", [Series("a", [(0, math.inf)])]) == "" == line_chart("t", [])


def test_extremes_of_very_many_points_are_drawn():
    points = [(x, 0.0) for x in range(10_000)]
    points[4321], points[8765] = (4321, 9.0), (8765, -9.0)
    chart = line_chart("t", [Series("a", points)])
    ys = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path_of(chart))]
    few = line_chart("t", [Series("a", [points[0], points[4321], points[8765]])])
    expected = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path_of(few))]
    assert min(ys) == min(expected) and max(ys) == max(expected) and len(ys) < 2000
    assert "lowest and the highest" in chart


def test_charts_are_well_formed_told_in_words_and_escape_names():
    evil = '<script>alert("x")</script>'
    charts = [
        line_chart(evil, [Series(evil, [(0, 1.0), (5, 2.0)]), Series("b", [(0, 2.0), (5, 4.0)])], [(0, 0), (5, 900)]),
        bar_chart(evil, [(evil, 0.5), ("b", -0.25)]),
    ]
    for chart in charts:
        (svg,) = [e for e in ET.fromstring(chart).iter("svg") if "role" in e.attrib]
        assert svg.attrib["role"] == "img" and evil in svg.attrib["aria-label"] and "<script" not in chart
    assert "b: 2 at update 0, 4 at update 5" in charts[0]
    assert "900" in charts[0]  # images below the updates


def test_shares_fill_the_bar():
    bar = ET.fromstring(share_bar({"a": 3.0, "b": 1.0}))
    assert [float(part.attrib["width"]) for part in bar] == [75, 25]
    assert bar.attrib["aria-label"] == "a 75.0 %, b 25.0 %"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (12345.0, "12,345"),
        (16.987, "16.99"),
        (0.012345, "0.01235"),
        (1e-5, "1e-05"),
        (math.nan, "not finite"),
    ],
)
def test_numbers_keep_four_digits(value, shown):
    assert number(value) == shown
