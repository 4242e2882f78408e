"""The outline of a network: every layer with its shapes and links, as text and as well-formed SVG."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from cnnrun.config import zoo
from cnnrun.explain.figures.network_svg import render_svg
from cnnrun.model.outline import OutlineEntry, build_outline, format_outline
from tests.support.networks import build_from_zoo


def flatten_entries(parts: list[OutlineEntry]) -> list[OutlineEntry]:
    return [inner for part in parts for inner in [part, *(p for lane in part.lanes for p in flatten_entries(lane))]]


@pytest.mark.parametrize("name", zoo.network_names())
def test_the_outline_and_drawing_of_every_zoo_network_are_complete(name):
    made = build_from_zoo(name, zoo.read_entry(name).image, 10)
    parts = build_outline(made, "classify")
    drawing = ElementTree.fromstring(render_svg(parts, name))
    words = [element.text for element in drawing.iter() if element.tag.endswith("text")]
    written = format_outline(parts)
    for part in flatten_entries(parts):
        assert any(part.title in word for word in words), part.title
        assert part.title in written
        assert part.shape in written
    for key in made.layers:
        if key.count(".") == 1 and (spec := made.layers[key].spec).name:
            assert f"{spec.name}: " in written


def test_the_text_outline_shows_structures_links_and_shapes():
    lines = format_outline(build_outline(build_from_zoo("resnet18_fpn", (3, 64, 64), 10), "classify")).splitlines()
    shown = [" ".join(line.split()) for line in lines]
    assert shown[0] == "├─ input 3x64x64"
    assert shown[1] == "├─ stem: conv 64, 7x7, stride 2, batch_norm, relu 64x32x32"
    assert "├─ inner4: add ← lateral4, up5 256x4x4" in shown
    assert "│ │ └─ conv 128, 1x1, batch_norm 128x8x8" in shown  # the shortcut that the builder added
    assert "│ └─ shortcut: identity" in shown
    assert shown[-1] == "└─ classify, 10,250 parameters 10"


def test_boxes_do_not_overlap_and_lie_inside_the_drawing():
    drawing = ElementTree.fromstring(
        render_svg(build_outline(build_from_zoo("googlenet", (3, 224, 224), 10), "classify"), "x")
    )
    width, height = float(drawing.get("width")), float(drawing.get("height"))
    rectangles = [element for element in drawing.iter() if element.tag.endswith("rect") and element.get("x")]
    boxes = [[float(element.get(key)) for key in ("x", "y", "width", "height")] for element in rectangles]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)
    for i, (x, y, w, h) in enumerate(boxes):
        for a, b, c, d in boxes[i + 1 :]:
            apart = x + w <= a or a + c <= x or y + h <= b or b + d <= y
            inside = (x <= a and y <= b and a + c <= x + w and b + d <= y + h) or (
                a <= x and b <= y and x + w <= a + c and y + h <= b + d
            )
            assert apart or inside


def test_names_cannot_break_the_svg():
    part = OutlineEntry("conv", 'conv <3> & "more"', [], "1x2x3", name="a<b")
    ElementTree.fromstring(render_svg([part], "</title><script>"))


def test_diagram_prints_the_outline_and_writes_an_svg(run_cli, tiny, tmp_path):
    code, out, _ = run_cli("diagram", tiny)
    assert code == 0
    assert "conv 4, 3x3, batch_norm, relu" in out
    code, _, _ = run_cli("diagram", tiny, "--out", tmp_path / "d.svg")
    assert code == 0
    ElementTree.parse(tmp_path / "d.svg")


def test_zoo_list_and_zoo_show_print_the_networks(run_cli):
    code, out, _ = run_cli("zoo", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[1:-2]] == zoo.network_names()
    assert "25,557,032" in out
    code, out, _ = run_cli("zoo", "show", "resnet50")
    assert (code, out) == (0, zoo.network_yaml("resnet50"))
    code, _, err = run_cli("zoo", "show", "resnet5")
    assert (code, len(err.splitlines())) == (2, 1)
