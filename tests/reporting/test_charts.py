"""Curves as SVG: what they hold, and that the same run gives the same bytes."""

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from bitnet_train.reporting.charts import Chart, Line, png, smoothed, svg

CHART = Chart("A & B", [Line("one", [1, 2, 3], [1.0, 0.5, 0.25]), Line("two", [1, 3], [2.0, 1.0], faint=True)])


def test_the_svg_scales_and_says_what_it_is() -> None:
    root = ElementTree.fromstring(svg(CHART))
    assert root.tag.endswith("svg")
    assert "width" not in root.attrib
    assert "height" not in root.attrib
    assert root.attrib["viewBox"].startswith("0 0 ")
    assert root.attrib["aria-label"] == "A & B"
    text = " ".join("".join(root.itertext()).split())
    for word in ("A & B", "one", "two", "optimizer step"):
        assert word in text


def test_the_same_curves_give_the_same_bytes() -> None:
    assert svg(CHART) == svg(CHART)


@pytest.mark.parametrize("values", [[0.0, 0.5], [-1.0, 1.0]])
def test_a_logarithmic_axis_without_positive_values_becomes_linear(values: list[float]) -> None:
    ElementTree.fromstring(svg(Chart("x", [Line("a", [1, 2], values)], logarithmic=True)))


def test_a_picture_of_its_own(tmp_path: Path) -> None:
    png(CHART, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.size == (832, 468)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20


def test_emptiness_is_about_finite_values() -> None:
    assert Chart("x", []).empty
    assert Chart("x", [Line("a", [1], [math.nan])]).empty
    assert not CHART.empty


def test_smoothing_is_corrected_for_its_start() -> None:
    assert smoothed([3.0] * 5, 4) == pytest.approx([3.0] * 5)
    assert smoothed([1.0, 2.0, 4.0], 1) == [1.0, 2.0, 4.0]
    two = smoothed([0.0, 1.0], 2)
    assert two == pytest.approx([0.0, 2 / 3])
    assert smoothed([1.0, math.inf, 1.0], 3)[1:] == [1.0, 1.0]
    assert math.isnan(smoothed([math.nan, 1.0], 3)[0])
