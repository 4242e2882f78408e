"""Drawing of a network as SVG: top-level layers from left to right, inner layers downwards, links as arcs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from cnnrun.model.outline import OutlineEntry

_GAP, _PADDING, _TITLE_HEIGHT, _LINE_HEIGHT, _MAX_ROW_WIDTH = 22.0, 12.0, 20.0, 14.0, 1500.0  # pixels
_LETTER_WIDTH = {"title": 7.0, "note": 5.8}  # approximate width of a letter of 12 and 10 pixels
_COLOURS = {
    "conv": "#dbeafe", "conv_transpose": "#dbeafe", "linear": "#fde8d0", "head": "#fcd9a8", "input": "#f3f4f6",
    "pool": "#d9f2dd", "norm": "#eceef1", "drop": "#f7f7f8", "merge": "#eadcfb", "other": "#fef7cd",
}  # fmt: skip
_MERGES = {"concat", "add", "multiply"}

DrawAt = Callable[[float, float], list[str]]


@dataclass(frozen=True)
class Drawable:
    """A drawing of known size, and the function that draws it at a position."""

    width: float
    height: float
    draw: DrawAt


@dataclass(frozen=True)
class PlacedDrawable:
    """A top-level box at its position; `strip_top` is the top of the free strip above its row."""

    entry: OutlineEntry
    drawable: Drawable
    x: float
    y: float
    strip_top: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the box."""
        return self.x + self.drawable.width / 2, self.y + self.drawable.height / 2


def render_svg(entries: list[OutlineEntry], title: str, key: str = "") -> str:
    """Draw a network as SVG text; `key` is a prefix for its ids, so that a page can hold several drawings."""
    placed = _place_boxes(entries)
    width = max(box.x + box.drawable.width for box in placed) + _GAP
    height = max(box.y + box.drawable.height for box in placed) + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" role="img">'
    )
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#6b7280"/></marker></defs>'
    )
    background = f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>'
    boxes = [line for box in placed for line in box.drawable.draw(box.x, box.y)]
    svg = "\n".join([head, marker, background, *_link_arcs(placed), *boxes, *_flow_arrows(placed), "</svg>\n"])
    return svg.replace('id="tip"', f'id="{key}tip"').replace("url(#tip)", f"url(#{key}tip)") if key else svg


def _place_boxes(entries: list[OutlineEntry]) -> list[PlacedDrawable]:
    """Place the top-level boxes in rows, vertically centred within each row."""
    rows: list[list[tuple[OutlineEntry, Drawable]]] = [[]]
    row_width = 0.0
    for entry in entries:
        box = _entry_box(entry)
        if rows[-1] and row_width + box.width > _MAX_ROW_WIDTH:
            rows.append([])
            row_width = 0.0
        rows[-1].append((entry, box))
        row_width += box.width + _GAP
    placed_boxes, top = [], 0.0
    for row in rows:
        strip_top, top, left = top, top + 3 * _GAP, _GAP
        tallest = max(box.height for _, box in row)
        for entry, box in row:
            placed_boxes.append(PlacedDrawable(entry, box, left, top + (tallest - box.height) / 2, strip_top))
            left += box.width + _GAP
        top += tallest
    return placed_boxes


def _flow_arrows(placed: list[PlacedDrawable]) -> list[str]:
    """Draw arrows from each layer to the next, if that takes its output."""
    lines = []
    for previous, current in pairwise(placed):
        if current.entry.sources and previous.entry.name not in current.entry.sources:
            continue
        x, y, to_y = previous.x + previous.drawable.width, previous.centre[1], current.centre[1]
        if current.strip_top == previous.strip_top:
            lines.append(_path(f"M{x:.1f} {y:.1f}L{current.x:.1f} {to_y:.1f}"))
        else:  # the next row
            strip = current.strip_top + 0.6 * _GAP
            lines.append(_path(f"M{x:.1f} {y:.1f}h8V{strip:.1f}H{current.x - 10:.1f}V{to_y:.1f}h10"))
    return lines


def _link_arcs(placed: list[PlacedDrawable]) -> list[str]:
    """Draw links from named layers to layers that take them by name, as arcs or through the strips between rows."""
    placed_by_name = {box.entry.name: box for box in placed if box.entry.name}
    lines: list[str] = []
    for previous, current in zip([None, *placed], placed, strict=False):
        source_names = {*current.entry.sources, *_nested_sources(current.entry)}
        for start in [placed_by_name[name] for name in sorted(source_names) if name in placed_by_name]:
            if start is previous and start.entry.name in current.entry.sources:
                continue  # an arrow shows it already
            (x, _), (to_x, _) = start.centre, current.centre
            if start.strip_top == current.strip_top:
                arc_top = min(start.y, current.y) - min(2.4 * _GAP, 10 + abs(to_x - x) / 12)
                curve = f"C{x:.1f} {arc_top:.1f} {to_x:.1f} {arc_top:.1f} {to_x:.1f} {current.y:.1f}"
                path = f"M{x:.1f} {start.y:.1f}{curve}"
            else:
                strip = current.strip_top + _GAP * (1.0 + 0.35 * (len(lines) % 5))
                path = f"M{x:.1f} {start.y + start.drawable.height:.1f}V{strip:.1f}H{to_x:.1f}V{current.y:.1f}"
            lines.append(_path(path, "#7c3aed"))
    return lines


def _nested_sources(entry: OutlineEntry) -> set[str]:
    return {s for lane in entry.lanes for inner in lane for s in {*inner.sources, *_nested_sources(inner)}}


