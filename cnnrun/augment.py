"""Augmentation of a whole batch at once, as pure functions of (seed, epoch, sample).

All geometry composes into one affine matrix a picture, all colour into one 3 x 4 matrix a picture, whatever the number
of operations asked for; then a rectangle may be erased. The same code runs on any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from cnnrun.randomness import uniform
from cnnrun.spec import Spec

# A draw's slot is its place here for ever: a new operation is added at the end, so that old runs repeat.
SLOTS = (
    "flip_x", "flip_y", "shift_y", "shift_x", "rotate", "scale", "shear",
    "brightness", "contrast", "saturation", "hue", "erase", "erase_area", "erase_shape", "erase_y", "erase_x",
)  # fmt: skip

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's "L"


class Augment(Spec):
    """Random changes of the training pictures, new ones every epoch. Everything is off by default."""

    flip: Literal["none", "horizontal", "vertical", "both"] = "none"
    """Mirrors half of the pictures, left-right, up-down, or each for itself."""
    shift: float = Field(0.0, ge=0, le=1)
    """Moves by up to this part of the height and width, in whole pixels; what moves in is black."""
    rotate: float = Field(0.0, ge=0, le=180)
    """Turns by up to so many degrees either way."""
    scale: float = Field(0.0, ge=0, lt=1)
    """Enlarges or shrinks by a factor in [1 - scale, 1 + scale]."""
    shear: float = Field(0.0, ge=0, lt=90)
    """Slants by up to so many degrees either way."""
    brightness: float = Field(0.0, ge=0, le=1)
    """Multiplies by a factor in [1 - brightness, 1 + brightness]."""
    contrast: float = Field(0.0, ge=0, le=1)
    """Stretches around the picture's mean grey by a factor in [1 - contrast, 1 + contrast]."""
    saturation: float = Field(0.0, ge=0, le=1)
    """Stretches around each pixel's grey by a factor in [1 - saturation, 1 + saturation]; colour pictures only."""
    hue: float = Field(0.0, ge=0, le=0.5)
    """Turns the colour circle by up to this part of it; colour pictures only."""
    erase: float = Field(0.0, ge=0, le=1)
    """The probability of blanking a rectangle of 2 to 33 % of the picture (Zhong et al. 2020)."""

    @property
    def changes(self) -> bool:
        """Whether any picture is changed at all."""
        return self != type(self)()

    def apply(self, pictures_BCHW: Tensor, index_B: Tensor, seed: int, epoch: int) -> Tensor:
        """uint8 pictures -> float32 pictures 0..255, changed; the same inputs give the same bits."""
        draws = Draws(seed, epoch, index_B)
        if self.rotate or self.scale or self.shear:
            moved = warp(pictures_BCHW.float(), self.matrices(draws, pictures_BCHW.shape))
        elif self.shift or self.flip != "none":
            moved = self._moved_whole(pictures_BCHW, draws).float()
        else:
            moved = pictures_BCHW.float()
        if self.brightness or self.contrast or self.saturation or self.hue:
            moved = self._recoloured(moved, draws)
        return self._erased(moved, draws) if self.erase else moved

    def matrices(self, draws: Draws, shape: Sequence[int]) -> Tensor:
        """[B, 2, 3]: where each output pixel (x, y, 1) comes from, in pixels from the picture's middle."""
        angle = math.radians(self.rotate) * draws.sign("rotate")
        slant = torch.tan(math.radians(self.shear) * draws.sign("shear"))
        size = 1 / (1 + self.scale * draws.sign("scale"))
        mirror_x, mirror_y = (1 - 2 * flipped.float() for flipped in self._flips(draws))
        dy, dx = (-shift.float() for shift in self._shifts(draws, shape))
        cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
        turn = torch.stack([cos, sin, -sin, cos], 1).view(-1, 2, 2)
        turn = torch.stack([turn[:, 0] + slant[:, None] * turn[:, 1], turn[:, 1]], 1)
        turn = turn * torch.stack([mirror_x, mirror_y], 1)[:, :, None]
        return torch.cat([turn, turn @ torch.stack([dx, dy], 1)[:, :, None]], 2)

    def _flips(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Whether each picture is mirrored left-right, up-down: bool [B] each."""
        sideways = draws["flip_x"] < (0.5 if self.flip in ("horizontal", "both") else 0.0)
        return sideways, draws["flip_y"] < (0.5 if self.flip in ("vertical", "both") else 0.0)

    def _shifts(self, draws: Draws, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Whole pixels down and right: int64 [B] each, uniform over -reach..reach."""
        reach = [int(self.shift * side + 1e-9) for side in shape[2:]]
        down, right = (
            (draws[slot] * (2 * r + 1)).long() - r for slot, r in zip(("shift_y", "shift_x"), reach, strict=True)
        )
        return down, right

    def _moved_whole(self, pictures: Tensor, draws: Draws) -> Tensor:
        """Flips and whole-pixel shifts by copying pixels: what `warp` gives, without interpolating."""
        _, channels, height, width = pictures.shape
        flip_x, flip_y = self._flips(draws)
        down, right = self._shifts(draws, pictures.shape)
        row_BH, row_inside = _sources(height, down, flip_y, pictures.device)
        column_BW, column_inside = _sources(width, right, flip_x, pictures.device)
        place = (row_BH[:, :, None] * width + column_BW[:, None, :]).view(-1, 1, height * width)
        moved = pictures.flatten(2).gather(2, place.expand(-1, channels, -1)).view_as(pictures)
        if not self.shift:
            return moved
        inside = row_inside[:, :, None] & column_inside[:, None, :]
        return moved * inside[:, None]

    def _recoloured(self, pictures: Tensor, draws: Draws) -> Tensor:
        """One matrix a picture: brightness, then contrast around the mean grey, then saturation, then hue."""
        gain = (1 + self.brightness * draws.sign("brightness"))[:, None]
        stretch = (1 + self.contrast * draws.sign("contrast"))[:, None]
        channels = pictures.shape[1]
        weight_C = torch.tensor(_GREY if channels == 3 else (1.0,), device=pictures.device)
        mean_grey = (pictures.mean((2, 3)) @ weight_C)[:, None] * gain
        offset = ((1 - stretch) * mean_grey)[:, :, None, None]
        if channels == 1:
            return (pictures * (gain * stretch)[:, :, None, None] + offset).clamp_(0, 255)
        matrix = gain[:, :, None] * stretch[:, :, None] * self._colour_matrices(draws, weight_C)
        mixed = torch.baddbmm(offset.flatten(1)[:, :, None], matrix, pictures.flatten(2))
        return mixed.view_as(pictures).clamp_(0, 255)

    def _colour_matrices(self, draws: Draws, weight_C: Tensor) -> Tensor:
        """[B, 3, 3] of saturation and hue. Both keep grey, so contrast's offset passes through them unchanged."""
        keep = (1 + self.saturation * draws.sign("saturation"))[:, None, None]
        eye = torch.eye(3, device=weight_C.device)
        grey = weight_C.expand(3, 3)
        return self._hue(draws, weight_C.device) @ (keep * eye + (1 - keep) * grey)

    def _hue(self, draws: Draws, device: torch.device) -> Tensor:
        """Rotations of the colour plane of YIQ, [B, 3, 3]."""
        to_yiq = torch.tensor([[*_GREY], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], device=device)
        angle = 2 * math.pi * self.hue * draws.sign("hue")
        cos, sin, zero, one = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle), torch.ones_like(angle)
        turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
        turned: Tensor = torch.linalg.inv(to_yiq) @ turn @ to_yiq
        return turned

    def _erased(self, pictures: Tensor, draws: Draws) -> Tensor:
        """A rectangle of random area, shape and place set to the mid grey, in a part of the pictures."""
        height, width = pictures.shape[2:]
        area = (0.02 + 0.31 * draws["erase_area"]) * height * width
        ratio = torch.exp(math.log(1 / 0.3) * draws.sign("erase_shape"))
        tall = torch.sqrt(area * ratio).clamp(1, height).round()
        wide = torch.sqrt(area / ratio).clamp(1, width).round()
        top = (draws["erase_y"] * (height - tall + 1)).floor()
        left = (draws["erase_x"] * (width - wide + 1)).floor()
        row_BH = _between(height, top, tall) & (draws["erase"] < self.erase)[:, None]
        blank = row_BH[:, :, None] & _between(width, left, wide)[:, None, :]
        return pictures.masked_fill(blank[:, None], 127.5)


