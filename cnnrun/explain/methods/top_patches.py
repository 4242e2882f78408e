"""`explain top`: each channel's strongest patches in a split, beside their deconvolutions (figure 2 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from cnnrun.base.counts import format_count
from cnnrun.data.dataset import Examples
from cnnrun.explain.aim import no_relu_note
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import mosaic
from cnnrun.explain.methods.patches import draw_patches, find_strongest_cells
from cnnrun.explain.subject import ExplainedNetwork, Explanation

_CHANNELS_PER_ROW = 4


def top_patches(
    subject: ExplainedNetwork,
    examples: Examples,
    layer: str | None,
    channels: Sequence[int],
    first_channels: int,
    batch: int,
) -> Explanation:
    """Draw the nine strongest patches of each channel in `channels`, or of the first `first_channels`.

    Raises ConfigError.
    """
    place = subject.find_feature_map_layer(layer)
    selected = subject.check_channels(place, channels) or list(range(min(first_channels, place.shape[0])))
    strongest = find_strongest_cells(subject.trained, place, examples, batch)
    blocks, channel_rows = [], []
    for channel, patches in zip(selected, draw_patches(subject, place, examples, strongest, selected), strict=True):
        sides = [mosaic([patch.image for patch in patches], 3), mosaic([patch.projection for patch in patches], 3)]
        blocks.append((f"channel {channel}, up to {patches[0].value:.3g}", mosaic(sides, 2)))
        channel_rows.append({"channel": channel, "patches": [patch.to_dict(examples) for patch in patches]})
    images = format_count(len(examples), "image")
    caption = (
        f"{place.title}: for each channel the {len(strongest.values)} strongest patches of {images}, left, "
        f"and their projections by the deconvnet, right (each scaled by itself; grey is 0). A cell's receptive "
        f"field has {place.output.field[1]}x{place.output.field[0]} pixels.{no_relu_note(subject)}"
    )
    image = titled_grid(
        [blocks[start : start + _CHANNELS_PER_ROW] for start in range(0, len(blocks), _CHANNELS_PER_ROW)]
    )
    return Explanation(image, caption, {"layer": place.title, "pictures": len(examples), "channels": channel_rows})
