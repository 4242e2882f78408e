"""The outline as an SVG: top-level layers from left to right, what they hold from top to bottom, links as arcs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from cnnrun.model.outline import OutlineEntry

_GAP, _PAD, _TITLE, _LINE, _ROW = 22.0, 12.0, 20.0, 14.0, 1500.0  # pixels
_LETTER = {"title": 7.0, "note": 5.8}  # about the width of a letter at 12 and 10 pixels
_COLOURS = {
    "conv": "#dbeafe", "conv_transpose": "#dbeafe", "linear": "#fde8d0", "head": "#fcd9a8", "input": "#f3f4f6",
    "pool": "#d9f2dd", "norm": "#eceef1", "drop": "#f7f7f8", "merge": "#eadcfb", "other": "#fef7cd",
}  # fmt: skip
_MERGES = {"concat", "add", "multiply"}

DrawAt = Callable[[float, float], list[str]]


@dataclass(frozen=True)
class Drawable:
    """Something of a size that can be drawn at a place."""

    width: float
    height: float
    draw: DrawAt


@dataclass(frozen=True)
class PlacedDrawable:
    """A top-level box at its place; `gap` is the height of the free strip above its row."""

    part: OutlineEntry
    drawable: Drawable
    x: float
    y: float
    gap: float

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.drawable.width / 2, self.y + self.drawable.height / 2


def render_svg(parts: list[OutlineEntry], title: str, key: str = "") -> str:
    """The drawing as the text of an SVG file; `key` begins the names in it, where it is one of several in a page."""
    placed = _placed(parts)
    width = max(each.x + each.drawable.width for each in placed) + _GAP
    height = max(each.y + each.drawable.height for each in placed) + _GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="Helvetica, Arial, sans-serif" role="img">'
    )
    marker = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#6b7280"/></marker></defs>'
    )
    ground = f'<title>{escape(title)}</title><rect width="100%" height="100%" fill="#fff"/>'
    boxes = [line for each in placed for line in each.drawable.draw(each.x, each.y)]
    made = "\n".join([head, marker, ground, *_links(placed), *boxes, *_flow(placed), "</svg>\n"])
    return made.replace('id="tip"', f'id="{key}tip"').replace("url(#tip)", f"url(#{key}tip)") if key else made


def _placed(parts: list[OutlineEntry]) -> list[PlacedDrawable]:
    """The top-level boxes in rows, each row's in the middle of its height."""
    rows: list[list[tuple[OutlineEntry, Drawable]]] = [[]]
    used = 0.0
    for part in parts:
        box = _box(part)
        if rows[-1] and used + box.width > _ROW:
            rows.append([])
            used = 0.0
        rows[-1].append((part, box))
        used += box.width + _GAP
    found, top = [], 0.0
    for row in rows:
        gap, top, left = top, top + 3 * _GAP, _GAP
        tallest = max(box.height for _, box in row)
        for part, box in row:
            found.append(PlacedDrawable(part, box, left, top + (tallest - box.height) / 2, gap))
            left += box.width + _GAP
        top += tallest
    return found


def _flow(placed: list[PlacedDrawable]) -> list[str]:
    """Arrows from each layer to the next, where that takes it."""
    lines = []
    for before, after in pairwise(placed):
        if after.part.sources and before.part.name not in after.part.sources:
            continue
        x, y, to_y = before.x + before.drawable.width, before.centre[1], after.centre[1]
        if after.gap == before.gap:
            lines.append(_path(f"M{x:.1f} {y:.1f}L{after.x:.1f} {to_y:.1f}"))
        else:  # the next row
            strip = after.gap + 0.6 * _GAP
            lines.append(_path(f"M{x:.1f} {y:.1f}h8V{strip:.1f}H{after.x - 10:.1f}V{to_y:.1f}h10"))
    return lines


def _links(placed: list[PlacedDrawable]) -> list[str]:
    """Links from a named layer to those that take it by name: arcs within a row, else through the strips between."""
    where = {each.part.name: each for each in placed if each.part.name}
    lines: list[str] = []
    for before, after in zip([None, *placed], placed, strict=False):
        taken = {*after.part.sources, *_taken_inside(after.part)}
        for start in [where[name] for name in sorted(taken) if name in where]:
            if start is before and start.part.name in after.part.sources:
                continue  # the flow shows it
            (x, _), (to_x, _) = start.centre, after.centre
            if start.gap == after.gap:
                high = min(start.y, after.y) - min(2.4 * _GAP, 10 + abs(to_x - x) / 12)
                path = f"M{x:.1f} {start.y:.1f}C{x:.1f} {high:.1f} {to_x:.1f} {high:.1f} {to_x:.1f} {after.y:.1f}"
            else:
                strip = after.gap + _GAP * (1.0 + 0.35 * (len(lines) % 5))
                path = f"M{x:.1f} {start.y + start.drawable.height:.1f}V{strip:.1f}H{to_x:.1f}V{after.y:.1f}"
            lines.append(_path(path, "#7c3aed"))
    return lines


