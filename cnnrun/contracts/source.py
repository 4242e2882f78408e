"""What a data source promises, and what it finds: splits of undecoded samples."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator
from torch import Tensor

from cnnrun.base.file_sequences import Files, Members
from cnnrun.config.spec import Kind
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.objects import ObjectTable


def _distinct(names: list[str]) -> list[str]:
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"class {twice[0]!r} stands twice")
    return names


ClassNames = Annotated[list[str], AfterValidator(_distinct)]


@dataclass(frozen=True)
class Split:
    """Undecoded samples: files, or pictures already in memory as uint8 [N, H, W, C]; and one row of targets each.

    Samples of one group (a patient, a camera, a session) belong on the same side of every split.
    """

    images: Files | Members | NDArray[np.uint8]
    targets: dict[str, Tensor]
    origin: str = "picture"
    groups: Tensor | None = None
    sizes: NDArray[np.int64] | None = None  # [N, 2]: height and width that boxes are written for
    objects: ObjectTable | None = None  # with their boxes, where these are the targets

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Tensor) -> Split:
        """Those samples alone."""
        pictures = self.images
        return Split(
            pictures[rows.numpy()] if isinstance(pictures, np.ndarray) else pictures.select(rows.tolist()),
            {name: values[rows] for name, values in self.targets.items()},
            self.origin,
            None if self.groups is None else self.groups[rows],
            None if self.sizes is None else self.sizes[rows.numpy()],
            None if self.objects is None else self.objects.select(rows),
        )

    def sample_name(self, index: int) -> str:
        """What to call sample `index` in messages: its file, or its number in the source."""
        if isinstance(self.images, Files):
            return os.fsdecode(self.images.path_bytes(index))
        item = self.images[index]
        return f"{self.origin}[{index}]" if isinstance(item, np.ndarray) else str(item)


@dataclass(frozen=True)
class BadBox:
    """A box that is not what it should be: in which split, which (file and id), and what is wrong with it.

    `used` says that it is used all the same, as far as it lies inside its picture.
    """

    split: str
    name: str
    problem: str
    is_used: bool = False

    @property
    def kind(self) -> str:
        """What is wrong, without the numbers of this box."""
        return re.split(r" \(| of its picture| as ", self.problem)[0]


@dataclass(frozen=True)
class SourceContents:
    """A source that was looked through: class names in the source's own order, and its splits by name."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    bad_boxes: tuple[BadBox, ...] = ()  # left out of the targets, or cut
    class_ids: tuple[int, ...] = ()  # the numbers by which the source's own files call its classes
    number_names: tuple[str, ...] = ()  # the names of the numbers that are known of each picture


class SourceSpec(Kind):
    """Where pictures and targets come from."""

    image: ClassVar[Shape | None] = None
    """(C, H, W) of the source's pictures where all have one size; None when the config must say."""

    @property
    def target_kind(self) -> str:
        """What is known of each picture: `labels` (one class), `label sets` (any number), `numbers` or `boxes`.

        The tensors of the same: `labels` [N], `present` [N, K], `numbers` [N, T]; boxes are in an `ObjectTable`.
        """
        return "labels"

    @property
    def has_pairs(self) -> bool:
        """Whether test is measured on a list of pairs."""
        return False

    @property
    def has_declared_classes(self) -> bool:
        """Whether the classes are listed one by one, and not gathered from what is written for the pictures."""
        return bool(getattr(self, "classes", None))

    def read(self, apart: bool = False) -> SourceContents:
        """Look through the source; files are listed, not decoded. Raises DataError.

        `apart`: val and test may have classes that train has not.
        """
        raise NotImplementedError
