"""Layers that rearrange values, or resize or pad feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

import torch.nn.functional as F
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from cnnrun.config.spec import SizePair
from cnnrun.contracts.layer import LayerSpec, Shape, ShapeError, Window, require_feature_maps


class PermutedFlatten(nn.Module):
    """Flattens [B, C, H, W] after putting its dimensions in `order`, such as `hwc`."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, *(1 + "chw".index(letter) for letter in self.order)).flatten(1)


class Flatten(LayerSpec):
    """Flattens feature maps to a vector: (C, H, W) -> (C * H * W,)."""

    kind = "flatten"
    main = "order"
    example = {"order": "hwc"}
    order: Literal["chw", "hwc", "whc"] = "chw"
    """Channels (c), rows (h) and columns (w), the slowest first; TensorFlow's weights need `hwc`, MATLAB's `whc`."""

    def build(self, in_shape: Shape) -> nn.Module:
        if self.order == "chw":
            return nn.Flatten()
        require_feature_maps(self.kind, in_shape)
        return PermutedFlatten(self.order)

    def window(self, in_shape: Shape) -> Window:
        return Window(is_global=True)


class Identity(LayerSpec):
    """Returns its input unchanged. Use it to give an output a name."""

    kind = "identity"

    def build(self, in_shape: Shape) -> nn.Module:
        return nn.Identity()


class Upsample(LayerSpec):
    """Enlarges feature maps by a whole factor."""

    kind = "upsample"
    main = "scale_factor"
    scale_factor: SizePair = (2, 2)
    mode: Literal["nearest", "bilinear"] = "nearest"

    def build(self, in_shape: Shape) -> nn.Module:
        require_feature_maps(self.kind, in_shape)
        factors = (float(self.scale_factor[0]), float(self.scale_factor[1]))
        return nn.Upsample(scale_factor=factors, mode=self.mode)

    def window(self, in_shape: Shape) -> Window:
        if self.mode == "nearest":
            return Window(scale=self.scale_factor)
        height, width = self.scale_factor
        return Window(kernel=(2, 2), scale=self.scale_factor, start=(0.5 / height - 0.5, 0.5 / width - 0.5))


class PixelShuffle(LayerSpec):
    """Turns channels into pixels: (C * r * r, H, W) -> (C, H * r, W * r) (Shi et al. 2016)."""

    kind = "pixel_shuffle"
    main = "upscale_factor"
    upscale_factor: int = Field(2, ge=1, le=64)

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_feature_maps(self.kind, in_shape)
        square = self.upscale_factor**2
        if channels % square:
            raise ShapeError(f"{channels} channels do not divide by {square}", "change upscale_factor or channels")
        return nn.PixelShuffle(self.upscale_factor)

    def window(self, in_shape: Shape) -> Window:
        return Window(scale=(self.upscale_factor, self.upscale_factor))


class ChannelChunk(nn.Module):
    """Part `index` of the channels of [B, C, ...], split into `chunks` equal parts."""

    def __init__(self, chunks: int, index: int) -> None:
        super().__init__()
        self.chunks, self.index = chunks, index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(self.chunks, 1)[self.index]


class Chunk(LayerSpec):
    """One of several equal parts of the channels, as in ShuffleNet V2's split (Ma et al. 2018)."""

    kind = "chunk"
    example = {"chunks": 2, "index": 1}
    chunks: int = Field(2, ge=1)
    index: int = Field(0, ge=0)
    """The part to return, counted from 0."""

    def build(self, in_shape: Shape) -> nn.Module:
        if in_shape[0] % self.chunks:
            raise ShapeError(f"{in_shape[0]} channels do not divide into {self.chunks} parts", "change chunks")
        return ChannelChunk(self.chunks, self.index)

    @model_validator(mode="after")
    def _check_index(self) -> Self:
        if self.index >= self.chunks:
            raise ValueError(f"index {self.index} is not one of {self.chunks} parts, which count from 0")
        return self


class ChannelInterleaving(nn.Module):
    """Moves channel g * n + i of [B, C, H, W] to i * groups + g, which mixes the groups (Zhang et al. 2018)."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        shuffled: Tensor = x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return shuffled


class ChannelShuffle(LayerSpec):
    """Interleaves the channels of `groups` groups, as ShuffleNet does (Zhang et al. 2018)."""

    kind = "channel_shuffle"
    main = "groups"
    groups: int = Field(2, ge=1)

    def build(self, in_shape: Shape) -> nn.Module:
        channels, _, _ = require_feature_maps(self.kind, in_shape)
        if channels % self.groups:
            raise ShapeError(f"{channels} channels do not divide into {self.groups} groups", "change groups")
        return ChannelInterleaving(self.groups)


class EdgePadding(nn.Module):
    """Pads [B, C, H, W] by (front, back) channels and (top, bottom, left, right) pixels."""

    def __init__(self, channels: tuple[int, int], sides: tuple[int, int, int, int], mode: str, value: float) -> None:
        super().__init__()
        self.channels, self.sides, self.mode, self.value = channels, sides, mode, value

    def forward(self, x: Tensor) -> Tensor:
        top, bottom, left, right = self.sides
        if self.mode == "constant":
            return F.pad(x, (left, right, top, bottom, *self.channels), value=self.value)
        return F.pad(x, (left, right, top, bottom), mode=self.mode)


def _check_sides(value: list[int]) -> list[int]:
    if len(value) != 4 or min(value) < 0:
        raise ValueError("expected [top, bottom, left, right], four whole numbers from 0 up")
    return value


class Pad(LayerSpec):
    """Adds pixels at the edges (one number for all sides, or `[top, bottom, left, right]`), or whole channels."""

    kind = "pad"
    main = "padding"
    example = {"padding": [0, 1, 2, 1], "channels": [1, 2]}
    padding: Annotated[int, Field(ge=0)] | Annotated[list[int], AfterValidator(_check_sides)] = 1
    channels: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)] = [0, 0]
    """Channels of `value` to add `[before, after]`, as in the shortcut without parameters of He et al. 2016."""
    mode: Literal["constant", "reflect", "replicate"] = "constant"
    value: float = 0.0

    def build(self, in_shape: Shape) -> nn.Module:
        _, height, width = require_feature_maps(self.kind, in_shape)
        sides: Any = self._all_sides()
        if self.mode == "reflect" and (max(sides[:2]) >= height or max(sides[2:]) >= width):
            raise ShapeError(
                "reflected padding must be smaller than the feature map", "use less padding, or another mode"
            )
        return EdgePadding((self.channels[0], self.channels[1]), sides, self.mode, self.value)

    def window(self, in_shape: Shape) -> Window:
        top, _, left, _ = self._all_sides()
        return Window(start=(-top, -left))

    def _all_sides(self) -> Sequence[int]:
        return (self.padding,) * 4 if isinstance(self.padding, int) else self.padding

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        if any(self.channels) and self.mode != "constant":
            raise ValueError(f"channels are added with a constant value, not by mode {self.mode!r}")
        return self
