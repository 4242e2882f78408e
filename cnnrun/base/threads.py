"""Threads of the numeric libraries: how long they spin while they wait for work."""

from __future__ import annotations

import os
import sys

# OpenMP's threads spin while they wait, by default for milliseconds. Beside another busy process they then take the
# processor from the very threads for which they wait: a training ran at a twentieth of its speed, and at a third with
# these values; on an idle machine no difference could be measured (benchmarks/README.md).
_SPIN_LIMITS = {
    "GOMP_SPINCOUNT": "1000",  # GNU's OpenMP (PyTorch on Linux), in rounds
    "KMP_BLOCKTIME": "1",  # LLVM's and Intel's OpenMP (macOS, Windows), in milliseconds
}


def limit_spinning() -> None:
    """Let waiting OpenMP threads sleep soon. Has no effect once torch is loaded; the user's own settings are kept."""
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        for name, value in _SPIN_LIMITS.items():
            os.environ.setdefault(name, value)
