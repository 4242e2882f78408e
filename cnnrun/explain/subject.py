"""Inputs and results that explain methods share: a network with its layers, images to explain, an explanation."""

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
from cnnrun.explain.layer_names import NamedLayer, find_layer, layer_features, list_layers
from cnnrun.model.network import BuiltNetwork, build_network
from cnnrun.model.trained_network import TrainedNetwork

_MAX_ACTIVATION_BYTES, _MAX_BATCH = 512 << 20, 128
_PER_IMAGE_FIELDS = ("raw_BK", "display_BK", "default_B")  # fields of ClassScores with a row for each image
TILE_SIDE = 84  # pixels to which small tiles are enlarged
# Layers of these kinds change no value in evaluation.
PASS_THROUGH_KINDS = ("dropout", "dropout2d", "drop_path", "identity", "flatten")


@dataclass(frozen=True)
class Explanation:
    """An image, its caption and its data; `table` is the key of the rows in `data` to print, if any."""

    image: NDArray[np.uint8]
    caption: str
    data: dict[str, Any]
    table: str | None = None
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImagesToExplain:
    """Images to explain: pixel values 0..255 [B, C, H, W] on the device, with names, targets and these as text."""

    pixels: Tensor
    names: list[str]
    target_texts: list[str]
    targets: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def pillow_image(self, index: int) -> Any:
        """Convert one image to a Pillow image."""
        return to_pillow(self.pixels[index])

    def title(self, index: int) -> str:
        """Title of one image: its target as text, or its name if it has none."""
        return self.target_texts[index] or self.names[index]


@dataclass(frozen=True)
class ExplainedNetwork:
    """A trained network and its layers."""

    trained: TrainedNetwork
    layers: Any  # the model section's layers

    @cached_property
    def built_network(self) -> BuiltNetwork:
        """The network on the meta device, whose layers are known by name."""
        return build_network(self.layers, self.trained.task)

    @cached_property
    def places(self) -> list[NamedLayer]:
        """The network's layers with their names, in order."""
        return list_layers(self.built_network)

    @cached_property
    def batch_size(self) -> int:
        """Number of images to run together, so that activations stored for gradients take at most 512 MiB."""
        image_bytes = sum(row.activation_bytes for row in self.built_network.rows)
        return max(1, min(_MAX_BATCH, _MAX_ACTIVATION_BYTES // image_bytes))

    def class_scores(self, images_BCHW: Tensor) -> ClassScores:
        """Compute the scores of any number of images in batches, without gradients."""
        with torch.no_grad():
            batch_scores = [compute_class_scores(self.trained, batch) for batch in images_BCHW.split(self.batch_size)]
        raw, display, default = (
            torch.cat([getattr(scores, name) for scores in batch_scores]) for name in _PER_IMAGE_FIELDS
        )
        return replace(batch_scores[0], raw_BK=raw, display_BK=display, default_B=default)

    def layer_features(self, place: NamedLayer, images_BCHW: Tensor) -> Tensor:
        """Compute a layer's output for any number of images in batches, without gradients."""
        network = self.trained.network
        return torch.cat(
            [layer_features(network, place, batch) for batch in images_BCHW.split(self.batch_size)]
        ).float()

    def find_layer(self, name: str) -> NamedLayer:
        """Find a layer by name, whatever its output. Raises ConfigError."""
        return find_layer(self.places, name, self.places, "features")

    def informative_layers(self) -> list[NamedLayer]:
        """List the layers before the head that change something in evaluation; the head alone if there are none."""
        places = [place for place in self.places if place.module_name != "head"]
        informative = [place for place in places if place.kind not in PASS_THROUGH_KINDS]
        return informative or self.places[-1:]

    def find_feature_map_layer(self, name: str | None) -> NamedLayer:
        """Find a layer whose outputs are feature maps by its name. Raises ConfigError.

        Without a name, choose the first layer that the task's head takes by name (a detector's finest level), else the
        last conv.
        """
        if name is None:
            name = next(iter(self.trained.task.requirements.feature_layers), None)
        return find_layer(self.places, name, self.feature_map_layers(), "feature maps")

    def feature_map_layers(self) -> list[NamedLayer]:
        """List the layers whose outputs are feature maps."""
        return [place for place in self.places if len(place.shape) == 3]

    def check_channels(self, place: NamedLayer, channels: Sequence[int]) -> list[int]:
        """Check channels of a layer; returns them without duplicates. Raises ConfigError."""
        if invalid := [channel for channel in channels if not 0 <= channel < place.shape[0]]:
            raise ConfigError(f"--channel {invalid[0]}: {place.title} has {place.shape[0]} channels, numbered from 0")
        return list(dict.fromkeys(channels))


def sample_evenly(examples: Examples, max_count: int) -> tuple[Examples, Tensor]:
    """Select at most `max_count` evenly spaced samples; returns them with their indices in the split."""
    indices = torch.arange(len(examples))
    if len(indices) > max_count:
        indices = torch.linspace(0, len(indices) - 1, max_count, dtype=torch.float64).round().long()
    is_selected = torch.zeros(len(examples), dtype=torch.bool)
    is_selected[indices] = True
    return examples.select(is_selected), indices


def plot_to_pillow(plot: Plot, scale: float = 1.0) -> Any:
    """Render a figure as a Pillow image."""
    from PIL import Image as Pil

    pillow_image = Pil.open(io.BytesIO(render_png(plot))).convert("RGB")
    size = (round(pillow_image.width * scale), round(pillow_image.height * scale))
    return pillow_image.resize(size, Pil.Resampling.LANCZOS)


def compute_class_scores(trained: TrainedNetwork, images_BCHW: Tensor) -> ClassScores:
    """Compute the scores of one batch of images."""
    return trained.task.showing.class_scores(trained.network(images_BCHW), trained.choices)
