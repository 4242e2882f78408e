"""Survey a source before a config is written for it: its images, their sizes and channels, its classes and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnrun.base.errors import DataError, escape
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import HeightWidth
from cnnrun.data.image_files import image_errors, read_image_bytes, read_image_header
from cnnrun.data.index import SourceIndex, index_source
from cnnrun.data.settings import Data

_MAX_HEADERS = 400  # headers whose median is the image size
_MIN_GREY_SHARE = 0.95  # the network gets one channel if more of the headers than this are grey


@dataclass(frozen=True)
class Survey:
    """A source: the count, median (height, width) and channels of its training images, and what it was indexed as.

    `has_own_size` is true if the source itself sets the image size.
    """

    source: Any  # as in the config
    index: SourceIndex
    images: int
    median: HeightWidth
    channels: int
    has_own_size: bool

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
        return Survey(source, source_index, len(split), (height, width), channels, has_own_size)
    sizes, grey_count = [], 0
    for index in np.linspace(0, len(split) - 1, min(_MAX_HEADERS, len(split))).astype(int).tolist():
        item = split.images[index]
        try:
            with image_errors(split.sample_name(index)):
                assert not isinstance(item, np.ndarray)
                size, is_grey = read_image_header(read_image_bytes(item))
        except DataError:
            continue  # the audit reports it with all other damaged files
        sizes.append(size)
        grey_count += is_grey
    if not sizes:
        raise DataError(f"{escape(split.sample_name(0))}: cannot be read, nor can any other image of the split")
    height, width = np.median(np.array(sizes), 0).astype(int).tolist()
    channels = 1 if grey_count > _MIN_GREY_SHARE * len(sizes) else 3
    return Survey(source, source_index, len(split), (height, width), channels, has_own_size=False)
