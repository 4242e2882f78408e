"""Interface of a data source, and its contents: splits of undecoded samples."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator
from torch import Tensor

from cnnrun.base.file_sequences import Files, Members
from cnnrun.config.spec import Kind
from cnnrun.contracts.drawn_masks import DrawnMasks
from cnnrun.contracts.layer import Shape
from cnnrun.contracts.objects import ObjectTable
from cnnrun.contracts.target_kind import TargetKind


def _check_distinct(names: list[str]) -> list[str]:
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"class {repeated[0]!r} appears twice")
    return names


ClassNames = Annotated[list[str], AfterValidator(_check_distinct)]


@dataclass(frozen=True)
class Split:
    """Undecoded samples: image files, or arrays of uint8, uint16 or int16 [N, H, W, C], with one row of targets each.

    `origin` names the source in messages about images that have no file. Samples of one group (a patient, a camera, a
    session) must all be in the same split.
    """

    images: Files | Members | NDArray[Any]
    targets: dict[str, Tensor]
    origin: str = "image"
    groups: Tensor | None = None
    sizes: NDArray[np.int64] | None = None  # [N, 2]: height and width of the image to which the boxes refer
    objects: ObjectTable | None = None  # if the targets are boxes
    masks: Masks | None = None  # if the targets are masks

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Tensor) -> Split:
        """Return the samples at these indices."""
        images = self.images
        return Split(
            images[indices.numpy()] if isinstance(images, np.ndarray) else images.select(indices.tolist()),
            {name: values[indices] for name, values in self.targets.items()},
            self.origin,
            None if self.groups is None else self.groups[indices],
            None if self.sizes is None else self.sizes[indices.numpy()],
            None if self.objects is None else self.objects.select(indices),
            None if self.masks is None else self.masks.select(indices),
        )

    def sample_name(self, index: int) -> str:
        """Name of a sample in messages: its file, or its index in the source."""
        if isinstance(self.images, Files):
            return os.fsdecode(self.images.path_bytes(index))
        image = self.images[index]
        return f"{self.origin}[{index}]" if isinstance(image, np.ndarray) else str(image)


@dataclass(frozen=True)
class Masks:
    """A mask for each image of a split: image files, drawn masks, or class indices as uint8 [N, H, W, 1].

    `class_of_value` [256] has the class index of each grey value or palette index of the files; `IGNORED` for pixels
    to ignore, `UNKNOWN` for values that are no class. If there is a `class_of_colour`, it has the same for each RGB
    colour (0xRRGGBB) that the files may show.
    """

    images: Files | DrawnMasks | NDArray[np.uint8]
    class_of_value: tuple[int, ...]
    origin: str = "mask"
    class_of_colour: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def meaning(self) -> str:
        """Text of what values and colours mean, for keys of caches and fingerprints."""
        return repr(self.class_of_value) + (repr(self.class_of_colour) if self.class_of_colour else "")

    def select(self, indices: Tensor) -> Masks:
        """Return the masks at these indices."""
        images = self.images
        return replace(
            self, images=images[indices.numpy()] if isinstance(images, np.ndarray) else images.select(indices.tolist())
        )

    def sample_name(self, index: int) -> str:
        """Name of a mask in messages: its file, or its index in the source."""
        if isinstance(self.images, Files):
            return os.fsdecode(self.images.path_bytes(index))
        return str(self.images[index]) if isinstance(self.images, DrawnMasks) else f"{self.origin}[{index}]"


BoxTreatment = Literal["left out", "cut", "kept"]  # cut at the image's edges


@dataclass(frozen=True)
class BadBox:
    """A box with a problem: its split, its name (file and id), the kind of problem, and this box's own details."""

    split: str
    name: str
    kind: str
    details: str
    treatment: BoxTreatment

    @property
    def problem(self) -> str:
        """Problem of the box, with its coordinates or the box that it repeats."""
        return f"{self.kind} {self.details}"

    @property
    def is_used(self) -> bool:
        """True if the box, or the part of it inside the image, is a target all the same."""
        return self.treatment != "left out"


@dataclass(frozen=True)
class SourceContents:
    """Contents of a source: class names in the source's order, and splits by name."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    bad_boxes: tuple[BadBox, ...] = ()
    class_ids: tuple[int, ...] = ()  # ids of the classes in the source's files
    number_names: tuple[str, ...] = ()  # names of the numeric targets


class SourceSpec(Kind):
    """A source of images and targets."""

    image_shape: ClassVar[Shape | None] = None
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

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        """List the source's samples without decoding images. Raises DataError.

        With `has_disjoint_classes`, val and test may have classes that train lacks.
        """
        raise NotImplementedError
