"""Changing colours by one matrix a picture, and blurring, noise and blanking, a batch at a time. Values are 0..255."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrun.base.device import tensor_on
from cnnrun.base.randomness import random_bits

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's "L"
_NOISE_SLOT = 1 << 33  # apart from every other draw's


def change_colours(
    pictures: Tensor, brightness_B: Tensor, contrast_B: Tensor, saturation_B: Tensor, hue_B: Tensor
) -> Tensor:
    """One matrix a picture: brightness, then contrast around the mean grey, then saturation, then hue.

    The first three are factors, hue an angle in radians. The result is cut to 0..255.
    """
    channels = pictures.shape[1]
    weight_C = tensor_on(pictures.device, _GREY if channels == 3 else (1.0,))
    gain, stretch = brightness_B[:, None], contrast_B[:, None]
    # A sum, no matrix product: that gives other last bits to other numbers of rows.
    mean_grey = (pictures.mean((2, 3)) * weight_C).sum(1)[:, None] * gain
    offset = ((1 - stretch) * mean_grey)[:, :, None, None]
    if channels == 1:
        return (pictures * (gain * stretch)[:, :, None, None] + offset).clamp_(0, 255)
    matrix = gain[:, :, None] * stretch[:, :, None] * _colour_matrices(saturation_B, hue_B, weight_C)
    mixed = torch.baddbmm(offset.flatten(1)[:, :, None], matrix, pictures.flatten(2))
    return mixed.view_as(pictures).clamp_(0, 255)


def _colour_matrices(saturation_B: Tensor, hue_B: Tensor, weight_C: Tensor) -> Tensor:
    """[B, 3, 3] of saturation and hue. Both keep grey, so contrast's offset passes through them unchanged."""
    keep = saturation_B[:, None, None]
    eye = torch.eye(3, device=weight_C.device)
    return _hue(hue_B) @ (keep * eye + (1 - keep) * weight_C.expand(3, 3))


def _hue(angle_B: Tensor) -> Tensor:
    """Rotations of the colour plane of YIQ, [B, 3, 3]."""
    to_yiq = tensor_on(angle_B.device, [[*_GREY], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin, zero, one = torch.cos(angle_B), torch.sin(angle_B), torch.zeros_like(angle_B), torch.ones_like(angle_B)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    turned: Tensor = torch.linalg.inv_ex(to_yiq)[0] @ turn @ to_yiq
    return turned


def gaussian_blur(pictures: Tensor, sigma_B: Tensor, largest: float) -> Tensor:
    """Gaussian blur of `sigma_B` pixels, at most `largest`; the edge's pixels go on beyond it.

    The window ends at three deviations, as scipy's `gaussian_filter(truncate=3)` does for the largest.
    """
    reach = math.ceil(3 * largest)
    place = torch.arange(-reach, reach + 1, device=pictures.device, dtype=torch.float32)
    weight_BT = torch.exp(-0.5 * (place / sigma_B.clamp(min=1e-3)[:, None]).square())
    weight_BT = weight_BT / weight_BT.sum(1, keepdim=True)
    for axis, pad in ((3, (reach, reach, 0, 0)), (2, (0, 0, reach, reach))):
        wide, size = F.pad(pictures, pad, mode="replicate"), pictures.shape[axis]
        pictures = torch.zeros_like(pictures)
        # A sum over shifted copies: the same bits whatever the number of threads, which a convolution does not promise.
        for tap in range(2 * reach + 1):
            pictures.addcmul_(wide.narrow(axis, tap, size), weight_BT[:, tap].view(-1, 1, 1, 1))
    return pictures


def add_noise(pictures: Tensor, sigma_B: Tensor, seed: int, epoch: int, index_B: Tensor) -> Tensor:
    """Gaussian noise of deviation `sigma_B` for each value of each picture, a function of (seed, epoch, sample, place).

    Two normals out of each hash by Box and Muller (1958).
    """
    count = pictures[0].numel()
    half = -(-count // 2)
    slots = torch.arange(half, device=pictures.device) + _NOISE_SLOT
    raw = random_bits(seed, epoch, index_B, slots)
    radius = torch.sqrt(-2 * torch.log(((raw >> 40 & 0xFFFFFF).float() + 1) * 2.0**-24))
    angle = (raw >> 16 & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)[:, :count]
    return torch.addcmul(pictures, normal.view_as(pictures), sigma_B.view(-1, 1, 1, 1)).clamp_(0, 255)


def rectangle_masks(area_B: Tensor, ratio_B: Tensor, y_B: Tensor, x_B: Tensor, height: int, width: int) -> Tensor:
    """bool [B, H, W]: rectangles of so many pixels and such ratios of height to width, inside the picture."""
    tall = torch.sqrt(area_B * ratio_B).clamp(1, height).round()
    wide = torch.sqrt(area_B / ratio_B).clamp(1, width).round()
    top = (y_B * (height - tall + 1)).floor()
    left = (x_B * (width - wide + 1)).floor()
    return _between(height, top, tall)[:, :, None] & _between(width, left, wide)[:, None, :]


def _between(size: int, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Which of range(size) lie in [start, start + length): bool [B, size]."""
    place = torch.arange(size, device=start_B.device)
    return (place >= start_B[:, None]) & (place < (start_B + length_B)[:, None])
