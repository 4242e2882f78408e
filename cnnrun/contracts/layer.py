"""What a layer and a data source promise. Read this second, after the README; a task's promises are in taskspec.py."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cnnrun.base.file_list import Files, Members
from cnnrun.config.spec import Kind
from cnnrun.contracts.objects import ObjectTable

_LARGEST_SIDE = 65_535  # pixels, or channels

Shape = tuple[int, ...]  # of one sample, without the batch: (C, H, W) for pictures, (F,) for vectors
Pair = tuple[int, int]  # (height, width)


# --- layers ---------------------------------------------------------------------------------------------------------


class CannotPass(Exception):
    """A layer cannot take what arrives: why, and what the user can do."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")


@dataclass(frozen=True)
class Window:
    """What a layer's output cell sees of its input, per direction: for receptive fields.

    `kernel` counts dilation in; `scale` is how much the layer enlarges; `whole` means all of the input. `start` is the
    input cell, from the first, where the first output cell's window begins: with padding it is below 0.
    """

    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    scale: Pair = (1, 1)
    whole: bool = False
    start: tuple[float, float] = (0.0, 0.0)


class LayerSpec(Kind):
    """A layer of the YAML: its settings, and how to build it for the shape that arrives."""

    # What the conformance tests build: settings in YAML's words, and a shape that can pass.
    example: ClassVar[dict[str, Any]] = {}
    example_shape: ClassVar[Shape] = (8, 6, 6)
    takes_several: ClassVar[bool] = False

    name: str | None = Field(None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=64)
    """Names this layer's output, for a later layer's `from`."""
    from_: str | Annotated[list[str], Field(min_length=1)] | None = Field(None, alias="from")
    """Takes the output of the layer of that name (or several) instead of the previous layer's."""

    @model_validator(mode="after")
    def _parts_are_unnamed(self) -> Self:
        """A norm or activation inside a layer is a part of it: a name or link there would be ignored, so is refused."""
        for value in self.__dict__.values():
            if isinstance(value, LayerSpec) and (value.name is not None or value.from_ is not None):
                raise ValueError(
                    f"{value.kind} inside {self.kind} takes neither name nor from; give it a line of its own"
                )
        return self

    def build(self, in_shape: Shape) -> nn.Module:
        """The module, for one input of `in_shape`. Raises CannotPass."""
        raise NotImplementedError

    def window(self, in_shape: Shape) -> Window:
        """What an output cell sees of the input."""
        return Window()

    def check(self, in_shapes: Sequence[Shape]) -> None:
        """Raises CannotPass when these inputs cannot be taken together."""
        if len(in_shapes) > 1:
            raise CannotPass(f"{self.kind} takes one input, here are {len(in_shapes)}", "join them with concat or add")

    def inputs(self) -> list[str]:
        """The names in `from`; empty for the previous layer."""
        return [] if self.from_ is None else [self.from_] if isinstance(self.from_, str) else self.from_


def need_picture(kind: str, in_shape: Shape) -> tuple[int, int, int]:
    """`in_shape` as (C, H, W). Raises CannotPass when a vector arrives."""
    if len(in_shape) != 3:
        fix = "move it before `flatten` or the global pool"
        raise CannotPass(f"{kind} needs feature maps (C, H, W)", fix)
    return in_shape[0], in_shape[1], in_shape[2]


def need_vector(kind: str, in_shape: Shape) -> int:
    """`in_shape` as a number of features. Raises CannotPass when feature maps arrive."""
    if len(in_shape) != 1:
        raise CannotPass(f"{kind} needs a vector (features,)", "add `flatten` or `global_avg_pool` before it")
    return in_shape[0]


