"""A grey square that moves over a picture, and what the network says then: figure 7 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import ConfigError, escape
from cnnrun.explain.aim import ScoreDirection, choose_direction
from cnnrun.explain.figures.panels import palette_colour, titled_grid, truncate_text
from cnnrun.explain.figures.tiles import heat_map, scale_to_side
from cnnrun.explain.layer_names import capture_outputs
from cnnrun.explain.subject import TILE_SIDE, Explanation, ImagesToExplain, Subject, compute_class_scores

_WIDE = 2 * TILE_SIDE
_NEUTRAL, _NAMED = 200, 9  # the grey where no middle comes; what is told of the colours


@dataclass(frozen=True)
class OcclusionScores:
    """What the network says with the square at each place [rows, columns], and where the squares' corners are."""

    score: Tensor
    energy: Tensor
    winner: Tensor  # the number of what is said most strongly
    tops: list[int]
    lefts: list[int]
    size: int


def occlude(
    subject: Subject,
    shown: ImagesToExplain,
    layer: str | None,
    target: str | None,
    size: int | None,
    stride: int | None,
) -> Explanation:
    """The score, the sum of the strongest map, and what is said most strongly, by where the square is.

    By default the square's side is a quarter of the picture's shorter one, moved by a quarter of itself. Raises
    ConfigError.
    """
    given, place = subject.trained, subject.find_map_layer(layer)
    size = size or max(1, min(given.facts.image[1:]) // 4)
    step = stride or max(1, size // 4)
    if size > min(given.facts.image[1:]):
        raise ConfigError(f"--size {size}: larger than the picture, {given.facts.image[2]}x{given.facts.image[1]}")
    said = subject.class_scores(shown.pixels)
    aim = choose_direction(said, target, shown, compare_with_itself=True)
    before = aim.scores(said.display_BK).tolist()
    sums = subject.layer_features(place, shown.pixels).sum((2, 3))
    words = said.names if said.is_comparable else ()
    rows, told = [], []
    for number in range(len(shown)):
        channel = int(sums[number].argmax())
        swept = measure_occlusion(
            subject, shown.pixels[number], aim.select(number), place.module_name, channel, size, step
        )
        rows.append(_drawn(shown, number, swept, aim, before[number], channel, words))
        told.append(_told(shown, number, swept, aim, before[number], channel, words, size))
    caption = (
        f"A grey square of {size} pixels moves by {step}: the {aim.quantity} of what is written, "
        f"the sum of the strongest map of {place.title}, each from black (least) to yellow (largest)"
        + (", and what it says most strongly, a colour each, by the square's middle." if words[1:] else ".")
    )
    data = {"layer": place.title, "size": size, "stride": step, "pictures": told}
    return Explanation(titled_grid(rows), caption, data, "pictures")


def measure_occlusion(
    subject: Subject, picture_CHW: Tensor, aim: ScoreDirection, module: str, channel: int, size: int, step: int
) -> OcclusionScores:
    """What is said of one picture with a square of the data's mean colour at each place, many places at once."""
    given = subject.trained
    _, high, wide = picture_CHW.shape
    tops, lefts = _starts(high, size, step), _starts(wide, size, step)
    at = torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)).view(-1, 2).to(given.device)
    rows, columns = torch.arange(high, device=given.device), torch.arange(wide, device=given.device)
    grey = torch.tensor(given.facts.mean, device=given.device).view(-1, 1, 1)
    scores, energies, winners = [], [], []
    with torch.no_grad(), capture_outputs(given.network, [module]) as kept:
        for part in at.split(subject.batch_size):
            in_rows = (rows >= part[:, :1]) & (rows < part[:, :1] + size)
            in_columns = (columns >= part[:, 1:]) & (columns < part[:, 1:] + size)
            square = in_rows[:, None, :, None] & in_columns[:, None, None, :]
            said = compute_class_scores(given, torch.where(square, grey, picture_CHW))
            scores.append(aim.scores(said.display_BK))
            energies.append(kept[module][:, channel].sum((1, 2)))
            winners.append(said.display_BK.argmax(1))
    score, energy, winner = (torch.cat(each).view(len(tops), len(lefts)).cpu() for each in (scores, energies, winners))
    return OcclusionScores(score.float(), energy.float(), winner, tops, lefts, size)


def _starts(side: int, size: int, step: int) -> list[int]:
    """Where the square begins along a side; the last one ends at the edge."""
    found = list(range(0, side - size + 1, step))
    return found if found[-1] == side - size else [*found, side - size]


