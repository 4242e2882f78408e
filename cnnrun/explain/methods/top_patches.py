"""The strongest patches of a data set for each channel of a layer, each beside its deconvolution: figure 2."""

from __future__ import annotations

from collections.abc import Sequence

from cnnrun.data.dataset import Examples
from cnnrun.explain.aim import no_relu_note
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import mosaic
from cnnrun.explain.methods.patches import draw_patches, find_strongest_cells
from cnnrun.explain.subject import Explanation, Subject

_BLOCKS = 4  # channels in a row


def top_patches(
    subject: Subject, examples: Examples, layer: str | None, channels: Sequence[int], most: int, batch: int
) -> Explanation:
    """The nine strongest patches of each channel asked for, else of the `most` first ones. Raises ConfigError."""
    place = subject.find_map_layer(layer)
    chosen = subject.check_channels(place, channels) or list(range(min(most, place.shape[0])))
    found = find_strongest_cells(subject.trained, place, examples, batch)
    blocks, told = [], []
    for channel, own in zip(chosen, draw_patches(subject, place, examples, found, chosen), strict=True):
        sides = [mosaic([patch.image for patch in own], 3), mosaic([patch.projection for patch in own], 3)]
        blocks.append((f"channel {channel}, up to {own[0].value:.3g}", mosaic(sides, 2)))
        told.append({"channel": channel, "patches": [patch.to_dict(examples) for patch in own]})
    caption = (
        f"{place.title}: for each channel the {len(found.values)} strongest patches of {len(examples):,} pictures, "
        f"left, and what of each the deconvnet gives back, right (each scaled by itself; grey is 0). A cell here sees "
        f"{place.output.field[1]}x{place.output.field[0]} pixels.{no_relu_note(subject)}"
    )
    drawn = titled_grid([blocks[start : start + _BLOCKS] for start in range(0, len(blocks), _BLOCKS)])
    return Explanation(drawn, caption, {"layer": place.title, "pictures": len(examples), "channels": told})
