"""Layers that set values to zero at random in training and do nothing otherwise."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from cnnrun.contracts.layer import LayerSpec, Shape, require_feature_maps


class Dropout(LayerSpec):
    """Sets each value to zero with probability p (Srivastava et al. 2014)."""

    kind = "dropout"
    main = "p"
    p: float = Field(0.5, ge=0, lt=1)

    def build(self, in_shape: Shape) -> nn.Module:
        return nn.Dropout(self.p)


class Dropout2d(LayerSpec):
    """Sets each channel of an image to zero with probability p."""

    kind = "dropout2d"
    main = "p"
    p: float = Field(0.5, ge=0, lt=1)

    def build(self, in_shape: Shape) -> nn.Module:
        require_feature_maps(self.kind, in_shape)
        return nn.Dropout2d(self.p)


class DropSample(nn.Module):
    """Sets all values of a sample to zero with probability p and scales the other samples by 1 / (1 - p)."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep_B = torch.rand(x.shape[0], device=x.device) >= self.p
        return x * (keep_B.to(x.dtype) / (1 - self.p)).view(-1, *[1] * (x.dim() - 1))


class DropPath(LayerSpec):
    """Stochastic depth (Huang et al. 2016): drops a residual branch per sample. Put it last in the branch."""

    kind = "drop_path"
    main = "p"
    p: float = Field(0.1, ge=0, lt=1)

    def build(self, in_shape: Shape) -> nn.Module:
        return DropSample(self.p)
