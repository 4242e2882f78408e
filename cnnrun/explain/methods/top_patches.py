"""The strongest patches of a data set for each channel of a layer, each beside its deconvolution: figure 2."""

from __future__ import annotations

from collections.abc import Sequence

from cnnrun.data.dataset import Examples
from cnnrun.explain.aim import other_rule
from cnnrun.explain.figures.panels import side_by_side
from cnnrun.explain.figures.tiles import mosaic
from cnnrun.explain.methods.patches import patches, strongest
from cnnrun.explain.subject import Explanation, Subject

_BLOCKS = 4  # channels in a row


def top(
    subject: Subject, examples: Examples, layer: str | None, channels: Sequence[int], most: int, batch: int
) -> Explanation:
    """The nine strongest patches of each channel asked for, else of the `most` first ones. Raises ConfigError."""
    place = subject.maps(layer)
    chosen = subject.channels(place, channels) or list(range(min(most, place.shape[0])))
    found = strongest(subject.given, place, examples, batch)
    blocks, told = [], []
    for channel, own in zip(chosen, patches(subject, place, examples, found, chosen), strict=True):
        sides = [mosaic([patch.real for patch in own], 3), mosaic([patch.made for patch in own], 3)]
        blocks.append((f"channel {channel}, up to {own[0].value:.3g}", mosaic(sides, 2)))
        told.append({"channel": channel, "patches": [patch.told(examples) for patch in own]})
    caption = (
        f"{place.title}: for each channel the {len(found.values)} strongest patches of {len(examples):,} pictures, "
        f"left, and what of each the deconvnet gives back, right (each scaled by itself; grey is 0). A cell here sees "
        f"{place.out.field[1]}x{place.out.field[0]} pixels.{other_rule(subject)}"
    )
    drawn = side_by_side([blocks[start : start + _BLOCKS] for start in range(0, len(blocks), _BLOCKS)])
    return Explanation(drawn, caption, {"layer": place.title, "pictures": len(examples), "channels": told})
