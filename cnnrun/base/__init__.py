"""Errors, files, locks, processes, devices, boxes, random numbers and progress: what every package may need.

Every package may import this one. It imports nothing else of cnnrun.
"""

__all__ = [
    "atomic_files",
    "bounded_files",
    "boxes",
    "console",
    "counts",
    "device",
    "downloads",
    "durations",
    "error_lines",
    "errors",
    "extras",
    "file_sequences",
    "locks",
    "machine_load",
    "ownership",
    "process_settings",
    "progress",
    "randomness",
    "ranks",
    "signals",
    "similarity",
    "standard_streams",
    "torchrun",
    "user_paths",
]
