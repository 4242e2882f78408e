"""Processors of the machine, their load, and pages that a process reads back from the disk."""

from __future__ import annotations

import os


def processor_count() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_average() -> float | None:
    """Processes that wanted a processor in the last minute, on average, this one included; None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def major_page_faults() -> int:
    """Pages that this process has read from the disk since it began; 0 if unknown."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt
