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
from cnnrun.contracts.results import ClassScores
from cnnrun.data.dataset import Examples
from cnnrun.explain.figures.panels import to_pillow
from cnnrun.explain.figures.png import render_png
from cnnrun.explain.layer_names import LayerPlace, find_layer, layer_features, layer_places
from cnnrun.model.network import BuiltNetwork, build_network
from cnnrun.model.trained_network import TrainedNetwork

_BYTES, _MOST_AT_ONCE = 512 << 20, 128
_OF_EACH = ("raw_BK", "display_BK", "default_B")  # fields of ClassScores that have a row for each image
TILE_SIDE = 84  # pixels that small tiles are enlarged to
PASS_THROUGH_KINDS = ("dropout", "dropout2d", "drop_path", "identity", "flatten")  # change nothing once trained


@dataclass(frozen=True)
class Explanation:
    """A picture, a line that says what it shows, and its numbers; `table` names those to print, rows of one kind."""

    image: NDArray[np.uint8]
    caption: str
    data: dict[str, Any]
    table: str | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImagesToExplain:
    """Pictures to explain: values 0..255 [B, C, H, W] on the device, what they are called and what is in them."""

    pixels: Tensor
    names: list[str]
    target_texts: list[str]
    targets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def pillow_image(self, number: int) -> Any:
        """One of them as a Pillow picture."""
        return to_pillow(self.pixels[number])

    def title(self, number: int) -> str:
        """What to write above it."""
        return self.target_texts[number] or self.names[number]


@dataclass(frozen=True)
class Subject:
    """A trained network and its layers."""

    trained: TrainedNetwork
    layers: Any  # the model section's layers

    @cached_property
    def built_network(self) -> BuiltNetwork:
        """The network on the meta device, with its layers by name."""
        return build_network(self.layers, self.trained.task, self.trained.facts)

    @cached_property
    def places(self) -> list[LayerPlace]:
        return layer_places(self.built_network)

    @cached_property
    def batch_size(self) -> int:
        """Pictures that are run together: so many that what they leave behind for slopes takes half a GiB."""
        return max(1, min(_MOST_AT_ONCE, _BYTES // sum(row.activation_bytes for row in self.built_network.rows)))

    def class_scores(self, pictures_BCHW: Tensor) -> ClassScores:
        """What the network says of any number of pictures, without gradients."""
        with torch.no_grad():
            parts = [compute_class_scores(self.trained, part) for part in pictures_BCHW.split(self.batch_size)]
        raw, shown, meant = (torch.cat([getattr(part, name) for part in parts]) for name in _OF_EACH)
        return replace(parts[0], raw_BK=raw, display_BK=shown, default_B=meant)

    def layer_features(self, place: LayerPlace, pictures_BCHW: Tensor) -> Tensor:
        """What comes out of a layer for any number of pictures, without gradients."""
        network = self.trained.network
        return torch.cat(
            [layer_features(network, place, part) for part in pictures_BCHW.split(self.batch_size)]
        ).float()

    def find_layer(self, word: str) -> LayerPlace:
        """The layer of that name, whatever it gives. Raises ConfigError."""
        return find_layer(self.places, word, self.places, "features")

    def informative_layers(self) -> list[LayerPlace]:
        """The layers before the task's that change something, once trained; the head's own where there are none."""
        known = [place for place in self.places if place.module_name != "head" and place.kind not in PASS_THROUGH_KINDS]
        return known or self.places[-1:]

    def find_map_layer(self, word: str | None) -> LayerPlace:
        """The layer of that name, which must give feature maps. Raises ConfigError.

        Without a name the last conv, or where the task's head takes layers by name, the first of these: a detector's
        finest level.
        """
        if word is None:
            word = next(iter(self.trained.task.feature_layers()), None)
        return find_layer(self.places, word, self.map_layers(), "feature maps")

    def map_layers(self) -> list[LayerPlace]:
        return [place for place in self.places if len(place.shape) == 3]

    def check_channels(self, place: LayerPlace, asked: Sequence[int]) -> list[int]:
        """Those channels of a layer. Raises ConfigError."""
        if wrong := [channel for channel in asked if not 0 <= channel < place.shape[0]]:
            raise ConfigError(f"--channel {wrong[0]}: {place.title} has {place.shape[0]} channels, from 0")
        return list(dict.fromkeys(asked))


def sample_evenly(examples: Examples, most: int) -> tuple[Examples, Tensor]:
    """At most so many samples, at equal distances, and their numbers in the split."""
    numbers = torch.arange(len(examples))
    if len(numbers) > most:
        numbers = torch.linspace(0, len(numbers) - 1, most, dtype=torch.float64).round().long()
    kept = torch.zeros(len(examples), dtype=torch.bool)
    kept[numbers] = True
    return examples.select(kept), numbers


def plot_to_pillow(plot: Plot, scale: float = 1.0) -> Any:
    """A figure as a Pillow picture."""
    from PIL import Image as Pil

    made = Pil.open(io.BytesIO(render_png(plot))).convert("RGB")
    return made.resize((round(made.width * scale), round(made.height * scale)), Pil.Resampling.LANCZOS)


def compute_class_scores(given: TrainedNetwork, pictures_BCHW: Tensor) -> ClassScores:
    """What the network says of pictures."""
    return given.task.class_scores(given.network(pictures_BCHW), given.facts)
