"""What explain methods are made of: the base classes, and the settings that several of them have.

Nothing here imports torch: the command line reads the settings for `--help`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cnnrun.config.spec import Kind

if TYPE_CHECKING:
    from cnnrun.explain.run_method import OpenRun
    from cnnrun.explain.subject import Explanation, ImagesToExplain


@dataclass(frozen=True)
class OptionName:
    """Annotates a setting whose option has another name: `--channel 1 --channel 2` gives the setting `channels`."""

    name: str


BackwardRule = Literal["plain", "guided", "deconv"]  # what ReLUs hand back
Map = Literal["pca", "tsne"]  # how vectors become points of a plane
Natural = Annotated[int, Field(ge=0)]

Layer = Annotated[
    str | None,
    Field(
        description="By path (model[2].conv), name, or name in the weights; "
        "by default the last conv, or a detector's finest."
    ),
]
Layers = Annotated[tuple[str, ...], OptionName("layer"), Field(description="A layer; may be given several times.")]
Channels = Annotated[
    tuple[Natural, ...], OptionName("channel"), Field(description="A channel; may be given several times.")
]
FirstChannels = Annotated[
    int, OptionName("channels"), Field(ge=1, le=1000, description="Channels where none is named: the first ones.")
]
Class = Annotated[
    str | None, OptionName("class"), Field(description="A class or number; by default what the network says.")
]
Split = Annotated[str | None, Field(description="The split to use; by default test where there is one, else val.")]
Images = Annotated[int, Field(ge=1, le=100, description="How many images: the split's first ones.")]
ImageNumbers = Annotated[
    tuple[Natural, ...],
    OptionName("image"),
    Field(description="An image's number in the split; may be given several times."),
]
Files = Annotated[
    tuple[Path, ...],
    OptionName("file"),
    Field(description="An image file or a folder instead; may be given several times."),
]


class ExplainMethod(Kind):
    """A way of looking into a trained network; its settings are the options of its command."""

    out: ClassVar[str] = "The PNG file to write; by default in the run's folder explain."
    suffixes: ClassVar[tuple[str, ...]] = ()  # of the file that holds the arrays, for methods that give arrays

    def explain(self, run: OpenRun) -> Explanation:
        """Explain an opened run. Raises ConfigError, DataError."""
        raise NotImplementedError


class SplitMethod(ExplainMethod):
    """A method that looks at a split."""

    split: Split = None


class ImageMethod(SplitMethod):
    """A method that explains images one by one: a split's first ones, some by number, or files."""

    images: Images = 4
    numbers: ImageNumbers = ()
    files: Files = ()

    def load_images(self, run: OpenRun) -> ImagesToExplain:
        """The images to explain. Raises ConfigError, DataError."""
        from cnnrun.explain.run_method import Selection

        return run.load_images(Selection(self.split, self.images, self.numbers, self.files))
