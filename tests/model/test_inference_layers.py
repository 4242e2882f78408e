"""Layers for prediction equal PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnrun.model.inference_layers import RowPReLU, SlicedMaxPool, replace_slow_layers


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
    replace_slow_layers(network)
    assert isinstance(network[0], SlicedMaxPool)
    assert all(isinstance(module, nn.MaxPool2d) for module in network[1])


@pytest.mark.parametrize("channels", [1, 10, 28, 32])
def test_row_prelu_equals_pytorchs(channels):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(channels, generator=generator)
    for batch, height, width in ((1, 5, 7), (3, 1, 1), (2, 9, 4)):
        x = torch.randn(batch, channels, height, width, generator=generator)
        expected = torch.nn.functional.prelu(x, weight)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            assert torch.equal(RowPReLU(weight)(x.contiguous(memory_format=memory_format)), expected)


def test_prelu_of_vectors_and_of_full_vectors_of_channels_stays():
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 10, 3), nn.PReLU(10)),
        nn.Sequential(nn.Conv2d(10, 32, 3), nn.PReLU(32)),
        nn.Sequential(nn.Linear(32, 10), nn.PReLU(10)),
    )
    replace_slow_layers(network)
    assert [type(part[1]) for part in network] == [RowPReLU, nn.PReLU, nn.PReLU]