def _taken_inside(part: OutlineEntry) -> set[str]:
    return {s for lane in part.lanes for inner in lane for s in {*inner.sources, *_taken_inside(inner)}}


def _box(part: OutlineEntry) -> Drawable:
    if not part.lanes:
        return _leaf(part)
    lanes = [_column(lane) for lane in part.lanes]
    tallest = max(lane.height for lane in lanes)
    joins = part.kind in ("residual", "parallel")
    sign = {"residual": "+", "parallel, add": "+", "parallel, multiply": "×"}.get(part.title, "concat") if joins else ""
    caption = f"{part.name}: {part.title}" if part.name else part.title
    notes = ", ".join(part.notes)
    inner = sum(lane.width for lane in lanes) + _GAP * (len(lanes) - 1)
    width = max(inner, len(caption) * _LETTER["title"], len(f"{notes}{part.shape}") * _LETTER["note"] + 12) + 2 * _PAD
    height = 2 * _TITLE + tallest + (4 * _LINE if joins else 0) + _PAD

    def draw(x: float, y: float) -> list[str]:
        lines = [_rectangle(x, y, width, height, "#fff" if part.kind != "repeat" else "#fafafa", "#c4c9d2")]
        lines += [_text(x + _PAD, y + 15, caption, 12, "bold"), _text(x + _PAD, y + 30, f"{part.shape}  {notes}", 10)]
        top = y + 2 * _TITLE + (1.2 * _LINE if joins else 0)
        left, middle = x + (width - inner) / 2, x + width / 2
        bottom = top + tallest + 1.6 * _LINE
        for lane in lanes:
            centre = left + lane.width / 2
            lines += lane.draw(left, top)
            if joins:
                lines.append(
                    _path(f"M{middle:.1f} {y + 2 * _TITLE - 4:.1f}H{centre:.1f}V{top:.1f}", tip=lane.height > 0)
                )
                foot = top + (lane.height or 0)
                lines.append(_path(f"M{centre:.1f} {foot:.1f}V{bottom:.1f}H{middle:.1f}", tip=False))
            left += lane.width + _GAP
        if joins:
            lines += _join(middle, bottom, sign)
        return lines

    return Drawable(width, height, draw)


def _join(x: float, y: float, sign: str) -> list[str]:
    half = 9.0 if len(sign) == 1 else 24.0
    shape = _rectangle(x - half, y - 9, 2 * half, 18, _COLOURS["merge"], "#7c3aed", 9)
    return [shape, _text(x, y + 4, sign, 11, "bold", "middle")]


def _column(lane: list[OutlineEntry]) -> Drawable:
    """Layers from top to bottom; an empty lane is a line of the width of one."""
    boxes = [_box(part) for part in lane]
    width = max([box.width for box in boxes], default=24.0)
    height = sum(box.height for box in boxes) + _GAP * max(0, len(boxes) - 1)

    def draw(x: float, y: float) -> list[str]:
        lines = []
        for number, box in enumerate(boxes):
            if number:
                lines.append(_path(f"M{x + width / 2:.1f} {y - _GAP:.1f}V{y:.1f}"))
            lines += box.draw(x + (width - box.width) / 2, y)
            y += box.height + _GAP
        return lines

    return Drawable(width, height, draw)


def _leaf(part: OutlineEntry) -> Drawable:
    title = f"{part.name}: {part.title}" if part.name and part.kind not in _MERGES else part.title
    words = [*_folded(part.notes), part.shape]
    width = max(len(title) * _LETTER["title"], *(len(word) * _LETTER["note"] for word in words)) + 2 * _PAD
    height = _TITLE + _LINE * len(words) + 6

    def draw(x: float, y: float) -> list[str]:
        lines = [_rectangle(x, y, width, height, _COLOURS[_family(part.kind)], "#9aa1ad")]
        lines.append(_text(x + width / 2, y + 16, title, 12, "bold", "middle"))
        for number, word in enumerate(words, 1):
            weight = "normal" if number < len(words) else "600"
            lines.append(_text(x + width / 2, y + 16 + _LINE * number, word, 10, weight, "middle"))
        return lines

    return Drawable(width, height, draw)


def _folded(notes: list[str]) -> list[str]:
    """Notes in lines of a moderate length."""
    lines: list[str] = []
    for note in notes:
        if lines and len(lines[-1]) + len(note) < 24:
            lines[-1] += f", {note}"
        else:
            lines.append(note)
    return lines


def _family(kind: str) -> str:
    if kind in _COLOURS:
        return kind
    families = {"pool": "pool", "norm": "norm", "drop": "drop"}
    return "merge" if kind in _MERGES else next((family for word, family in families.items() if word in kind), "other")


def _rectangle(x: float, y: float, width: float, height: float, fill: str, line: str, radius: float = 5) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius:g}" '
        f'fill="{fill}" stroke="{line}"/>'
    )


def _text(x: float, y: float, words: str, size: int, weight: str = "normal", anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" '
        f'fill="#1f2937">{escape(words.strip())}</text>'
    )


def _path(path: str, colour: str = "#6b7280", tip: bool = True) -> str:
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.4"{end}/>'
