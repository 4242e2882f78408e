"""Max pooling by slices equals PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnrun.model.sliced_pooling import SlicedMaxPool, replace_max_pools


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize(("kernel", "stride"), [(2, 2), (3, 2), (3, 1), (2, 1), (3, 3)])
@pytest.mark.parametrize("size", [(3, 3), (7, 8), (10, 11), (12, 13)])
def test_it_equals_pytorchs_and_leaves_its_input(kernel, stride, ceil_mode, size):
    x = torch.randn(2, 5, *size, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=memory_format)
        pooled = SlicedMaxPool((kernel, kernel), (stride, stride), ceil_mode)(given)
        assert torch.equal(pooled, nn.MaxPool2d(kernel, stride, ceil_mode=ceil_mode)(x))
        assert torch.equal(given, x)


def test_only_pools_without_padding_are_replaced():
    network = nn.Sequential(nn.MaxPool2d(2), nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, dilation=2)))
    replace_max_pools(network)
    assert isinstance(network[0], SlicedMaxPool)
    assert all(isinstance(module, nn.MaxPool2d) for module in network[1])
