"""Pooling layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from cnnrun.config.spec import PaddingPair, SizePair
from cnnrun.contracts.layer import LayerSpec, Shape, ShapeError, Window, require_feature_maps


class MaxPool(LayerSpec):
    """The maximum of each window. By default the windows do not overlap."""

    kind = "max_pool"
    main = "kernel_size"

    kernel_size: SizePair = (2, 2)
    stride: SizePair | None = None
    """By default equal to `kernel_size`."""
    padding: PaddingPair = (0, 0)
    dilation: SizePair = (1, 1)
    ceil_mode: bool = False
    """Keep incomplete windows at the edge."""

    def build(self, in_shape: Shape) -> nn.Module:
        _, height, width = require_feature_maps(self.kind, in_shape)
        check_pool_padding(self.padding, self.kernel_size)
        if any(self._has_empty_window(direction, size) for direction, size in enumerate((height, width))):
            raise ShapeError("a dilated window that lies in the padding alone has no maximum", "use less padding")
        return nn.MaxPool2d(self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode)

    def window(self, in_shape: Shape) -> Window:
        kernel = tuple(d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        start = (-self.padding[0], -self.padding[1])
        return Window(kernel=(kernel[0], kernel[1]), stride=self.stride or self.kernel_size, start=start)

    def _has_empty_window(self, direction: int, size: int) -> bool:
        """Tell whether a window lies in the padding alone; its maximum would be minus infinity."""
        kernel, padding, dilation = self.kernel_size[direction], self.padding[direction], self.dilation[direction]
        stride = (self.stride or self.kernel_size)[direction]
        end = size + padding - dilation * (kernel - 1)
        starts = range(-padding, min(end + stride - 1, size) if self.ceil_mode else end, stride)
        cells = range(0, dilation * kernel, dilation)
        return padding > 0 and any(not any(0 <= start + cell < size for cell in cells) for start in starts)


class AvgPool(LayerSpec):
    """The mean of each window. By default the windows do not overlap."""

    kind = "avg_pool"
    main = "kernel_size"

    kernel_size: SizePair = (2, 2)
    stride: SizePair | None = None
    """By default equal to `kernel_size`."""
    padding: PaddingPair = (0, 0)
    ceil_mode: bool = False
    """Keep incomplete windows at the edge."""
    count_include_pad: bool = True
    """Count the padding's zeros in the mean."""

    def build(self, in_shape: Shape) -> nn.Module:
        require_feature_maps(self.kind, in_shape)
        check_pool_padding(self.padding, self.kernel_size)
        return nn.AvgPool2d(self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad)

    def window(self, in_shape: Shape) -> Window:
        start = (-self.padding[0], -self.padding[1])
        return Window(kernel=self.kernel_size, stride=self.stride or self.kernel_size, start=start)


def check_pool_padding(padding: tuple[int, int], kernel: tuple[int, int]) -> None:
    """Raise ShapeError if a pooling window could lie in the padding alone."""
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        raise ShapeError(f"padding {padding} is more than half of kernel {kernel}", "use less padding")


class _AdaptivePool(LayerSpec):
    module: ClassVar[type[nn.Module]]
    main = "output_size"
    example = {"output_size": 3}
    output_size: SizePair = (1, 1)

    def build(self, in_shape: Shape) -> nn.Module:
        require_feature_maps(self.kind, in_shape)
        return self.module(self.output_size)

    def window(self, in_shape: Shape) -> Window:
        sizes = tuple(-(-i // o) for i, o in zip(in_shape[1:], self.output_size, strict=True))
        return Window(kernel=(sizes[0], sizes[1]), stride=(sizes[0], sizes[1]))


class AdaptiveAvgPool(_AdaptivePool):
    """Means over `output_size` windows, whatever the input size."""

    kind = "adaptive_avg_pool"
    module = nn.AdaptiveAvgPool2d


class AdaptiveMaxPool(_AdaptivePool):
    """Maxima over `output_size` windows, whatever the input size."""

    kind = "adaptive_max_pool"
    module = nn.AdaptiveMaxPool2d


class SpatialMean(nn.Module):
    """The mean of each channel, [B, C, H, W] -> [B, C]. Unlike adaptive pooling, its CUDA gradient is deterministic."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class SpatialMax(nn.Module):
    """The maximum of each channel, [B, C, H, W] -> [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


class _GlobalPool(LayerSpec):
    module: ClassVar[type[nn.Module]]

    def build(self, in_shape: Shape) -> nn.Module:
        require_feature_maps(self.kind, in_shape)
        return self.module()

    def window(self, in_shape: Shape) -> Window:
        return Window(is_global=True)


class GlobalAvgPool(_GlobalPool):
    """The mean of each channel over all positions: feature maps become a vector."""

    kind = "global_avg_pool"
    module = SpatialMean


class GlobalMaxPool(_GlobalPool):
    """The maximum of each channel over all positions: feature maps become a vector."""

    kind = "global_max_pool"
    module = SpatialMax
