"""Names of splits, as sources write them."""

from __future__ import annotations

_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


def parse_split_name(written: str) -> str | None:
    """`train`, `val` or `test` for the usual ways to write them."""
    return _SPLITS.get(written.strip().lower())
