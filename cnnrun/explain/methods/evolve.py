"""A channel's strongest patch through training: figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cnnrun.data.dataset import Examples
from cnnrun.explain.aim import no_relu_note
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.figures.tiles import mosaic
from cnnrun.explain.methods.patches import draw_patches, find_strongest_cells
from cnnrun.explain.subject import Explanation, Subject


def evolve(
    subjects: Iterable[tuple[int, Subject]],
    examples: Examples,
    layer: str | None,
    channels: Sequence[int],
    most: int,
    batch: int,
) -> Explanation:
    """For each checkpoint (its step, the network) the strongest patch of a split for each channel, and its projection.

    A patch that jumps shows where another picture has become the strongest. Raises ConfigError.
    """
    columns: list[list[tuple[str, Any]]] = []
    told: list[dict[str, Any]] = []
    title = note = ""
    for step, subject in subjects:
        place = subject.find_map_layer(layer)
        title, note = place.title, no_relu_note(subject)
        chosen = subject.check_channels(place, channels) or list(range(min(most, place.shape[0])))
        found = draw_patches(
            subject, place, examples, find_strongest_cells(subject.trained, place, examples, batch, 1), chosen
        )
        firsts = [own[0] for own in found]
        told += [{"step": step, **patch.to_dict(examples)} for patch in firsts]
        columns.append(
            [
                (f"step {step}, channel {patch.cell[0]}: {patch.value:.3g}", mosaic([patch.image, patch.projection], 2))
                for patch in firsts
            ]
        )
    caption = (
        f"{title}: the strongest patch of {len(examples):,} pictures for each channel (a row), and what of it the "
        "deconvnet gives back, checkpoint by checkpoint (a column); each scaled by itself, grey is 0." + note
    )
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Explanation(titled_grid(rows), caption, {"layer": title, "patches": told}, "patches")
