"""Layers that scale channels."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from cnnrun.config.spec import Kinds
from cnnrun.contracts.layer import LayerSpec, Shape, Window, require_feature_maps
from cnnrun.model.layers.activation import Activation, Relu, Sigmoid


class SqueezeExcitation(nn.Module):
    """x times a gate per channel, computed from the channels' means (Hu et al. 2018, eq. 2-4)."""

    def __init__(self, channels: int, squeezed: int, activation: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.channels, self.squeezed = channels, squeezed
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.activation = activation
        self.excite = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        scale: Tensor = self.gate(self.excite(self.activation(self.squeeze(mean))))
        return x * scale


class SqueezeExcite(LayerSpec):
    """Scales each channel by a gate that depends on the whole image (Hu et al. 2018)."""

    kind = "squeeze_excite"
    main = "channels"
    channels: int | None = Field(None, ge=1)
    """Channels of the bottleneck; by default a quarter of the input's, at least 1."""
    activation: Annotated[Activation, Kinds()] = Relu()
    gate: Annotated[Activation, Kinds()] = Sigmoid()

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_feature_maps(self.kind, in_shape)
        squeezed = self.channels or max(1, channels // 4)
        squeezed_shape = (squeezed, 1, 1)
        return SqueezeExcitation(channels, squeezed, self.activation.build(squeezed_shape), self.gate.build(in_shape))

    def window(self, in_shape: Shape) -> Window:
        return Window()  # the gate sees the whole image, the values that it scales do not


class ChannelScale(nn.Module):
    """x times a learned factor per channel."""

    def __init__(self, shape: Shape, initial: float) -> None:
        super().__init__()
        self.shape, self.initial = shape, initial
        self.weight = nn.Parameter(torch.empty(shape[0], *[1] * (len(shape) - 1)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class LayerScale(LayerSpec):
    """A learned factor per channel, small at first (Touvron et al. 2021). Put it last in a residual branch."""

    kind = "layer_scale"
    main = "initial"
    initial: float = 1e-6

    def build(self, in_shape: Shape) -> nn.Module:
        return ChannelScale(in_shape, self.initial)
