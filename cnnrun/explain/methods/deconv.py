"""`explain deconv`: activations of a layer projected back to pixels by the deconvnet (section 2.1 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnrun.explain.aim import no_relu_note
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import scale_to_side, signed_tile
from cnnrun.explain.methods.patches import Cell, projections, receptive_field_box
from cnnrun.explain.subject import TILE_SIDE, ExplainedNetwork, Explanation, ImagesToExplain

_CHANNELS_PER_IMAGE = 4  # the strongest channels are drawn if none is named
_IMAGE_SIDE = 2 * TILE_SIDE


def deconv(
    subject: ExplainedNetwork, images: ImagesToExplain, layer: str | None, channels: Sequence[int]
) -> Explanation:
    """Draw each image beside projections of its strongest cells, one for each channel; by default of four channels.

    Raises ConfigError for a layer without feature maps or a channel that it does not have.
    """
    trained, place = subject.trained, subject.find_feature_map_layer(layer)
    selected = subject.check_channels(place, channels)
    peaks, positions = subject.layer_features(place, images.pixels).flatten(2).max(2)
    count = len(selected) or min(_CHANNELS_PER_IMAGE, place.shape[0])
    cells, projection_rows = list[Cell](), list[dict[str, Any]]()
    for index in range(len(images)):
        for channel in selected or peaks[index].topk(count).indices.tolist():
            row, column = divmod(int(positions[index, channel]), place.shape[2])
            cells.append((channel, row, column))
            projection_rows.append(
                {
                    "picture": images.names[index],
                    "channel": channel,
                    "value": float(peaks[index, channel]),
                    "cell": [row, column],
                    "box": list(receptive_field_box(place, row, column, trained.facts.image_shape)),
                }
            )
    rows = []
    for index in range(len(images)):
        row_images = [(images.title(index), scale_to_side(images.pillow_image(index), _IMAGE_SIDE).convert("RGB"))]
        for cell, data in zip(cells[index * count :][:count], projection_rows[index * count :][:count], strict=True):
            (projection_CHW,) = projections(subject, place, images.pixels[index : index + 1], [cell])
            title = f"channel {data['channel']}: {data['value']:.3g}"
            row_images.append((title, signed_tile(projection_CHW, _IMAGE_SIDE)))
        rows.append(row_images)
    caption = (
        f"{place.title}: each image, and the strongest cell of a channel projected back to its pixels through the "
        "filters and the positions that max-pooling chose; each scaled by itself, grey is 0."
    )
    data = {"layer": place.title, "projections": projection_rows}
    return Explanation(titled_grid(rows), caption + no_relu_note(subject), data, "projections")
