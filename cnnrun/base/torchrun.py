"""Rank, world size and other settings that torchrun passes to its processes in environment variables."""

from __future__ import annotations

import os

from cnnrun.base.errors import ConfigError

_PARENT = os.getppid()
_ALWAYS_SET, _SET_FOR_SEVERAL = ("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_INTEGERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")


def check_environment() -> None:
    """Raise ConfigError if torchrun's environment variables are incomplete or contradict each other."""
    if not any(os.environ.get(name) for name in (*_ALWAYS_SET, "LOCAL_RANK")):
        return
    advice = "start with torchrun, which sets all of them, or unset them"
    for name in _INTEGERS:
        if not _is_integer(value := os.environ.get(name) or "0"):
            raise ConfigError(f"the environment's {name} is {value!r}, not a whole number: {advice}")
    required = (*_ALWAYS_SET, *_SET_FOR_SEVERAL) if world_size() > 1 else _ALWAYS_SET
    if missing := [name for name in required if not os.environ.get(name)]:
        present = ", ".join(name for name in (*_ALWAYS_SET, *_SET_FOR_SEVERAL) if os.environ.get(name))
        raise ConfigError(f"the environment has {present} but not {', '.join(missing)}: {advice}")
    if rank() >= world_size():
        raise ConfigError(f"the environment's RANK {rank()} is not below its WORLD_SIZE {world_size()}: {advice}")


def is_orphan() -> bool:
    """Return whether torchrun started this process and has ended since."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _PARENT


def world_size() -> int:
    """Number of processes that train together; 1 without torchrun."""
    return _integer("WORLD_SIZE", 1)


def rank() -> int:
    """Rank of this process, from 0; 0 without torchrun."""
    return _integer("RANK", 0)


def local_rank() -> int:
    """Rank of this process among those on its host, from 0."""
    return _integer("LOCAL_RANK", 0)


def is_single_host() -> bool:
    """Return whether torchrun started all processes on this host."""
    return _integer("LOCAL_WORLD_SIZE", 0) == world_size()


def restart_count() -> int:
    """Number of times that torchrun restarted the processes after a rank ended."""
    return _integer("TORCHELASTIC_RESTART_COUNT", 0)


def is_restarted() -> bool:
    """Return whether torchrun restarted this process after a rank ended."""
    return restart_count() > 0


def can_repeat_signals() -> bool:
    """Return whether a signal to all processes of a job can arrive twice, because torchrun forwards its own."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _integer(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if _is_integer(value) else default


def _is_integer(value: str) -> bool:
    return value.isascii() and value.isdigit()
