"""A network with the weights that training chose, and what anyone needs to use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnrun.contracts import Facts, Results, TaskSpec
from cnnrun.network import Network
from cnnrun.pictures import Image


@dataclass(frozen=True)
class Trained:
    """The network on its device in eval mode; `step` is the checkpoint's."""

    network: Network
    criterion: nn.Module
    task: TaskSpec
    facts: Facts
    image: Image
    run: Path
    step: int
    device: torch.device

    def results(self, pictures_BCHW: Tensor) -> Results:
        """Pixel values 0..255 -> results, without gradients."""
        with torch.inference_mode():
            return self.task.decode(self.network(pictures_BCHW))


class Deployed(nn.Module):
    """What is exported: uint8 pixels [B, H, W, C], as any decoder gives them -> the task's results, in order."""

    def __init__(self, trained: Trained) -> None:
        super().__init__()
        self.network, self.task = trained.network, trained.task

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.task.decode(self.network(pixels.permute(0, 3, 1, 2).float())).values())
