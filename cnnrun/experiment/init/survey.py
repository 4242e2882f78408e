"""Survey a source before a config is written for it: its images, their sizes and channels, its classes and splits."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun.base.errors import DataError, escape
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import HeightWidth
from cnnrun.contracts.source import Split
from cnnrun.data.image_files import image_errors, read_image_bytes, read_image_header, read_planes
from cnnrun.data.image_planes import PlanesHeader
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.index import SourceIndex, index_source
from cnnrun.data.settings import Data

_MAX_HEADERS = 400  # headers whose median is the image size
_MIN_GREY_SHARE = 0.95  # the network gets one channel if more of the headers than this are grey
_MAX_CLIPPED_SHARE = 0.01  # of so few pixels below 0, as of a satellite, nothing is lost


@dataclass(frozen=True)
class Survey:
    """A source: the count, median (height, width) and channels of its training images, and what it was indexed as.

    `has_own_size` is true if the source itself sets the image size. `levels` are the settings of `image` that images of
    16 bits need; empty for 8.
    """

    source: Any  # as in the config
    index: SourceIndex
    images: int
    median: HeightWidth
    channels: int
    has_own_size: bool
    levels: dict[str, Any] = field(default_factory=dict)

    @property
    def splits(self) -> frozenset[str]:
        """The names of the source's own splits."""
        return frozenset(self.index.contents.splits)

    @property
    def class_count(self) -> int:
        """The number of classes, 0 for numbers."""
        return len(self.index.contents.classes)

    def facts(self, channels: int, size: HeightWidth) -> DataFacts:
        """The data facts for images of this size, as they are known before decoding."""
        return DataFacts(
            self.index.contents.classes,
            (channels, *size),
            class_counts=self.index.class_counts(),
            counts=self.index.counts,
            numbers=self.index.numbers(),
        )


def survey_source(source: Any, has_disjoint_classes: bool = False) -> Survey:
    """Index a source and read the headers of some training images. Raises DataError if none can be read.

    `has_disjoint_classes` says that the splits have other classes, such as other people.
    """
    split_by = "label" if has_disjoint_classes else "image"
    data = Data.model_validate({"source": source, "split": {"by": split_by, "val": 0.0, "test": 0.0}})
    source_index = index_source(data)
    split = source_index.contents.splits["train"]
    if isinstance(split.images, np.ndarray):
        height, width, channels = split.images.shape[1:]
        has_own_size = data.source.image_shape is not None
        levels = {} if split.images.dtype == np.uint8 else _find_levels(source_index, channels)
        return Survey(source, source_index, len(split), (height, width), channels, has_own_size, levels)
    headers: list[PlanesHeader] = []
    for index in np.linspace(0, len(split) - 1, min(_MAX_HEADERS, len(split))).astype(int).tolist():
        item = split.images[index]
        try:
            with image_errors(split.sample_name(index)):
                assert not isinstance(item, np.ndarray)
                headers.append(read_image_header(read_image_bytes(item)))
        except DataError:
            continue  # the audit reports it with all other damaged files
    if not headers:
        raise DataError(f"{escape(split.sample_name(0))}: cannot be read, nor can any other image of the split")
    height, width = np.median(np.array([header.size for header in headers]), 0).astype(int).tolist()
    channels = _common_channels(headers)
    levels = _find_levels(source_index, channels) if all(header.is_deep for header in headers) else {}
    return Survey(source, source_index, len(split), (height, width), channels, False, levels)


def _common_channels(headers: list[PlanesHeader]) -> int:
    """The channels that most images have; grey only if almost all are."""
    counts = Counter(header.planes for header in headers)
    channels = counts.most_common(1)[0][0]
    return 3 if channels == 1 and counts[1] <= _MIN_GREY_SHARE * len(headers) else channels


def _find_levels(source_index: SourceIndex, channels: int) -> dict[str, Any]:
    """The settings `bits`, `white`, `black` and `clip` that the 16-bit images of all splits need."""
    say("reading the range of the 16-bit images")

    def read_range(split: Split, index: int) -> tuple[int, int, float]:
        try:
            pixels = _read_pixels(split, index, channels)
        except DataError:
            return 0, 0, 0.0  # the audit reports it with all other damaged files
        return int(pixels.min()), int(pixels.max()), float(np.mean(pixels < 0))

    ranges: list[tuple[int, int, float]] = []
    with ThreadPoolExecutor(processor_count()) as pool:
        for split in source_index.source_splits():
            ranges += pool.map(partial(read_range, split), range(len(split)))
    lows, highs, negative_shares = zip(*ranges, strict=True)
    levels: dict[str, Any] = {"bits": 16, "white": _largest_of_bits(max(highs))}
    if min(lows) >= 0:
        return levels
    negative_share = float(np.mean(negative_shares))
    if negative_share < _MAX_CLIPPED_SHARE:
        say(
            f"{100 * negative_share:.2g} % of the pixels are below 0, down to {min(lows):,}: they are taken as 0 (clip)"
        )
        return levels | {"clip": True}
    return levels | {"black": -_largest_of_bits(-min(lows) - 1) - 1}


def _read_pixels(split: Split, index: int, channels: int) -> NDArray[Any]:
    """The pixels of an image as its file has them, [H, W, C]. Raises DataError."""
    item = split.images[index]
    if isinstance(item, np.ndarray):
        return item
    with image_errors(split.sample_name(index)):
        return read_planes(read_image_bytes(item), channels, ImageSettings()).pixels_HWP


def _largest_of_bits(value: int) -> int:
    """The largest number of as many bits as `value` needs, from 9."""
    return max((1 << value.bit_length()) - 1, 511)
