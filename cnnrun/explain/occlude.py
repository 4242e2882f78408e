"""A grey square that moves over a picture, and what the network says then: figure 7 of the paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.errors import ConfigError
from cnnrun.explain.subject import SIDE, Aim, Explanation, Shown, Subject, aimed, said_of
from cnnrun.panels import colour, side_by_side
from cnnrun.seeing import captured
from cnnrun.tiles import grown, heat

_WIDE = 2 * SIDE


@dataclass(frozen=True)
class Swept:
    """What the network says with the square at each place [rows, columns], and where the squares' corners are."""

    score: Tensor
    energy: Tensor
    said: Tensor  # the number of what is said most strongly
    tops: list[int]
    lefts: list[int]


def occlude(
    subject: Subject, shown: Shown, layer: str | None, target: str | None, size: int | None, stride: int | None
) -> Explanation:
    """The score, the sum of the strongest map, and what is said most strongly, by where the square is.

    By default the square's side is a quarter of the picture's shorter one, moved by a quarter of itself. Raises
    ConfigError.
    """
    given, place = subject.given, subject.maps(layer)
    size = size or max(1, min(given.facts.image[1:]) // 4)
    step = stride or max(1, size // 4)
    if size > min(given.facts.image[1:]):
        raise ConfigError(f"--size {size}: larger than the picture, {given.facts.image[2]}x{given.facts.image[1]}")
    said = subject.said(shown.pixels)
    aim = aimed(said, target, shown, itself=True)
    before = aim.of(said.shown_BK).tolist()
    sums = subject.features(place, shown.pixels).sum((2, 3))
    words = said.names if said.comparable else ()
    rows, told = [], []
    for number in range(len(shown)):
        channel = int(sums[number].argmax())
        swept = sweep(subject, shown.pixels[number], aim.part(number), place.module, channel, size, step)
        rows.append(_drawn(shown, number, swept, aim, before[number], channel, words))
        told.append(_told(shown, number, swept, aim, before[number], channel, words, size))
    caption = (
        f"A grey square of {size} pixels moves by {step}: how strongly the network says what is written ({aim.what}), "
        f"the sum of the strongest map of {place.title}, each from black (least) to yellow (largest)"
        + (", and what it says most strongly, a colour each, by the square's middle." if words[1:] else ".")
    )
    data = {"layer": place.title, "size": size, "stride": step, "pictures": told}
    return Explanation(side_by_side(rows), caption, data, "pictures")


def sweep(subject: Subject, picture_CHW: Tensor, aim: Aim, module: str, channel: int, size: int, step: int) -> Swept:
    """What is said of one picture with a square of the data's mean colour at each place, many places at once."""
    given = subject.given
    _, high, wide = picture_CHW.shape
    tops, lefts = _starts(high, size, step), _starts(wide, size, step)
    at = torch.cartesian_prod(torch.tensor(tops), torch.tensor(lefts)).view(-1, 2).to(given.device)
    rows, columns = torch.arange(high, device=given.device), torch.arange(wide, device=given.device)
    grey = torch.tensor(given.facts.mean, device=given.device).view(-1, 1, 1)
    scores, energies, winners = [], [], []
    with torch.no_grad(), captured(given.network, [module]) as kept:
        for part in at.split(subject.at_once):
            in_rows = (rows >= part[:, :1]) & (rows < part[:, :1] + size)
            in_columns = (columns >= part[:, 1:]) & (columns < part[:, 1:] + size)
            square = in_rows[:, None, :, None] & in_columns[:, None, None, :]
            said = said_of(given, torch.where(square, grey, picture_CHW))
            scores.append(aim.of(said.shown_BK))
            energies.append(kept[module][:, channel].sum((1, 2)))
            winners.append(said.shown_BK.argmax(1))
    score, energy, winner = (torch.cat(each).view(len(tops), len(lefts)).cpu() for each in (scores, energies, winners))
    return Swept(score.float(), energy.float(), winner, tops, lefts)


def _starts(side: int, size: int, step: int) -> list[int]:
    """Where the square begins along a side; the last one ends at the edge."""
    found = list(range(0, side - size + 1, step))
    return found if found[-1] == side - size else [*found, side - size]


def _drawn(
    shown: Shown, number: int, swept: Swept, aim: Aim, before: float, channel: int, names: tuple[str, ...]
) -> list[tuple[str, Any]]:
    from PIL import Image as Pil

    picture = grown(shown.picture(number), _WIDE).convert("RGB")

    def over(values: Tensor) -> Any:
        return heat(values, float(values.min()), float(values.max())).resize(picture.size, Pil.Resampling.NEAREST)

    score, energy = swept.score, swept.energy
    row = [
        (shown.title(number), picture),
        (f"{aim.names[number]} {before:.3g}: {float(score.min()):.3g} to {float(score.max()):.3g}", over(score)),
        (f"channel {channel}: {float(energy.min()):.3g} to {float(energy.max()):.3g}", over(energy)),
    ]
    return [*row, _winners(swept.said, names, picture.size)] if len(names) > 1 else row


def _winners(said: Tensor, names: tuple[str, ...], size: tuple[int, int]) -> tuple[str, Any]:
    """What is said at each place, in one of ten colours, the most frequent named."""
    from PIL import Image as Pil
    from PIL import ImageColor

    made = Pil.new("RGB", (said.shape[1], said.shape[0]))
    made.putdata([ImageColor.getrgb(colour(each)) for each in said.flatten().tolist()])
    found, counts = said.unique(return_counts=True)
    often = found[counts.argsort(descending=True, stable=True)].tolist()
    return ", ".join(names[each] for each in often[:4]), made.resize(size, Pil.Resampling.NEAREST)


def _told(
    shown: Shown, number: int, swept: Swept, aim: Aim, before: float, channel: int, names: tuple[str, ...], size: int
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
        **({"said": [[names[each] for each in row] for row in swept.said.tolist()]} if len(names) > 1 else {}),
    }
