"""Interface of a data source, and its contents: splits of undecoded samples."""

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
from cnnrun.contracts.target_kind import TargetKind


def _check_distinct(names: list[str]) -> list[str]:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"class {repeated[0]!r} stands twice")
    return names


ClassNames = Annotated[list[str], AfterValidator(_check_distinct)]


@dataclass(frozen=True)
class Split:
    """Undecoded samples: image files, or images in memory as uint8 [N, H, W, C], with one row of targets each.

    Samples of one group (a patient, a camera, a session) must all be in the same split.
    """

    images: Files | Members | NDArray[np.uint8]
    targets: dict[str, Tensor]
    origin: str = "picture"
    groups: Tensor | None = None
    sizes: NDArray[np.int64] | None = None  # [N, 2]: height and width of the image to which the boxes refer
    objects: ObjectTable | None = None  # if the targets are boxes

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: Tensor) -> Split:
        """Return the samples at these indices."""
        images = self.images
        return Split(
            images[rows.numpy()] if isinstance(images, np.ndarray) else images.select(rows.tolist()),
            {name: values[rows] for name, values in self.targets.items()},
            self.origin,
            None if self.groups is None else self.groups[rows],
            None if self.sizes is None else self.sizes[rows.numpy()],
            None if self.objects is None else self.objects.select(rows),
        )

    def sample_name(self, index: int) -> str:
        """Name of a sample in messages: its file, or its index in the source."""
        if isinstance(self.images, Files):
            return os.fsdecode(self.images.path_bytes(index))
        image = self.images[index]
        return f"{self.origin}[{index}]" if isinstance(image, np.ndarray) else str(image)


@dataclass(frozen=True)
class BadBox:
    """A box with a problem: its split, its name (file and id), and what is wrong.

    `is_used` means that the part of the box inside the image is used all the same.
    """

    split: str
    name: str
    problem: str
    is_used: bool = False

    @property
    def kind(self) -> str:
        """The problem without this box's coordinates, to count boxes with the same problem."""
        return re.split(r" \(| of its picture| as ", self.problem)[0]


@dataclass(frozen=True)
class SourceContents:
    """Contents of a source: class names in the source's order, and splits by name."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    bad_boxes: tuple[BadBox, ...] = ()  # left out of the targets, or cut at the image's edges
    class_ids: tuple[int, ...] = ()  # ids of the classes in the source's files
    number_names: tuple[str, ...] = ()  # names of the numeric targets


class SourceSpec(Kind):
    """A source of images and targets."""

    image: ClassVar[Shape | None] = None
    """(C, H, W) of the images if all have the same size; None if the config must set it."""

    @property
    def target_kind(self) -> TargetKind:
        """Kind of the targets; a task must learn it."""
        return TargetKind.LABELS

    @property
    def has_pairs(self) -> bool:
        """True if test is measured on a list of pairs."""
        return False

    @property
    def has_declared_classes(self) -> bool:
        """True if the config lists the classes, and they are not collected from the targets."""
        return bool(getattr(self, "classes", None))

    def read(self, apart: bool = False) -> SourceContents:
        """List the source's samples without decoding images. Raises DataError.

        With `apart`, val and test may have classes that train does not have.
        """
        raise NotImplementedError
