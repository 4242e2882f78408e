"""Layers across channels that learn nothing."""

from __future__ import annotations

from pydantic import Field
from torch import nn

from cnnrun.contracts.layer import LayerSpec, Shape, require_maps


class LocalResponseNorm(LayerSpec):
    """Each value divided by the strength of its `size` neighbouring channels (Krizhevsky et al. 2012, section 3.3)."""

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
    """Exponentials that sum to 1 over the channels or features."""

    kind = "softmax"

    def build(self, in_shape: Shape) -> nn.Module:
        return nn.Softmax(1)
