"""The feature maps that a layer makes of pictures."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import grey_tile, mosaic, scale_to_side
from cnnrun.explain.subject import TILE_SIDE, Explanation, ImagesToExplain, Subject

_MOST, _TOLD = 64, 10  # maps that are drawn, and channels that are told, for each picture


def feature_maps(subject: Subject, shown: ImagesToExplain, layer: str | None) -> Explanation:
    """The strongest maps of a layer for each picture. Raises ConfigError."""
    place = subject.find_map_layer(layer)
    maps = subject.layer_features(place, shown.pixels)
    peaks = maps.flatten(2).amax(2)
    rows, told = [], []
    for number in range(len(shown)):
        chosen = peaks[number].topk(min(_MOST, maps.shape[1])).indices.sort().values
        rows.append(
            [
                (shown.title(number), scale_to_side(shown.pillow_image(number), 2 * TILE_SIDE)),
                _drawn(maps[number], chosen),
            ]
        )
        told.append({"picture": shown.names[number], "strongest": _strongest(maps[number])})
    dead = int((maps.amax((0, 2, 3)) <= 0).sum())
    count, high, wide = place.shape
    which = f"the {_MOST} strongest of its {count} maps" if count > _MOST else f"its {count} maps"
    caption = (
        f"{place.title}: {which} of {high}x{wide} for each picture; black is the layer's least value there, white "
    )
    caption += f"its largest. {dead} of {count} channels are above 0 nowhere in these pictures."
    data = {"layer": place.title, "shape": list(place.shape), "never_active": dead, "pictures": told}
    return Explanation(titled_grid(rows), caption, data)


def _drawn(maps_CHW: Tensor, chosen: Tensor) -> tuple[str, Any]:
    least, most = float(maps_CHW.min()), float(maps_CHW.max())
    numbers = chosen.tolist()
    tiles = [grey_tile(maps_CHW[channel], least, most, TILE_SIDE // 2) for channel in numbers]
    title = f"channels {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else f"channel {numbers[0]}"
    return f"{title}, {least:.3g} to {most:.3g}", mosaic(tiles, max(8, math.ceil(math.sqrt(2 * len(tiles)))))


def _strongest(maps_CHW: Tensor) -> list[dict[str, Any]]:
    peaks, cells = maps_CHW.flatten(1).max(1)
    means, wide = maps_CHW.mean((1, 2)).tolist(), maps_CHW.shape[2]
    return [
        {"channel": each, "peak": float(peaks[each]), "mean": means[each], "cell": list(divmod(int(cells[each]), wide))}
        for each in peaks.topk(min(_TOLD, len(peaks))).indices.tolist()
    ]
