"""Bitwise reproducible training on a GPU: PyTorch's deterministic kernels, and replacements for layers without one.

A CPU's kernels are deterministic already, and nothing here changes them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnnrun.base.errors import ConfigError
from cnnrun.model.layers.reshape import EdgePadding

_NO_KERNEL_PATTERN = re.compile(r"(\w+) does not have a deterministic implementation")


@contextmanager
def deterministic_kernels(device: torch.device, enabled: bool) -> Iterator[None]:
    """Context in which a GPU uses deterministic kernels if `enabled`, otherwise the fastest that cuDNN finds.

    Raises ConfigError if PyTorch has no deterministic kernel for an operation inside.
    """
    if device.type != "cuda":
        yield
        return
    # cuBLAS's sums may depend on the size of its workspace. It reads this variable when its first kernel runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    previous = torch.are_deterministic_algorithms_enabled()
    warn_only, benchmark = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    fill_memory = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # saves a kernel per tensor
    try:
        yield
    except RuntimeError as error:
        if match := _NO_KERNEL_PATTERN.search(str(error)):
            line = f"train.deterministic: PyTorch has no deterministic kernel for {match[1]} on a GPU"
            raise ConfigError(f"{line}; use another layer, or `deterministic: false`") from None
        raise
    finally:
        torch.use_deterministic_algorithms(previous, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill_memory  # type: ignore[attr-defined]


class DeterministicAdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d as two matrix products in float32, whose gradients are deterministic on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        rows, columns = (
            _mean_weights(size, cells, wide.dtype, x.device)
            for size, cells in zip(x.shape[2:], _output_size(self), strict=True)
        )
        with torch.autocast(x.device.type, enabled=False):
            means: Tensor = (rows @ wide @ columns.mT).to(x.dtype)
        return means


class DeterministicAdaptiveMaxPool(nn.AdaptiveMaxPool2d):
    """nn.AdaptiveMaxPool2d as one maximum per cell; equal maxima share the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (_windows(size, cells) for size, cells in zip(x.shape[2:], _output_size(self), strict=True))
        cells = [x[:, :, top:bottom, left:right].amax((2, 3)) for top, bottom in rows for left, right in columns]
        return torch.stack(cells, 2).view(*x.shape[:2], len(rows), len(columns))


class DeterministicResponseNorm(nn.LocalResponseNorm):
    """nn.LocalResponseNorm as a sum over shifted channels."""

    def forward(self, x: Tensor) -> Tensor:
        before = self.size // 2
        squares = F.pad(x.square(), (0, 0, 0, 0, before, self.size - 1 - before))
        total = torch.stack([squares.narrow(1, shift, x.shape[1]) for shift in range(self.size)]).sum(0)
        normed: Tensor = x / (total * (self.alpha / self.size) + self.k).pow(self.beta)
        return normed


class DeterministicPad(EdgePadding):
    """EdgePadding whose reflected pixels are selected by index, which has a deterministic gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if self.mode != "reflect":
            return super().forward(x)
        top, bottom, left, right = self.sides
        rows = _reflected_indices(x.shape[2], top, bottom, x.device)
        columns = _reflected_indices(x.shape[3], left, right, x.device)
        return x.index_select(2, rows).index_select(3, columns)


def _output_size(pool: nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) -> tuple[int, int]:
    size = pool.output_size
    assert isinstance(size, tuple)
    return int(size[0] or 0), int(size[1] or 0)


def _windows(size: int, cells: int) -> list[tuple[int, int]]:
    """(start, end) of each cell along an axis of `size` pixels, by PyTorch's rule for adaptive pooling."""
    return [(cell * size // cells, -(-(cell + 1) * size // cells)) for cell in range(cells)]


@lru_cache(16)
def _mean_weights(size: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights of the pixels in each cell's mean: [cells, size]."""
    with torch.inference_mode(False):  # the cached tensor must also serve training
        weights = torch.zeros(cells, size, dtype=dtype)
        for cell, (start, end) in enumerate(_windows(size, cells)):
            weights[cell, start:end] = 1 / (end - start)
        return weights.to(device, non_blocking=True)


def _reflected_indices(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """Source index of each pixel of a reflected row: int64 [before + size + after]."""
    indices = torch.arange(-before, size + after, device=device).abs()
    return torch.where(indices < size, indices, 2 * (size - 1) - indices)


_REPLACEMENTS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.AdaptiveAvgPool2d: lambda old: DeterministicAdaptiveAvgPool(old.output_size),
    nn.AdaptiveMaxPool2d: lambda old: DeterministicAdaptiveMaxPool(old.output_size),
    nn.LocalResponseNorm: lambda old: DeterministicResponseNorm(old.size, old.alpha, old.beta, old.k),
    EdgePadding: lambda old: DeterministicPad(old.channels, old.sides, old.mode, old.value),
}


def use_deterministic_layers(network: nn.Module) -> None:
    """Replace, in place, layers without a deterministic gradient on a GPU by layers with the same outputs.

    Unlike the original, the replacement of adaptive max pooling shares the gradient among equal maxima of a window.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if build_replacement := _REPLACEMENTS.get(type(child)):
                setattr(module, name, build_replacement(child).train(child.training))
