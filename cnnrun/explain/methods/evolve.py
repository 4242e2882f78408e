"""`explain evolve`: the strongest patch of each channel through training (figure 4 of the paper)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cnnrun.base.counts import format_count
from cnnrun.data.dataset import Examples
from cnnrun.explain.aim import no_relu_note
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import mosaic
from cnnrun.explain.methods.patches import draw_patches, find_strongest_cells
from cnnrun.explain.subject import ExplainedNetwork, Explanation


def evolve(
    subjects: Iterable[tuple[int, ExplainedNetwork]],
    examples: Examples,
    layer: str | None,
    channels: Sequence[int],
    first_channels: int,
    batch: int,
) -> Explanation:
    """Draw each channel's strongest patch of a split and its projection, for each checkpoint (step and network).

    A sudden change means that another image has become the strongest. Raises ConfigError.
    """
    columns: list[list[tuple[str, Any]]] = []
    patch_rows: list[dict[str, Any]] = []
    title = note = ""
    for step, subject in subjects:
        place = subject.find_feature_map_layer(layer)
        title, note = place.title, no_relu_note(subject)
        selected = subject.check_channels(place, channels) or list(range(min(first_channels, place.shape[0])))
        patches = draw_patches(
            subject, place, examples, find_strongest_cells(subject.trained, place, examples, batch, 1), selected
        )
        strongest = [channel_patches[0] for channel_patches in patches]
        patch_rows += [{"step": step, **patch.to_dict(examples)} for patch in strongest]
        columns.append(
            [
                (f"step {step}, channel {patch.cell[0]}: {patch.value:.3g}", mosaic([patch.image, patch.projection], 2))
                for patch in strongest
            ]
        )
    images = format_count(len(examples), "image")
    caption = (
        f"{title}: the strongest patch of {images} for each channel (rows) and its projection by the "
        "deconvnet, for each checkpoint (columns); each scaled by itself, grey is 0." + note
    )
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Explanation(titled_grid(rows), caption, {"layer": title, "patches": patch_rows}, "patches")
