"""Drawings on images: boxes with labels, and the cells that are assigned to objects."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import escape
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.pixels import drawn_channels
from cnnrun.contracts.prediction import CaptionedBox, Overlay
from cnnrun.contracts.results import Results, View
from cnnrun.contracts.target_kind import IGNORED
from cnnrun.contracts.task import Task

# Ten colours that most people can distinguish (matplotlib's default cycle).
_COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
)  # fmt: skip
_MIN_SIDE, _GAP, _TITLE_HEIGHT = 320, 8, 18  # pixels; smaller images are enlarged to this side


@dataclass(frozen=True)
class Dot:
    """A cell at (x, y) in pixels, the object that it is assigned to, and how well it fits, 0..1."""

    x: float
    y: float
    object_index: int
    quality: float


def palette_colour(index: int) -> str:
    """Colour of a class or object; ten colours repeat."""
    return _COLOURS[index % len(_COLOURS)]


def draw_overlay(pillow_image: Any, overlay: Overlay, factor: int = 1) -> Any:
    """Draw an overlay on a copy of a Pillow image, enlarged by a factor, as RGB."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    enlarged = (pillow_image.width * factor, pillow_image.height * factor)
    drawing = pillow_image.convert("RGB").resize(enlarged, Pil.Resampling.NEAREST)
    if overlay.class_map is not None:
        drawing = _colour_classes(drawing, overlay.class_map)
    size = max(11, min(drawing.size) // 40)
    draw, font, width = ImageDraw.Draw(drawing), ImageFont.load_default(size=size), max(1, min(drawing.size) // 250)
    for box in overlay.boxes:
        x1, y1, x2, y2 = (side * factor for side in box.box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=palette_colour(box.colour), width=width)
        text = escape(box.text)
        if text:
            top = y1 - size - 3 if y1 > size + 3 else y1
            draw.rectangle(
                (x1, top, x1 + draw.textlength(text, font) + 4, top + size + 3), fill=palette_colour(box.colour)
            )
            draw.text((x1 + 2, top), text, "white", font)
    return drawing


def _colour_classes(drawing: Any, class_map: NDArray[np.uint8]) -> Any:
    """Mix each pixel half and half with the colour of its class; pixels to ignore stay."""
    from PIL import Image as Pil
    from PIL import ImageColor

    colours = np.array([ImageColor.getrgb(palette_colour(index)) for index in range(256)], np.uint8)
    enlarged = Pil.fromarray(class_map).resize(drawing.size, Pil.Resampling.NEAREST)
    mask = Pil.fromarray(np.where(np.asarray(enlarged) == IGNORED, 0, 128).astype(np.uint8))
    return Pil.composite(Pil.fromarray(colours[np.asarray(enlarged)]), drawing, mask)


def to_pillow(pixels_CHW: Tensor) -> Any:
    """Convert pixel values 0..255 to a Pillow image; images that are neither grey nor RGB are stretched.

    Of these the first channels are drawn, each from its smallest value (black) to its largest.
    """
    from PIL import Image as Pil

    if len(pixels_CHW) not in (1, 3):
        pixels_CHW = pixels_CHW[drawn_channels(len(pixels_CHW))].float()
        low, high = pixels_CHW.amin((1, 2), keepdim=True), pixels_CHW.amax((1, 2), keepdim=True)
        pixels_CHW = (pixels_CHW - low) / (high - low).clamp(min=1e-6) * 255
    values = pixels_CHW.clamp(0, 255).round().byte().cpu().numpy()
    return Pil.fromarray(values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0)))


def titled_grid(rows: Sequence[Sequence[tuple[str, Any]]]) -> NDArray[np.uint8]:
    """Draw rows of Pillow images, each below its title, in columns as wide as needed: uint8 [H, W, 3]."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    font, columns = ImageFont.load_default(size=12), itertools.zip_longest(*rows)
    column_widths = [_GAP + max(_cell_width(cell, font) for cell in column if cell) for column in columns]
    row_heights = [_GAP + _TITLE_HEIGHT + max(pillow_image.height for _, pillow_image in row) for row in rows]
    grid = Pil.new("RGB", (sum(column_widths) + _GAP, sum(row_heights) + _GAP), "white")
    draw, top = ImageDraw.Draw(grid), _GAP
    for row, row_height in zip(rows, row_heights, strict=True):
        left = _GAP
        for (title, pillow_image), column_width in zip(row, column_widths, strict=False):
            draw.text((left, top), truncate_text(escape(title), font, column_width - 2), "black", font)
            grid.paste(pillow_image, (left, top + _TITLE_HEIGHT))
            left += column_width
        top += row_height
    return np.asarray(grid)


def truncate_text(text: str, font: Any, width: int) -> str:
    """Cut a text to a width in pixels."""
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _cell_width(cell: tuple[str, Any], font: Any) -> int:
    """Width of a cell: that of its image, or of its title, which is cut at twice the image's width."""
    title: int = math.ceil(font.getlength(escape(cell[0])))
    width: int = cell[1].width
    return width if title <= width else min(title, 2 * width)


def overlay_panel(
    images_BCHW: Tensor, target_overlays: Sequence[Overlay], overlays: Sequence[Overlay], names: Sequence[str]
) -> NDArray[np.uint8]:
    """Draw targets and results side by side, a row for each image: uint8 [H, W, 3]."""
    rows = []
    for pixels, targets, results, name in zip(images_BCHW, target_overlays, overlays, names, strict=True):
        pillow_image = to_pillow(pixels)
        factor = enlargement(pillow_image)
        target_image, result_image = (draw_overlay(pillow_image, overlay, factor) for overlay in (targets, results))
        rows.append([(name, target_image), ("predicted", result_image)])
    return titled_grid(rows)


def results_panel(task: Task, batch: Batch, results: Results, names: Sequence[str]) -> NDArray[np.uint8]:
    """Draw the panel of a batch, for a task whose targets and predictions can be drawn."""
    predicting, choices = task.predicting, Choices()
    views = [View((batch.images.shape[2], batch.images.shape[3]))] * len(batch)
    predictions = predicting.predictions(results, views, predicting.thresholds(choices))
    overlays = [prediction.overlay() or Overlay() for prediction in predictions]
    return overlay_panel(batch.images, task.showing.target_overlays(batch.targets), overlays, names)


def enlargement(pillow_image: Any) -> int:
    """Factor by which an image is enlarged so that its longer side has at least _MIN_SIDE pixels."""
    factor: int = math.ceil(_MIN_SIDE / max(pillow_image.size))
    return max(1, factor)


def draw_dots(pillow_image: Any, boxes: Sequence[CaptionedBox], dots: Sequence[Dot], factor: int) -> Any:
    """Draw boxes and the cells assigned to them: the better a cell fits, the larger its dot."""
    from PIL import ImageDraw

    drawing = draw_overlay(pillow_image, Overlay(boxes), factor)
    draw = ImageDraw.Draw(drawing)
    for dot in dots:
        x, y, radius = dot.x * factor, dot.y * factor, 2 + 4 * dot.quality
        draw.ellipse(
            (x - radius, y - radius, x + radius, y + radius), fill=palette_colour(dot.object_index), outline="white"
        )
    return drawing
