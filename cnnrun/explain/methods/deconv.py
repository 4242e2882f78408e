"""What one activation of a layer stands for in a picture, by the deconvnet: section 2.1 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cnnrun.explain.aim import no_relu_note
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import scale_to_side, signed_tile
from cnnrun.explain.methods.patches import Cell, projections, receptive_field_box
from cnnrun.explain.subject import TILE_SIDE, Explanation, ImagesToExplain, Subject

_CHANNELS = 4  # for each picture, its strongest ones
_WIDE = 2 * TILE_SIDE


def deconv(subject: Subject, shown: ImagesToExplain, layer: str | None, channels: Sequence[int]) -> Explanation:
    """Each picture beside the projections of the strongest cells of channels: those asked for, or its strongest four.

    Raises ConfigError.
    """
    given, place = subject.trained, subject.find_map_layer(layer)
    asked = subject.check_channels(place, channels)
    peaks, at = subject.layer_features(place, shown.pixels).flatten(2).max(2)
    count = len(asked) or min(_CHANNELS, place.shape[0])
    cells, told = list[Cell](), list[dict[str, Any]]()
    for number in range(len(shown)):
        for channel in asked or peaks[number].topk(count).indices.tolist():
            row, column = divmod(int(at[number, channel]), place.shape[2])
            cells.append((channel, row, column))
            told.append(
                {
                    "picture": shown.names[number],
                    "channel": channel,
                    "value": float(peaks[number, channel]),
                    "cell": [row, column],
                    "box": list(receptive_field_box(place, row, column, given.facts.image)),
                }
            )
    rows = []
    for number in range(len(shown)):
        drawn = [(shown.title(number), scale_to_side(shown.pillow_image(number), _WIDE).convert("RGB"))]
        for each in range(number * count, (number + 1) * count):
            (made,) = projections(subject, place, shown.pixels[number : number + 1], [cells[each]])
            drawn.append((f"channel {told[each]['channel']}: {told[each]['value']:.3g}", signed_tile(made, _WIDE)))
        rows.append(drawn)
    caption = (
        f"{place.title}: each picture, and what in it the strongest cell of a channel stands for, projected back "
        "through the filters and the positions that max-pooling chose; scaled each by itself, grey is 0."
    )
    return Explanation(
        titled_grid(rows), caption + no_relu_note(subject), {"layer": place.title, "projections": told}, "projections"
    )
