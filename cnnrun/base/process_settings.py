"""Settings of a process that computes: how long waiting threads spin, whether freed memory is kept, the collector.

The first is made before torch is imported, so this module imports nothing large.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys

# OpenMP's threads spin while they wait, by default 300,000 rounds. Beside another busy process they then take the
# processor from the very threads for which they wait: lenet trained at a fortieth of its speed, and at an eighth with
# 10,000 rounds. With 1,000 it is a quarter, but on an idle machine a tenth is lost (benchmarks/README.md).
_SPIN_LIMITS = {
    "GOMP_SPINCOUNT": "10000",  # GNU's OpenMP (PyTorch on Linux), in rounds
    "KMP_BLOCKTIME": "1",  # LLVM's and Intel's OpenMP (macOS, Windows), in milliseconds
}

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_NEW_OBJECTS = 50_000  # between two searches for reference cycles


def limit_spinning() -> None:
    """Let waiting OpenMP threads sleep soon. Has no effect once torch is loaded; the user's own settings are kept."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SPIN_LIMITS.items():
            os.environ.setdefault(name, value)


def collect_garbage_rarely() -> None:
    """Search for reference cycles after 50,000 new objects instead of 700, and not at all when the process ends.

    Importing torch makes about a million objects, none of them garbage. Searching them took 1.3 s of the 3.3 s of
    processor time of `cnnrun check`, of which 0.8 s at its end (docs/speed.md).
    """
    gc.set_threshold(_NEW_OBJECTS, *gc.get_threshold()[1:])
    atexit.unregister(gc.freeze)  # once, however often a program calls this
    atexit.register(gc.freeze)


def keep_freed_memory() -> None:
    """Tell the C library to keep freed memory for the next step instead of returning it to the kernel.

    Every step of a network frees and allocates the same large tensors. By default glibc returns each to the kernel,
    which then clears every page again. Measured on 2 cores (benchmarks/README.md): lenet's bare loop 12,200 -> 19,400
    images/s, vgg-small's 1,130 -> 1,340. Peak memory grows by a few per cent.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent in other C libraries (musl)
    if mallopt is None:
        return
    # Older versions refuse more than 32 MiB. Without a limit of ours, the others would only switch off glibc's own.
    if mallopt(_M_MMAP_THRESHOLD, 1 << 30) == 0 and mallopt(_M_MMAP_THRESHOLD, 32 << 20) == 0:
        return
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    mallopt(_M_TOP_PAD, 64 << 20)
