"""The strongest patches of a data set for each channel of a layer, each beside its deconvolution: figure 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.batches import in_order
from cnnrun.dataset import Examples
from cnnrun.explain import Explanation, Subject
from cnnrun.explain.patches import box_of, pair, projections
from cnnrun.panels import side_by_side
from cnnrun.seeing import Place, features
from cnnrun.tiles import mosaic
from cnnrun.trained import Trained

BEST = 9  # as in the paper
_BLOCKS = 4  # channels in a row


@dataclass(frozen=True)
class Strongest:
    """For each channel its strongest cells, of different pictures, best first: all [BEST, C]."""

    values: Tensor
    samples: Tensor
    cells: Tensor  # row * width + column


def top(
    subject: Subject, examples: Examples, layer: str | None, channels: Sequence[int], most: int, batch: int
) -> Explanation:
    """The nine strongest patches of each channel asked for, else of the `most` first ones. Raises ConfigError."""
    given, place = subject.given, subject.maps(layer)
    chosen = subject.channels(place, channels) or list(range(min(most, place.shape[0])))
    found = strongest(given, place, examples, batch)
    numbers = found.samples[:, chosen].T.flatten()  # channel by channel
    rows, columns = (found.cells[:, chosen].T.flatten() // place.shape[2]), found.cells[:, chosen].T.flatten()
    cells = torch.stack([torch.tensor(chosen).repeat_interleave(len(found.values)), rows, columns % place.shape[2]], 1)
    pictures = examples.take(numbers).float()
    blocks, told = [], []
    signals = projections(subject, place, pictures, cells)
    pairs = [
        pair(picture, signal, box_of(place, row, column, given.facts.image))
        for picture, signal, (_, row, column) in zip(pictures, signals, cells.tolist(), strict=True)
    ]
    for number, channel in enumerate(chosen):
        own = pairs[number * len(found.values) : (number + 1) * len(found.values)]
        title = f"channel {channel}, up to {float(found.values[0, channel]):.3g}"
        blocks.append((title, mosaic([mosaic([real for real, _ in own], 3), mosaic([made for _, made in own], 3)], 2)))
        told.append({"channel": channel, "patches": _told(found, channel, place, examples, given)})
    caption = (
        f"{place.title}: for each channel the {len(found.values)} strongest patches of {len(examples):,} pictures, "
        f"left, and what of each the deconvnet gives back, right (each scaled by itself; grey is 0). A cell here sees "
        f"{place.out.field[1]}x{place.out.field[0]} pixels."
    )
    drawn = side_by_side([blocks[start : start + _BLOCKS] for start in range(0, len(blocks), _BLOCKS)])
    return Explanation(drawn, caption, {"layer": place.title, "pictures": len(examples), "channels": told})


def strongest(given: Trained, place: Place, examples: Examples, batch: int, best: int = BEST) -> Strongest:
    """One pass over a split: of each picture each channel's strongest cell, of these the best.

    Of equally strong ones the first comes first, whatever the batch.
    """
    kept: Strongest | None = None
    for part in in_order(examples, batch, given.device):
        values, cells = features(given.network, place, part.pictures).flatten(2).max(2)
        samples = part.index_B.to(values.device)[:, None].expand_as(values)
        new = Strongest(values, samples, cells)
        joined = (
            new if kept is None else Strongest(*(torch.cat(pair) for pair in zip(_all(kept), _all(new), strict=True)))
        )
        order = joined.values.sort(dim=0, descending=True, stable=True).indices[:best]
        kept = Strongest(*(each.gather(0, order) for each in _all(joined)))
    assert kept is not None
    return Strongest(*(each.cpu() for each in _all(kept)))


def _all(found: Strongest) -> tuple[Tensor, Tensor, Tensor]:
    return found.values, found.samples, found.cells


def _told(found: Strongest, channel: int, place: Place, examples: Examples, given: Trained) -> list[dict[str, Any]]:
    rows = []
    for value, sample, cell in zip(*(each[:, channel].tolist() for each in _all(found)), strict=True):
        row, column = divmod(cell, place.shape[2])
        box = list(box_of(place, row, column, given.facts.image))
        rows.append(
            {"picture": examples.name(sample), "sample": sample, "value": value, "cell": [row, column], "box": box}
        )
    return rows
