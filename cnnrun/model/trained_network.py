"""A trained network with everything that is needed to use it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnrun.contracts.facts import Facts
from cnnrun.contracts.results import Results
from cnnrun.contracts.task import TaskSpec
from cnnrun.data.image_files import ImageSettings
from cnnrun.model.network import Network


@dataclass(frozen=True)
class TrainedNetwork:
    """A network on its device in eval mode, with its task, its data facts and its run; `step` is the checkpoint's."""

    network: Network
    criterion: nn.Module
    task: TaskSpec
    facts: Facts
    image: ImageSettings
    run: Path
    step: int
    device: torch.device

    @cached_property
    def decoder(self) -> nn.Module:
        """The task's decoder: raw outputs -> results."""
        return self.task.decoder(self.facts).to(self.device)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights and of the image settings; networks with equal digests give equal results."""
        digest = hashlib.sha256(f"{self.image.model_dump_json()} {self.facts.image}".encode())
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
    """The module to export: uint8 pixels [B, H, W, C], as from any image decoder -> the task's results, in order."""

    def __init__(self, trained: TrainedNetwork) -> None:
        super().__init__()
        self.network, self.decoder = trained.network, trained.decoder

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.decoder(self.network(pixels.permute(0, 3, 1, 2).float())).values())
