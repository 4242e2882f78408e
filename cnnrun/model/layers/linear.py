"""Fully connected layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from cnnrun.config.spec import Kinds
from cnnrun.contracts.layer import LayerSpec, Shape, require_feature_maps, require_vector
from cnnrun.model.layers.activation import Activation, make_in_place
from cnnrun.model.layers.norm import Norm
from cnnrun.model.layers.norm_and_activation import add_norm_and_activation


class PositionwiseLayers(nn.Sequential):
    """Applies layers for vectors to the channels of each position of [B, C, H, W], as in ConvNeXt (Liu et al. 2022)."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = super().forward(input.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


class Linear(LayerSpec):
    """Fully connected layer for a vector, then the norm and activation if given."""

    kind = "linear"
    main = "out_features"
    example = {"out_features": 5, "activation": "relu"}
    example_shape = (12,)

    out_features: int = Field(ge=1, le=10_000_000)
    each_position: bool = False
    """Apply it to the channels of each position of feature maps: a 1x1 convolution, computed by PyTorch's Linear."""
    bias: bool | None = None
    """By default true, unless a norm follows, because a norm has its own bias."""
    norm: Annotated[Norm, Kinds("_norm")] | None = None
    activation: Annotated[Activation, Kinds()] | None = None

    def build(self, in_shape: Shape) -> nn.Module:
        bias = self.norm is None if self.bias is None else self.bias
        if not self.each_position:
            linear = nn.Linear(require_vector("linear", in_shape), self.out_features, bias=bias)
            return add_norm_and_activation("linear", linear, (self.out_features,), self.norm, self.activation)
        channels, height, width = require_feature_maps("linear with each_position", in_shape)
        chain = PositionwiseLayers(OrderedDict(linear=nn.Linear(channels, self.out_features, bias=bias)))
        activation = make_in_place(self.activation.build((self.out_features,))) if self.activation else None
        if self.norm or activation is None or list(activation.parameters()):
            # A norm, and an activation with a weight per channel, expect the channels first.
            return add_norm_and_activation(
                "linear", chain, (self.out_features, height, width), self.norm, self.activation
            )
        # Apply the activation while the channels are last, as ConvNeXt's own code does: same bits, less copying.
        chain.add_module("activation", activation)
        return chain
