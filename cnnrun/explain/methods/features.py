"""`explain features`: a layer's feature maps of images."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import grey_tile, mosaic, scale_to_side
from cnnrun.explain.subject import TILE_SIDE, ExplainedNetwork, Explanation, ImagesToExplain

_MAX_MAPS, _MAX_LISTED_CHANNELS = 64, 10  # drawn and listed for each image


def feature_maps(subject: ExplainedNetwork, images: ImagesToExplain, layer: str | None) -> Explanation:
    """Draw the strongest maps of a layer for each image. Raises ConfigError."""
    place = subject.find_feature_map_layer(layer)
    maps = subject.layer_features(place, images.pixels)
    peaks = maps.flatten(2).amax(2)
    rows, image_rows = [], []
    for index in range(len(images)):
        channels = peaks[index].topk(min(_MAX_MAPS, maps.shape[1])).indices.sort().values
        rows.append(
            [
                (images.title(index), scale_to_side(images.pillow_image(index), 2 * TILE_SIDE)),
                _draw_maps(maps[index], channels),
            ]
        )
        image_rows.append({"picture": images.names[index], "strongest": _strongest_channels(maps[index])})
    dead_count = int((maps.amax((0, 2, 3)) <= 0).sum())
    count, height, width = place.shape
    description = f"the {_MAX_MAPS} strongest of its {count} maps" if count > _MAX_MAPS else f"its {count} maps"
    caption = (
        f"{place.title}: {description} of {height}x{width} for each image, from black (the layer's minimum there) "
        f"to white (its maximum). {dead_count} of {count} channels are never above 0 in these images."
    )
    data = {"layer": place.title, "shape": list(place.shape), "never_active": dead_count, "pictures": image_rows}
    return Explanation(titled_grid(rows), caption, data)


def _draw_maps(maps_CHW: Tensor, channels: Tensor) -> tuple[str, Any]:
    min_value, max_value = float(maps_CHW.min()), float(maps_CHW.max())
    channel_list = channels.tolist()
    tiles = [grey_tile(maps_CHW[channel], min_value, max_value, TILE_SIDE // 2) for channel in channel_list]
    first, last = channel_list[0], channel_list[-1]
    title = f"channels {first} to {last}" if len(channel_list) > 1 else f"channel {first}"
    return f"{title}, {min_value:.3g} to {max_value:.3g}", mosaic(tiles, max(8, math.ceil(math.sqrt(2 * len(tiles)))))


def _strongest_channels(maps_CHW: Tensor) -> list[dict[str, Any]]:
    peaks, cells = maps_CHW.flatten(1).max(1)
    means, width = maps_CHW.mean((1, 2)).tolist(), maps_CHW.shape[2]
    return [
        {
            "channel": channel,
            "peak": float(peaks[channel]),
            "mean": means[channel],
            "cell": list(divmod(int(cells[channel]), width)),
        }
        for channel in peaks.topk(min(_MAX_LISTED_CHANNELS, len(peaks))).indices.tolist()
    ]