def _entry_box(entry: OutlineEntry) -> Drawable:
    if not entry.lanes:
        return _layer_box(entry)
    lanes = [_stack_lane(lane) for lane in entry.lanes]
    tallest = max(lane.height for lane in lanes)
    joins = entry.kind in ("residual", "parallel")
    sign = (
        {"residual": "+", "parallel, add": "+", "parallel, multiply": "×"}.get(entry.title, "concat") if joins else ""
    )
    caption = f"{entry.name}: {entry.title}" if entry.name else entry.title
    notes = ", ".join(entry.notes)
    inner = sum(lane.width for lane in lanes) + _GAP * (len(lanes) - 1)
    note_width = len(f"{notes}{entry.shape}") * _LETTER_WIDTH["note"] + 12
    width = max(inner, len(caption) * _LETTER_WIDTH["title"], note_width) + 2 * _PADDING
    height = 2 * _TITLE_HEIGHT + tallest + (4 * _LINE_HEIGHT if joins else 0) + _PADDING

    def draw(x: float, y: float) -> list[str]:
        lines = [_rectangle((x, y), (width, height), "#fff" if entry.kind != "repeat" else "#fafafa", "#c4c9d2")]
        lines += [
            _text(x + _PADDING, y + 15, caption, 12, "bold"),
            _text(x + _PADDING, y + 30, f"{entry.shape}  {notes}", 10),
        ]
        top = y + 2 * _TITLE_HEIGHT + (1.2 * _LINE_HEIGHT if joins else 0)
        left, middle = x + (width - inner) / 2, x + width / 2
        bottom = top + tallest + 1.6 * _LINE_HEIGHT
        for lane in lanes:
            centre = left + lane.width / 2
            lines += lane.draw(left, top)
            if joins:
                lines.append(
                    _path(f"M{middle:.1f} {y + 2 * _TITLE_HEIGHT - 4:.1f}H{centre:.1f}V{top:.1f}", tip=lane.height > 0)
                )
                foot = top + (lane.height or 0)
                lines.append(_path(f"M{centre:.1f} {foot:.1f}V{bottom:.1f}H{middle:.1f}", tip=False))
            left += lane.width + _GAP
        if joins:
            lines += _draw_join(middle, bottom, sign)
        return lines

    return Drawable(width, height, draw)


def _draw_join(x: float, y: float, sign: str) -> list[str]:
    half = 9.0 if len(sign) == 1 else 24.0
    shape = _rectangle((x - half, y - 9), (2 * half, 18), _COLOURS["merge"], "#7c3aed", 9)
    return [shape, _text(x, y + 4, sign, 11, "bold", "middle")]


def _stack_lane(lane: list[OutlineEntry]) -> Drawable:
    """Stack the layers of a lane from top to bottom; an empty lane still has a width, for its line."""
    boxes = [_entry_box(entry) for entry in lane]
    width = max([box.width for box in boxes], default=24.0)
    height = sum(box.height for box in boxes) + _GAP * max(0, len(boxes) - 1)

    def draw(x: float, y: float) -> list[str]:
        lines = []
        for index, box in enumerate(boxes):
            if index:
                lines.append(_path(f"M{x + width / 2:.1f} {y - _GAP:.1f}V{y:.1f}"))
            lines += box.draw(x + (width - box.width) / 2, y)
            y += box.height + _GAP
        return lines

    return Drawable(width, height, draw)


def _layer_box(entry: OutlineEntry) -> Drawable:
    title = f"{entry.name}: {entry.title}" if entry.name and entry.kind not in _MERGES else entry.title
    texts = [*_wrap_notes(entry.notes), entry.shape]
    text_widths = [len(text) * _LETTER_WIDTH["note"] for text in texts]
    width = max(len(title) * _LETTER_WIDTH["title"], *text_widths) + 2 * _PADDING
    height = _TITLE_HEIGHT + _LINE_HEIGHT * len(texts) + 6

    def draw(x: float, y: float) -> list[str]:
        lines = [_rectangle((x, y), (width, height), _COLOURS[_colour_key(entry.kind)], "#9aa1ad")]
        lines.append(_text(x + width / 2, y + 16, title, 12, "bold", "middle"))
        for index, text in enumerate(texts, 1):
            weight = "normal" if index < len(texts) else "600"
            lines.append(_text(x + width / 2, y + 16 + _LINE_HEIGHT * index, text, 10, weight, "middle"))
        return lines

    return Drawable(width, height, draw)


def _wrap_notes(notes: list[str]) -> list[str]:
    """Join notes into lines of moderate length."""
    lines: list[str] = []
    for note in notes:
        if lines and len(lines[-1]) + len(note) < 24:
            lines[-1] += f", {note}"
        else:
            lines.append(note)
    return lines


def _colour_key(kind: str) -> str:
    if kind in _COLOURS:
        return kind
    families = {"pool": "pool", "norm": "norm", "drop": "drop"}
    return "merge" if kind in _MERGES else next((family for part, family in families.items() if part in kind), "other")


def _rectangle(corner: tuple[float, float], size: tuple[float, float], fill: str, line: str, radius: float = 5) -> str:
    (x, y), (width, height) = corner, size
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}" '
        f'fill="{fill}" stroke="{line}"/>'
    )


def _text(x: float, y: float, text: str, size: int, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#1f2937">{escape(text.strip())}</text>'
    )


def _path(path: str, colour: str = "#6b7280", tip: bool = True) -> str:
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{end}/>'
