"""A decoded data set: its splits with images, targets and objects, and the facts measured on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import escape
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.objects import ObjectTable
from cnnrun.contracts.source import BadBox, Masks, Split
from cnnrun.data.image_stores import ImageStore
from cnnrun.data.masks import find_shown_classes
from cnnrun.data.storage import StoredSplit
from cnnrun.data.targets import count_classes, flatten_targets, target_codes


@dataclass(frozen=True)
class Examples:
    """A decoded split: its images, targets and objects.

    Splits may share `images` [M, C, H, W]: `rows` [N] are the indices of this split's own images. `source_rows` [N] are
    the indices of the same samples in `source`.
    """

    images: ImageStore
    rows: Tensor
    targets: dict[str, Tensor]
    source: Split
    source_rows: Tensor
    objects: ObjectTable | None = None
    masks: ImageStore | None = None  # by the index in `source`

    def __len__(self) -> int:
        return len(self.rows)

    def sample_name(self, index: int) -> str:
        """Name of sample `index` for messages: its file, or its index in the source."""
        return self.source.sample_name(int(self.source_rows[index]))

    def select(self, mask_N: Tensor) -> Examples:
        """The samples for which `mask_N` (bool [N]) is true."""
        targets = {name: values[mask_N] for name, values in self.targets.items()}
        objects = None if self.objects is None else self.objects.select(mask_N)
        rows, source_rows = self.rows[mask_N], self.source_rows[mask_N]
        return replace(self, rows=rows, source_rows=source_rows, targets=targets, objects=objects)

    def batch_targets(self, index_B: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The targets of samples `index_B` on a device, objects padded to the largest count among these samples."""
        objects = {} if self.objects is None else self.objects.pad(index_B)
        targets = {name: values[index_B] for name, values in self.targets.items()} | objects
        if self.masks is not None:
            targets["masks"] = self.masks.take(self.source_rows[index_B])[:, 0]
        return {name: values.to(device, non_blocking=True) for name, values in targets.items()}

    def all_targets(self) -> dict[str, Tensor]:
        """The targets of all samples, objects concatenated with a count per sample: see `flatten_targets`."""
        return flatten_targets(self.targets, self.objects)

    def class_counts(self, classes: int) -> tuple[int, ...]:
        """Number of images, or of objects, of each class; with masks, of images that show it. Empty without classes."""
        if self.masks is not None:
            return tuple(find_shown_classes(self.masks, self.source_rows, classes).sum(0).tolist())
        return count_classes(self.all_targets(), classes)

    def load_images(self, index_B: Tensor) -> Tensor:
        """The images of samples `index_B`, [B, C, H, W], on the host."""
        return self.images.take(self.rows[index_B])


@dataclass(frozen=True)
class Dataset:
    """All decoded splits, the facts measured on the training split, and the samples left out with reasons."""

    facts: DataFacts
    splits: dict[str, Examples]
    stored_splits: dict[str, StoredSplit] = field(default_factory=dict)
    skipped_samples: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # remarks on the data, a line each, for the user
    bad_boxes: tuple[BadBox, ...] = ()
    # Name, split and (size, time) of each file, for the source's splits that consist of files, then for their masks.
    file_listings: tuple[tuple[str, Split | Masks, NDArray[np.int64]], ...] = ()

    def listing_lines(self) -> Iterator[str]:
        """Yield a line for each file: split, path, size, modification time in ns, label (or a digest of its boxes).

        The label of a mask's file is `mask`. Splits whose images are in memory have no lines.
        """
        for name, part, listing in self.file_listings:
            if isinstance(part, Masks):
                labels = ["mask"] * len(part)
            else:
                labels = target_codes(part.targets, part.objects, len(part)).tolist()
            for index, (size, modified_ns, *_) in enumerate(listing.tolist()):
                yield f"{name}\t{escape(part.sample_name(index))}\t{size}\t{modified_ns}\t{labels[index]}"
