"""A contact sheet: pictures as they are and as training sees them, in rows, with their labels."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.atomic_files import write_new_file
from cnnrun.explain.figures.panels import truncate_text

_CELL, _GAP, _LINE = 112, 6, 16  # pixels: the shorter a picture, the more it is enlarged


def draw_contact_sheet(columns: Sequence[tuple[str, Tensor, Sequence[str]]]) -> NDArray[np.uint8]:
    """uint8 [H, W, 3]: a column a (title, pictures [N, C, h, w] of values 0..255, a label a picture)."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    height, width = columns[0][1].shape[2:]
    factor = max(1, round(_CELL / max(height, width)))
    wide, tall = max(width * factor, _CELL) + _GAP, height * factor + _LINE + _GAP
    rows = len(columns[0][1])
    made = Pil.new("RGB", (len(columns) * wide + _GAP, rows * tall + _LINE + _GAP), "white")
    draw, font = ImageDraw.Draw(made), ImageFont.load_default(size=11)
    for number, (title, pictures, labels) in enumerate(columns):
        left = _GAP + number * wide
        draw.text((left, 2), truncate_text(title, font, wide - _GAP), "black", font)
        for row in range(rows):
            top = _GAP + _LINE + row * tall
            shown = Pil.fromarray(_pixels(pictures[row]))
            made.paste(shown.resize((width * factor, height * factor), Pil.Resampling.NEAREST), (left, top))
            draw.text((left, top + height * factor), truncate_text(labels[row], font, wide - _GAP), "black", font)
    return np.asarray(made)


def write_png(path: Path, pixels: NDArray[np.uint8], by: str) -> None:
    """Write a picture [H, W, 3]; a file that is there is replaced if `by` made it. Raises ConfigError."""
    from PIL import Image as Pil
    from PIL.PngImagePlugin import PngInfo

    buffer, about = io.BytesIO(), PngInfo()
    about.add_text("Software", by)
    Pil.fromarray(pixels).save(buffer, "PNG", pnginfo=about)
    write_new_file(path, buffer.getvalue(), own_mark=by.encode(), tidy=False)  # there may be thousands in the folder


def _pixels(picture_CHW: Tensor) -> NDArray[np.uint8]:
    values: NDArray[np.uint8] = picture_CHW.clamp(0, 255).round().byte().cpu().numpy()
    return values[0] if len(values) == 1 else np.ascontiguousarray(values.transpose(1, 2, 0))
