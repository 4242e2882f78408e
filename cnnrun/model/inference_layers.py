"""Layers for networks that only predict: several times as fast as PyTorch's on a processor where channels are few.

PyTorch computes these over channels in the channels_last layout, which is slow if a vector does not fill up with them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_VECTOR = 16  # numbers that a processor computes with at once


class SlicedMaxPool(nn.Module):
    """Max pooling without padding, as the maximum of shifted slices; results are equal to those of nn.MaxPool2d.

    It computes no indices, which a gradient would need, and vectorizes over rows where PyTorch does over channels.
    """

    def __init__(self, kernel_size: tuple[int, int], stride: tuple[int, int], ceil_mode: bool) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.ceil_mode = kernel_size, stride, ceil_mode

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for dimension, kernel, stride in zip((2, 3), self.kernel_size, self.stride, strict=True):
            x_BCHW = self._pool_along(x_BCHW, dimension, kernel, stride)
        return x_BCHW

    def _pool_along(self, x: Tensor, dimension: int, kernel: int, stride: int) -> Tensor:
        """Maximum of each window of `kernel` values along one dimension; windows may end outside with `ceil_mode`."""
        size = x.shape[dimension]
        windows = (size - kernel + (stride - 1 if self.ceil_mode else 0)) // stride + 1
        slices = [_every(x, dimension, first, stride, windows) for first in range(kernel)]
        out = slices[0].clone(memory_format=torch.channels_last)
        for part in slices[1:]:  # a part is shorter where the last window ends outside
            target = out.narrow(dimension, 0, part.shape[dimension])
            torch.maximum(target, part, out=target)
        return out


def _every(x: Tensor, dimension: int, first: int, step: int, count: int) -> Tensor:
    """Every `step`-th index of a dimension from `first` on, at most `count` of them."""
    indices = slice(first, first + step * count, step)
    return x[:, :, indices] if dimension == 2 else x[:, :, :, indices]


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class RowPReLU(nn.Module):
    """PReLU with a slope per channel, over whole rows of feature maps; results are equal to those of nn.PReLU."""

    def __init__(self, weight_C: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_C)

    weight: Tensor

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        rows = x_BCHW.permute(0, 2, 3, 1).reshape(batch * height, width * channels)
        out = F.prelu(rows, self.weight.repeat(width))
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def replace_slow_layers(network: nn.Module) -> None:
    """Replace, in place, max pools that neither pad nor dilate, and PReLU of feature maps that do not fill vectors."""
    for module in list(network.modules()):
        is_convolution = any(isinstance(child, nn.Conv2d) for child in module.children())
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d) and child.padding in (0, (0, 0)) and child.dilation in (1, (1, 1)):
                setattr(module, name, SlicedMaxPool(_pair(child.kernel_size), _pair(child.stride), child.ceil_mode))
            if (
                isinstance(child, nn.PReLU)
                and is_convolution
                and child.num_parameters > 1
                and child.num_parameters % _VECTOR
            ):
                setattr(module, name, RowPReLU(child.weight.detach()))
