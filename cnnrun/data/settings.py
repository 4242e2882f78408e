"""The `data` section of the YAML."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.layer import Shape
from cnnrun.data.augment.settings import Augment
from cnnrun.data.image_files import ImageSettings
from cnnrun.data.sources import Source
from cnnrun.data.storage import CacheSettings

HoldOutPart = Annotated[float, Field(ge=0, lt=1)] | Annotated[list[str], Field(min_length=1)]


class HoldOut(Spec):
    """Parts of the training pictures held out where the source has no such split of its own; stratified by label.

    Where the source knows groups, a group is on one side alone.
    """

    by: Literal["picture", "label"] = "picture"
    """`label` holds out whole classes, such as people who are never seen in training."""
    val: HoldOutPart = 0.1
    """The part that chooses: best checkpoint, early stop, thresholds. With `by: label`, a part of the classes, or \
their names."""
    test: HoldOutPart = 0.0
    """The part that is reported, once. With `by: label`, a part of the classes, or their names."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Apart from the run's own seed, so that several seeds are compared on the same pictures."""

    @model_validator(mode="after")
    def _names_are_of_classes(self) -> Self:
        if self.by == "picture" and (isinstance(self.val, list) or isinstance(self.test, list)):
            raise ValueError("classes are held out by name with `by: label`")
        return self


class Data(CacheSettings):
    """What the network learns from."""

    source: Annotated[Source, Kinds()]
    image: ImageSettings = ImageSettings()
    augment: Augment = Augment()
    split: HoldOut = HoldOut()
    bad_files: Literal["error", "skip"] = "error"
    """What to do about files that cannot be decoded: stop and name them, or leave them out and list them in the run."""
    bad_boxes: Literal["error", "skip"] = "error"
    """What to do about boxes of no area, swapped or outside their picture: stop and name them, or leave them out."""
    leakage: Literal["error", "skip", "keep"] = "error"
    """What to do where val or test holds a picture or a group of train, or one picture has two labels: stop, leave \
such pictures out of training, or say so and go on."""
    fingerprint: Literal["times", "content"] = "times"
    """How changed files are noticed: by size and time of change, or by reading them all."""
    prefetch: int | None = Field(None, ge=0, le=1000)
    """Batches read ahead while the network works; by default 2, and none where pictures in memory meet a CPU."""

    def image_shape(self) -> Shape | None:
        """(C, H, W) that the network will see, or None where the config must say and does not."""
        own = self.source.image
        size = self.image.size or (own[1:] if own else None)
        channels = self.image.channels or (own[0] if own else None)
        return None if size is None or channels is None else (channels, *size)
