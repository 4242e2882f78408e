"""Normalization layers. Those in `Norm` are also a setting of `conv`, `linear` and `residual`."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from cnnrun.contracts.layer import LayerSpec, Shape, ShapeError, require_feature_maps


class BatchNorm(LayerSpec):
    """Normalizes each channel over the batch to mean 0, variance 1, then scales and shifts (Ioffe and Szegedy 2015)."""

    kind = "batch_norm"
    eps: float = Field(1e-5, gt=0)
    momentum: float = Field(0.1, gt=0, le=1)
    affine: bool = True

    def build(self, in_shape: Shape) -> nn.Module:
        norm = nn.BatchNorm2d if len(in_shape) == 3 else nn.BatchNorm1d
        return norm(in_shape[0], eps=self.eps, momentum=self.momentum, affine=self.affine)

    def shape_module(self, module: nn.Module) -> nn.Module:
        return nn.Identity()


class GroupNorm(LayerSpec):
    """Normalizes each group of channels of an image to mean 0, variance 1 (Wu and He 2018)."""

    kind = "group_norm"
    main = "num_groups"
    num_groups: int = Field(8, ge=1)
    eps: float = Field(1e-5, gt=0)
    affine: bool = True

    def build(self, in_shape: Shape) -> nn.Module:
        if in_shape[0] % self.num_groups:
            raise ShapeError(
                f"{in_shape[0]} channels do not divide into {self.num_groups} groups", "change num_groups or channels"
            )
        return nn.GroupNorm(self.num_groups, in_shape[0], eps=self.eps, affine=self.affine)


class ChannelsLayerNorm(nn.LayerNorm):
    """Layer norm over the channels of each position of [B, C, H, W], as in ConvNeXt (Liu et al. 2022)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm(LayerSpec):
    """Normalizes the channels of each position, or a vector, to mean 0, variance 1 (Ba, Kiros and Hinton 2016)."""

    kind = "layer_norm"
    eps: float = Field(1e-5, gt=0)

    def build(self, in_shape: Shape) -> nn.Module:
        norm = ChannelsLayerNorm if len(in_shape) == 3 else nn.LayerNorm
        return norm(in_shape[0], eps=self.eps)


class InstanceNorm(LayerSpec):
    """Normalizes each channel of an image to mean 0, variance 1 (Ulyanov et al. 2016)."""

    kind = "instance_norm"
    eps: float = Field(1e-5, gt=0)
    affine: bool = False

    def build(self, in_shape: Shape) -> nn.Module:
        channels, height, width = require_feature_maps(self.kind, in_shape)
        if height * width < 2:
            raise ShapeError("one value per channel has no variance", "use another norm, or put it before the pooling")
        return nn.InstanceNorm2d(channels, eps=self.eps, affine=self.affine)


class LocalResponseNorm(LayerSpec):
    """Divides by (k + alpha * mean square of `size` neighbouring channels) ** beta (Krizhevsky et al. 2012, 3.3)."""

    kind = "local_response_norm"
    main = "size"
    size: int = Field(5, ge=1)
    alpha: float = Field(1e-4, gt=0)
    beta: float = Field(0.75, gt=0)
    k: float = Field(1.0, gt=0)

    def build(self, in_shape: Shape) -> nn.Module:
        require_feature_maps(self.kind, in_shape)
        return nn.LocalResponseNorm(self.size, self.alpha, self.beta, self.k)


Norm = BatchNorm | GroupNorm | LayerNorm | InstanceNorm
