"""What the network learns from: the `data` section of the YAML, its splits, and what they are once decoded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import escape
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.objects import ObjectTable
from cnnrun.contracts.source import BadBox, Split
from cnnrun.data.storage import ImageStore, StoredSplit
from cnnrun.data.targets import flatten_targets, target_codes


@dataclass(frozen=True)
class Examples:
    """A split, decoded: `rows` says which of the pictures [M, C, H, W] that splits may share are its own."""

    images: ImageStore
    rows: Tensor
    targets: dict[str, Tensor]
    source: Split
    source_rows: Tensor
    objects: ObjectTable | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def sample_name(self, index: int) -> str:
        """What to call sample `index` in messages."""
        return self.source.sample_name(int(self.source_rows[index]))

    def select(self, kept: Tensor) -> Examples:
        """The samples for which `kept` (bool [N]) holds."""
        targets = {name: values[kept] for name, values in self.targets.items()}
        objects = None if self.objects is None else self.objects.select(kept)
        rows, source_rows = self.rows[kept], self.source_rows[kept]
        return replace(self, rows=rows, source_rows=source_rows, targets=targets, objects=objects)

    def batch_targets(self, index_B: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The targets of samples `index_B`, objects padded to the most that one of them has."""
        objects = {} if self.objects is None else self.objects.pad(index_B)
        own = {name: values[index_B] for name, values in self.targets.items()} | objects
        return {name: values.to(device, non_blocking=True) for name, values in own.items()}

    def all_targets(self) -> dict[str, Tensor]:
        """The targets of all samples; objects one after the other, with how many there are of each: see `flat`."""
        return flatten_targets(self.targets, self.objects)

    def load_images(self, index_B: Tensor) -> Tensor:
        """Samples `index_B` as [B, C, H, W] on the host."""
        return self.images.take(self.rows[index_B])


@dataclass(frozen=True)
class Dataset:
    """Every split, decoded, what was measured on the training split, and what was left out and why."""

    facts: Facts
    splits: dict[str, Examples]
    stored_splits: dict[str, StoredSplit] = field(default_factory=dict)
    skipped_samples: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()  # what the audit found, for people
    bad_boxes: tuple[BadBox, ...] = ()
    file_listings: tuple[
        tuple[str, Split, NDArray[np.int64]], ...
    ] = ()  # the source's splits of files, with sizes and times

    def listing_lines(self) -> Iterator[str]:
        """A line a file: split, path, size, time of change, label (or a digest of its boxes).

        Nothing for pictures that are no files.
        """
        for name, split, of_files in self.file_listings:
            labels = target_codes(split.targets, split.objects, len(split)).tolist()
            for number, (size, when, *_) in enumerate(of_files.tolist()):
                yield f"{name}\t{escape(split.sample_name(number))}\t{size}\t{when}\t{labels[number]}"
