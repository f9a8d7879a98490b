"""The pictures of docs/observability.md: what draws them, and that they are of panels that there are."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from bench import charts
from bench.charts import Mark, Panel, Series
from bench.panels import PICTURES
from tests.observe.dashboards import NAMES, ROOT, dashboard

SVG = "{http://www.w3.org/2000/svg}"


def elements(document: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(document).iter(SVG + tag))  # noqa: S314 - our own


def texts(document: str) -> list[str]:
    return [element.text or "" for element in elements(document, "text")]


def corners(line: ElementTree.Element) -> list[tuple[float, float]]:
    """The points of a line, across and down."""
    pairs = (point.split(",") for point in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


@pytest.mark.parametrize("name", NAMES)
def test_the_pictures_are_of_the_dashboards_panels(name: str) -> None:
    titles = [panel["title"] for panel in dashboard(name)["panels"]]
    assert set(PICTURES[name]) <= set(titles)
    shown = texts((ROOT / "docs" / "pictures" / f"grafana-{name}.svg").read_text())
    assert [title for title in PICTURES[name] if title not in shown] == []
    assert dashboard(name)["title"] in shown
    assert f"grafana-{name}.svg" in (ROOT / "docs" / "observability.md").read_text()


def test_a_stacked_panel_puts_series_on_each_other_and_what_is_missing_counts_as_nothing() -> None:
    panel = Panel("two", "", [Series("a", [(0, 10), (1, 10)]), Series("b", [(1, 10)])], 1, is_stacked=True)
    document = charts.picture("title", [panel], [], 10)
    lower, upper = map(corners, elements(document, "polyline"))
    assert [x for x, _ in lower] == [x for x, _ in upper]
    assert lower[0] == upper[0]
    assert lower[1][1] - upper[1][1] > 50  # as high as the first, and not as the axis
    assert "20" in texts(document)


def test_a_gap_is_a_gap_and_not_a_number_is_no_point() -> None:
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, float("nan")), (5.0, 1.0)]
    document = charts.picture("title", [Panel("one", "s", [Series("a", points)], 1)], [], 10)
    assert [len(corners(line)) for line in elements(document, "polyline")] == [2, 1]


def test_a_timeline_has_the_colours_of_its_words_and_marks_their_numbers() -> None:
    words = {0: ("up", "green"), 1: ("down", "red")}
    panel = Panel("states", "", [Series("<b>", [(0, 0), (1, 1)])], 1, words=words)
    document = charts.picture("title", [panel], [Mark(1, "b & c are killed")], 2)
    fills = [element.attrib["fill"] for element in elements(document, "rect")]
    assert [fill for fill in fills if fill in charts.WORDS.values()] == [
        *(charts.WORDS["green"], charts.WORDS["red"]),
        *(charts.WORDS["green"], charts.WORDS["red"]),  # of the legend
    ]
    assert {"<b>", "1 b & c are killed", "1", "up", "down"} <= set(texts(document))
