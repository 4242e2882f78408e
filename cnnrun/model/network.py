"""The network: normalization, the layers of the YAML and the task's head.

It is first built on PyTorch's meta device, without memory. A network that is too large for the machine is reported
before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.contracts.layer import Shape
from cnnrun.contracts.task import Task
from cnnrun.model.builder import Builder, BuildError, BuiltLayer, SummaryRow
from cnnrun.model.receptive_field import LayerOutput


class Normalize(nn.Module):
    """Pixel values 0..255 -> about mean 0, deviation 1 per channel. Part of the network, so it cannot be forgotten."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return (images_BCHW - self.mean) / self.std


class Network(nn.Module):
    """Raw pixel values [B, C, H, W] -> the task's raw outputs.

    With `averages_mirror` it gives, when it is not training, the mean of an image's and its mirror image's.
    """

    def __init__(self, normalize: nn.Module, layers: nn.Module, head: nn.Module, averages_mirror: bool = False) -> None:
        super().__init__()
        self.normalize, self.layers, self.head = normalize, layers, head
        self.averages_mirror = averages_mirror

    def forward(self, images_BCHW: Tensor) -> Tensor:
        if self.averages_mirror and not self.training:
            return (self._outputs(images_BCHW) + self._outputs(images_BCHW.flip(3))) / 2
        return self._outputs(images_BCHW)

    def _outputs(self, images_BCHW: Tensor) -> Tensor:
        features = self.layers(self.normalize(images_BCHW))
        out: Tensor = self.head(*features) if isinstance(features, tuple) else self.head(features)
        return out


@dataclass
class BuiltNetwork:
    """A network on the meta device and the results of building it; `materialize` gives it memory and weights.

    `rows` are the summary's, `layers` has every layer by its name in the weights, and `levels` are the head's inputs.
    """

    network: Network
    image_shape: Shape
    rows: list[SummaryRow] = field(default_factory=list)
    layers: dict[str, BuiltLayer] = field(default_factory=dict)
    levels: list[LayerOutput] = field(default_factory=list)

    @property
    def parameter_count(self) -> int:
        """The number of values in all parameters."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def build_network(nodes: Sequence[Any], task: Task) -> BuiltNetwork:
    """Build the network for the task's images, without memory. Raises BuildError."""
    builder, facts = Builder(), task.facts
    with torch.device("meta"):
        layers, levels = builder.build_body(nodes, LayerOutput(facts.image_shape), task.requirements.feature_layers)
        if builder.problems:
            raise BuildError(builder.problems)
        head = builder.build_head(task, levels)
    network = Network(Normalize(facts.mean, facts.std), layers, head, task.requirements.averages_mirror)
    return BuiltNetwork(network, facts.image_shape, builder.rows, builder.layers, levels)


def flops(built_network: BuiltNetwork) -> list[int]:
    """Floating-point operations of each summary row in one image's forward pass; a multiply-add counts as two."""
    from torch.utils.flop_counter import FlopCounterMode  # this import takes 0.1 s

    network = Network(nn.Identity(), built_network.network.layers, built_network.network.head).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, *built_network.image_shape, device="meta"))
    network.train()
    counts = counter.get_flop_counts()
    return [sum(counts.get(f"Network.{row.module}", {}).values()) for row in built_network.rows]


def materialize(network: Network, seed: int) -> Network:
    """Allocate a network built on the meta device, on the CPU, and initialize its layers in order as PyTorch does."""
    torch.manual_seed(seed)
    for part in (network.layers, network.head):  # `normalize` was built on the CPU already
        part.to_empty(device="cpu")
        for module in part.modules():
            if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
                module.reset_parameters()  # type: ignore[operator]
    return network
