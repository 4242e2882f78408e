"""What torchrun tells the processes that it starts, in their environment."""

from __future__ import annotations

import os

from cnnrun.base.errors import ConfigError

_PARENT = os.getppid()
_ALWAYS, _OF_SEVERAL = ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


def check_environment() -> None:
    """Raises ConfigError where the environment says only half of what torchrun sets, or what cannot be."""
    if not any(os.environ.get(name) for name in (*_ALWAYS, "LOCAL_RANK")):
        return
    advice = "start with torchrun, which sets all of them, or unset them"
    for name in _NUMBERS:
        if not _is_number(value := os.environ.get(name) or "0"):
            raise ConfigError(f"the environment's {name} is {value!r}, not a whole number: {advice}")
    wanted = (*_ALWAYS, *_OF_SEVERAL) if world_size() > 1 else _ALWAYS
    if missing := [name for name in wanted if not os.environ.get(name)]:
        there = ", ".join(name for name in (*_ALWAYS, *_OF_SEVERAL) if os.environ.get(name))
        raise ConfigError(f"the environment has {there} but not {', '.join(missing)}: {advice}")
    if rank() >= world_size():
        raise ConfigError(f"the environment's RANK {rank()} is not below its WORLD_SIZE {world_size()}: {advice}")


def is_orphan() -> bool:
    """Return whether torchrun, which started this process, is gone."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT


def world_size() -> int:
    """How many processes train together; 1 for a process of its own."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """Which of them this one is."""
    return _number("RANK", 0)


def local_rank() -> int:
    """Which of those on its host."""
    return _number("LOCAL_RANK", 0)


def is_single_host() -> bool:
    """Whether all of them are on this host."""
    return _number("LOCAL_WORLD_SIZE", 0) == world_size()


def restart_count() -> int:
    """How often they were started again after a rank was lost."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0)


def was_restarted() -> bool:
    """Whether it was started again after a rank was lost."""
    return restart_count() > 0


def can_repeat_signals() -> bool:
    """Whether a signal to all processes of a job comes twice: torchrun passes on what it gets."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if _is_number(value) else otherwise


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()
