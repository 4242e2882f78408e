"""Convolutions, with an optional norm and activation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from cnnrun.config.spec import Kinds, PaddingPair, SizePair
from cnnrun.contracts.layer import HeightWidth, LayerSpec, Shape, ShapeError, Window, require_feature_maps
from cnnrun.model.layers.activation import Activation
from cnnrun.model.layers.norm import Norm
from cnnrun.model.layers.norm_and_activation import add_norm_and_activation, module_before_norm


class Conv(LayerSpec):
    """2-D convolution, then the norm and activation if given. The default padding keeps the size at stride 1."""

    kind = "conv"
    main = "out_channels"
    example = {"out_channels": 4, "norm": "batch", "activation": "relu"}

    out_channels: int | None = Field(None, ge=1, le=1_000_000)
    """Output channels; by default as many as the input has."""
    kernel_size: SizePair = (3, 3)
    stride: SizePair = (1, 1)
    padding: PaddingPair | None = None
    """Zeros around the feature map; by default dilation * (kernel_size - 1) / 2, which keeps the size at stride 1."""
    dilation: SizePair = (1, 1)
    groups: Annotated[int, Field(ge=1)] | Literal["depthwise"] = 1
    """Number of separate groups of channels; `depthwise` means one group per channel."""
    bias: bool | None = None
    """By default true, unless a norm follows, because a norm has its own bias."""
    norm: Annotated[Norm, Kinds("_norm")] | None = None
    activation: Annotated[Activation, Kinds()] | None = None

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_feature_maps(self.kind, in_shape)
        out_channels = self.out_channels or channels
        groups = channels if self.groups == "depthwise" else self.groups
        for count, side in ((channels, "input"), (out_channels, "output")):
            if count % groups:
                raise ShapeError(f"{count} {side} channels do not divide into {groups} groups", "change groups")
        conv = nn.Conv2d(
            channels,
            out_channels,
            self.kernel_size,
            self.stride,
            self.same_padding() if self.padding is None else self.padding,
            self.dilation,
            groups,
            bias=self.norm is None if self.bias is None else self.bias,
        )
        return add_norm_and_activation("conv", conv, (out_channels, *in_shape[1:]), self.norm, self.activation)

    def same_padding(self) -> HeightWidth:
        """The padding that keeps the size at stride 1. Raises ShapeError for an even kernel, which has none."""
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(t % 2 for t in total):
            raise ShapeError("no padding keeps the size under an even kernel", "give padding, or an odd kernel_size")
        return total[0] // 2, total[1] // 2

    def shape_module(self, module: nn.Module) -> nn.Module:
        return module_before_norm(module)

    def window(self, in_shape: Shape) -> Window:
        kernel = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        padding = self.same_padding() if self.padding is None else self.padding
        return Window(kernel=(kernel[0], kernel[1]), stride=self.stride, start=(-padding[0], -padding[1]))


class ConvTranspose(LayerSpec):
    """Transposed 2-D convolution, which enlarges by its stride. The defaults give exactly twice the size."""

    kind = "conv_transpose"
    main = "out_channels"
    example = {"out_channels": 4, "kernel_size": 3, "padding": 1, "output_padding": 1}

    out_channels: int = Field(ge=1, le=1_000_000)
    kernel_size: SizePair = (2, 2)
    stride: SizePair = (2, 2)
    padding: PaddingPair = (0, 0)
    output_padding: PaddingPair = (0, 0)
    groups: int = Field(1, ge=1)
    bias: bool | None = None
    """By default true, unless a norm follows, because a norm has its own bias."""
    norm: Annotated[Norm, Kinds("_norm")] | None = None
    activation: Annotated[Activation, Kinds()] | None = None

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_feature_maps(self.kind, in_shape)
        if channels % self.groups or self.out_channels % self.groups:
            raise ShapeError(
                f"{channels} -> {self.out_channels} channels do not divide into {self.groups} groups", "change groups"
            )
        if any(extra >= stride for extra, stride in zip(self.output_padding, self.stride, strict=True)):
            raise ShapeError(f"output_padding {self.output_padding} is not less than stride {self.stride}", "use less")
        conv = nn.ConvTranspose2d(
            channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            bias=self.norm is None if self.bias is None else self.bias,
        )
        return add_norm_and_activation("conv", conv, (self.out_channels, *in_shape[1:]), self.norm, self.activation)

    def shape_module(self, module: nn.Module) -> nn.Module:
        return module_before_norm(module)

    def window(self, in_shape: Shape) -> Window:
        # An output cell is written by ceil(kernel / stride) input cells in each direction.
        kernel = tuple(-(-k // s) for k, s in zip(self.kernel_size, self.stride, strict=True))
        start = [(p - k + 1) / s for p, k, s in zip(self.padding, self.kernel_size, self.stride, strict=True)]
        return Window(kernel=(kernel[0], kernel[1]), scale=self.stride, start=(start[0], start[1]))
