"""Settings that are chosen on val for trained weights, such as thresholds and a temperature."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from pydantic import ConfigDict

_TEMPERATURE, _IMPOSTOR_PAIRS = "temperature", "pairs of two people"
_CLASS_THRESHOLD, _FAR_THRESHOLD = "threshold of ", "threshold at FAR "


@dataclass(frozen=True)
class OperatingPoint:
    """A similarity threshold, the false accept rate it was chosen for, and the impostor pairs that it rests on."""

    far: float
    threshold: float
    impostor_pairs: int

    def is_for(self, far: float) -> bool:
        """Return True if the threshold was chosen for this rate, to six digits: old checkpoints store no more."""
        return f"{self.far:g}" == f"{far:g}"


@dataclass(frozen=True)
class Choices:
    """Settings chosen on val for trained weights. They change results, never the weights; empty until chosen."""

    temperature: float | None = None
    """Raw outputs are divided by it before they become probabilities."""
    class_thresholds: dict[str, float] = field(default_factory=dict)
    """Minimum probability of each class that counts as present."""
    operating_points: tuple[OperatingPoint, ...] = ()

    # For reading choices from a file: see run_records.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Return the choices as plain data for JSON."""
        return asdict(self)

    def replaced_by(self, newer: Choices) -> Choices:
        """Return these choices, replaced by those that are set in `newer`."""
        return Choices(
            self.temperature if newer.temperature is None else newer.temperature,
            newer.class_thresholds or self.class_thresholds,
            newer.operating_points or self.operating_points,
        )

    def consistency_problem(self) -> str | None:
        """Reason that these choices cannot be used, or None."""
        if self.temperature is not None and self.temperature <= 0:
            return "a temperature must be above 0"
        return None

    def by_description(self) -> dict[str, float]:
        """The values by their description, as reports and exported files show them."""
        descriptions = {f"{_CLASS_THRESHOLD}{name}": value for name, value in self.class_thresholds.items()}
        descriptions |= {f"{_FAR_THRESHOLD}{point.far:g}": point.threshold for point in self.operating_points}
        if self.operating_points:
            descriptions[_IMPOSTOR_PAIRS] = float(self.operating_points[0].impostor_pairs)
        return descriptions | ({} if self.temperature is None else {_TEMPERATURE: self.temperature})

    @classmethod
    def from_descriptions(cls, values: dict[str, float]) -> Choices:
        """Read choices as old checkpoints and calibrations store them: by description. Raises ValueError."""
        values = dict(values)
        temperature, impostor_pairs = values.pop(_TEMPERATURE, None), int(values.pop(_IMPOSTOR_PAIRS, 0))
        thresholds, points = dict[str, float](), list[OperatingPoint]()
        for description, value in values.items():
            if description.startswith(_CLASS_THRESHOLD):
                thresholds[description.removeprefix(_CLASS_THRESHOLD)] = value
            elif description.startswith(_FAR_THRESHOLD):
                points.append(OperatingPoint(float(description.removeprefix(_FAR_THRESHOLD)), value, impostor_pairs))
            else:
                raise ValueError(f"unknown choice {description!r}")
        return cls(temperature, thresholds, tuple(points))
