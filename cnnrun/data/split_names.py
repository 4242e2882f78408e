"""Names of splits, as data sets write them."""

from __future__ import annotations

_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


def parse_split_name(text: str) -> str | None:
    """`train`, `val` or `test` for the usual spellings, in any case; None for other texts."""
    return _SPLITS.get(text.strip().lower())
