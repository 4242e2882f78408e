"""What is known of the data once it was measured: classes, image shape, statistics, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

from cnnrun.contracts.layer import MAX_SIDE, Shape


@dataclass(frozen=True)
class NumberStatistics:
    """A number that is known of each picture, and what it is over the training pictures."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    least: float = 0.0
    most: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What the data says about itself: measured once on the training split, kept with the model.

    `chosen` is what val chose for the trained network, such as thresholds; empty until then.
    """

    classes: tuple[str, ...]
    image: Shape
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    class_counts: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    class_ids: tuple[int, ...] = ()
    chosen: dict[str, float] = field(default_factory=dict)
    numbers: tuple[NumberStatistics, ...] = ()

    # How a file that holds them is read: see run_records.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def consistency_problem(self) -> str | None:
        """What cannot be true of any data, or None."""
        channels = self.image[0] if len(self.image) == 3 else 0
        per_channel = {len(self.mean), len(self.std)} <= {1, channels}
        sides = min(self.image, default=0) >= 1 and max(self.image, default=0) <= MAX_SIDE
        if not sides or not channels or not per_channel or min(self.std, default=0.0) <= 0:
            return "image, mean and std do not fit each other"
        if len(set(self.classes)) < len(self.classes):
            return "a class stands twice"
        wrong_lengths = any(each and len(each) != len(self.classes) for each in (self.class_counts, self.class_ids))
        if wrong_lengths or min((*self.class_counts, *self.counts.values()), default=0) < 0:
            return "its counts are not those of its classes"
        return None


def format_per_class(classes: Sequence[str], values: Sequence[float], unit: str = "", most: int = 10) -> str:
    """A number for each class in one line; of many classes the smallest and the largest."""
    pairs = sorted(zip(classes, values, strict=True), key=lambda pair: pair[1])
    shown = pairs if len(pairs) <= most else [pairs[0], pairs[-1]]
    text = ", ".join(f"{name} {value:.3g}{f' {unit}' if unit else ''}" for name, value in shown)
    return text if len(pairs) <= most else f"{text} ({len(pairs)} classes)"
