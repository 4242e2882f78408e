"""A trained network with everything that is needed to use it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.prediction import Overlay, Prediction
from cnnrun.contracts.results import Results, View
from cnnrun.contracts.task import Task
from cnnrun.contracts.task_parts import Criterion
from cnnrun.data.image_settings import ImageSettings
from cnnrun.model.network import Network


@dataclass(frozen=True)
class MeasuredNetwork:
    """A network to measure: `forward` maps images to raw outputs. Without a criterion no loss is measured."""

    forward: Callable[[Tensor], Tensor]
    criterion: nn.Module | None
    task: Task
    choices: Choices
    device: torch.device


@dataclass(frozen=True)
class TrainedNetwork:
    """A network on its device in eval mode, with its task, what val chose and its run; `step` is the checkpoint's."""

    network: Network
    criterion: Criterion
    task: Task
    choices: Choices
    image: ImageSettings
    run: Path
    step: int
    device: torch.device

    @property
    def facts(self) -> DataFacts:
        """The facts of the data that the network learned from."""
        return self.task.facts

    def to_measure(self) -> MeasuredNetwork:
        """Return what is measured: with its loss, unless the task is measured on classes that it never saw."""
        criterion = None if self.task.requirements.has_unseen_classes else self.criterion
        return MeasuredNetwork(self.network, criterion, self.task, self.choices, self.device)

    @cached_property
    def decoder(self) -> nn.Module:
        """The task's decoder: raw outputs -> results."""
        return self.task.predicting.build_decoder(self.choices).to(self.device)

    def overlays(self, images_BCHW: Tensor) -> list[Overlay]:
        """Overlay to draw onto each image for its prediction, in pixels of the network's input."""
        views = [View((images_BCHW.shape[2], images_BCHW.shape[3]))] * len(images_BCHW)
        predictions = self.predictions(self.results(images_BCHW), views)
        return [prediction.overlay() or Overlay() for prediction in predictions]

    def predictions(self, results: Results, views: Sequence[View]) -> Sequence[Prediction]:
        """Turn a batch's results into a prediction for each image; `views` map the original images to the input."""
        predicting = self.task.predicting
        return predicting.predictions(results, views, predicting.thresholds(self.choices))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and of the image settings; networks with equal digests give equal results."""
        digest = hashlib.sha256(f"{self.image.digest_text()} {self.facts.image_shape}".encode())
        if self.network.averages_mirror:
            digest.update(b"averages mirror images")
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def results(self, images_BCHW: Tensor) -> Results:
        """Pixel values 0..255 -> results, without gradients."""
        with torch.inference_mode():
            results: Results = self.decoder(self.network(images_BCHW))
            return results


class ExportedNetwork(nn.Module):
    """The module to export: pixels [B, H, W, C], as from any image decoder -> the task's results, in order.

    The pixels are uint8, or uint16 (int16 with a black below 0) for a network whose images keep 16 bits.
    """

    def __init__(self, trained: TrainedNetwork) -> None:
        super().__init__()
        self.network, self.decoder = trained.network, trained.decoder
        self.pixel_format = trained.image.pixel_format

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        values = self.pixel_format.from_file(pixels.permute(0, 3, 1, 2))
        return tuple(self.decoder(self.network(values)).values())
