"""Pictures with what is in them drawn on: boxes with labels, and the cells that learn objects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.boxes import Mark
from cnnrun.base.errors import escape
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import Results
from cnnrun.contracts.task import TaskSpec

# Ten colours that stay apart for most eyes (matplotlib's own ten).
_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
_LEAST, _GAP, _LINE = 320, 8, 18  # pixels: the side that small pictures are enlarged to


@dataclass(frozen=True)
class Dot:
    """A cell at (x, y) in pixels that learns object number `of`, 0..1 well."""

    x: float
    y: float
    object_index: int
    quality: float


def palette_colour(number: int) -> str:
    """One of ten, by class or object."""
    return _COLOURS[number % len(_COLOURS)]


def draw_marks(picture: Any, marks: Sequence[Mark], factor: int = 1) -> Any:
    """A Pillow picture, enlarged, with boxes and labels on it, as RGB."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    made = picture.convert("RGB").resize((picture.width * factor, picture.height * factor), Pil.Resampling.NEAREST)
    size = max(11, min(made.size) // 40)
    draw, font, width = ImageDraw.Draw(made), ImageFont.load_default(size=size), max(1, min(made.size) // 250)
    for mark in marks:
        x1, y1, x2, y2 = (side * factor for side in mark.box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=palette_colour(mark.colour), width=width)
        text = escape(mark.text)
        if text:
            top = y1 - size - 3 if y1 > size + 3 else y1
            draw.rectangle(
                (x1, top, x1 + draw.textlength(text, font) + 4, top + size + 3), fill=palette_colour(mark.colour)
            )
            draw.text((x1 + 2, top), text, "white", font)
    return made


def to_pillow(pixels_CHW: Tensor) -> Any:
    """A Pillow picture of values 0..255."""
    from PIL import Image as Pil

    values = pixels_CHW.clamp(0, 255).round().byte().cpu().numpy()
    return Pil.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))


def titled_grid(rows: Sequence[Sequence[tuple[str, Any]]]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: rows of Pillow pictures, each with its title above, in columns as wide as they need."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    font, columns = ImageFont.load_default(size=12), itertools.zip_longest(*rows)
    wide = [_GAP + max(_wide(cell, font) for cell in column if cell) for column in columns]
    tall = [_GAP + _LINE + max(picture.height for _, picture in row) for row in rows]
    made = Pil.new("RGB", (sum(wide) + _GAP, sum(tall) + _GAP), "white")
    draw, top = ImageDraw.Draw(made), _GAP
    for row, high in zip(rows, tall, strict=True):
        left = _GAP
        for (title, picture), width in zip(row, wide, strict=False):
            draw.text((left, top), truncate_text(escape(title), font, width - 2), "black", font)
            made.paste(picture, (left, top + _LINE))
            left += width
        top += high
    return np.asarray(made)


def truncate_text(text: str, font: Any, width: int) -> str:
    """As much of a text as fits."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _wide(cell: tuple[str, Any], font: Any) -> int:
    """A cell's width: its picture's, or its title's where that is not much wider."""
    title: int = math.ceil(font.getlength(escape(cell[0])))
    width: int = cell[1].width
    return width if title <= width else min(title, 2 * width)


def marks_panel(
    pictures_BCHW: Tensor, true: Sequence[Sequence[Mark]], found: Sequence[Sequence[Mark]], names: Sequence[str]
) -> NDArray[np.uint8]:
    """What is in pictures beside what was found in them: uint8 [H, W, 3], a row a picture."""
    rows = []
    for pixels, truth, result, name in zip(pictures_BCHW, true, found, names, strict=True):
        picture = to_pillow(pixels)
        factor = enlargement(picture)
        rows.append([(name, draw_marks(picture, truth, factor)), ("found", draw_marks(picture, result, factor))])
    return titled_grid(rows)


def results_panel(
    task: TaskSpec, facts: Facts, batch: Batch, results: Results, names: Sequence[str]
) -> NDArray[np.uint8] | None:
    """The panel of a batch; None for tasks whose results have no place."""
    true, marks = task.target_marks(batch.targets, facts), task.result_marks(results, facts)
    return None if true is None or marks is None else marks_panel(batch.images, true, marks, names)


def enlargement(picture: Any) -> int:
    """How many times larger a picture is shown."""
    factor: int = math.ceil(_LEAST / max(picture.size))
    return max(1, factor)


def draw_dots(picture: Any, marks: Sequence[Mark], dots: Sequence[Dot], factor: int) -> Any:
    """A picture with boxes, and the cells that learn them: the better one fits, the larger its dot."""
    from PIL import ImageDraw

    made = draw_marks(picture, marks, factor)
    draw = ImageDraw.Draw(made)
    for dot in dots:
        x, y, radius = dot.x * factor, dot.y * factor, 2 + 4 * dot.quality
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=palette_colour(dot.object_index), outline="white"
        )
    return made
