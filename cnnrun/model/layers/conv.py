"""Convolutions, with the norm and activation that most of them carry."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from cnnrun.config.spec import Kinds, PaddingPair, SizePair
from cnnrun.contracts.layer import HeightWidth, LayerSpec, Shape, ShapeError, Window, require_maps
from cnnrun.model.layers.activation import Activation
from cnnrun.model.layers.norm import Norm
from cnnrun.model.layers.norm_and_activation import add_norm_and_activation


class Conv(LayerSpec):
    """2-D convolution, then norm and activation where given. By default the padding keeps the size at stride 1."""

    kind = "conv"
    main = "out_channels"
    example = {"out_channels": 4, "norm": "batch", "activation": "relu"}

    out_channels: int | None = Field(None, ge=1, le=1_000_000)
    """Channels that come out; by default as many as come in."""
    kernel_size: SizePair = (3, 3)
    stride: SizePair = (1, 1)
    padding: PaddingPair | None = None
    """Zeros around the picture; by default dilation * (kernel_size - 1) / 2, which keeps the size at stride 1."""
    dilation: SizePair = (1, 1)
    groups: Annotated[int, Field(ge=1)] | Literal["depthwise"] = 1
    """Separate groups of channels; `depthwise` for one a channel."""
    bias: bool | None = None
    """By default: yes, unless a norm follows, which has its own."""
    norm: Annotated[Norm, Kinds("_norm")] | None = None
    activation: Annotated[Activation, Kinds()] | None = None

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_maps(self.kind, in_shape)
        out = self.out_channels or channels
        groups = channels if self.groups == "depthwise" else self.groups
        for count, what in ((channels, "arriving"), (out, "outgoing")):
            if count % groups:
                raise ShapeError(f"{count} {what} channels do not divide into {groups} groups", "change groups")
        conv = nn.Conv2d(
            channels,
            out,
            self.kernel_size,
            self.stride,
            self.same_padding() if self.padding is None else self.padding,
            self.dilation,
            groups,
            bias=self.norm is None if self.bias is None else self.bias,
        )
        return add_norm_and_activation("conv", conv, (out, *in_shape[1:]), self.norm, self.activation)

    def same_padding(self) -> HeightWidth:
        """The padding that keeps the size at stride 1. Raises CannotPass for an even kernel, which has none."""
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        if any(r % 2 for r in reach):
            raise ShapeError("no padding keeps the size under an even kernel", "give padding, or an odd kernel_size")
        return reach[0] // 2, reach[1] // 2

    def window(self, in_shape: Shape) -> Window:
        kernel = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        padding = self.same_padding() if self.padding is None else self.padding
        return Window(kernel=(kernel[0], kernel[1]), stride=self.stride, start=(-padding[0], -padding[1]))


class ConvTranspose(LayerSpec):
    """Transposed 2-D convolution: enlarges by its stride. By default kernel 2, stride 2: exactly twice the size."""

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
    """By default: yes, unless a norm follows, which has its own."""
    norm: Annotated[Norm, Kinds("_norm")] | None = None
    activation: Annotated[Activation, Kinds()] | None = None

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_maps(self.kind, in_shape)
        if channels % self.groups or self.out_channels % self.groups:
            raise ShapeError(
                f"{channels} -> {self.out_channels} channels do not divide into {self.groups} groups", "change groups"
            )
        if any(more >= step for more, step in zip(self.output_padding, self.stride, strict=True)):
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

    def window(self, in_shape: Shape) -> Window:
        # An output cell is written by ceil(kernel / stride) input cells in each direction.
        kernel = tuple(-(-k // s) for k, s in zip(self.kernel_size, self.stride, strict=True))
        start = [(p - k + 1) / s for p, k, s in zip(self.padding, self.kernel_size, self.stride, strict=True)]
        return Window(kernel=(kernel[0], kernel[1]), scale=self.stride, start=(start[0], start[1]))
