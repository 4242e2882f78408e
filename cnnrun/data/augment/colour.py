"""Colour changes, blur, noise and blank rectangles for a batch of images with values 0..255."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrun.base.device import tensor_on
from cnnrun.base.randomness import random_bits

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma, as Pillow's "L"
_NOISE_SLOT = 1 << 33  # beyond the slots of all other draws


def change_colours(
    images: Tensor, brightness_B: Tensor, contrast_B: Tensor, saturation_B: Tensor, hue_B: Tensor
) -> Tensor:
    """Change brightness, then contrast around the mean grey, then saturation, then hue, by one matrix for each image.

    The first three are factors; hue is an angle in radians. The result is clipped to 0..255. Images that are not RGB
    keep saturation and hue, and each of their channels has its own mean.
    """
    gain, stretch = brightness_B[:, None], contrast_B[:, None]
    if images.shape[1] != 3:
        offset = (1 - stretch) * (images.mean((2, 3)) * gain)
        return (images * (gain * stretch)[:, :, None, None] + offset[:, :, None, None]).clamp_(0, 255)
    weight_C = tensor_on(images.device, _GREY)
    # A sum: the last bits of a matrix product would depend on the size of the batch.
    mean_grey = (images.mean((2, 3)) * weight_C).sum(1)[:, None] * gain
    offset = ((1 - stretch) * mean_grey)[:, :, None, None]
    matrix = gain[:, :, None] * stretch[:, :, None] * _colour_matrices(saturation_B, hue_B, weight_C)
    mixed = torch.baddbmm(offset.flatten(1)[:, :, None], matrix, images.flatten(2))
    return mixed.view_as(images).clamp_(0, 255)


def _colour_matrices(saturation_B: Tensor, hue_B: Tensor, weight_C: Tensor) -> Tensor:
    """Matrices of saturation and hue, [B, 3, 3]. Both keep grey, so the offset of contrast passes through unchanged."""
    saturation = saturation_B[:, None, None]
    eye = torch.eye(3, device=weight_C.device)
    return _hue_matrices(hue_B) @ (saturation * eye + (1 - saturation) * weight_C.expand(3, 3))


def _hue_matrices(angle_B: Tensor) -> Tensor:
    """Rotations of the I and Q axes of YIQ by angles in radians, as matrices for RGB, [B, 3, 3]."""
    to_yiq = tensor_on(angle_B.device, [[*_GREY], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    cos, sin, zero, one = torch.cos(angle_B), torch.sin(angle_B), torch.zeros_like(angle_B), torch.ones_like(angle_B)
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    matrices: Tensor = torch.linalg.inv_ex(to_yiq)[0] @ rotation @ to_yiq
    return matrices


def gaussian_blur(images: Tensor, sigma_B: Tensor, max_sigma: float) -> Tensor:
    """Gaussian blur with deviations of `sigma_B` pixels, at most `max_sigma`; edges are padded with their own pixels.

    The window ends at three times `max_sigma`, as that of scipy's `gaussian_filter(truncate=3)`.
    """
    radius = math.ceil(3 * max_sigma)
    offset = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    weight_BT = torch.exp(-0.5 * (offset / sigma_B.clamp(min=1e-3)[:, None]).square())
    weight_BT = weight_BT / weight_BT.sum(1, keepdim=True)
    for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded, size = F.pad(images, pad, mode="replicate"), images.shape[axis]
        images = torch.zeros_like(images)
        # A sum over shifted copies: unlike a convolution, it gives the same bits for any number of threads.
        for tap in range(2 * radius + 1):
            images.addcmul_(padded.narrow(axis, tap, size), weight_BT[:, tap].view(-1, 1, 1, 1))
    return images


def add_noise(images: Tensor, sigma_B: Tensor, seed: int, epoch: int, index_B: Tensor) -> Tensor:
    """Add Gaussian noise of deviation `sigma_B` to each value, as a function of (seed, epoch, sample, position).

    Each hash gives two normal numbers (Box and Muller 1958). The result is clipped to 0..255.
    """
    count = images[0].numel()
    half = -(-count // 2)
    slots = torch.arange(half, device=images.device) + _NOISE_SLOT
    bits = random_bits(seed, epoch, index_B, slots)
    radius = torch.sqrt(-2 * torch.log(((bits >> 40 & 0xFFFFFF).float() + 1) * 2.0**-24))
    angle = (bits >> 16 & 0xFFFFFF).float() * (2 * math.pi * 2.0**-24)
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)[:, :count]
    return torch.addcmul(images, normal.view_as(images), sigma_B.view(-1, 1, 1, 1)).clamp_(0, 255)


def rectangle_masks(
    area_B: Tensor, height_per_width_B: Tensor, y_B: Tensor, x_B: Tensor, height: int, width: int
) -> Tensor:
    """Masks of rectangles inside the image, bool [B, H, W].

    `area_B` is in pixels, and `y_B` and `x_B` in [0, 1) choose the place.
    """
    mask_height = torch.sqrt(area_B * height_per_width_B).clamp(1, height).round()
    mask_width = torch.sqrt(area_B / height_per_width_B).clamp(1, width).round()
    top = (y_B * (height - mask_height + 1)).floor()
    left = (x_B * (width - mask_width + 1)).floor()
    return _interval_masks(height, top, mask_height)[:, :, None] & _interval_masks(width, left, mask_width)[:, None, :]


def _interval_masks(size: int, start_B: Tensor, length_B: Tensor) -> Tensor:
    """Masks of range(size) that are true in [start, start + length), bool [B, size]."""
    position = torch.arange(size, device=start_B.device)
    return (position >= start_B[:, None]) & (position < (start_B + length_B)[:, None])
