"""Counts with their noun, for messages."""


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """Format a count with its noun: "1 image", "60,000 images"; `plural` where it is not `noun` with an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"
