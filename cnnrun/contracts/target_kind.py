"""The kinds of targets that sources give and tasks learn."""

from __future__ import annotations

from enum import StrEnum


class TargetKind(StrEnum):
    """A kind of targets; its value is its name in messages."""

    LABELS = "labels"
    """One class per image: `labels` [N]."""
    LABEL_SETS = "label sets"
    """Any number of classes per image: `present` [N, K], 0 or 1."""
    NUMBERS = "numbers"
    """Numbers per image: `numbers` [N, T]."""
    BOXES = "boxes"
    """Objects with boxes and classes, in an `ObjectTable`."""
