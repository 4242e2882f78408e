"""Normalisation across channels, without parameters."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from cnnrun.contracts.layer import LayerSpec, Shape, require_maps


class LocalResponseNorm(LayerSpec):
    """Divides by (k + alpha * mean square of `size` neighbouring channels) ** beta (Krizhevsky et al. 2012, 3.3)."""

    kind = "local_response_norm"
    main = "size"
    size: int = Field(5, ge=1)
    alpha: float = Field(1e-4, gt=0)
    beta: float = Field(0.75, gt=0)
    k: float = Field(1.0, gt=0)

    def build(self, in_shape: Shape) -> nn.Module:
        require_maps(self.kind, in_shape)
        return nn.LocalResponseNorm(self.size, self.alpha, self.beta, self.k)


class Softmax(LayerSpec):
    """Softmax over the channels or features."""

    kind = "softmax"

    def build(self, in_shape: Shape) -> nn.Module:
        return nn.Softmax(1)
