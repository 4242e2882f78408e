"""The kinds of targets that sources give and tasks learn."""

from __future__ import annotations

from enum import StrEnum

IGNORED = 255  # in a mask: a pixel that is neither learned nor measured
UNKNOWN = 254  # in a mask: a value that is no class; such masks are refused


class TargetKind(StrEnum):
    """A kind of targets; its value is its name in messages."""

    LABELS = "labels"
    """One class per image: `labels` [N]."""
    LABEL_SETS = "label sets"
    """Any number of classes per image: `present` [N, K], 0 or 1."""
    NUMBERS = "numbers"
    """Numbers per image: `numbers` [N, T]."""
    MASKS = "masks"
    """A class for every pixel: `masks` [N, H, W], class indices or `IGNORED`."""
    BOXES = "boxes"
    """Objects with boxes and classes, in an `ObjectTable`."""
