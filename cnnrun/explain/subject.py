"""What every way of looking takes and gives: a network with its layers, pictures, an aim, an explanation."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import ConfigError
from cnnrun.contracts.figure import Plot
from cnnrun.contracts.results import Said
from cnnrun.data.dataset import Examples
from cnnrun.explain.figures.panels import picture_of
from cnnrun.explain.figures.png import png
from cnnrun.explain.layer_names import Place, features, located, places
from cnnrun.model.network import Built, build
from cnnrun.model.trained import Trained

_BYTES, _MOST_AT_ONCE = 512 << 20, 128
_OF_EACH = ("raw_BK", "shown_BK", "meant_B")  # what a Said has for each picture
SIDE = 84  # pixels that small tiles are enlarged to
AS_THEY_COME = ("dropout", "dropout2d", "drop_path", "identity", "flatten")  # change nothing once trained


@dataclass(frozen=True)
class Explanation:
    """A picture, a line that says what it shows, and its numbers; `table` names those to print, rows of one kind."""

    picture: NDArray[np.uint8]
    caption: str
    data: dict[str, Any]
    table: str | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """Pictures to explain: values 0..255 [B, C, H, W] on the device, what they are called and what is in them."""

    pixels: Tensor
    names: list[str]
    words: list[str]
    targets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, number: int) -> Any:
        """One of them as a Pillow picture."""
        return picture_of(self.pixels[number])

    def title(self, number: int) -> str:
        """What to write above it."""
        return self.words[number] or self.names[number]


@dataclass(frozen=True)
class Subject:
    """A trained network and its layers."""

    given: Trained
    nodes: Any  # the model section's layers

    @cached_property
    def built(self) -> Built:
        """The network on the meta device, with its layers by name."""
        return build(self.nodes, self.given.task, self.given.facts)

    @cached_property
    def places(self) -> list[Place]:
        return places(self.built)

    @cached_property
    def at_once(self) -> int:
        """Pictures that are run together: so many that what they leave behind for slopes takes half a GiB."""
        return max(1, min(_MOST_AT_ONCE, _BYTES // sum(row.activation_bytes for row in self.built.rows)))

    def said(self, pictures_BCHW: Tensor) -> Said:
        """What the network says of any number of pictures, without gradients."""
        with torch.no_grad():
            parts = [said_of(self.given, part) for part in pictures_BCHW.split(self.at_once)]
        raw, shown, meant = (torch.cat([getattr(part, name) for part in parts]) for name in _OF_EACH)
        return replace(parts[0], raw_BK=raw, shown_BK=shown, meant_B=meant)

    def features(self, place: Place, pictures_BCHW: Tensor) -> Tensor:
        """What comes out of a layer for any number of pictures, without gradients."""
        network = self.given.network
        return torch.cat([features(network, place, part) for part in pictures_BCHW.split(self.at_once)]).float()

    def any(self, word: str) -> Place:
        """The layer of that name, whatever it gives. Raises ConfigError."""
        return located(self.places, word, self.places, "features")

    def telling(self) -> list[Place]:
        """The layers before the task's that change something, once trained; the head's own where there are none."""
        known = [place for place in self.places if place.module != "head" and place.kind not in AS_THEY_COME]
        return known or self.places[-1:]

    def maps(self, word: str | None) -> Place:
        """The layer of that name, which must give feature maps. Raises ConfigError.

        Without a name the last conv, or where the task's head takes layers by name, the first of these: a detector's
        finest level.
        """
        if word is None:
            word = next(iter(self.given.task.taken()), None)
        return located(self.places, word, self.with_maps(), "feature maps")

    def with_maps(self) -> list[Place]:
        return [place for place in self.places if len(place.shape) == 3]

    def channels(self, place: Place, asked: Sequence[int]) -> list[int]:
        """Those channels of a layer. Raises ConfigError."""
        if wrong := [channel for channel in asked if not 0 <= channel < place.shape[0]]:
            raise ConfigError(f"--channel {wrong[0]}: {place.title} has {place.shape[0]} channels, from 0")
        return list(dict.fromkeys(asked))


def some(examples: Examples, most: int) -> tuple[Examples, Tensor]:
    """At most so many samples, at equal distances, and their numbers in the split."""
    numbers = torch.arange(len(examples))
    if len(numbers) > most:
        numbers = torch.linspace(0, len(numbers) - 1, most, dtype=torch.float64).round().long()
    kept = torch.zeros(len(examples), dtype=torch.bool)
    kept[numbers] = True
    return examples.only(kept), numbers


def drawn(plot: Plot, scale: float = 1.0) -> Any:
    """A figure as a Pillow picture."""
    from PIL import Image as Pil

    made = Pil.open(io.BytesIO(png(plot))).convert("RGB")
    return made.resize((round(made.width * scale), round(made.height * scale)), Pil.Resampling.LANCZOS)


def said_of(given: Trained, pictures_BCHW: Tensor) -> Said:
    """What the network says of pictures."""
    return given.task.said(given.network(pictures_BCHW), given.facts)
