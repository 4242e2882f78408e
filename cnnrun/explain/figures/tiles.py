"""Numbers as small pictures: feature maps, kernels, signals around zero, heat over a picture; and a line below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import escape

_GAP, _LINE = 2, 16  # pixels
_BEYOND = 0.002  # of a signal's values
_DARK, _MIDDLE, _BRIGHT = "#000004", "#bb3754", "#fcffa4"  # three colours of matplotlib's inferno


def scale_to_side(picture: Any, side: int) -> Any:
    """A Pillow picture enlarged by a whole factor to about `side` pixels; one of more than half as much again is
    made smaller.
    """
    from PIL import Image as Pil

    if max(picture.size) > (most := 3 * side // 2):
        small = picture.copy()
        small.thumbnail((most, most))
        return small
    factor = max(1, round(side / max(picture.size)))
    return picture.resize((picture.width * factor, picture.height * factor), Pil.Resampling.NEAREST)


def signed_tile(values_CHW: Tensor, side: int = 84) -> Any:
    """Values around 0 as a picture: 0 is grey, the farthest from it black or white (or a colour).

    Two in a thousand may be farther: a single pixel would otherwise leave all others grey.
    """
    from PIL import Image as Pil

    values = values_CHW.detach().float().cpu().numpy()
    most = np.quantile(np.abs(values), 1 - _BEYOND, method="higher") or np.abs(values).max() or 1.0
    pixels = np.rint(127.5 + 127.5 * (values / most).clip(-1, 1)).astype(np.uint8)
    if len(pixels) == 3:
        return scale_to_side(Pil.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))), side)
    return scale_to_side(Pil.fromarray(pixels[0]), side).convert("RGB")


def grey_tile(values_HW: Tensor, least: float, most: float, side: int = 84) -> Any:
    """Values as shades from black (`least`) to white (`most`)."""
    return scale_to_side(_shades(values_HW, least, most), side).convert("RGB")


def heat_map(values_HW: Tensor, least: float, most: float) -> Any:
    """Values as colours from black (`least`) over red to yellow (`most`), a pixel each."""
    from PIL import ImageOps

    return ImageOps.colorize(_shades(values_HW, least, most), black=_DARK, white=_BRIGHT, mid=_MIDDLE)


def overlay_heat_map(picture: Any, values_HW: Tensor, least: float = 0.0) -> Any:
    """A Pillow picture under the heat of a map that lies over it, from `least` to the map's largest."""
    from PIL import Image as Pil

    size = (picture.height, picture.width)
    over = F.interpolate(values_HW.detach().float().cpu()[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    most = max(float(over.max()), least + 1e-12)
    strength = _shades(over, least, most).point(lambda shade: 40 + shade * 3 // 5)
    return Pil.composite(heat_map(over, least, most), picture.convert("RGB"), strength)


def _shades(values_HW: Tensor, least: float, most: float) -> Any:
    """Values as a grey Pillow picture, a pixel each."""
    from PIL import Image as Pil

    pixels = (values_HW.detach().float() - least) / ((most - least) or 1.0) * 255
    return Pil.fromarray(pixels.clamp(0, 255).round().byte().cpu().numpy())


def mosaic(tiles: Sequence[Any], columns: int) -> Any:
    """Pillow pictures of one size in rows, as one."""
    from PIL import Image as Pil

    wide, tall = tiles[0].width + _GAP, tiles[0].height + _GAP
    columns = min(columns, len(tiles))
    made = Pil.new("RGB", (columns * wide - _GAP, -(-len(tiles) // columns) * tall - _GAP), "#8896a8")
    for number, tile in enumerate(tiles):
        made.paste(tile, (number % columns * wide, number // columns * tall))
    return made


def add_caption(pixels: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    """A picture [H, W, 3] with a text below, in as many lines as its width asks for."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(size=12)
    width = max(480, pixels.shape[1])
    lines = _lines(escape(caption), font, width - 16)
    made = Pil.new("RGB", (width, pixels.shape[0] + _LINE * len(lines) + 8), "white")
    made.paste(Pil.fromarray(pixels), (0, 0))
    draw = ImageDraw.Draw(made)
    for number, line in enumerate(lines):
        draw.text((8, pixels.shape[0] + _LINE * number), line, "#333333", font)
    return np.asarray(made)


def _lines(text: str, font: Any, width: int) -> list[str]:
    """A text in lines of no more than that many pixels; a word that is longer alone is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        while font.getlength(word) > width:
            word = word[:-1]
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return [line for line in lines if line]
