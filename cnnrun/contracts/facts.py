"""Facts about the data, measured once: classes, image shape, pixel statistics, counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from cnnrun.contracts.layer import MAX_SIDE, Shape


@dataclass(frozen=True)
class NumberStatistics:
    """Statistics of a numeric target over the training images."""

    name: str
    mean: float = 0.0
    std: float = 1.0
    minimum: Annotated[float, Field(alias="least")] = 0.0
    maximum: Annotated[float, Field(alias="most")] = 0.0


@dataclass(frozen=True)
class DataFacts:
    """Properties of the data, measured once on the training split and stored with the network.

    Names in files that differ from those of the fields are aliases.
    """

    classes: tuple[str, ...]
    image_shape: Annotated[Shape, Field(alias="image")]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    class_counts: tuple[int, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    class_ids: tuple[int, ...] = ()
    numbers: tuple[NumberStatistics, ...] = ()

    # For reading facts from a file: see run_records.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain data for JSON."""
        facts: dict[str, Any] = TypeAdapter(DataFacts).dump_python(self, by_alias=True)
        return facts

    def consistency_problem(self) -> str | None:
        """Reason that the facts contradict each other, or None."""
        channels = self.image_shape[0] if len(self.image_shape) == 3 else 0
        if not channels or min(self.image_shape) < 1 or max(self.image_shape) > MAX_SIDE:
            return "image is not a shape (channels, height, width)"
        if not {len(self.mean), len(self.std)} <= {1, channels}:
            return "image, mean and std have different numbers of channels"
        if min(self.std, default=0.0) <= 0:
            return "std is not positive"
        if len(set(self.classes)) < len(self.classes):
            return "a class appears twice"
        per_class = (self.class_counts, self.class_ids)
        wrong_lengths = any(values and len(values) != len(self.classes) for values in per_class)
        if wrong_lengths or min((*self.class_counts, *self.counts.values()), default=0) < 0:
            return "class_counts or class_ids has another length than classes, or a count is negative"
        return None


def format_per_class(classes: Sequence[str], values: Sequence[float], unit: str = "", max_shown: int = 10) -> str:
    """Format a value per class in one line, in ascending order; of many classes only the smallest and the largest."""
    pairs = sorted(zip(classes, values, strict=True), key=lambda pair: pair[1])
    shown = pairs if len(pairs) <= max_shown else [pairs[0], pairs[-1]]
    text = ", ".join(f"{name} {value:.3g}{f' {unit}' if unit else ''}" for name, value in shown)
    return text if len(pairs) <= max_shown else f"{text} ({len(pairs)} classes)"
