"""Statistics of a split's pixels: mean and deviation by channel, and the grey levels that 16-bit images use."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.data.cache import images_per_block
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.image_records import channel_mean_std, fill_pixel_sums, record_dtype

_FEW_LEVELS = 64  # of 256: 16-bit images with at most this many grey levels are reported


def training_mean_std(dataset: Dataset) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over the training images."""
    train, stored = dataset.splits["train"], dataset.stored_splits["train"]
    pixels_per_image = int(np.prod(train.images.shape[1:]))
    if stored.records is None:
        total, squares = _sum_pixels(train)
    else:
        records, channels = stored.records()[train.rows.numpy()], train.images.shape[0]
        total, squares = records["pixel_sum"][:, :channels], records["pixel_square_sum"][:, :channels]
    return channel_mean_std(total, squares, pixels_per_image, train.images.pixel_format.levels_per_grey)


def _sum_pixels(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sums of each image's pixels and of their squares, by channel: int64 [N, C] each."""
    records = np.zeros(len(examples), record_dtype(examples.images.shape[0]))
    levels = examples.images.pixel_format.without_black()
    for part in torch.arange(len(examples)).split(images_per_block(int(np.prod(examples.images.shape)))):
        fill_pixel_sums(records[part[0] : part[-1] + 1], levels.to_file(examples.load_images(part)).numpy())
    channels = examples.images.shape[0]
    return records["pixel_sum"][:, :channels], records["pixel_square_sum"][:, :channels]


def narrow_peak(peak_N: NDArray[np.uint16]) -> int | None:
    """The largest value of all 16-bit images if few grey levels are left when they are scaled to 8 bits, else None."""
    peak = int(peak_N.max(initial=0))
    return peak if peak > 0 and _grey_levels(peak) <= _FEW_LEVELS else None


def describe_dark_images(peak: int) -> str:
    """The end of a remark on 16-bit images whose largest value is `peak`."""
    levels = _grey_levels(peak)
    white = next(2**bits - 1 for bits in range(9, 17) if 2**bits > peak)
    kept = f"keep them all with data.image: {{bits: 16, white: {white}}}"
    return f"have no value above {peak:,} of 65,535, which leaves {levels} of 256 grey levels: {kept}"


def _grey_levels(peak: int) -> int:
    """Number of grey levels that are left when 16-bit images up to `peak` are scaled by 1/257 to 8 bits."""
    return peak // 257 + 1
