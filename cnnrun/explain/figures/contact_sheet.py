"""A contact sheet: images in rows and titled columns, each with a label below."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.atomic_files import write_new_file
from cnnrun.explain.figures.panels import to_pillow, truncate_text

_ENLARGED_SIDE, _GAP, _TEXT_HEIGHT = 112, 6, 16  # pixels


def draw_contact_sheet(columns: Sequence[tuple[str, Tensor, Sequence[str]]]) -> NDArray[np.uint8]:
    """Draw a sheet, uint8 [H, W, 3], of columns (title, images [N, C, h, w] with values 0..255, N labels)."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    height, width = columns[0][1].shape[2:]
    factor = max(1, round(_ENLARGED_SIDE / max(height, width)))
    column_width, row_height = max(width * factor, _ENLARGED_SIDE) + _GAP, height * factor + _TEXT_HEIGHT + _GAP
    row_count = len(columns[0][1])
    sheet = Pil.new("RGB", (len(columns) * column_width + _GAP, row_count * row_height + _TEXT_HEIGHT + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for column, (title, images_NCHW, labels) in enumerate(columns):
        left = _GAP + column * column_width
        draw.text((left, 2), truncate_text(title, font, column_width - _GAP), "black", font)
        for row in range(row_count):
            top = _GAP + _TEXT_HEIGHT + row * row_height
            pillow_image = to_pillow(images_NCHW[row])
            sheet.paste(pillow_image.resize((width * factor, height * factor), Pil.Resampling.NEAREST), (left, top))
            draw.text(
                (left, top + height * factor), truncate_text(labels[row], font, column_width - _GAP), "black", font
            )
    return np.asarray(sheet)


def write_png(path: Path, pixels: NDArray[np.uint8], generator: str) -> None:
    """Write an image [H, W, 3], or grey [H, W], as PNG. Raises ConfigError if another program wrote the file."""
    from PIL import Image as Pil
    from PIL.PngImagePlugin import PngInfo

    buffer, metadata = io.BytesIO(), PngInfo()
    metadata.add_text("Software", generator)
    Pil.fromarray(pixels).save(buffer, "PNG", pnginfo=metadata)
    write_new_file(
        path, buffer.getvalue(), own_mark=generator.encode(), tidy=False
    )  # the folder may hold thousands of files
