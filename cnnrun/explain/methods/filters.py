"""The kernels of a layer: what its channels are the scalar products with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import grey_tile, mosaic, signed_tile
from cnnrun.explain.layer_names import LayerPlace, find_layer
from cnnrun.explain.subject import Explanation, Subject

_MOST, _SIDE, _COLUMNS = 256, 40, 16  # kernels that are drawn, each of so many pixels, so many in a row
_WEAK = 0.01  # of the largest norm


def filters(subject: Subject, layer: str | None) -> Explanation:
    """Kernels over one or three channels as pictures, deeper ones as norms over their channels. Raises ConfigError.

    Without a layer those of the network's first conv.
    """
    suits = [place for place in subject.places if _kernels(subject, place) is not None]
    place = suits[0] if suits and layer is None else find_layer(subject.places, layer, suits, "kernels")
    kernels = _kernels(subject, place)
    assert kernels is not None
    count, depth, high, wide = kernels.shape
    norms = kernels.flatten(1).norm(dim=1)
    shown = kernels[:_MOST]
    if depth in (1, 3):
        tiles = [signed_tile(kernel, _SIDE) for kernel in shown]
        how = "each as it is, scaled by its own largest weight; grey is 0"
    else:
        strength = shown.norm(dim=1)
        tiles = [grey_tile(each, 0.0, float(strength.max()), _SIDE) for each in strength]
        how = f"at each place the norm over the {depth} channels that come in; black is 0, white the largest of all"
    weak = int((norms < _WEAK * norms.max()).sum())
    more = f" (the first {_MOST} shown)" if count > _MOST else ""
    caption = f"{place.title}: {count} kernels of {high}x{wide}{more}, {how}."
    caption += f" {weak} of them are next to nothing." if weak else ""
    rows = [{"channel": number, "norm": norm} for number, norm in enumerate(norms.tolist())]
    made = titled_grid([[(f"{place.title} ({place.module_name})", mosaic(tiles, _COLUMNS))]])
    return Explanation(made, caption, {"layer": place.title, "kernel": [high, wide], "weak": weak, "channels": rows})


def _kernels(subject: Subject, place: LayerPlace) -> Tensor | None:
    """A layer's weights [out, in, h, w] where it is a conv of its own."""
    if place.kind != "conv":
        return None
    module: Any = subject.trained.network.get_submodule(place.module_name)
    convs = [each for each in module.modules() if isinstance(each, torch.nn.Conv2d)]
    return convs[0].weight.detach() if convs else None