class Draws:
    """The random numbers of a batch by slot name; drawn when first asked for."""

    def __init__(self, seed: int, epoch: int, index_B: Tensor) -> None:
        slots = torch.arange(len(SLOTS), device=index_B.device)
        self._values = dict(zip(SLOTS, uniform(seed, epoch, index_B, slots).unbind(1), strict=True))

    def __getitem__(self, slot: str) -> Tensor:
        """Uniform in [0, 1): float32 [B]."""
        return self._values[slot]

    def sign(self, slot: str) -> Tensor:
        """Uniform in [-1, 1): float32 [B]."""
        return self._values[slot] * 2 - 1


def warp(pictures_BCHW: Tensor, matrix_B23: Tensor) -> Tensor:
    """Pictures sampled bilinearly where the matrices say; black outside. See `Augment.matrices`."""
    height, width = pictures_BCHW.shape[2:]
    half = torch.tensor([width / 2, height / 2], device=pictures_BCHW.device)
    # grid_sample counts from -1 to 1 over the picture, the matrices in pixels from its middle.
    linear = matrix_B23[:, :, :2] * half[None, None, :] / half[None, :, None]
    theta = torch.cat([linear, matrix_B23[:, :, 2:] / half[None, :, None]], 2)
    grid = F.affine_grid(theta, list(pictures_BCHW.shape), align_corners=False)
    return F.grid_sample(pictures_BCHW, grid, padding_mode="zeros", align_corners=False)


def _sources(size: int, shift_B: Tensor, flip_B: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each output row (or column) the input row it comes from, [B, size], and whether that lies inside."""
    source = torch.arange(size, device=device) - shift_B[:, None]
    inside = (source >= 0) & (source < size)
    source = torch.where(flip_B[:, None], size - 1 - source, source)
    return source.clamp(0, size - 1), inside


def _between(size: int, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Which of range(size) lie in [start, start + length): bool [B, size]."""
    place = torch.arange(size, device=start_B.device)
    return (place >= start_B[:, None]) & (place < (start_B + length_B)[:, None])