# --- data -----------------------------------------------------------------------------------------------------------


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

    pictures: Files | Members | NDArray[np.uint8]
    targets: dict[str, Tensor]
    origin: str = "picture"
    groups: Tensor | None = None
    sizes: NDArray[np.int64] | None = None  # [N, 2]: height and width that boxes are written for
    objects: ObjectTable | None = None  # with their boxes, where these are the targets

    def __len__(self) -> int:
        return len(self.pictures)

    def only(self, rows: Tensor) -> Split:
        """Those samples alone."""
        pictures = self.pictures
        return Split(
            pictures[rows.numpy()] if isinstance(pictures, np.ndarray) else pictures.only(rows.tolist()),
            {name: values[rows] for name, values in self.targets.items()},
            self.origin,
            None if self.groups is None else self.groups[rows],
            None if self.sizes is None else self.sizes[rows.numpy()],
            None if self.objects is None else self.objects.only(rows),
        )

    def name(self, index: int) -> str:
        """What to call sample `index` in messages: its file, or its number in the source."""
        if isinstance(self.pictures, Files):
            return os.fsdecode(self.pictures.raw(index))
        item = self.pictures[index]
        return f"{self.origin}[{index}]" if isinstance(item, np.ndarray) else str(item)


@dataclass(frozen=True)
class BadBox:
    """A box that is not what it should be: in which split, which (file and id), and what is wrong with it.

    `used` says that it is used all the same, as far as it lies inside its picture.
    """

    split: str
    name: str
    what: str
    used: bool = False

    @property
    def kind(self) -> str:
        """What is wrong, without the numbers of this box."""
        return re.split(r" \(| of its picture| as ", self.what)[0]


@dataclass(frozen=True)
class Indexed:
    """A source that was looked through: class names in the source's own order, and its splits by name."""

    classes: tuple[str, ...]
    splits: dict[str, Split]
    bad_boxes: tuple[BadBox, ...] = ()  # left out of the targets, or cut
    class_ids: tuple[int, ...] = ()  # the numbers by which the source's own files call its classes
    numbers: tuple[str, ...] = ()  # the names of the numbers that are known of each picture


class SourceSpec(Kind):
    """Where pictures and targets come from."""

    image: ClassVar[Shape | None] = None
    """(C, H, W) of the source's pictures where all have one size; None when the config must say."""

    @property
    def targets(self) -> str:
        """What is known of each picture: `labels` (one class), `label sets` (any number), `numbers` or `boxes`.

        The tensors of the same: `labels` [N], `present` [N, K], `numbers` [N, T]; boxes are in an `ObjectTable`.
        """
        return "labels"

    @property
    def paired(self) -> bool:
        """Whether test is measured on a list of pairs."""
        return False

    @property
    def declares_classes(self) -> bool:
        """Whether the classes are listed one by one, and not gathered from what is written for the pictures."""
        return bool(getattr(self, "classes", None))

    def read(self, apart: bool = False) -> Indexed:
        """Look through the source; files are listed, not decoded. Raises DataError.

        `apart`: val and test may have classes that train has not.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Number:
    """A number that is known of each picture, and what it is over the training pictures."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    least: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What the data says about itself: measured once on the training split, kept with the model.

    `chosen` is what val chose for the trained network, such as thresholds; empty until then.
    """

    classes: tuple[str, ...]
    image: Shape
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    class_counts: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    class_ids: tuple[int, ...] = ()
    chosen: dict[str, float] = field(default_factory=dict)
    numbers: tuple[Number, ...] = ()

    # How a file that holds them is read: see run_records.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def problem(self) -> str | None:
        """What cannot be true of any data, or None."""
        channels = self.image[0] if len(self.image) == 3 else 0
        per_channel = {len(self.mean), len(self.std)} <= {1, channels}
        sides = min(self.image, default=0) >= 1 and max(self.image, default=0) <= _LARGEST_SIDE
        if not sides or not channels or not per_channel or min(self.std, default=0.0) <= 0:
            return "image, mean and std do not fit each other"
        if len(set(self.classes)) < len(self.classes):
            return "a class stands twice"
        wrong_lengths = any(each and len(each) != len(self.classes) for each in (self.class_counts, self.class_ids))
        if wrong_lengths or min((*self.class_counts, *self.counts.values()), default=0) < 0:
            return "its counts are not those of its classes"
        return None


def of_classes(classes: Sequence[str], values: Sequence[float], unit: str = "", most: int = 10) -> str:
    """A number for each class in one line; of many classes the smallest and the largest."""
    pairs = sorted(zip(classes, values, strict=True), key=lambda pair: pair[1])
    shown = pairs if len(pairs) <= most else [pairs[0], pairs[-1]]
    text = ", ".join(f"{name} {value:.3g}{f' {unit}' if unit else ''}" for name, value in shown)
    return text if len(pairs) <= most else f"{text} ({len(pairs)} classes)"
