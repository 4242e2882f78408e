"""The `data` section of the YAML."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cnnrun.config.spec import Kinds, Spec
from cnnrun.contracts.layer import Shape
from cnnrun.data.augment.settings import Augment
from cnnrun.data.image_settings import ImageSettings
from cnnrun.data.sources import Source
from cnnrun.data.storage import StorageSettings

HoldOutPart = Annotated[float, Field(ge=0, lt=1)] | Annotated[list[str], Field(min_length=1)]


class Fold(Spec):
    """One of several equal parts of the images, stratified by label; with `by: label`, of the classes."""

    fold: int = Field(ge=1)
    """The number of the part, from 1."""
    of: int = Field(ge=2, le=100)
    """The number of parts."""

    @model_validator(mode="after")
    def _check_number(self) -> Self:
        if self.fold > self.of:
            raise ValueError(f"there is no fold {self.fold} of {self.of}")
        return self


class HoldOut(Spec):
    """Fractions of the training images to hold out, stratified by label, for splits that the source does not have.

    If the source has groups, each group stays in one split.
    """

    old_values = {"by": {"picture": "image"}}

    by: Literal["image", "label"] = "image"
    """`label` holds out whole classes, such as people who are never seen in training."""
    val: HoldOutPart | Fold = 0.1
    """For choices (best checkpoint, early stop, thresholds): a fraction of the images that `test` leaves. With \
`by: label`, a fraction of all classes, or their names. `{fold: 1, of: 5}`: one of five folds, as `cnnrun data split` \
makes them."""
    test: HoldOutPart = 0.0
    """For the final report: a fraction of the images. With `by: label`, a fraction of the classes, or their names."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the split. It is separate from the run's seed, so that runs with different seeds share one split."""

    @model_validator(mode="after")
    def _check_class_names(self) -> Self:
        if self.by == "image" and (isinstance(self.val, list) or isinstance(self.test, list)):
            raise ValueError("classes are held out by name with `by: label`")
        return self


class Data(StorageSettings):
    """The data set that the network learns from: its source, images, splits and checks."""

    source: Annotated[Source, Kinds()]
    image: ImageSettings = ImageSettings()
    augment: Augment = Augment()
    split: HoldOut = HoldOut()
    bad_files: Literal["error", "skip"] = "error"
    """For image files that cannot be used: stop and name them, or leave them out and list them in the run."""
    bad_boxes: Literal["error", "skip"] = "error"
    """For boxes without area, with swapped corners or outside their image: stop and name them, or leave them out."""
    leakage: Literal["error", "skip", "keep"] = "error"
    """For an image or group of train that is in val or test too, and an image with two labels: stop, leave such \
images out of training, or warn and go on."""
    fingerprint: Literal["times", "content"] = "times"
    """Find changed files by size and modification time, or by reading all of them."""
    prefetch: int | None = Field(None, ge=0, le=1000)
    """Batches to read ahead while the network works; by default 2, or 0 for images in memory on a CPU."""

    def image_shape(self) -> Shape | None:
        """Shape (C, H, W) of the network's input, or None if neither the config nor the source has it."""
        source_shape = self.source.image_shape
        size = self.image.size or (source_shape[1:] if source_shape else None)
        channels = self.image.channels or (source_shape[0] if source_shape else None)
        return None if size is None or channels is None else (channels, *size)