def _drawn(
    shown: ImagesToExplain,
    number: int,
    swept: OcclusionScores,
    aim: ScoreDirection,
    before: float,
    channel: int,
    names: tuple[str, ...],
) -> list[tuple[str, Any]]:
    picture = scale_to_side(shown.pillow_image(number), _WIDE).convert("RGB")

    def over(values: Tensor) -> Any:
        return _lying(heat_map(values, float(values.min()), float(values.max())), swept, shown, picture.size)

    score, energy = swept.score, swept.energy
    row = [
        (shown.title(number), picture),
        (f"{aim.names[number]} {before:.3g}: {float(score.min()):.3g} to {float(score.max()):.3g}", over(score)),
        (f"channel {channel}: {float(energy.min()):.3g} to {float(energy.max()):.3g}", over(energy)),
    ]
    if len(names) < 2:
        return row
    made, often = _winners(swept.winner)
    return [*row, ("most strongly", _lying(made, swept, shown, picture.size)), _key(often, names)]


def _lying(places: Any, swept: OcclusionScores, shown: ImagesToExplain, size: tuple[int, int]) -> Any:
    """A pixel for each place of the square -> each where the square's middle is, over the whole picture, else grey."""
    from PIL import Image as Pil

    high, wide = shown.pixels.shape[2:]
    rows, columns = (_nearest(each, side, swept.size) for each, side in ((swept.tops, high), (swept.lefts, wide)))
    spread = np.asarray(places)[rows.clip(0)][:, columns.clip(0)]
    inside = (rows >= 0)[:, None, None] & (columns >= 0)[None, :, None]
    made = np.where(inside, spread, _NEUTRAL).astype(np.uint8)
    return Pil.fromarray(made).resize(size, Pil.Resampling.NEAREST)


def _nearest(starts: Sequence[int], side: int, size: int) -> NDArray[np.int64]:
    """For each pixel along a side the square whose middle is nearest; -1 further out than any middle's own strip."""
    middles = np.array(starts) + size / 2
    pixels = np.arange(side) + 0.5
    away = np.abs(pixels[:, None] - middles)
    reach = max(0.5, (middles[1] - middles[0]) / 2) if len(middles) > 1 else size / 2
    return np.where(away.min(1) <= reach, away.argmin(1), -1)


def _key(often: Sequence[int], names: tuple[str, ...]) -> tuple[str, Any]:
    """Which colour is what, the most frequent first."""
    from PIL import Image as Pil
    from PIL import ImageDraw, ImageFont

    font, shown = ImageFont.load_default(size=12), often[:_NAMED]
    made = Pil.new("RGB", (130, 18 * len(shown) + 4), "white")
    draw = ImageDraw.Draw(made)
    for line, number in enumerate(shown):
        draw.rectangle((2, 18 * line + 3, 14, 18 * line + 15), fill=palette_colour(number))
        draw.text((20, 18 * line + 2), truncate_text(escape(names[number]), font, 108), "black", font)
    return "", made


def _winners(said: Tensor) -> tuple[Any, list[int]]:
    """What is said at each place, in one of ten colours; and what is said at all, the most frequent first."""
    from PIL import Image as Pil
    from PIL import ImageColor

    made = Pil.new("RGB", (said.shape[1], said.shape[0]))
    made.putdata([ImageColor.getrgb(palette_colour(each)) for each in said.flatten().tolist()])
    found, counts = said.unique(return_counts=True)
    often = found[counts.argsort(descending=True, stable=True)].tolist()
    return made, often


def _told(
    shown: ImagesToExplain,
    number: int,
    swept: OcclusionScores,
    aim: ScoreDirection,
    before: float,
    channel: int,
    names: tuple[str, ...],
    size: int,
) -> dict[str, Any]:
    worst = divmod(int(swept.score.argmin()), swept.score.shape[1])
    box = [swept.lefts[worst[1]], swept.tops[worst[0]]]
    return {
        "picture": shown.names[number],
        "target": aim.names[number],
        "score": before,
        "least": float(swept.score.min()),
        "least_box": [*box, box[0] + size, box[1] + size],
        "channel": channel,
        "tops": swept.tops,
        "lefts": swept.lefts,
        "scores": swept.score.tolist(),
        "energies": swept.energy.tolist(),
        **({"said": [[names[each] for each in row] for row in swept.winner.tolist()]} if len(names) > 1 else {}),
    }
