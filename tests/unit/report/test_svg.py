"""The elements of a drawing: text is escaped once, names of attributes are SVG's."""

from __future__ import annotations

from xml.etree import ElementTree

from markupsafe import Markup

from gadcore.report import svg


def test_names_and_values_of_attributes() -> None:
    made = svg.element("line", class_="a", stroke_width=2, viewBox="0 0 1 1", d='"<&')
    assert made == '<line class="a" stroke-width="2" viewBox="0 0 1 1" d="&#34;&lt;&amp;"/>'


def test_text_is_escaped_and_elements_are_not() -> None:
    assert svg.text("a < b", x=1) == '<text x="1">a &lt; b</text>'
    assert svg.element("g", svg.rect(x=0) + "a < b") == '<g><rect x="0"/>a &lt; b</g>'
    assert svg.element("p", "") == "<p></p>"


def test_a_picture_is_named_by_its_title_and_description() -> None:
    root = ElementTree.fromstring(svg.picture("n", "T & t", "D", Markup("<g/>"), class_="c"))
    named = {child.get("id"): child.text for child in root}
    assert [named[name] for name in root.attrib["aria-labelledby"].split()] == ["T & t", "D"]
    assert root.get("class") == "c" and root.get("role") == "img"


def test_lines_go_down_and_across() -> None:
    assert svg.vertical("5%", 1, 9, class_="a") == '<line class="a" x1="5%" x2="5%" y1="1" y2="9"/>'
    assert svg.horizontal("5%", class_="a") == '<line class="a" x1="0" x2="100%" y1="5%" y2="5%"/>'


def test_a_scale_maps_its_ends_to_0_and_1() -> None:
    assert [svg.Scale(-2.0, 2.0).at(value) for value in (-2, 0, 2)] == [0.0, 0.5, 1.0]
    assert [svg.Scale(0.01, 100.0, log=True).at(value) for value in (0.01, 1, 100)] == [0.0, 0.5, 1.0]
