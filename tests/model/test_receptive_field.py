"""The receptive box of a cell equals the box around the pixels that its value depends on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cnnrun.contracts.facts import DataFacts
from cnnrun.experiment.config_file import parse_config
from cnnrun.model.network import BuiltNetwork, build_network, materialize

IMAGE = (1, 41, 37)
PLAIN = {
    "convs that keep the size": "[{conv: 2}, {conv: {out_channels: 2, kernel_size: 5}}]",
    "convs without padding": "[{conv: {out_channels: 2, padding: 0}}, {max_pool: 2}, "
    "{conv: {out_channels: 2, padding: 0}}]",
    "strides": "[{conv: {out_channels: 2, stride: 2}}, {conv: {out_channels: 2, stride: 2}}, "
    "{avg_pool: {kernel_size: 3, stride: 2, padding: 1}}]",
    "dilation, uneven kernels": "[{conv: {out_channels: 2, kernel_size: [1, 5], dilation: 2}}, {avg_pool: [3, 2]}]",
    "padding on one side": "[{pad: [2, 0, 1, 0]}, {conv: {out_channels: 2, padding: 0, stride: 2}}, {conv: 2}]",
    "a residual": "[{conv: {out_channels: 2, stride: 2}}, {residual: [{conv: 2}, {conv: 2}]}]",
    "branches with unequal receptive fields": "[{parallel: {branches: [[{conv: {out_channels: 2, kernel_size: 1}}], "
    "[{conv: {out_channels: 2, kernel_size: 7}}]], merge: concat}}, {avg_pool: 2}]",
    "a link by name": "[{conv: {out_channels: 2, name: a}}, {conv: {out_channels: 2, kernel_size: 5}}, "
    "{concat: [a]}, {conv: {out_channels: 2, stride: 2}}]",
}
ENLARGED = {
    "upsample": "[{max_pool: 2}, {conv: 2}, {upsample: 2}, {conv: 2}]",
    "bilinear": "[{max_pool: 2}, {conv: 2}, {upsample: {scale_factor: 2, mode: bilinear}}, {conv: 2}]",
    "transposed": "[{conv: {out_channels: 2, stride: 2}}, {conv_transpose: 2}, {conv: 2}]",
}


def _build(layers: str) -> tuple[BuiltNetwork, nn.Module]:
    """A network whose weights are all positive, so that no contributions cancel out."""
    made = parse_config(
        f"task: {{classify: {{}}}}\ndata: {{source: digits, image: {{size: [41, 37]}}}}\n"
        f"model: {layers[:-1]}, global_avg_pool]\n",
        "here.yaml",
    )
    built = build_network(made.model.layers, made.task.bind(DataFacts(("a", "b"), IMAGE)))
    network = materialize(built.network, 0).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(0.3)
    return built, network.layers


def _dependency_box(network: nn.Module, row: int, column: int) -> tuple[int, int, int, int]:
    """The box around the pixels that a cell's sum over channels depends on, found by gradients."""
    seen = torch.zeros(IMAGE[1:], dtype=torch.bool)
    for _ in range(60):  # a maximum depends on one of its cells at a time
        picture = (torch.rand(1, *IMAGE, dtype=torch.float64) + 1).requires_grad_()
        (slope,) = torch.autograd.grad(network(picture)[0, :, row, column].sum(), picture)
        seen |= (slope[0] != 0).any(0)
    rows, columns = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _receptive_box(built: BuiltNetwork, layer: str, row: int, column: int) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = built.layers[layer].out.receptive_box(row, column, IMAGE)
    return max(0, x1), max(0, y1), min(IMAGE[2], x2), min(IMAGE[1], y2)


def _without_the_pool(built: BuiltNetwork, layers: nn.Module) -> tuple[str, nn.Module]:
    """The last layer before the global pool, and the layers up to it."""
    names = [name for name in built.layers if name.count(".") == 1]
    layers.global_avg_pool1 = nn.Identity()
    return names[-2], layers


@pytest.mark.parametrize("layers", PLAIN.values(), ids=PLAIN)
def test_the_receptive_box_equals_the_pixels_that_a_cell_depends_on(layers):
    built, network = _build(layers)
    name, network = _without_the_pool(built, network)
    _, high, wide = built.layers[name].out_shape
    for row, column in ((0, 0), (high // 2, wide // 3), (high // 2, wide // 2)):
        assert _dependency_box(network, row, column) == _receptive_box(built, name, row, column), (row, column)
    # At the right and bottom edges, strides may skip pixels that no intermediate map has a cell for.
    x1, y1, x2, y2 = _dependency_box(network, high - 1, wide - 1)
    left, top, right, bottom = _receptive_box(built, name, high - 1, wide - 1)
    assert (max(left, x1), max(top, y1), min(right, x2), min(bottom, y2)) == (x1, y1, x2, y2)


@pytest.mark.parametrize("layers", ENLARGED.values(), ids=ENLARGED)
def test_the_receptive_box_after_upsampling_is_right_within_two_pixels(layers):
    built, network = _build(layers)
    name, network = _without_the_pool(built, network)
    node = built.layers[name]
    for row, column in ((0, 0), (7, 11), (node.out_shape[1] - 1, 3)):
        for side, told in zip(
            _dependency_box(network, row, column), _receptive_box(built, name, row, column), strict=True
        ):
            assert abs(side - told) <= 2  # a cell of the map before upsampling is two pixels wide
