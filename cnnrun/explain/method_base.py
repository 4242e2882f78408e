"""Base classes of explain methods, and the settings that several of them share.

Nothing here imports torch, since the command line reads the settings for `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cnnrun.config.spec import Kind

if TYPE_CHECKING:
    from cnnrun.explain.run import OpenRun
    from cnnrun.explain.subject import Explanation, ImagesToExplain


@dataclass(frozen=True)
class OptionName:
    """Name of a setting's option, if it differs: `--channel 1 --channel 2` sets `channels`."""

    name: str


BackwardRule = Literal["plain", "guided", "deconv"]  # what ReLUs do to gradients
Map = Literal["pca", "tsne"]  # projection of vectors to the plane
Natural = Annotated[int, Field(ge=0)]

Layer = Annotated[
    str | None,
    Field(
        description="A layer by path (model[2].conv), name, or name in the weights; "
        "by default the last conv, or a detector's finest level."
    ),
]
Layers = Annotated[tuple[str, ...], OptionName("layer"), Field(description="A layer by path or name; may be repeated.")]
Channels = Annotated[
    tuple[Natural, ...], OptionName("channel"), Field(description="The number of a channel, from 0; may be repeated.")
]
FirstChannels = Annotated[
    int,
    OptionName("channels"),
    Field(ge=1, le=1000, description="Number of channels to show, starting at channel 0, unless --channel is given."),
]
Class = Annotated[
    str | None, OptionName("class"), Field(description="A class or target to explain; by default the predicted one.")
]
SplitName = Annotated[str | None, Field(description="The split to use; by default test if there is one, else val.")]
ImageCount = Annotated[int, Field(ge=1, le=100, description="Number of images, the first ones of the split.")]
ImageIndices = Annotated[
    tuple[Natural, ...],
    OptionName("image"),
    Field(description="The number of an image in the split, from 0; may be repeated."),
]
Files = Annotated[
    tuple[Path, ...],
    OptionName("file"),
    Field(description="An image file or a folder, instead of a split; may be repeated."),
]


class ExplainMethod(Kind):
    """A method that explains a trained network; its settings are the options of its command."""

    out: ClassVar[str] = "The PNG file to write; by default in RUN/explain."
    suffixes: ClassVar[tuple[str, ...]] = ()  # suffixes of the file for a method's arrays, if it has any

    def explain(self, run: OpenRun) -> Explanation:
        """Explain an opened run. Raises ConfigError, DataError."""
        raise NotImplementedError


class SplitMethod(ExplainMethod):
    """A method that uses a split."""

    split: SplitName = None


class ImageMethod(SplitMethod):
    """A method that explains single images: the first ones of a split, chosen ones, or files."""

    images: ImageCount = 4
    image_indices: ImageIndices = ()
    files: Files = ()

    def load_images(self, run: OpenRun) -> ImagesToExplain:
        """Load the images to explain. Raises ConfigError, DataError."""
        from cnnrun.explain.run import Selection

        return run.load_images(Selection(self.split, self.images, self.image_indices, self.files))
