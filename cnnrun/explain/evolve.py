"""A channel's strongest patch through training: figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from cnnrun.dataset import Examples
from cnnrun.explain import Explanation, Subject
from cnnrun.explain.patches import as_tensor, box_of, pair, projections
from cnnrun.explain.top import strongest
from cnnrun.panels import side_by_side
from cnnrun.tiles import mosaic


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
    path = ""
    for step, subject in subjects:
        given, place = subject.given, subject.maps(layer)
        path = place.title
        chosen = subject.channels(place, channels) or list(range(min(most, place.shape[0])))
        found = strongest(given, place, examples, batch, 1)
        samples = found.samples[0, chosen]
        at = [divmod(cell, place.shape[2]) for cell in found.cells[0, chosen].tolist()]
        pictures = examples.take(samples).float()
        cells = as_tensor([(channel, *cell) for channel, cell in zip(chosen, at, strict=True)])
        signals = projections(subject, place, pictures, cells)
        column = []
        for number, (picture, signal) in enumerate(zip(pictures, signals, strict=True)):
            box = box_of(place, at[number][0], at[number][1], given.facts.image)
            value, sample = float(found.values[0, chosen[number]]), int(samples[number])
            column.append(
                (f"step {step}, channel {chosen[number]}: {value:.3g}", mosaic(pair(picture, signal, box), 2))
            )
            told.append(
                {
                    "step": step,
                    "channel": chosen[number],
                    "picture": examples.name(sample),
                    "value": value,
                    "cell": list(at[number]),
                    "box": list(box),
                }
            )
        columns.append(column)
    caption = (
        f"{path}: the strongest patch of {len(examples):,} pictures for each channel (a row), and what of it the "
        "deconvnet gives back, checkpoint by checkpoint (a column); each scaled by itself, grey is 0."
    )
    rows = [list(row) for row in zip(*columns, strict=True)]
    return Explanation(side_by_side(rows), caption, {"layer": path, "patches": told}, "patches")
