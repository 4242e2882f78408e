"""Training on a GPU that gives the same bits each time: by PyTorch's deterministic kernels, and layers without one
replaced.

A CPU's kernels are deterministic as they are, and nothing here changes them.
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

_NO_KERNEL = re.compile(r"(\w+) does not have a deterministic implementation")


@contextmanager
def deterministic_kernels(device: torch.device, wanted: bool) -> Iterator[None]:
    """Inside, a GPU computes by deterministic kernels if `wanted`, else by the fastest that cuDNN finds.

    Raises ConfigError where PyTorch has no deterministic kernel for an operation.
    """
    if device.type != "cuda":
        yield
        return
    # The size of cuBLAS's workspace, by which its sums may differ; read when the first of its kernels runs.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warned, benchmark = torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a kernel a tensor
    try:
        yield
    except RuntimeError as error:
        if found := _NO_KERNEL.search(str(error)):
            line = f"train.deterministic: PyTorch has no deterministic kernel for {found[1]} on a GPU"
            raise ConfigError(f"{line}; use another layer, or `deterministic: false`") from None
        raise
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


class DeterministicAdaptiveAvgPool(nn.AdaptiveAvgPool2d):
    """nn.AdaptiveAvgPool2d as two matrix products in float32, whose gradients are deterministic on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        rows, columns = (
            _means(size, cells, wide.dtype, x.device) for size, cells in zip(x.shape[2:], _pair(self), strict=True)
        )
        with torch.autocast(x.device.type, enabled=False):
            means: Tensor = (rows @ wide @ columns.mT).to(x.dtype)
        return means


class DeterministicAdaptiveMaxPool(nn.AdaptiveMaxPool2d):
    """nn.AdaptiveMaxPool2d as a maximum a cell; equal maxima share the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (_windows(size, cells) for size, cells in zip(x.shape[2:], _pair(self), strict=True))
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
    """PadEdges whose reflected pixels are taken by their numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if self.mode != "reflect":
            return super().forward(x)
        top, bottom, left, right = self.sides
        rows, columns = _reflected(x.shape[2], top, bottom, x.device), _reflected(x.shape[3], left, right, x.device)
        return x.index_select(2, rows).index_select(3, columns)


def _pair(pool: nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d) -> tuple[int, int]:
    size = pool.output_size
    assert isinstance(size, tuple)
    return int(size[0] or 0), int(size[1] or 0)


def _windows(size: int, cells: int) -> list[tuple[int, int]]:
    """Where each of so many cells begins and ends: PyTorch's rule for adaptive pooling."""
    return [(cell * size // cells, -(-(cell + 1) * size // cells)) for cell in range(cells)]


@lru_cache(16)
def _means(size: int, cells: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[cells, size]: the weight of each pixel in each cell's mean."""
    with torch.inference_mode(False):  # kept for training, whoever asks first
        made = torch.zeros(cells, size, dtype=dtype)
        for cell, (start, end) in enumerate(_windows(size, cells)):
            made[cell, start:end] = 1 / (end - start)
        return made.to(device, non_blocking=True)


def _reflected(size: int, before: int, after: int, device: torch.device) -> Tensor:
    """The place of each pixel of a reflected row: int64 [before + size + after]."""
    places = torch.arange(-before, size + after, device=device).abs()
    return torch.where(places < size, places, 2 * (size - 1) - places)


_IN_PLACE_OF: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.AdaptiveAvgPool2d: lambda old: DeterministicAdaptiveAvgPool(old.output_size),
    nn.AdaptiveMaxPool2d: lambda old: DeterministicAdaptiveMaxPool(old.output_size),
    nn.LocalResponseNorm: lambda old: DeterministicResponseNorm(old.size, old.alpha, old.beta, old.k),
    EdgePadding: lambda old: DeterministicPad(old.channels, old.sides, old.mode, old.value),
}


def use_deterministic_layers(network: nn.Module) -> None:
    """Replace, within `network`, layers whose gradient PyTorch cannot repeat on a GPU by others of the same outputs.

    Where several values of a window are the largest, adaptive max pooling shares the gradient among them.
    """
    for module in list(network.modules()):
        for name, child in module.named_children():
            if build_instead := _IN_PLACE_OF.get(type(child)):
                setattr(module, name, build_instead(child).train(child.training))
