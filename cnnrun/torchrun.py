"""What torchrun tells the processes that it starts, in their environment."""

from __future__ import annotations

import os


def size() -> int:
    """How many processes train together; 1 for a process of its own."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this one is."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Which of those on its host."""
    return _number("LOCAL_RANK", 0)


def one_host() -> bool:
    """Whether all of them are on this host."""
    return _number("LOCAL_WORLD_SIZE", 0) == size()


def attempt() -> int:
    """How often they were started again after a rank was lost."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def restarted() -> bool:
    """Whether it was started again after a rank was lost."""
    return attempt() > 0


def echoes() -> bool:
    """Whether a signal to all processes of a job comes twice: torchrun passes on what it gets."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else otherwise
