"""`explain filters`: the kernels of a convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import grey_tile, mosaic, signed_tile
from cnnrun.explain.layer_names import NamedLayer, find_layer
from cnnrun.explain.subject import ExplainedNetwork, Explanation

_MAX_KERNELS, _COLUMNS = 256, 16  # kernels that are drawn, and how many of them in a row
_KERNEL_SIDE = 40  # pixels
_WEAK_NORM_SHARE = 0.01  # kernels with less than this share of the largest norm are weak


def filters(subject: ExplainedNetwork, layer: str | None) -> Explanation:
    """Draw kernels over one or three channels as images, and deeper ones as norms over their channels.

    The default layer is the network's first conv. Raises ConfigError for a layer without kernels.
    """
    conv_places = [place for place in subject.places if _conv_kernels(subject, place) is not None]
    name = conv_places[0].module_name if conv_places and layer is None else layer
    place = find_layer(subject.places, name, conv_places, "kernels")
    kernels = _conv_kernels(subject, place)
    assert kernels is not None
    count, depth, height, width = kernels.shape
    norms = kernels.flatten(1).norm(dim=1)
    drawn_kernels = kernels[:_MAX_KERNELS]
    if depth in (1, 3):
        tiles = [signed_tile(kernel, _KERNEL_SIDE) for kernel in drawn_kernels]
        scaling = "each scaled by its own largest weight; grey is 0"
    else:
        norms_HW = drawn_kernels.norm(dim=1)
        tiles = [grey_tile(norm_HW, 0.0, float(norms_HW.max()), _KERNEL_SIDE) for norm_HW in norms_HW]
        scaling = f"each weight the norm over its {depth} input channels; black is 0, white the largest norm"
    weak_count = int((norms < _WEAK_NORM_SHARE * norms.max()).sum())
    shortened = f" (the first {_MAX_KERNELS} shown)" if count > _MAX_KERNELS else ""
    caption = f"{place.title}: {count} kernels of {height}x{width}{shortened}, {scaling}."
    caption += f" {weak_count} of them have almost no weight." if weak_count else ""
    rows = [{"channel": channel, "norm": norm} for channel, norm in enumerate(norms.tolist())]
    image = titled_grid([[(f"{place.title} ({place.module_name})", mosaic(tiles, _COLUMNS))]])
    data = {"layer": place.title, "kernel": [height, width], "weak": weak_count, "channels": rows}
    return Explanation(image, caption, data)


def _conv_kernels(subject: ExplainedNetwork, place: NamedLayer) -> Tensor | None:
    """Weights [out, in, h, w] of a conv layer; None for any other layer."""
    if place.kind != "conv":
        return None
    module: Any = subject.trained.network.get_submodule(place.module_name)
    convs = [submodule for submodule in module.modules() if isinstance(submodule, torch.nn.Conv2d)]
    return convs[0].weight.detach() if convs else None
